"""What the page says about benchmarks: measured here, beside the numbers that were published."""

from typing import Any

from galenic.evaluate.benchmarks import rows as published

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
    unknown = (None,) * len(published.MODELS)
    for row in (*published.ROWS, *others):
        scores = [found.get(row) for found in measured.values()]
        sure = [score for score in scores if score]
        rows.append(
            {
                "name": row,
                "metric": sure[0].get("metric", "") if sure else "",
                "scores": scores,
                "published": published.ROWS[row].published if row in published.ROWS else unknown,
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
