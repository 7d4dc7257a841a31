"""What the page says about benchmarks beside their published numbers, and about probes."""

from collections.abc import Iterator
from typing import Any

from . import published

Results = dict[str, Any]


def benchmarks(models: Results) -> dict[str, Any] | None:
    """The table of benchmarks: what was measured here, and what the report publishes for the same row.

    Args:
        models: name -> numbers, as in results.json; models without benchmarks are left out.
    """
    measured = {name: found for name, model in models.items() if (found := model.get("benchmarks"))}
    if not measured:
        return None
    others = sorted({row for found in measured.values() for row in found if row not in published.ROWS})
    rows: list[dict[str, Any]] = []
    for row in (*published.ROWS, *others):
        scores = [found.get(row) for found in measured.values()]
        sure = [score for score in scores if score]
        rows.append(
            {
                "name": row,
                "metric": sure[0].get("metric", "") if sure else "",
                "scores": scores,
                "published": published.ROWS.get(row, (None,) * len(published.MODELS)),
            }
        )
    whole = [
        [row["scores"][i]["value"] for row in rows[: len(published.ROWS)] if row["scores"][i]]
        for i in range(len(measured))
    ]
    return {
        "models": list(measured),
        "published": published.MODELS,
        "rows": rows,
        "averages": [
            sum(values) / len(values) if len(values) == len(published.ROWS) else None for values in whole
        ],
        "published_averages": published.AVERAGE,
        "measured": sum(any(row["scores"]) for row in rows[: len(published.ROWS)]),
    }


def probes(models: Results) -> dict[str, Any] | None:
    """The table of probes: every number of every probe, a row each, a column a model."""
    found = {name: dict(_numbers(model["probes"])) for name, model in models.items() if model.get("probes")}
    if not found:
        return None
    names = list(dict.fromkeys(path for numbers in found.values() for path in numbers))
    return {
        "models": list(found),
        "rows": [
            {"probe": path[0], "what": " ".join(path[1:]), "scores": [n.get(path) for n in found.values()]}
            for path in names
        ],
    }


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Walks through nested numbers; a number with its interval is one."""
    for key, inner in value.items():
        here = (*path, str(key).replace("_", " "))
        if isinstance(inner, dict) and "value" in inner:
            yield here, inner
        elif isinstance(inner, dict):
            yield from _numbers(inner, here)
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            yield here, {"value": inner}
