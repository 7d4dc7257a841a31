"""The files of the corpus folder: each appears whole or not at all, the same rows give the same bytes."""

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from galenic.corpus.config import CorpusConfig
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document
from galenic.corpus.selection import Ledger, by_source
from galenic.corpus.wheels import Wheels
from galenic.runtime import atomic_path, write_json, write_jsonl

Row = dict[str, Any]
Splits = tuple[list[Row], list[Row]]
"""(training rows, held-out rows)"""


def write_corpus(
    out: Path,
    config: CorpusConfig,
    documents: list[Document],
    ledger: Ledger,
    conversations: dict[str, tuple[list[Row], list[Row]]],
    preferences: list[Row],
    questions: dict[str, list[Row]],
    transfer: frozenset[str],
) -> None:
    """Writes the corpus folder.

    Args:
        out: the folder.
        config: tells the pinned versions.
        documents: kept documents with their split.
        ledger: dropped documents.
        conversations: expert -> (training rows, held-out rows).
        preferences: preference pairs.
        questions: kind -> rows.
        transfer: ids of the entities that are nowhere in training (counted only).
    """
    place = {source: number for number, source in enumerate(SOURCES)}
    documents = sorted(documents, key=lambda d: (place[d.source], d.id))
    dropped = sorted(ledger.rows, key=lambda row: (place[row[1]], row[0], row[2], row[3]))
    _write_parquet(out / "documents.parquet", [f.name for f in fields(Document)], map(astuple, documents))
    _write_parquet(out / "ledger.parquet", ["id", "source", "reason", "detail", "text"], dropped)
    for name, splits in conversations.items():
        for split, rows in zip(("train", "heldout"), splits, strict=True):
            write_jsonl(out / "sft" / f"{name}.{split}.jsonl", rows)
    write_jsonl(out / "preferences.jsonl", preferences)
    for name, rows in questions.items():
        write_jsonl(out / "questions" / f"{name}.jsonl", rows)
    wheels = Wheels(config.wheels, config.requirements)
    write_json(out / "sources.json", _sources(documents, dropped, wheels))
    counts = {
        "conversations": {
            f"{n}.{s}": len(r)
            for n, both in conversations.items()
            for s, r in zip(("train", "heldout"), both, strict=True)
        },
        "preferences": len(preferences),
        "questions": {name: len(rows) for name, rows in questions.items()},
        "transfer_entities": len(transfer),
    }
    write_json(out / "stats.json", _statistics(documents, dropped) | counts)


def _write_parquet(path: Path, names: list[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows in their order; the same rows give the same bytes."""
    import pyarrow
    from pyarrow import parquet

    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    types = {"quality": pyarrow.float64(), "value": pyarrow.float64(), "weight": pyarrow.float64()}
    types["duplicates"] = pyarrow.int64()
    arrays = [pyarrow.array(c, types.get(n, pyarrow.string())) for n, c in zip(names, columns, strict=True)]
    with atomic_path(path) as temporary:
        table = pyarrow.table(dict(zip(names, arrays, strict=True)))
        parquet.write_table(table, temporary, compression="zstd", row_group_size=8192)


def _sources(documents: list[Document], dropped: list[tuple[str, str, str, str, str]], wheels: Wheels) -> Row:
    reasons = Counter((row[1], row[2]) for row in dropped)
    groups = by_source(documents)
    table = {}
    for name, source in SOURCES.items():
        group = groups.get(name, [])
        pin = f"{source.package} {wheels.requirements[source.package].version}" if source.package else ""
        table[name] = {
            "group": source.group,
            "title": source.title,
            "licence": source.licence,
            "language": source.language,
            "url_or_package": pin
            or ("galenic" if name == "arithmetic" else f"CPython {platform.python_version()}"),
            "documents": len(group),
            "characters": sum(len(document.text) for document in group),
            "dropped": {reason: count for (s, reason), count in sorted(reasons.items()) if s == name},
            "heldout": sum(document.split == "heldout" for document in group),
            "duplicates": sum(document.duplicates - 1 for document in group),
        }
    return table


def _statistics(documents: list[Document], dropped: list[tuple[str, str, str, str, str]]) -> Row:
    reasons = Counter(row[2] for row in dropped)

    def counted(key: str) -> Row:
        return dict(sorted(Counter(getattr(document, key) for document in documents).items()))

    return {
        "documents_in": len(documents) + len(dropped),
        "kept": len(documents),
        "dropped": dict(sorted(reasons.items())),
        "exact_duplicates": reasons["exact duplicate"],
        "near_duplicates": reasons["near duplicate"],
        "characters": sum(len(document.text) for document in documents),
        "by_language": counted("language"),
        "by_category": counted("category"),
        "by_department": counted("department"),
        "by_split": counted("split"),
    }
