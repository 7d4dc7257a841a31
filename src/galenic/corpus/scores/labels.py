"""What a scorer learns from: texts with some scores and labels each, from files or from the starter's own sources.

A file has a field `text`, any of the heads' names (`taxonomy.HEADS`), and may have `group`: what must not be split
between training and check, such as the title of an article whose sections the rows are. Without it, the first line is.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.scores.features import features
from galenic.corpus.scores.taxonomy import CLASSES, HEADS, SCORES, label_number
from galenic.corpus.scores.training import Examples
from galenic.corpus.starter.holdout import stable_key, tokens
from galenic.corpus.texts import column
from galenic.runtime import UserError, read_jsonl

PARTS = ("train", "calibration", "heldout")
_SHARES = (70, 82)  # of 100: below the first train, below the second calibration


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A text and what is known of it."""

    text: str
    group: str
    """Rows of one group are all trained on, or none."""
    origin: str
    """Where it comes from, for the counts and figures: a source, a file, a corruption."""
    title: str = ""
    """Folded; a text is not checked on whose title was trained on."""
    scores: dict[str, float] = field(default_factory=dict)
    """Score -> target in [0, 1]."""
    labels: dict[str, int] = field(default_factory=dict)
    """Class -> number of its label."""


def title_of(text: str) -> str:
    r"""Returns the first line's words, folded, at most twelve: what near copies in two vocabularies share.

    >>> title_of("# Febrile Seizures\n\nA kind of ...")
    'febrile seizure'
    """
    line = next((line for line in text.split("\n") if line.strip()), "")
    return " ".join(tokens(line[:200])[:12])


def part(group: str, seed: int) -> str:
    """Returns the part a group belongs to: 70% train, 12% calibration, 18% heldout."""
    place = stable_key(seed, "scorer part", group) % 100
    return PARTS[0] if place < _SHARES[0] else PARTS[1] if place < _SHARES[1] else PARTS[2]


def split(rows: Iterable[Labelled], seed: int) -> tuple[dict[str, list[Labelled]], int]:
    """Splits rows by group; what has the title of a row trained on is taken out of the other two parts.

    Returns:
        (part -> rows, how many were taken out).
    """
    parts: dict[str, list[Labelled]] = {name: [] for name in PARTS}
    for row in rows:
        parts[part(row.group, seed)].append(row)
    known = {row.title for row in parts["train"] if row.title}
    kept = {
        name: [row for row in group if name == "train" or not row.title or row.title not in known]
        for name, group in parts.items()
    }
    return kept, sum(len(parts[name]) - len(kept[name]) for name in PARTS)


def read_labels(paths: Sequence[str]) -> list[Labelled]:
    """Reads labelled texts from JSON-lines and Parquet files.

    Raises:
        UserError: a file is missing or not one of these, a row has no text or no label at all, or a label or score is
            none that there is (file and row named).
    """
    rows = []
    for path in paths:
        for number, fields in _rows(path):
            rows.append(_labelled(fields, f"{path}:{number}", Path(path).name))
        if not rows:
            raise UserError(f"{path}: no rows")
    return rows


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.endswith(".jsonl"):
        yield from enumerate(read_jsonl(path), start=1)
    elif path.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            file = parquet.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from None
        wanted = [name for name in file.schema_arrow.names if name in ("text", "group", *HEADS)]
        number = 0
        for batch in file.iter_batches(batch_size=1000, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    else:
        raise UserError(f"{path}: labels are .jsonl or .parquet files")


def _labelled(fields: dict[str, Any], place: str, origin: str) -> Labelled:
    text = fields.get("text")
    if not isinstance(text, str) or not text:
        raise UserError(f"{place}: no field 'text' with a text")
    scores, labels = {}, {}
    try:
        for name in SCORES:
            value = fields.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"{name} is {value!r}, not a number in [0, 1]")
            scores[name] = float(value)
        for name in CLASSES:
            value = fields.get(name)
            if value is not None and value != "":
                labels[name] = label_number(name, value)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if not scores and not labels:
        raise UserError(f"{place}: none of the fields {', '.join(HEADS)}")
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    group = fields.get("group")
    title = title_of(text)
    return Labelled(
        text=text,
        group=str(group) if group not in (None, "") else title or text[:80],
        origin=origin,
        title=title if group in (None, "") else "",
        scores=scores,
        labels=labels,
    )


def heads_of(rows: Iterable[Labelled]) -> tuple[list[str], list[str]]:
    """Returns the scores and the classes that any row tells, in the taxonomy's order."""
    scores: set[str] = set()
    classes: set[str] = set()
    for row in rows:
        scores.update(row.scores)
        classes.update(row.labels)
    return [name for name in SCORES if name in scores], [name for name in CLASSES if name in classes]


def examples(rows: Sequence[Labelled], bits: int, scores: Sequence[str], classes: Sequence[str]) -> Examples:
    """Returns rows as features and targets."""
    ids, ends, shapes = features(column(row.text for row in rows), bits)
    return Examples(
        ids=ids,
        ends=ends,
        shapes=shapes,
        scores=np.array(
            [[row.scores.get(name, math.nan) for name in scores] for row in rows], np.float32
        ).reshape(len(rows), len(scores)),
        labels=np.array([[row.labels.get(name, -1) for name in classes] for row in rows], np.int32).reshape(
            len(rows), len(classes)
        ),
    )
