"""Runs the benchmarks of one model: rows of the report in free text, tasks of lm-eval through its own machinery."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from galenic.evaluate import inputs
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.statistics import wilson
from galenic.evaluate.written import Writer, Written
from galenic.runtime import UserError, human, read_json, write_json

from . import items
from .config import BenchmarksConfig
from .items import Item
from .rows import ROWS

Advance = Callable[[int], None]


class Points(Protocol):
    """What a judge says of an answer."""

    score: float | None
    """Share of the points, in [0, 1]; none if it said nothing usable."""
    reason: str


Judge = Callable[[list[dict[str, Any]]], Sequence[Points]]
"""Gives points for answers: {"id", "prompt", "question", "answer", "truth"}."""


def load(config: BenchmarksConfig, judged: bool = False) -> dict[str, list[Item]]:
    """Returns the sampled items of each row.

    Args:
        config: what is asked.
        judged: whether there is a judge.

    Raises:
        UserError: see `items.load`; or a row that only a judge can score.
    """
    found = {}
    for row, place in config.rows.items():
        if ROWS[row].metric == "judge" and not judged:
            raise UserError(
                f"benchmarks.rows.{row}: its answers are open texts, which only a judge can score; leave the row out"
            )
        every = items.load(row, place, f"benchmarks.rows.{row}")
        found[row] = inputs.sample(every, [item.id for item in every], config.samples, config.seed)
    return found


def fact(config: BenchmarksConfig) -> str:
    """Says what would be asked, for the plan."""
    rows = load(config)
    parts = [f"{human(sum(map(len, rows.values())))} items of {len(rows)} rows"] if rows else []
    parts += [f"{len(config.tasks)} lm-eval tasks"] if config.tasks else []
    return ", ".join(parts) + ", each model"


def measure(
    config: BenchmarksConfig,
    model: Any,
    tokenizer: Any,
    name: str,
    out: Path,
    advance: Advance | None = None,
    judge: Judge | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Asks a model all items.

    A row that is answered is kept in `out/benchmarks/NAME/`, so that a killed run goes on with the next one.

    Args:
        config: what is asked.
        model: a Hugging Face causal language model.
        tokenizer: its own.
        name: what the model is called.
        out: folder of the evaluation.
        advance: called with the number of items that are done.
        judge: gives points for open answers and diagnoses.

    Returns:
        (row or task -> its numbers, one row an item).

    Raises:
        UserError: see `load`; lm-eval is not installed, does not know a task or cannot load its data.
    """
    numbers: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for row, asked in load(config, judge is not None).items():
        kept, key = out / "benchmarks" / name / f"{row}.json", _key(config, asked, judge is not None)
        found = read_json(kept) if kept.exists() else {}
        if found.get("key") == key:
            if advance:
                advance(len(asked))
        else:
            lines = ask(config, model, tokenizer, row, asked, advance)
            found = {"key": key, "items": judged(row, asked, lines, judge) if judge else lines}
            write_json(kept, found)
        rows += found["items"]
        numbers[row] = summary(found["items"], ROWS[row].metric)
    if config.tasks:
        from .lm import run_tasks  # lm-eval is an optional dependency

        for task, (metric, found) in run_tasks(config, model, tokenizer).items():
            rows += found
            numbers[task] = summary(found, metric)
    return numbers, rows


