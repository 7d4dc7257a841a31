r"""Position bias: is an option chosen for what it says, or for its letter?

    Question: {question}\nA. {option}\nB. {option}\nC. {option}\nD. {option}\nAnswer: A|B|C|D

Each question is asked once for each place, its options moved on by one each time, so that every option stands behind
every letter once. Without bias every letter is chosen equally often and the same option each time.
Source: C. Zheng et al., "Large Language Models Are Not Robust Multiple Choice Selectors" (arXiv 2309.03882).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from galenic.evaluate import multiple_choice
from galenic.evaluate.inputs import sample
from galenic.evaluate.statistics import interval, mean_interval, resampled_means, summary

from .asked import Row, Subject, choose
from .config import PositionsConfig

LETTERS = "ABCDEFGHIJ"
Question = Mapping[str, Any]

PROTOCOL = (
    "options behind letters, the likeliest letter is the pick; each question in all cyclic orders of its options; "
    "letters: share of picks a letter; accuracy_at: accuracy by the letter of the right option; spread: largest "
    "accuracy_at minus smallest; bias: half the sum of |share - 1/options|, 0 without bias, highest if one letter "
    "is always chosen; consistency: share of questions with one option picked in all orders; intervals over "
    "questions, of spread and bias by bootstrap, which chance alone lifts above 0"
)


def put(question: Question, turn: int) -> tuple[str, list[int]]:
    """Returns the question with its options behind letters, and which option stands behind each.

    Args:
        question: with `question` and `options`.
        turn: option i stands at place (i + turn) mod options.
    """
    options = question["options"]
    order = [(place - turn) % len(options) for place in range(len(options))]
    lines = [f"{LETTERS[place]}. {options[option]}" for place, option in enumerate(order)]
    return "\n".join([question["question"], *lines]), order


def measure(
    config: PositionsConfig, subject: Subject, questions: Mapping[str, Sequence[Question]], seed: int
) -> tuple[dict[str, Any], list[Row]]:
    """Returns the bias of each kind of question, and a row a question; its score is its accuracy over all orders."""
    found: dict[str, Any] = {}
    rows: list[Row] = []
    for kind, asked in chosen(config, questions, seed).items():
        options = Counter(len(question["options"]) for question in asked).most_common(1)[0][0]
        same = [question for question in asked if len(question["options"]) == options <= len(LETTERS)]
        turns = [put(question, turn) for question in same for turn in range(options)]
        scores, truncated = choose(subject, [text for text, _ in turns], [LETTERS[:options]] * len(turns))
        letters = np.array([multiple_choice.best(values) for values in scores], dtype=np.int64)
        letters = letters.reshape(len(same), options)
        mine = [
            _row(kind, question, letters[number], [order for _, order in turns[number * options :][:options]])
            for number, question in enumerate(same)
        ]
        rows += mine
        found[kind] = {
            **numbers(mine, options, seed),
            "truncated": truncated,
            "left_out": len(asked) - len(same),
        }
    return found, rows


def chosen(
    config: PositionsConfig, questions: Mapping[str, Sequence[Question]], seed: int
) -> dict[str, list[Question]]:
    """Returns the sample of questions of each kind."""
    return {
        kind: sample(rows, [row["id"] for row in rows], config.questions, seed)
        for kind, rows in questions.items()
    }


def _row(kind: str, question: Question, letters: np.ndarray, orders: Sequence[Sequence[int]]) -> Row:
    """One question: the letters picked in each order, the options behind them, and where the right one stood."""
    picks = [order[letter] for order, letter in zip(orders, letters.tolist(), strict=True)]
    return {
        "kind": f"probe-positions-{kind}",
        "id": question["id"],
        "right": sum(pick == question["answer"] for pick in picks) / len(picks),
        "answer": question["answer"],
        "letters": letters.tolist(),
        "picks_in_turn": picks,
        "places": [list(order).index(question["answer"]) for order in orders],
    }


def numbers(rows: Sequence[Row], options: int, seed: int) -> dict[str, Any]:
    """Sums up the rows of one kind; see `PROTOCOL`."""
    # Of each question: share of picks a letter, then whether it is right with the right option behind each letter.
    shares = np.zeros((len(rows), options))
    right = np.zeros((len(rows), options))
    for number, row in enumerate(rows):
        for letter, pick, place in zip(row["letters"], row["picks_in_turn"], row["places"], strict=True):
            shares[number, letter] += 1 / options
            right[number, place] = float(pick == row["answer"])
    draws = resampled_means(np.hstack([shares, right]), seed=seed)

    def bias(means: np.ndarray) -> np.ndarray:
        return np.abs(means[..., :options] - 1 / options).sum(axis=-1) / 2

    def spread(means: np.ndarray) -> np.ndarray:
        return means[..., options:].max(axis=-1) - means[..., options:].min(axis=-1)

    def told(of: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        low, high = interval(of(draws))
        value = float(of(np.hstack([shares, right]).mean(axis=0)))
        return {"value": value, "low": min(low, value), "high": max(high, value), "n": len(rows)}

    return {
        "accuracy": {**summary([row["right"] for row in rows]), "chance": 1 / options},
        "letters": {LETTERS[i]: _share(shares[:, i]) for i in range(options)},
        "accuracy_at": {LETTERS[i]: summary(right[:, i]) for i in range(options)},
        "bias": told(bias),
        "spread": told(spread),
        "consistency": summary([float(len(set(row["picks_in_turn"])) == 1) for row in rows]),
    }


def _share(values: np.ndarray) -> dict[str, Any]:
    clipped = np.minimum(values, 1.0)  # sums of thirds may end above 1
    low, high = mean_interval(clipped)
    return {"value": float(clipped.mean()), "low": low, "high": high, "n": len(values)}
