"""What is told of a corpus: sources, statistics, notices; and the files made of the starter's documents."""

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from galenic.corpus.config import CorpusConfig, SourceConfig
from galenic.corpus.engine import Unit
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.starter.starter import Made, Prepared
from galenic.corpus.starter.wheels import Wheels
from galenic.runtime import atomic_path, human, write_json, write_jsonl

Dropped = Sequence[tuple[str, str, str, str, str]]
"""Ledger rows of what went before the pipeline: (id, source, reason, detail, text)."""


def write_ledger(rows: Dropped, path: Path) -> None:
    """Writes ledger rows; the same rows give the same bytes."""
    import pyarrow
    from pyarrow import parquet

    place = {source: number for number, source in enumerate(SOURCES)}
    ordered = sorted(rows, key=lambda row: (place[row[1]], row[0], row[2], row[3]))
    columns = list(zip(*ordered, strict=True)) or [()] * 5
    arrays = [pyarrow.array(column, pyarrow.large_string()) for column in columns]
    with atomic_path(path) as temporary:
        table = pyarrow.table(dict(zip(("id", "source", "reason", "detail", "text"), arrays, strict=True)))
        parquet.write_table(table, temporary, compression="zstd")


def write_made(out: Path, made: Made) -> None:
    """Writes conversations, tasks, preference pairs and questions."""
    for folder, groups in (("sft", made.conversations), ("tasks", made.tasks)):
        for name, splits in groups.items():
            for split, rows in zip(("train", "heldout"), splits, strict=True):
                write_jsonl(out / folder / f"{name}.{split}.jsonl", rows)
    for name, rows in zip(("preferences", "preferences.heldout"), made.preferences, strict=True):
        write_jsonl(out / f"{name}.jsonl", rows)
    for name, rows in made.questions.items():
        write_jsonl(out / "questions" / f"{name}.jsonl", rows)


def write_sources(
    out: Path,
    config: CorpusConfig,
    sources: Mapping[str, SourceConfig],
    earlier: Dropped,
    results: Iterable[Unit],
    finished: Iterable[Unit],
) -> None:
    """Writes `sources.json`: for each source whose it is, how much stays, and why the rest does not."""
    dropped: dict[str, Counter[str]] = {name: Counter() for name in sources}
    masked: dict[str, Counter[str]] = {name: Counter() for name in sources}
    counts: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for row in earlier:
        dropped[row[1]][row[2]] += 1
    for result in results:
        dropped[result["source"]].update(result["dropped"])
        masked[result["source"]].update(result["masked"])
    for result in finished:
        dropped[result["source"]].update(result["dropped"])
        count = counts[result["source"]]
        count.update({key: result[key] for key in ("documents", "characters", "duplicates")})
        count["weighted_characters"] += result["weighted_characters"]
        count["heldout"] += result.get("by_split", {}).get("heldout", 0)
    table = {}
    for name, source in sources.items():
        table[name] = {
            "group": source.group,
            "title": source.title or name,
            "licence": source.licence,
            "language": SOURCES[name].language if name in SOURCES and config.starter else source.language,
            "url_or_package": _origin(name, source, config),
            "documents": counts[name]["documents"],
            "characters": counts[name]["characters"],
            "weighted_characters": round(counts[name]["weighted_characters"], 1),
            "dropped": dict(sorted(dropped[name].items())),
            "heldout": counts[name]["heldout"],
            "duplicates": counts[name]["duplicates"],
        }
        if masked[name]:
            table[name]["masked"] = dict(sorted(masked[name].items()))
    write_json(out / "sources.json", table)


def _origin(name: str, source: SourceConfig, config: CorpusConfig) -> str:
    """Where a source comes from: a pinned wheel, the running Python, this project, or what the user named."""
    if config.starter is None or name not in SOURCES:
        return source.path
    package = SOURCES[name].package
    if package:
        pinned = Wheels(config.starter.wheels, config.starter.requirements).requirements
        return f"{package} {pinned[package].version}"
    return "galenic" if name in ("arithmetic", "reasoning") else f"CPython {platform.python_version()}"


