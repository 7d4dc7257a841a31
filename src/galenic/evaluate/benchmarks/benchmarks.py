"""Runs the benchmarks of one model: rows of the report in free text, tasks of lm-eval through its own machinery."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from galenic.evaluate import inputs, judging
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.statistics import wilson
from galenic.evaluate.written import Writer, Written
from galenic.runtime import UserError, human, read_json, write_json

from . import items
from .config import BenchmarksConfig
from .items import Item
from .rows import ROWS

Advance = Callable[[int], None]


def load(config: BenchmarksConfig) -> dict[str, list[Item]]:
    """Returns the sampled items of each row.

    Raises:
        UserError: see `items.load`.
    """
    found = {}
    for row, place in config.rows.items():
        every = items.load(row, place, f"benchmarks.rows.{row}")
        found[row] = inputs.sample(every, [item.id for item in every], config.samples, config.seed)
    return found


def facts(config: BenchmarksConfig) -> dict[str, str]:
    """Says what would be asked, and what a judge would take, for the plan."""
    rows = load(config)
    parts = [f"{human(sum(map(len, rows.values())))} items of {len(rows)} rows"] if rows else []
    parts += [f"{len(config.tasks)} lm-eval tasks"] if config.tasks else []
    told = {"benchmarks": ", ".join(parts) + ", each model"}
    if config.judge is None:
        return told
    shown = [_shown(row, item, {"said": "", "right": 0.0}) for row in rows for item in rows[row]]
    return told | judging.facts(config.judge, [each for each in shown if each], config.new_tokens)


def measure(
    config: BenchmarksConfig,
    rows: Mapping[str, Sequence[Item]],
    model: Any,
    tokenizer: Any,
    name: str,
    out: Path,
    advance: Advance | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Asks a model all items.

    A row that is answered is kept in `out/benchmarks/NAME/`: a killed run goes on with the next one, and another judge
    judges the same answers.

    Args:
        config: what is asked, and how.
        rows: the items of each row; of `load`.
        model: a Hugging Face causal language model.
        tokenizer: its own.
        name: what the model is called.
        out: folder of the evaluation.
        advance: called with the number of items that are done.

    Returns:
        (row or task -> its numbers, one line an item).

    Raises:
        UserError: see `judging.Judge`; lm-eval is not installed, does not know a task or cannot load its
            data.
    """
    numbers: dict[str, dict[str, Any]] = {}
    lines: list[dict[str, Any]] = []
    judge = None if config.judge is None else judging.Judge(config.judge, out / "judge")
    for row, asked in rows.items():
        kept, key = out / "benchmarks" / name / f"{row}.json", _key(config, asked)
        found: dict[str, Any] = read_json(kept) if kept.exists() else {}
        if found.get("key") == key:
            if advance:
                advance(len(asked))
        else:
            found = {"key": key, "said": ask(config, model, tokenizer, row, asked, advance)}
            write_json(kept, found)
        numbers[row], said = {}, found["said"]
        if judge and ROWS[row].judge:
            who = [judge.config.endpoint.base_url, judge.config.endpoint.model, judge.config.prompts]
            if found.get("judge") != who:
                said, told = judged(row, asked, said, judge)
                found |= {"judge": who, "judged": said, "told": told}
                write_json(kept, found)
            said = found["judged"]
            numbers[row] = {"judge": found["told"]} if found["told"] else {}
        lines += said
        numbers[row] = summary(said, ROWS[row].metric) | numbers[row]
    if config.tasks:
        from .lm import run_tasks  # lm-eval is an optional dependency

        for task, (metric, more) in run_tasks(config, model, tokenizer).items():
            lines += more
            numbers[task] = summary(more, metric)
    return numbers, lines


def _key(config: BenchmarksConfig, asked: Sequence[Item]) -> str:
    """Identifies what was asked and how."""
    how = [config.prompt, config.system, config.new_tokens]
    text = json.dumps([how, [asdict(item) for item in asked]], sort_keys=True, ensure_ascii=False)
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


def _shown(row: str, item: Item, line: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what a judge is shown of an answer; none if it is not asked."""
    prompt = ROWS[row].judge
    if prompt is None or line.get("problem") == "endless":
        return None
    shown = {"id": item.id, "prompt": prompt, "question": item.question, "answer": line["said"]}
    shown |= {"truth": list(item.answer), "language": ROWS[row].language}
    return shown | ({} if item.kind == "judge" else {"rule": int(line["right"])})


def judged(
    row: str, asked: Sequence[Item], lines: Sequence[dict[str, Any]], judge: judging.Judge
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Puts a judge's points in the place of the rule's; `rule` keeps those.

    What did not end is not shown to the judge: it stays wrong. So does what the judge failed on, which is told as
    problem `judge`.

    Returns:
        (the lines, what is to be known about the judge: see `judging.summary`).
    """
    shown = [_shown(row, item, line) for item, line in zip(asked, lines, strict=True)]
    places = [place for place, each in enumerate(shown) if each]
    cases = [each for each in shown if each]
    if not cases:
        return list(lines), {}
    found, verdicts = list(lines), judge.judge(cases)
    for place, verdict in zip(places, verdicts, strict=True):
        line = {name: value for name, value in lines[place].items() if name != "problem"}
        line |= {"rule": line["right"]} if asked[place].kind != "judge" else {}
        failed = {"problem": "judge"} if verdict.score is None else {}
        blank = {"problem": "none"} if verdict.blank else {}
        found[place] = line | {"right": verdict.score or 0.0, "judged": verdict.reason} | failed | blank
    return found, judging.summary(cases, verdicts)[str(ROWS[row].judge)]


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
    if config.judge is not None:
        names = ", ".join(row for row in config.rows if ROWS[row].judge)
        written += f"; points of {names or 'no row'} by {config.judge.endpoint.model} as a judge, see `judge`"
    return {
        **({"benchmarks": written} if config.rows else {}),
        **({"benchmark_tasks": tasks} if config.tasks else {}),
    }
