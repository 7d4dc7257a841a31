"""From an item to what the judge is asked, and from what it says to a score: pure functions."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from galenic.corpus.synthesis.checks import language_of
from galenic.corpus.synthesis.filling import framed
from galenic.runtime import UserError

from .config import JudgeConfig
from .prompt_files import LETTERS, NONE, Prompt, Value, load

Item = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is sent; equal ones are asked once."""

    prompt: Prompt
    text: str
    values: tuple[Value, ...]
    """The verdict may be."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An item as the judge sees it."""

    item: Item
    first: Question | None
    """None where there is no answer to judge."""
    again: Question | None
    """The same in another order."""
    turned: bool
    """Of a pair, the item's answer stands second in `first`."""
    truth: Value | None
    """The verdict that is right, where it is no number or preference."""
    shortened: bool

    @property
    def questions(self) -> list[Question]:
        """What is asked."""
        return [question for question in (self.first, self.again) if question is not None]


def case(config: JudgeConfig, item: Item) -> Case:
    """Returns an item as the judge sees it.

    Raises:
        UserError: the prompt cannot be used, or the item lacks what it shows.
    """
    prompt = _prompt(config, item)
    options = list(item.get("options") or ())
    values = prompt.values or (*LETTERS[: len(options)], NONE)
    truth = _truth(item, prompt, values)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    told = _told(item) if truth is None or prompt.values else lines[LETTERS.index(str(truth))]
    given = [str(item.get(key) or "") for key in ("answer", "other")]
    answers = [shorten(text, config.answer_characters) for text in given]
    dice = random.Random(f"{config.seed}/{item['prompt']}/{item['id']}")
    turned = prompt.pair and dice.random() < 0.5
    twice = prompt.ordered and dice.random() < config.swapped_share

    def question(other_order: bool) -> Question:
        first, second = answers[::-1] if turned != other_order else answers
        values_of = {
            "question": str(item["question"]),
            "options": "\n".join(lines[::-1] if other_order else lines),
            "truth": told,
            "lower": str(item.get("lower", told)),
            "upper": str(item.get("upper", told)),
            "answer": answers[0],
            "first": first,
            "second": second,
        }
        for place in sorted(prompt.places - {"answer", "first", "second"}):
            if not values_of[place].strip():
                raise UserError(f"{_who(item)} lacks '{place}', which prompt '{item['prompt']}' shows")
        return Question(prompt=prompt, text=framed(prompt.text, values_of), values=values)

    asked = prompt.pair or bool(given[0].strip())
    return Case(
        item=item,
        first=question(False) if asked else None,
        again=question(True) if asked and twice else None,
        turned=turned,
        truth=truth,
        shortened=answers != given,
    )


def _who(item: Item) -> str:
    return f"judge: item {item.get('id', '(without id)')}"


def _prompt(config: JudgeConfig, item: Item) -> Prompt:
    """Returns the prompt of an item that has all it needs."""
    for key in ("id", "prompt", "question", "answer"):
        if key not in item:
            raise UserError(f"{_who(item)} lacks '{key}'")
    name, count = item["prompt"], len(item.get("options") or ())
    prompt = load(name, item.get("language") or language_of(str(item["question"])), config.prompts)
    if not prompt.values and not 2 <= count <= len(LETTERS):
        raise UserError(f"{_who(item)} has {count} options; prompt '{name}' shows 2 to {len(LETTERS)}")
    if prompt.pair and "other" not in item:
        raise UserError(f"{_who(item)} lacks 'other', the answer that prompt '{name}' compares with")
    return prompt


def _truth(item: Item, prompt: Prompt, values: tuple[Value, ...]) -> Value | None:
    """Returns the verdict that is right, if it has to be one of the values."""
    if prompt.pair or isinstance(values[0], int):
        return None
    truth, words = item.get("truth"), [value for value in values if value != NONE]
    if not prompt.values and type(truth) is int and 0 <= truth < len(words):
        return words[truth]
    if truth not in words:
        shown = ", ".join(str(word) for word in words)
        raise UserError(f"{_who(item)}: its truth is {truth!r}, not one of {shown}")
    return truth


def _told(item: Item) -> str:
    """Writes a truth: nothing, one, or several that are each right."""
    truth = item.get("truth")
    if isinstance(truth, list | tuple):
        return " | ".join(str(one) for one in truth)
    return "" if truth is None else str(truth)


def shorten(text: str, characters: int) -> str:
    """Returns a text, or of a longer one the first third and the last two thirds of so many characters."""
    if len(text) <= characters:
        return text
    head = characters // 3
    left = f"\n[... {len(text) - characters} characters are left out here ...]\n"
    return text[:head] + left + text[len(text) - characters + head :]


def score(prompt: Prompt, said: Value, truth: Value | None) -> float:
    """Returns what a verdict is worth, in [0, 1] (`prompt_files`); of a pair, `first` is the item's answer."""
    if prompt.pair:
        return {"first": 1.0, "tie": 0.5, "second": 0.0}[str(said)]
    if isinstance(said, int):
        numbers = [int(value) for value in prompt.values]
        return (said - min(numbers)) / (max(numbers) - min(numbers))
    return float(said == truth)


def unturned(said: Value, turned: bool) -> Value:
    """Returns which answer of a pair a judge prefers, `first` being the item's, of what it said of them turned."""
    return {"first": "second", "second": "first"}.get(str(said), said) if turned else said