def write_statistics(
    out: Path,
    earlier: Dropped,
    results: Sequence[Unit],
    finished: Sequence[Unit],
    made: Made | None,
    prepared: Prepared | None,
) -> None:
    """Writes `stats.json`: what came in, what stays by its labels, why the rest does not."""
    reasons = Counter(row[2] for row in earlier)
    totals: Counter[str] = Counter()
    labels: dict[str, Counter[str]] = {}
    for result in results:
        reasons.update(result["dropped"])
    for result in finished:
        reasons.update(result["dropped"])
        totals.update({key: result[key] for key in ("documents", "characters")})
        for key, value in result.items():
            if key.startswith("by_"):
                labels.setdefault(key, Counter()).update(value)
    statistics: dict[str, Any] = {
        "documents_in": len(earlier) + sum(result["read"] for result in results),
        "kept": totals["documents"],
        "dropped": dict(sorted(reasons.items())),
        "exact_duplicates": reasons["exact duplicate"],
        "near_duplicates": reasons["near duplicate"],
        "characters": totals["characters"],
        **{key: dict(sorted(counter.items())) for key, counter in sorted(labels.items())},
    }
    masked: Counter[str] = Counter()
    for result in results:
        masked.update(result["masked"])
    if masked:
        statistics["masked"] = dict(sorted(masked.items()))
    if made is not None and prepared is not None:
        for kind, groups in (("conversations", made.conversations), ("tasks", made.tasks)):
            statistics[kind] = {
                f"{name}.{split}": len(rows)
                for name, both in groups.items()
                for split, rows in zip(("train", "heldout"), both, strict=True)
            }
        statistics["preferences"] = len(made.preferences[0])
        statistics["questions"] = {name: len(rows) for name, rows in made.questions.items()}
        statistics["transfer_entities"] = len(prepared.transfer)
    write_json(out / "stats.json", statistics)


def write_notices(out: Path, sources: Mapping[str, SourceConfig], finished: Iterable[Unit]) -> None:
    """Writes `NOTICES.md`: whose text this is, under which licence; for the model card and whoever passes it on."""
    counts: Counter[str] = Counter()
    for result in finished:
        counts[result["source"]] += result["documents"]
    lines = [
        "# Data notices",
        "",
        "This corpus holds text of the sources below. Whoever passes it on, or what was made from it, takes over the",
        "duties of their licences. It is not medical advice.",
        "",
        "| source | what | licence | documents |",
        "|---|---|---|--:|",
    ]
    for name, source in sources.items():
        if counts[name]:
            title = (source.title or name).replace("|", "/")
            lines.append(
                f"| `{name}` | {title} | {source.licence.replace('|', '/')} | {human(counts[name])} |"
            )
    with atomic_path(out / "NOTICES.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_contamination(out: Path, work: Path, results: Iterable[Unit]) -> None:
    """Writes `contamination.parquet`, every span that was taken out, and their sums in `contamination.json`."""
    import pyarrow
    from pyarrow import parquet

    from galenic.corpus.contamination.decontaminate import Evaluations
    from galenic.corpus.contamination.report import contamination_report, span_schema

    searched: Counter[str] = Counter()
    for result in results:
        searched[result["source"]] += result["searched"]
    found = [parquet.read_table(path) for path in sorted((work / "spans").glob("*.parquet"))]
    spans = pyarrow.concat_tables([span_schema().empty_table(), *found])
    with atomic_path(out / "contamination.parquet") as temporary:
        parquet.write_table(spans, temporary, compression="zstd")
    evaluations = Evaluations.load(work / "evaluations.npz")
    write_json(out / "contamination.json", contamination_report(spans, searched, evaluations, examples=0))
