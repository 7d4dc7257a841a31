"""The page beside every flattened model: what moved, whether as predicted, and what that did to loss and curvature.

It shows what is in `flatten.json` and computes nothing new; what was not measured has no place on it.
"""

import math
from pathlib import Path
from typing import Any

from galenic.runtime import human

from . import flatten_charts as charts
from .flattening import MODES, half_width, moved, trace_name
from .page import render, write

Summary = dict[str, Any]


def write_flatten_page(file: Path, summary: Summary, recipe: str) -> None:
    """Writes the page; the same values give the same bytes.

    Args:
        file: to write, atomically.
        summary: the contents of `flatten.json`.
        recipe: YAML.
    """
    layers = summary["layers"]
    page = render(
        "flatten.html",
        {"fixed": _fixed, "signed": _signed, "small": _small, "wide": _wide},
        title=f"Flattening of {summary['model']}",
        verdict=summary["verdict"],
        what=_what(summary),
        tiles=_tiles(summary),
        layers=[layer | {"change": 100 * charts.norm_change(layer)} for layer in layers],
        bounds=any(layer["loss_bound"] is not None for layer in layers),
        rows=len({layer["rows"] for layer in layers}) > 1,
        agreement=charts.agreement(layers),
        still=len(layers) - len(charts.changed(layers)),
        spectra=charts.spectra(layers),
        norms=charts.norms(layers) if layers else None,
        norm_changes=charts.norm_changes(layers),
        losses=_losses(summary),
        unit=_unit(summary),
        curvature=_curvature(summary),
        landscape=_landscape(summary),
        selection=_selection(summary["selection"]),
        error="validation error, share" if summary["task"] == "class" else "validation loss, nats per token",
        settings={key: value for key, value in summary["settings"].items() if value is not None},
        notes=summary["notes"],
        recipe=recipe,
    )
    write(file, page)


# ---------------------------------------------------------------------------- numbers as words


def _fixed(value: float | None, digits: int = 4) -> str:
    return "\u2013" if value is None else f"{value:.{digits}f}"


def _signed(value: float, digits: int = 4) -> str:
    """Formats a change: its sign always, and enough digits to see one that is not nothing."""
    if value and abs(value) < 10.0**-digits:
        return f"{value:+.1e}".replace("-", "\u2212")
    return (f"{value:+.{digits}f}" if value else "0").replace("-", "\u2212")


def _small(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.2e}".replace("-", "\u2212") if value else "0"


def _wide(value: Any) -> str:
    """Formats a number of any size, or anything else as it is."""
    return f"{value:.5g}".replace("-", "\u2212") if isinstance(value, float) else str(value)


def _interval(estimate: dict[str, Any]) -> str:
    half = half_width(estimate)
    return _wide(float(estimate["mean"])) + ("" if math.isnan(half) else f" \u00b1 {half:.2g}")


def _unit(summary: Summary) -> str:
    return "sample" if summary["task"] == "class" else "token"


# ---------------------------------------------------------------------------- the top


def _what(summary: Summary) -> str:
    anchor = f" The shift applies to the difference from {summary['anchored_to']}." * bool(
        summary["anchored_to"]
    )
    return (
        f"Mode {summary['mode']}: {MODES[summary['mode']]}.{anchor} "
        f"Measured on {summary['rows']:,} {_unit(summary)}s of training data."
    )


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    layers, (old, new) = summary["layers"], summary["loss"]["heldout"]
    shifted = sum(layer["action"] == "shift" for layer in layers)
    squares = [sum(layer[key] ** 2 for layer in layers) for key in ("norm_before", "norm_after")]
    tiles = [
        ("Layers shifted", str(shifted), f"of {len(layers)}"),
        ("Held-out loss", _signed(new - old), f"from {old:.4f} to {new:.4f}"),
    ]
    if summary["accuracy"]:
        old, new = summary["accuracy"]["heldout"]
        note = f"points, from {100 * old:.2f}% to {100 * new:.2f}%"
        tiles.append(("Held-out accuracy", _signed(100 * (new - old), 2), note))
    if squares[0]:
        share = 100 * (squares[1] / squares[0] - 1)
        tiles.append(("Squared norm", f"{_signed(share, 2)}%", "of all these layers"))
    if trace := summary["trace"]:
        matched = trace["matched_difference"]
        change = matched or trace["difference"]
        note = "at equal loss" if matched else "the losses differ"
        if reference := _reference(trace, bool(matched)):
            share, half = (100 * v / abs(reference) for v in (change["mean"], half_width(change)))
            value = f"{_signed(share, 1)}%"
            note += "" if math.isnan(half) else f"; 95%: \u00b1{half:.2g} points"
        else:
            value = _wide(float(change["mean"]))
        tiles.append((f"{trace['kind']} trace", value, note))
    tiles.append(("Data", human(summary["rows"]), f"{_unit(summary)}s"))
    return tiles


