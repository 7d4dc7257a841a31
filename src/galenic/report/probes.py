"""What the page says about probes: their numbers, where a fact in a long text is found, how right it is to be sure."""

from collections.abc import Iterator, Sequence
from typing import Any

from . import score_charts, svg
from .data import Chart, slug

Results = dict[str, Any]
LONG_TEXTS = {"needle": "A fact in a long text", "hops": "Facts that lead to each other in a long text"}
"""Probes that measure by length and something else -> the chart's title."""
NOT_TOLD = ("grid", "bins", "n")
"""Drawn, or told beside a number."""
FIRST = {
    "needle": ("needle", "written"),
    "hops": ("hops",),
    "safety": ("refusal", "over refusal"),
    "positions": ("accuracy", "bias", "consistency"),
    "calibration": ("error",),
}
"""Probe -> last words of the numbers that are told first; of others the outermost."""


def probes(models: Results) -> dict[str, Any] | None:
    """The tables of probes: a row each number, a column a model; what is told `first`, and `all` of it.

    Args:
        models: name -> numbers, as in results.json; models without probes are left out.
    """
    found = {name: dict(_numbers(model["probes"])) for name, model in models.items() if model.get("probes")}
    if not found:
        return None
    names = list(dict.fromkeys(path for numbers in found.values() for path in numbers))
    rows = [
        {
            "probe": path[0],
            "what": ", ".join(word for word in path[1:] if word != "by") or "all",
            "scores": [numbers.get(path) for numbers in found.values()],
        }
        for path in names
    ]
    first = [row for row, path in zip(rows, names, strict=True) if _is_first(path)]
    return {"models": list(found), "first": first, "all": rows}


def _is_first(path: tuple[str, ...]) -> bool:
    return "by" not in path and (path[-1] in FIRST[path[0]] if path[0] in FIRST else len(path) == 2)


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Walks through nested numbers, outer ones first; a number with its interval is one."""
    for key, inner in value.items():
        here = (*path, str(key).replace("_", " "))
        if key in NOT_TOLD or (isinstance(inner, dict) and not inner):
            continue
        if isinstance(inner, dict):
            if "value" in inner:
                yield here, inner
            yield from _numbers(
                {k: v for k, v in inner.items() if k not in ("value", "low", "high", "chance")}, here
            )
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            yield here, {"value": inner}


def drawings(models: Results) -> list[tuple[str, str, Chart]]:
    """(title, note, chart) of what is better seen: shares by length, and accuracy by confidence.

    Args:
        models: as of `probes`; a few of them.
    """
    found = []
    for name, model in models.items():
        told = model.get("probes") or {}
        for probe, title in LONG_TEXTS.items():
            if grid := told.get(probe, {}).get("grid"):
                found.append((f"{title}: {name}", "shares found", _grid(probe, name, grid)))
        lines = _bins(told.get("calibration", {}))
        if lines:
            found.append(
                (
                    f"Is it right to be sure? {name}",
                    "on the dashes: as often right as sure",
                    _sure(name, lines),
                )
            )
    return found


def _bins(calibration: dict[str, Any]) -> dict[str, Sequence[tuple[float, float, float]]]:
    """(confidence, accuracy, answers) of each bin by kind of questions; of the headline's scoring, the first."""
    found: dict[str, Sequence[tuple[float, float, float]]] = {}
    for kind, numbers in calibration.items():
        first = next(iter(numbers.values()), None) if isinstance(numbers, dict) else None
        bins = first.get("error", {}).get("bins") if isinstance(first, dict) else None
        if bins:
            found[kind] = [(b["confidence"], b["accuracy"], b["n"]) for b in bins]
    return found


def _grid(probe: str, name: str, grid: dict[str, dict[str, Any]]) -> Chart:
    columns = list(dict.fromkeys(column for row in grid.values() for column in row))
    what = "depth" if probe == "needle" else "steps"
    cells = [[grid[row].get(column) for column in columns] for row in grid]
    words = "; ".join(
        f"{row} tokens, {what} {column}: {100 * score['value']:.0f}%"
        for row, line in zip(grid, cells, strict=True)
        for column, score in zip(columns, line, strict=True)
        if score and score["value"] is not None
    )
    shares = [[None if score is None else score["value"] for score in line] for line in cells]
    drawn = svg.shares(
        f"{name}, {probe}. {words}.", list(grid), columns, shares, f"rows: tokens; columns: {what}"
    )
    rows = [
        (row, column, score["value"], score["low"], score["high"], score["n"])
        for row, line in zip(grid, cells, strict=True)
        for column, score in zip(columns, line, strict=True)
        if score
    ]
    return Chart(svg=drawn, columns=("tokens", what, "share", "low", "high", "items"), rows=rows)


def _sure(name: str, lines: dict[str, Sequence[tuple[float, float, float]]]) -> Chart:
    words = "; ".join(
        f"{kind}: "
        + ", ".join(f"{100 * sure:.0f}% sure, {100 * right:.0f}% right" for sure, right, _ in line)
        for kind, line in lines.items()
    )
    return score_charts.reliability(f"sure-{slug(name)}", f"{name}, accuracy by confidence. {words}.", lines)
