"""The two drawings of the page beside every merged model, made without a library.

To load one takes longer than all the rest of a page. As in `charts`, colours are the page's CSS variables and nothing
is told by colour alone; numbers in, SVG out.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, LETTER = 500, 7
"""Of a drawing, and about that of a letter, in its own units."""
SERIES = ("first", "second", "third", "fourth", "fifth", "sixth")
"""Names of colours."""
DASHES = ("", "6 3", "6 2 1 2", "1.5 2", "6 1 1 1 1 1", "1 1")
MARKS = ("M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0", "M-3,-3h6v6h-6z", "M0,-4l4,4l-4,4l-4,-4z", "M0,-4l4,7h-8z")
"""A circle, a square, a diamond and a triangle about the origin."""
FEW = 40
"""Points up to which each has a mark."""


def heat(label: str, names: Sequence[str], matrix: Sequence[Sequence[float]]) -> Markup:
    """Draws a symmetric matrix of cosines as shaded cells with their numbers.

    Args:
        label: what the drawing shows, for those who cannot see it.
        names: of rows and columns.
        matrix: the cosines.
    """
    left, height = 12 + LETTER * max(map(len, names)), 46
    width = (WIDTH - left) / len(names)
    parts = []
    for row, (name, values) in enumerate(zip(names, matrix, strict=True)):
        middle = (row + 0.5) * height
        parts.append(_text(left - 8, middle, name, "end"))
        for column, value in enumerate(values):
            shade = "merge" if value >= 0 else "bad"
            parts.append(
                f'<rect x="{left + column * width:.1f}" y="{row * height}" width="{width:.1f}" height="{height}" '
                f'fill="var(--{shade})" fill-opacity="{0.6 * min(1.0, abs(value)):.3f}"/>'
            )
            parts.append(_text(left + (column + 0.5) * width, middle, f"{value:.3f}"))
    bottom = len(names) * height + 14
    parts += [_text(left + (i + 0.5) * width, bottom, name) for i, name in enumerate(names)]
    return _drawing(label, bottom + 12, parts)


def profile(label: str, series: Sequence[tuple[str, Sequence[float]]], x_title: str) -> Markup:
    """Draws one line a name over the units of a network, in their order.

    Args:
        label: what the drawing shows, for those who cannot see it.
        series: (name, values), all of one length, at least 2.
        x_title: what the units are.
    """
    count = len(series[0][1])
    ticks = nice_ticks(
        min(0.0, *(min(values) for _, values in series)), max(max(values) for _, values in series)
    )
    left = 14 + LETTER * max(len(f"{tick:g}") for tick in ticks)
    top, bottom, right = 10.0, 210.0, WIDTH - 10.0
    low, high = ticks[0], ticks[-1]

    def place(i: float, value: float) -> tuple[float, float]:
        return left + (right - left) * i / (count - 1), bottom - (bottom - top) * (value - low) / (high - low)

    parts = [
        f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="var(--line)"/>',
        _text((left + right) / 2, bottom + 34, x_title),
    ]
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f'<path d="M{left - 4},{y:.1f}h4" stroke="var(--line)"/>')
        parts.append(_text(left - 7, y, f"{tick:g}", "end"))
    for i in range(0, count, math.ceil(count / 9)):
        parts.append(_text(place(i, low)[0], bottom + 14, str(i)))
    for k, (_, values) in enumerate(series):
        points = [place(i, value) for i, value in enumerate(values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" {_stroke(k)}/>')
        if count <= FEW:
            parts += [_mark(k, x, y) for x, y in points]
    y = bottom + 56
    if len(series) > 1:
        wide = 44 + LETTER * max(len(name) for name, _ in series)
        columns = max(1, min(len(series), int(right - left) // wide))
        for k, (name, _) in enumerate(series):
            x, y = left + wide * (k % columns), bottom + 56 + 18 * (k // columns)
            parts.append(f'<path d="M{x:.1f},{y:.1f}h26" {_stroke(k)}/>')
            parts += [_mark(k, x + 13, y), _text(x + 33, y, name, "start")]
    return _drawing(label, y + (12 if len(series) > 1 else -10), parts)


def nice_ticks(low: float, high: float) -> list[float]:
    """Returns four to seven round numbers in equal steps that enclose the range.

    Example:
        >>> nice_ticks(0.0, 5.3)
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    """
    span = high - low if high > low else abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= 6)
    first, last = math.floor(low / step), math.ceil((low + span) / step)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _stroke(k: int) -> str:
    dash = DASHES[k % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="var(--{SERIES[k % len(SERIES)]})" stroke-width="1.5"{dashed}'


def _mark(k: int, x: float, y: float) -> str:
    colour, mark = SERIES[k % len(SERIES)], MARKS[k % len(MARKS)]
    return f'<path d="{mark}" transform="translate({x:.1f},{y:.1f})" fill="var(--{colour})"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}" font-size="12" fill="var(--ink)">'
        f"{escape(text)}</text>"
    )


def _drawing(label: str, height: float, parts: Sequence[str]) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return Markup("\n".join([head, *parts, "</svg>"]))
