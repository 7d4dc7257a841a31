"""Runs the probes that a config names on one model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galenic.evaluate import multiple_choice
from galenic.evaluate.likelihood import Advance
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.runtime import UserError

from . import calibration, contamination, hops, needle, positions, safety
from .asked import Row, Subject
from .config import PROBES, ProbesConfig
from .haystack import source
from .safety_items import ITEMS

Questions = Mapping[str, Sequence[Mapping[str, Any]]]


def check(config: ProbesConfig) -> None:
    """Refuses a haystack or corpus that cannot be read, before any work.

    Raises:
        UserError: see `haystack.source` and `contamination.search`.
    """
    source(config.haystack)
    if config.contamination and not (Path(config.contamination.corpus) / "documents.parquet").exists():
        raise UserError(
            f"probes.contamination.corpus: {config.contamination.corpus} is no corpus step's folder (no "
            "documents.parquet)"
        )


def prompts(config: ProbesConfig, questions: Questions) -> dict[str, int]:
    """Returns how many prompts each probe puts to a model; written answers count apart."""
    counts: dict[str, int] = {}
    if given := config.needle:
        cells = len(given.contexts) * len(given.depths) * len(given.languages)
        counts["needle"] = cells * given.items * (1 + bool(given.written_tokens))
    if deep := config.hops:
        cells = len(deep.contexts) * len(deep.hops) * len(deep.languages)
        counts["hops"] = cells * deep.items * (1 + bool(deep.written_tokens))
    if config.safety:
        counts["safety"] = 2 * len(ITEMS) * len(config.safety.languages)
    if config.positions:
        asked = positions.chosen(config.positions, questions, config.seed)
        counts["positions"] = sum(len(row["options"]) for rows in asked.values() for row in rows)
    return counts | {name: 0 for name in PROBES if getattr(config, name) is not None and name not in counts}


def measure(
    config: ProbesConfig,
    model: Any,
    tokenizer: Any,
    name: str,
    out: Path,
    advance: Advance,
    *,
    prompt: PromptFormat,
    batch_tokens: int = 2048,
    questions: Questions | None = None,
    files: Sequence[Path] = (),
    rows: Sequence[Row] = (),
    scoring: str = "total",
) -> tuple[dict[str, Any], list[Row]]:
    """Returns (numbers of each probe, rows of those that ask something).

    Args:
        config: which probes, and how.
        model: a causal language model.
        tokenizer: the model's.
        name: the model's, for messages.
        out: the evaluation's folder; what is the same for all models is kept there.
        advance: called with the number of prompts done; `prompts` says how many there are.
        prompt: how questions are put.
        batch_tokens: most tokens of one forward pass.
        questions: the evaluation's own, by kind.
        files: they were read from.
        rows: of these questions.
        scoring: of the headline accuracy.

    Raises:
        UserError: the model cannot be sampled from, or the corpus cannot be searched.
    """
    subject = Subject(
        model=model, tokenizer=tokenizer, prompt=prompt, batch_tokens=batch_tokens, advance=advance
    )
    numbers: dict[str, Any] = {}
    found: list[Row] = []
    filler = source(config.haystack)
    try:
        if config.needle:
            numbers["needle"], more = needle.measure(config.needle, subject, filler, config.seed)
            found += more
        if config.hops:
            numbers["hops"], more = hops.measure(config.hops, subject, filler, config.seed)
            found += more
        if config.safety:
            numbers["safety"], more = safety.measure(config.safety, subject)
            found += more
        if config.positions:
            numbers["positions"], more = positions.measure(
                config.positions, subject, questions or {}, config.seed
            )
            found += more
    except UserError as error:
        raise UserError(f"models.{name}: {error}") from None
    if config.calibration:
        others = [other for other in multiple_choice.SCORINGS if other != scoring]
        numbers["calibration"] = calibration.measure(
            config.calibration, rows, [scoring, *others], config.seed
        )
    if config.contamination:
        told = contamination.remembered(out / "contamination.json", files, config.contamination.corpus)
        numbers["contamination"] = contamination.measure(told, rows)
    return numbers, found


def protocol(config: ProbesConfig) -> dict[str, str]:
    """Says in words how each probe is measured."""
    parts = {
        "needle": needle.PROTOCOL,
        "hops": hops.PROTOCOL,
        "safety": safety.PROTOCOL,
        "calibration": calibration.PROTOCOL,
        "positions": positions.PROTOCOL,
        "contamination": contamination.PROTOCOL,
    }
    text = (
        "sentences made by templates"
        if config.haystack is None
        else f"held-out text of {Path(config.haystack).name}"
    )
    around = {"needle": f"; the text: {text}", "hops": f"; the text: {text}"}
    for name in around:
        probe = getattr(config, name)
        if probe is not None and probe.written_tokens:
            around[name] += (
                f"; written: the model's own answer of at most {probe.written_tokens} tokens is right if the answer is "
                "the first of the four that it names; one that names none is unanswered"
            )
    return {
        f"probes.{name}": parts[name] + around.get(name, "")
        for name in PROBES
        if getattr(config, name) is not None
    }