def _key(config: BenchmarksConfig, asked: Sequence[Item], judged: bool) -> str:
    """Identifies what was asked and how."""
    how = {name: getattr(config, name) for name in ("prompt", "system", "new_tokens")}
    text = json.dumps([how, judged, [asdict(item) for item in asked]], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def ask(
    config: BenchmarksConfig,
    model: Any,
    tokenizer: Any,
    row: str,
    asked: Sequence[Item],
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Lets a model answer the items of a row, the likeliest token each time, and scores the answers by rules."""
    context = int(model.config.max_position_embeddings)
    if context - config.new_tokens < 2:
        raise UserError(
            f"benchmarks.new_tokens: {config.new_tokens} leave no room for a question; the model reads {context} tokens"
        )
    writer = Writer(
        model=model,
        tokenizer=tokenizer,
        prompt=PromptFormat(name=config.prompt, system=config.system),
        context=context,
        tokens=config.new_tokens,
    )
    answers = writer([item.prompt for item in asked], advance)
    return [scored(row, item, answer) for item, answer in zip(asked, answers, strict=True)]


def scored(row: str, item: Item, answer: Written) -> dict[str, Any]:
    """Returns an item's line: what was said, how it was read, whether it is right, and why not where it cannot be."""
    line = {"kind": row, "id": item.id, "right": 0.0, "answer": list(item.answer), "said": answer.text}
    if answer.truncated:
        line["truncated"] = True
    if not answer.ended:
        return line | {"problem": "endless"}
    if item.kind == "judge":
        return line | ({} if answer.text else {"problem": "none"})
    verdict = items.score(item, answer.text)
    line |= {"right": verdict.right, "read": verdict.read}
    return line | ({"problem": verdict.problem} if verdict.problem else {})


def judged(
    row: str, asked: Sequence[Item], lines: Sequence[dict[str, Any]], judge: Judge
) -> list[dict[str, Any]]:
    """Puts a judge's points in the place of the rule's, where the row has a judge; `rule` keeps those.

    What did not end or is empty is not shown to the judge: it stays wrong. So does what the judge failed on, which is
    told as problem `judge`.
    """
    prompt = ROWS[row].judge
    if prompt is None:
        return list(lines)
    places = [place for place, line in enumerate(lines) if line["said"] and line.get("problem") != "endless"]
    shown = [
        {
            "id": lines[place]["id"],
            "prompt": prompt,
            "question": asked[place].question,
            "answer": lines[place]["said"],
            "truth": "; ".join(asked[place].answer),
        }
        for place in places
    ]
    found = list(lines)
    for place, points in zip(places, judge(shown), strict=True):
        line = {name: value for name, value in lines[place].items() if name != "problem"}
        if asked[place].kind != "judge":
            line["rule"] = line["right"]
        if points.score is None:
            found[place] = line | {"right": 0.0, "problem": "judge", "judged": points.reason}
        else:
            found[place] = line | {"right": float(points.score), "judged": points.reason}
    return found


def summary(found: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Returns the mean of a row with its 95% interval, and how many items could not be scored, all counted as wrong.

    The interval is Wilson's. For scores between 0 and 1 it is too wide rather than too narrow: no distribution on
    [0, 1] varies more than the one on its ends.
    """
    total = sum(line["right"] for line in found)
    low, high = wilson(total, len(found))
    problems = [line["problem"] for line in found if line.get("problem")]
    more = {
        "endless": problems.count("endless"),
        "judge_failed": problems.count("judge"),
        "truncated": sum(1 for line in found if line.get("truncated")),
    }
    return {
        "value": total / len(found),
        "low": low,
        "high": high,
        "n": len(found),
        "metric": metric,
        "unanswered": len(problems) - more["judge_failed"],
        **{name: count for name, count in more.items() if count},
    }


def protocol(config: BenchmarksConfig) -> dict[str, str]:
    """Says in words how the numbers were measured."""
    shape = "its chat format" if config.prompt == "chat" else "the form 'Question: ... Answer:'"
    written = (
        f"free text after {shape}, the likeliest token each time, at most {config.new_tokens}; read by rules (option, "
        "label, number, date, one of five diagnoses); what says nothing or two things, or does not end, is wrong and "
        f"counted as unanswered; at most {config.samples} items, sampled by seed {config.seed}; 95% interval by Wilson"
    )
    tasks = (
        "lm-eval's own task and prompt, on its Hub data, scored by likelihood or as the task says; at most "
        f"{config.samples} items, sampled by seed {config.seed}"
    )
    return {
        **({"benchmarks": written} if config.rows else {}),
        **({"benchmark_tasks": tasks} if config.tasks else {}),
    }
