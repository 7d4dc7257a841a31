"""What decontamination found, summed up for people: by evaluation file and by source."""

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galenic.corpus.contamination.decontaminate import Evaluations

KINDS = ("13-gram", "whole item", "near copy")
"""Of spans, by the numbers of `overlap`; the name stays where `ngram` is another number."""


def span_schema() -> Any:
    """Returns the columns of the spans, as `pyarrow.Schema`."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    kinds = {"id": text, "source": text, "item": text, "file": text, "kind": text}
    return pa.schema(kinds | {"start": number, "stop": number, "excerpt": text, "outcome": text})


def contamination_report(
    spans: Any, documents: Mapping[str, int], evaluations: "Evaluations | None" = None, *, examples: int = 3
) -> dict[str, Any]:
    """Sums up what was found.

    Args:
        spans: of `decontaminate_table`, joined over all tables.
        documents: source -> how many documents were searched.
        evaluations: adds how many items each file has and how many are too short to be looked for.
        examples: excerpts of each file and each source; they quote training texts, 0 quotes none.

    Returns:
        {"files": {file: {"items", "unsearched", "touched", "documents", "kinds", "examples"}},
        "sources": {source: {"documents", "cut", "dropped", "spans", "examples"}}}.
    """
    rows = sorted(spans.to_pylist(), key=lambda row: (row["id"], row["start"], row["item"]))
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    sources: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        files[row["file"]].append(row)
        sources[row["source"]].append(row)
    names = list(dict.fromkeys(evaluations.files)) if evaluations else sorted(files)

    def about(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first = {row["item"]: row for row in reversed(rows)}
        keys = ("id", "item", "kind", "excerpt")
        return [{key: row[key] for key in keys} for row in list(reversed(first.values()))[:examples]]

    def count(rows: list[dict[str, Any]], outcome: str) -> int:
        return len({row["id"] for row in rows if row["outcome"] == outcome})

    return {
        "files": {
            name: {
                "items": evaluations.files.count(name) if evaluations else None,
                "unsearched": evaluations.unsearched.get(name, 0) if evaluations else None,
                "touched": len({row["item"] for row in files[name]}),
                "documents": len({row["id"] for row in files[name]}),
                "kinds": {k: n for k in KINDS if (n := sum(row["kind"] == k for row in files[name]))},
                "examples": about(files[name]),
            }
            for name in names
        },
        "sources": {
            name: {
                "documents": documents.get(name),
                "cut": count(sources[name], "cut"),
                "dropped": count(sources[name], "dropped"),
                "spans": len({(row["id"], row["start"], row["stop"]) for row in sources[name]}),
                "examples": about(sources[name]),
            }
            for name in sorted({*documents, *sources})
        },
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Renders a report as two tables and its examples."""
    lines = [
        "| evaluation file | items | too short | found in training | documents | kinds |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for name, row in report["files"].items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in row["kinds"].items()) or "none"
        given = ["" if row[key] is None else row[key] for key in ("items", "unsearched")]
        lines.append(
            f"| {name} | {given[0]} | {given[1]} | {row['touched']} | {row['documents']} | {kinds} |"
        )
    lines += ["", "| source | documents | cut | dropped | spans |", "|---|--:|--:|--:|--:|"]
    for name, row in report["sources"].items():
        total = "" if row["documents"] is None else row["documents"]
        lines.append(f"| {name} | {total} | {row['cut']} | {row['dropped']} | {row['spans']} |")
    for row in report["files"].values():
        for example in row["examples"]:
            excerpt = " ".join(example["excerpt"].split())
            lines += ["", f"- {example['item']} in `{example['id']}` ({example['kind']}): {excerpt}"]
    return "\n".join(lines) + "\n"
