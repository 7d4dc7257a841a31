"""The drawings of the page beside every flattened model: numbers in, SVG out, by the parts of `svg`."""

import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from . import svg

Layer = dict[str, Any]
Losses = Sequence[float | None]

ACTIONS = ("shift", "no-op", "over budget", "rolled back")
ROUNDING = 1e-6
"""Relative output changes below it are no more than rounding in float32."""
DARK = 1e-16
"""Eigenvalues below this share of the largest are drawn at it."""
BANDS = 10
"""Shades of a plane."""


# ---------------------------------------------------------------------------- outputs


def changed(layers: Sequence[Layer]) -> list[Layer]:
    """Returns the layers whose outputs were predicted or measured to change by more than rounding."""
    return [
        layer
        for layer in layers
        if max(layer["relative_output_change_predicted"], layer["relative_output_change_measured"]) > ROUNDING
    ]


def agreement(layers: Sequence[Layer]) -> Markup | None:
    """Draws the output change of each layer that has one, predicted against measured, on two axes of one range."""
    points = [
        (
            layer["relative_output_change_predicted"],
            layer["relative_output_change_measured"],
            ACTIONS.index(layer["action"]),
            layer["name"],
        )
        for layer in changed(layers)
    ]
    if not points:
        return None
    ends = [max(ROUNDING, value) for predicted, measured, *_ in points for value in (predicted, measured)]
    x = svg.logarithmic("predicted", min(ends), max(ends))
    y = svg.logarithmic("measured", min(ends), max(ends))
    parts, place = svg.frame(x, y, bottom=330)
    (left, low), (right, high) = place(x.low, y.low), place(x.high, y.high)
    parts.append(
        f'<path d="M{left:.1f},{low:.1f}L{right:.1f},{high:.1f}" stroke="var(--muted)" stroke-dasharray="4 4"/>'
    )
    size = 1.2 if len(points) <= 60 else 0.9
    for predicted, measured, k, name in points:
        title = f"{name}: predicted {predicted:.3g}, measured {measured:.3g}"
        parts.append(svg.mark(k, *place(predicted, measured), size=size, title=title))
    present = sorted({k for *_, k, _ in points})
    entries = [("", svg.mark(k, 0, 0, size=1.2), ACTIONS[k]) for k in present]
    more, height = svg.legend([*entries, ('stroke="var(--muted)" stroke-dasharray="4 4"', "", "equal")], 386)
    label = (
        f"Relative change of outputs of {len(points)} layers, predicted from {min(p[0] for p in points):.3g} to "
        f"{max(p[0] for p in points):.3g}, measured from {min(p[1] for p in points):.3g} to "
        f"{max(p[1] for p in points):.3g}."
    )
    return svg.drawing(label, height, parts + more)


# ---------------------------------------------------------------------------- spectra


