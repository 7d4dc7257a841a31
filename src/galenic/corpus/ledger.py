"""Verb `ledger`: why documents were dropped, with examples; texts are quoted only because somebody asks here."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from galenic.corpus.config import LedgerConfig
from galenic.runtime import Plan, UserError, nearest

EXCERPT = 100
"""Characters of an example."""


def plan(config: LedgerConfig) -> Plan:
    """What the verb would read."""
    return Plan(reads=[str(_folder(config))], writes=[])


def run(config: LedgerConfig) -> None:
    """Prints how many documents each reason dropped, from which sources, and some of them.

    Raises:
        UserError: not a corpus folder, or a reason or source that dropped nothing.
    """
    print("\n".join(lines(config)))


def lines(config: LedgerConfig) -> list[str]:
    """Returns what `run` prints."""
    from pyarrow import dataset

    counts: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    ledger = dataset.dataset(str(_folder(config)), format="parquet")
    for batch in ledger.to_batches(columns=["id", "source", "reason", "detail", "text"]):
        for row in batch.to_pylist():
            if config.source and row["source"] != config.source:
                continue
            counts[row["reason"]] += 1
            sources[row["reason"]][row["source"]] += 1
            if len(examples[row["reason"]]) < config.examples:
                examples[row["reason"]].append(row)
    if config.source and not counts:
        raise UserError(f"{config.corpus}: nothing of source '{config.source}' was dropped")
    if config.reason and config.reason not in counts:
        hint = f"{nearest(config.reason, counts)}; they are {', '.join(sorted(counts))}"
        raise UserError(f"{config.corpus}: nothing was dropped as '{config.reason}'{hint}")
    told = [f"{sum(counts.values()):,} documents dropped"]
    for reason, count in counts.most_common():
        if config.reason in ("", reason):
            of = ", ".join(f"{source} {number:,}" for source, number in sources[reason].most_common())
            told += ["", f"{reason}: {count:,} ({of})"]
            told += [f"  {_example(row)}" for row in examples[reason]]
    return told


def _folder(config: LedgerConfig) -> Path:
    folder = Path(config.corpus) / "ledger.parquet"
    if not folder.exists():
        raise UserError(
            f"{config.corpus}: not a corpus folder (no ledger.parquet); run the corpus step first"
        )
    return folder


def _example(row: dict[str, Any]) -> str:
    text = " ".join(row["text"].split())
    text = text[:EXCERPT] + "..." if len(text) > EXCERPT else text
    return f"{row['id']}" + (f" ({row['detail']})" if row["detail"] else "") + f": {text}"
