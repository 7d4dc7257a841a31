"""Runs the benchmarks of one model: rows of the report in free text, tasks of lm-eval through its own machinery."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from galenic.align.rollouts.sampling import end_tokens, ends_with, sample
from galenic.corpus.tokens.chat_format import encode_text
from galenic.evaluate import inputs
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.statistics import wilson
from galenic.runtime import UserError, human, read_json, write_json

from . import items
from .config import BenchmarksConfig
from .items import Item
from .rows import ROWS

Advance = Callable[[int], None]
NEXT = "\nQuestion:"
"""Ends a plain answer: a model that goes on asks itself the next question."""


def load(config: BenchmarksConfig) -> dict[str, list[Item]]:
    """Returns the sampled items of each row.

    Raises:
        UserError: see `items.load`; or a row that only a judge can score.
    """
    found = {}
    for row, place in config.rows.items():
        if ROWS[row].metric == "judge":
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
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Asks a model all items.

    A row that is answered is kept in `out/benchmarks/NAME/`, so that a killed run goes on with the next one.

    Args:
        config: what is asked.
        model: a Hugging Face causal language model.
        tokenizer: its own.
        name: what the model is called.
        out: folder of the evaluation.
        advance: called with the number of items after each row.

    Returns:
        (row or task -> its numbers, one row an item).

    Raises:
        UserError: see `load`; lm-eval is not installed, does not know a task or cannot load its data.
    """
    numbers: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for row, asked in load(config).items():
        kept, key = out / "benchmarks" / name / f"{row}.json", _key(config, asked)
        found = read_json(kept) if kept.exists() else {}
        if found.get("key") != key:
            found = {"key": key, "items": ask(config, model, tokenizer, row, asked)}
            write_json(kept, found)
        rows += found["items"]
        numbers[row] = summary(found["items"], ROWS[row].metric)
        if advance:
            advance(len(asked))
    if config.tasks:
        from .lm import run_tasks  # lm-eval is an optional dependency

        for task, (metric, found) in run_tasks(config, model, tokenizer).items():
            rows += found
            numbers[task] = summary(found, metric)
    return numbers, rows


def _key(config: BenchmarksConfig, asked: Sequence[Item]) -> str:
    """Identifies what was asked and how."""
    how = {name: getattr(config, name) for name in ("prompt", "system", "new_tokens")}
    text = json.dumps([how, [asdict(item) for item in asked]], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def ask(
    config: BenchmarksConfig, model: Any, tokenizer: Any, row: str, asked: Sequence[Item]
) -> list[dict[str, Any]]:
    """Lets a model answer the items of a row, the likeliest token each time, and scores the answers.

    A prompt that leaves no room for an answer is not asked: its item is wrong and `too_long`. An answer that does not
    end is scored as far as it goes, and is `endless`.
    """
    room = int(model.config.max_position_embeddings) - config.new_tokens
    if room < 1:
        raise UserError(
            f"benchmarks.new_tokens: {config.new_tokens} leave no room for a question; the model reads "
            f"{model.config.max_position_embeddings} tokens"
        )
    prompts = [_encode(config, tokenizer, item.prompt) for item in asked]
    fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= room]
    ends = end_tokens(tokenizer, model) if config.prompt == "chat" else [tokenizer.eos_token_id]
    said = sample(
        model,
        [prompts[number] for number in fitting],
        keys=[(number,) for number in fitting],
        max_new_tokens=config.new_tokens,
        end={end for end in ends if end is not None},
        temperature=0.0,
        stop=None if config.prompt == "chat" else ends_with(tokenizer, NEXT),
        batch=config.batch,
    )
    answers = dict(zip(fitting, said, strict=True))
    found = []
    for number, item in enumerate(asked):
        answer = answers.get(number)
        text = "" if answer is None else tokenizer.decode(answer.ids, skip_special_tokens=True)
        text = text.split(NEXT)[0].strip() if config.prompt == "plain" else text.strip()
        found.append(
            scored(row, item, text)
            | ({"too_long": True} if answer is None else {})
            | ({"endless": True} if answer is not None and not answer.ended else {})
        )
    return found


def _encode(config: BenchmarksConfig, tokenizer: Any, prompt: str) -> list[int]:
    head, text = PromptFormat(name=config.prompt, system=config.system).parts(tokenizer, prompt)
    return head + encode_text(tokenizer, text)


def scored(row: str, item: Item, text: str) -> dict[str, Any]:
    """Returns an item's line: what was said, how it was read, whether it is right."""
    verdict = items.score(item, text)
    return {
        "kind": row,
        "id": item.id,
        "right": verdict.right,
        "answer": list(item.answer),
        "said": text,
        "read": verdict.read,
        **({"problem": verdict.problem} if verdict.problem else {}),
    }


def summary(found: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Returns the mean of a row with its 95% interval, and the items that could not be scored, all counted as wrong.

    The interval is Wilson's. For scores between 0 and 1 it is too wide rather than too narrow: no distribution on
    [0, 1] varies more than the one on its ends.
    """
    total = sum(line["right"] for line in found)
    low, high = wilson(total, len(found))
    counts = {name: sum(1 for line in found if line.get(name)) for name in ("endless", "too_long")}
    return {
        "value": total / len(found),
        "low": low,
        "high": high,
        "n": len(found),
        "metric": metric,
        "unanswered": sum(1 for line in found if line.get("problem")),
        **{name: count for name, count in counts.items() if count},
    }


def protocol(config: BenchmarksConfig) -> dict[str, str]:
    """Says in words how the numbers were measured."""
    shape = "its chat format" if config.prompt == "chat" else "the form 'Question: ... Answer:'"
    written = (
        f"free text after {shape}, the likeliest token each time, at most {config.new_tokens}; read by rules (option, "
        "label, number, date, one of five diagnoses); what says nothing or two things is wrong and counted as "
        f"unanswered; at most {config.samples} items, sampled by seed {config.seed}; 95% interval by Wilson"
    )
    tasks = (
        "lm-eval's own task and prompt, on its Hub data, scored by likelihood or as the task says; at most "
        f"{config.samples} items, sampled by seed {config.seed}"
    )
    return {
        **({"benchmarks": written} if config.rows else {}),
        **({"benchmark_tasks": tasks} if config.tasks else {}),
    }