def spectra(layers: Sequence[Layer]) -> Markup | None:
    """Draws the eigenvalues of every layer's Gram matrix relative to the largest, and names three layers."""
    layers = [layer for layer in layers if len(layer["spectrum"]) > 1 and max(layer["spectrum"]) > 0]
    if not layers:
        return None
    order = sorted(range(len(layers)), key=lambda i: layers[i]["rank"] / layers[i]["dimension"])
    shown = dict.fromkeys(
        (order[0], order[len(order) // 2], order[-1]) if len(order) > 4 else range(len(order))
    )
    lowest = min(value for layer in layers for value in layer["spectrum"] if value > 0)
    x = svg.Axis("share of the eigenvalues, largest first (%)", 0, 100, range(0, 101, 20))
    y = svg.logarithmic("eigenvalue / largest", max(DARK, lowest), 1)
    parts, place = svg.frame(x, y)

    def line(i: int, attributes: str) -> str:
        values = layers[i]["spectrum"]
        points = [place(100 * j / (len(values) - 1), value) for j, value in enumerate(values)]
        return svg.polyline(points, attributes)

    faint = 'stroke="var(--muted)" stroke-width="0.8" stroke-opacity="0.35"'
    parts += [line(i, faint) for i in range(len(layers)) if i not in shown]
    parts += [line(i, svg.stroke(k, width=2)) for k, i in enumerate(shown)]
    entries = []
    for k, i in enumerate(shown):
        rank = f", rank {layers[i]['rank']} of {layers[i]['dimension']}"
        room = (svg.WIDTH - 44) // svg.LETTER - len(rank)
        entries.append((svg.stroke(k, width=2), "", shorten(layers[i]["name"], room) + rank))
    if len(shown) < len(layers):
        entries.append((faint, "", f"the other {len(layers) - len(shown)} layers"))
    more, height = svg.legend(entries)
    named = "; ".join(name for *_, name in entries)
    return svg.drawing(f"Spectra of the inputs of {len(layers)} layers: {named}.", height, parts + more)


def shorten(name: str, room: int) -> str:
    """Cuts the start of a long name."""
    return name if len(name) <= room else "\u2026" + name[1 - room :]


# ---------------------------------------------------------------------------- norms


def norms(layers: Sequence[Layer]) -> Markup:
    """Draws each layer's norm before and after, layers of the same part of the network side by side."""
    rows = [(layer["norm_before"], layer["norm_after"]) for layer in layers]
    label = f"Norms of {len(layers)} layers' weights, before and after; the numbers are in the table."
    return _by_part(label, "norm of the weight", layers, rows, ("base", "flattened"))


def norm_changes(layers: Sequence[Layer]) -> Markup | None:
    """Draws by how many per cent each layer's norm changed, if any did."""
    rows = [(0.0, 100 * norm_change(layer)) for layer in layers]
    if not any(value for _, value in rows):
        return None
    low, high = min(value for _, value in rows), max(value for _, value in rows)
    label = f"Changes of {len(layers)} layers' norms, from {low:+.2f}% to {high:+.2f}%."
    return _by_part(label, "change of the norm (%)", layers, rows, ("", "flattened"))


def norm_change(layer: Layer) -> float:
    """Returns the relative change of a layer's norm; none where there was no norm."""
    return layer["norm_after"] / layer["norm_before"] - 1 if layer["norm_before"] else 0.0


def parts_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Groups layers that differ in their numbers alone, in the order of the first; label -> places.

    Example:
        >>> parts_of(["model.layers.0.mlp.up", "lm_head", "model.layers.1.mlp.up"])
        {'up': [0, 2], 'lm_head': [1]}
    """
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(place)
    last = [group.rpartition(".")[2] for group in groups]
    labels = last if len(set(last)) == len(last) and "*" not in last else list(groups)
    return dict(zip(labels, groups.values(), strict=True))


def _by_part(
    label: str,
    title: str,
    layers: Sequence[Layer],
    rows: Sequence[tuple[float, float]],
    colours: tuple[str, str],
) -> Markup:
    """Draws a stem a layer from one value to another, with marks in two colours; no colour, no mark."""
    groups = parts_of([layer["name"] for layer in layers])
    gap = max(1.0, len(layers) / 40)
    x = svg.Axis("", -gap, len(layers) + gap * (len(groups) - 1) - 1 + gap, ())
    y = svg.linear(title, min(0.0, *map(min, rows)), max(0.0, *map(max, rows)))
    parts, place = svg.frame(x, y)
    left, zero = place(x.low, 0.0)
    if y.low < 0:
        parts.append(f'<path d="M{left:.1f},{zero:.1f}H{place(x.high, 0)[0]:.1f}" stroke="var(--line)"/>')
    size = min(1.0, max(0.45, 60 / len(layers)))
    at, written, deepest = 0.0, -math.inf, 0.0
    slanted = max(map(len, groups)) <= 9  # longer ones would leave the drawing on the left
    for name, places in groups.items():
        middle = place(at + (len(places) - 1) / 2, 0.0)[0]
        if len(groups) > 1 and middle - written >= (19 if slanted else 13):
            words = shorten(name, 22)
            parts.append(svg.text(middle, svg.BOTTOM + 8, words, "end", turn=-40 if slanted else -90))
            written, deepest = middle, max(deepest, len(words) * svg.LETTER * (0.64 if slanted else 1.0))
        for i in places:
            before, after = rows[i]
            (across, start), (_, end) = place(at, before), place(at, after)
            parts.append(
                f'<path d="M{across:.1f},{start:.1f}V{end:.1f}" stroke="var(--muted)" stroke-opacity="0.5"/>'
            )
            said = f"{layers[i]['name']}: {before:.4g} to {after:.4g}" if colours[0] else f"{after:+.3g}%"
            for k, (colour, up) in enumerate(zip(colours, (start, end), strict=True)):
                if colour:
                    parts.append(svg.mark(k, across, up, colour, size, said))
            at += 1
        at += gap
    bottom = svg.BOTTOM + 22 + deepest
    if not colours[0]:
        return svg.drawing(label, bottom, parts)
    entries = [("", svg.mark(k, 0, 0, colours[k]), name) for k, name in enumerate(("before", "after"))]
    more, bottom = svg.legend(entries, bottom + 6)
    return svg.drawing(label, bottom, parts + more)


# ---------------------------------------------------------------------------- curvature


def whiskers(title: str, rows: Sequence[tuple[str, float, float, str]], zero: bool = False) -> Markup:
    """Draws numbers with their 95% intervals, one below another.

    Args:
        title: what the numbers are.
        rows: (name, value, half the width of its interval or not a number, colour).
        zero: marks zero by a line.
    """
    ends = [v + sign * (0.0 if math.isnan(half) else half) for _, v, half, _ in rows for sign in (-1, 1)]
    x = svg.linear(title, min(0.0, *ends) if zero else min(ends), max(0.0, *ends) if zero else max(ends))
    left, right, bottom = (
        20.0 + svg.LETTER * max(len(name) for name, *_ in rows),
        svg.WIDTH - 24.0,
        34 * len(rows),
    )

    def place(value: float) -> float:
        return left + (right - left) * x.share(value)

    parts = [f'<path d="M{left:.1f},{bottom}H{right}" stroke="var(--line)"/>']
    step = math.ceil(len(x.ticks) * max(len(x.name(tick)) for tick in x.ticks) * svg.LETTER / (right - left))
    for i, tick in enumerate(x.ticks):
        parts.append(f'<path d="M{place(tick):.1f},{bottom}v4" stroke="var(--line)"/>')
        if i % step == 0:
            parts.append(svg.text(place(tick), bottom + 14, x.name(tick)))
    parts.append(svg.text((left + right) / 2, bottom + 34, title))
    if zero:
        parts.append(f'<path d="M{place(0):.1f},4V{bottom}" stroke="var(--muted)" stroke-dasharray="4 4"/>')
    for k, (name, value, half, colour) in enumerate(rows):
        y = 34 * k + 17
        parts.append(svg.text(left - 10, y, name, "end"))
        if not math.isnan(half):
            low, high = place(value - half), place(value + half)
            parts.append(
                f'<path d="M{low:.1f},{y - 5}v10M{low:.1f},{y}H{high:.1f}M{high:.1f},{y - 5}v10" fill="none" '
                f'stroke="var(--{colour})" stroke-width="1.6"/>'
            )
        parts.append(svg.mark(k, place(value), y, colour, 1.4))
    said = "; ".join(
        f"{name} {value:.4g}" + ("" if math.isnan(half) else f" \u00b1 {half:.2g}")
        for name, value, half, _ in rows
    )
    return svg.drawing(f"{title}: {said}.", bottom + 46, parts)


# ---------------------------------------------------------------------------- landscape


def line(places: Sequence[float], before: Losses, after: Losses, title: str) -> Markup | None:
    """Draws the loss along a direction, before and after; a gap where it is not finite."""
    finite = _finite([before, after])
    if not finite:
        return None
    x = svg.linear("distance along the direction", min(places), max(places))
    x = svg.Axis(x.title, min(places), max(places), [t for t in x.ticks if min(places) <= t <= max(places)])
    parts, place = svg.frame(x, svg.linear(title, min(finite), max(finite)))
    entries = []
    for k, (name, losses, colour) in enumerate((("before", before, "base"), ("after", after, "flattened"))):
        attributes = svg.stroke(k, colour, 2)
        run: list[tuple[float, float]] = []
        for at, loss in [*zip(places, losses, strict=True), (0.0, None)]:
            if loss is not None and math.isfinite(loss):
                run.append(place(at, loss))
                continue
            if run:
                parts.append(svg.polyline(run, attributes))
                parts += [svg.mark(k, *point, colour) for point in run] if len(places) <= svg.FEW else []
            run = []
        entries.append((attributes, svg.mark(k, 0, 0, colour), name))
    more, height = svg.legend(entries)
    label = f"Loss along one direction at {len(places)} places, from {min(finite):.4g} to {max(finite):.4g}."
    return svg.drawing(label, height, parts + more)


def plane(places: Sequence[float], before: Sequence[Losses], after: Sequence[Losses]) -> Markup | None:
    """Draws the loss over two directions, before and after, in the same bands of loss."""
    finite = _finite([*before, *after])
    if not finite:
        return None
    low, high = min(finite), max(finite)
    log = 0 < 10 * low < high
    scale = svg.Axis("", low, high if high > low else low + 1, (), log)
    count, side, top = len(places), 186.0, 24.0
    cell = side / count
    parts = []
    for left, name, losses in ((30.0, "before", before), (svg.WIDTH - side - 8, "after", after)):
        parts.append(svg.text(left + side / 2, 10, name))
        for i, row in enumerate(losses):
            for j, loss in enumerate(row):
                x, y = left + j * cell, top + side - (i + 1) * cell
                if loss is None or not math.isfinite(loss):
                    parts.append(
                        f'<path d="M{x:.2f},{y:.2f}l{cell:.2f},{cell:.2f}" stroke="var(--bad)" stroke-width="1"/>'
                    )
                    continue
                band = min(BANDS - 1, int(BANDS * scale.share(loss)))
                parts.append(_shade(x, y, cell, cell, band))
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{side}" height="{side}" fill="none" stroke="var(--line)"/>'
        )
        middle, centre = left + side / 2, top + side / 2
        parts.append(
            f'<path d="M{middle - 5:.1f},{centre:.1f}h10M{middle:.1f},{centre - 5:.1f}v10" stroke="var(--ink)" '
            'stroke-width="1.5"/>'
        )
        for at, anchor in ((0, "start"), (-1, "end")):
            tick = f"{places[at]:g}".replace("-", "\u2212")
            parts.append(svg.text(left + (side if at else 0), top + side + 12, tick, anchor))
            if left < 100:
                parts.append(svg.text(left - 5, top + (6 if at else side - 6), tick, "end"))
        parts.append(svg.text(left + side / 2, top + side + 12, "second direction"))
    parts.append(svg.text(14, top + side / 2, "first direction", turn=-90))
    wide, bottom = (svg.WIDTH - 60) / BANDS, top + side + 34
    for band in range(BANDS):
        parts.append(_shade(30 + band * wide, bottom, wide, 14, band))
    for k, anchor in ((0, "start"), (BANDS // 2, "middle"), (BANDS, "end")):
        share = k / BANDS
        edge = scale.low * (scale.high / scale.low) ** share if log else low + (scale.high - low) * share
        parts.append(svg.text(30 + k * wide, bottom + 26, f"{edge:.4g}", anchor))
    parts.append(svg.text(svg.WIDTH / 2, bottom + 46, "loss" + ", in equal ratios" * log))
    return svg.drawing(
        f"Loss over a plane, from {low:.4g} to {high:.4g}, before and after.", bottom + 58, parts
    )


def _shade(x: float, y: float, width: float, height: float, band: int) -> str:
    opacity = 0.04 + 0.9 * band / (BANDS - 1)
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="var(--first)" '
        f'fill-opacity="{opacity:.2f}"/>'
    )


def _finite(rows: Sequence[Losses]) -> list[float]:
    return [loss for row in rows for loss in row if loss is not None and math.isfinite(loss)]