def _losses(summary: Summary) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) of losses and accuracies."""
    names = {"train": "training", "heldout": "held-out"}
    rows = [
        (f"loss, {names[split]} data", _fixed(old), _fixed(new), _signed(new - old))
        for split, (old, new) in summary["loss"].items()
    ]
    for split, (old, new) in (summary["accuracy"] or {}).items():
        change = _signed(100 * (new - old), 2)
        rows.append(
            (f"accuracy, {names[split]} data", f"{100 * old:.2f}%", f"{100 * new:.2f}%", f"{change} points")
        )
    return rows


# ---------------------------------------------------------------------------- curvature, landscape, selection


def _reference(trace: dict[str, Any], matched: bool) -> float:
    """Returns the mean that a change is a share of: the trace before, at equal loss that of the scaled original."""
    return (trace["matched"] if matched and trace["scaled"] == "before" else trace["before"])["mean"]


def _curvature(summary: Summary) -> dict[str, Any] | None:
    trace, largest, adaptive = summary["trace"], summary["eigenvalue"], summary["adaptive_sharpness"]
    if not (trace or largest or adaptive):
        return None
    matched = bool((trace and trace["matched"]) or (largest and largest["matched"] is not None))
    found: dict[str, Any] = {
        "matched": matched,
        "rows": [],
        "charts": [],
        "said": [],
        "probes": None,
        "scale": None,
        "scaled": None,
    }
    if trace:
        name = trace_name(trace)
        estimates = [("before", trace["before"], "base"), ("after", trace["after"], "flattened")]
        changes = [("after", trace["difference"], "flattened")]
        if trace["matched"]:
            estimates.append((f"{trace['scaled']}, scaled", trace["matched"], "merge"))
        if trace["matched_difference"]:
            changes.append(("at equal loss", trace["matched_difference"], "merge"))
        found["charts"] = [
            ("Curvature", "whiskers: 95% interval over the choice of probes", name, estimates, False),
            (
                "Change of the curvature",
                "the same probes before and after, so the change is known better than either",
                f"change of the {name}",
                changes,
                True,
            ),
        ]
        found["charts"] = [
            (title, note, charts.whiskers(axis, [(n, e["mean"], half_width(e), c) for n, e, c in rows], zero))
            for title, note, axis, rows, zero in found["charts"]
        ]
        found["rows"].append(
            (
                name,
                _interval(trace["before"]),
                _interval(trace["after"]),
                _interval(trace["difference"]),
                _interval(trace["matched"]) if trace["matched"] else "",
                _interval(trace["matched_difference"]) if trace["matched_difference"] else "",
            )
        )
        found["said"] = [
            f"{'At equal loss' if label == 'at equal loss' else 'As it is'}, the shift "
            f"{moved(e['mean'], half_width(e), _reference(trace, label == 'at equal loss'), name)}."
            for label, e, _ in changes
        ]
        found["probes"] = trace["before"]["probes"]
        found["scale"], found["scaled"] = trace["scale"], trace["scaled"]
    if largest:
        old, new, at = largest["before"], largest["after"], largest["matched"]
        more = ("", "") if at is None else (_wide(at), _wide(largest["matched_difference"]))
        found["rows"].append(("largest eigenvalue", _wide(old), _wide(new), _wide(new - old), *more))
    if adaptive:
        old, new = adaptive["before"], adaptive["after"]
        name = f"adaptive sharpness (\u03c1 = {adaptive['rho']:g})"
        found["rows"].append((name, _wide(old), _wide(new), _wide(new - old), "", ""))
    return found


def _landscape(summary: Summary) -> list[tuple[str, str, Any]]:
    """(title, note, drawing) of the loss along a line and over a plane."""
    data = summary["landscape"]
    if not data:
        return []
    unit = f"loss (nats per {_unit(summary)})"
    found = [
        (
            "The loss along one direction",
            "random, each filter moved in proportion to its norm; 0 is the model",
            charts.line(data["places"], data["line"]["before"], data["line"]["after"], unit),
        )
    ]
    if plane := data["plane"]:
        note = "the stronger the colour, the higher; the cross is the model"
        drawing = charts.plane(plane["places"], plane["before"], plane["after"])
        found.append(("The loss over two directions", note, drawing))
    return [entry for entry in found if entry[2]]


def _selection(selection: Summary | None) -> dict[str, Any] | None:
    if not selection:
        return None
    candidates = selection["candidates"]
    return {
        "keys": list(dict.fromkeys(key for candidate in candidates for key in candidate["settings"])),
        "candidates": candidates,
        "chosen": selection["chosen"],
    }
