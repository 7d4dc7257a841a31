"""Drawings of the pages beside merged and flattened models, made without a library.

To load one takes longer than all the rest of a page. As in `charts`, colours are the page's CSS variables and nothing
is told by colour alone; numbers in, SVG out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, LETTER = 440, 7
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
        parts.append(text(left - 8, middle, name, "end"))
        for column, value in enumerate(values):
            shade = "merge" if value >= 0 else "bad"
            parts.append(
                f'<rect x="{left + column * width:.1f}" y="{row * height}" width="{width:.1f}" height="{height}" '
                f'fill="var(--{shade})" fill-opacity="{0.6 * min(1.0, abs(value)):.3f}"/>'
            )
            parts.append(text(left + (column + 0.5) * width, middle, f"{value:.3f}"))
    bottom = len(names) * height + 14
    parts += [text(left + (i + 0.5) * width, bottom, name) for i, name in enumerate(names)]
    return drawing(label, bottom + 12, parts)


def shares(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
) -> Markup:
    """Draws shares as shaded cells with their percents, the stronger the more; a cell without one stays empty.

    Args:
        label: what the drawing shows, for those who cannot see it.
        rows: names, from the top.
        columns: names.
        values: a row of shares in [0, 1] for each of `rows`.
        title: what rows and columns are.
    """
    left, height = 14 + LETTER * max(map(len, rows)), 34
    width = (WIDTH - left) / len(columns)
    parts = []
    for row, (name, line) in enumerate(zip(rows, values, strict=True)):
        middle = (row + 0.5) * height
        parts.append(text(left - 8, middle, name, "end"))
        for column, value in enumerate(line):
            if value is None:
                continue
            parts.append(
                f'<rect x="{left + column * width:.1f}" y="{row * height}" width="{width:.1f}" height="{height}" '
                f'fill="var(--merge)" fill-opacity="{0.6 * value:.3f}"/>'
            )
            parts.append(text(left + (column + 0.5) * width, middle, f"{100 * value:.0f}%"))
    bottom = len(rows) * height + 14
    parts += [text(left + (i + 0.5) * width, bottom, name) for i, name in enumerate(columns)]
    parts.append(text(left + (WIDTH - left) / 2, bottom + 20, title))
    return drawing(label, bottom + 32, parts)


def profile(label: str, series: Sequence[tuple[str, Sequence[float]]], x_title: str) -> Markup:
    """Draws one line a name over the units of a network, in their order.

    Args:
        label: what the drawing shows, for those who cannot see it.
        series: (name, values), all of one length, at least 2.
        x_title: what the units are.
    """
    count = len(series[0][1])
    lowest = min(0.0, *(min(values) for _, values in series))
    x = Axis(x_title, 0, count - 1, range(0, count, math.ceil(count / 9)))
    y = linear("", lowest, max(max(values) for _, values in series))
    parts, place = frame(x, y)
    for k, (_, values) in enumerate(series):
        points = [place(i, value) for i, value in enumerate(values)]
        parts.append(polyline(points, stroke(k)))
        if count <= FEW:
            parts += [mark(k, *point) for point in points]
    if len(series) == 1:
        return drawing(label, BOTTOM + 46, parts)
    more, height = legend([(stroke(k), mark(k, 0, 0), name) for k, (name, _) in enumerate(series)])
    return drawing(label, height, parts + more)


# ---------------------------------------------------------------------------- axes

TOP, BOTTOM = 10.0, 210.0
"""Of the field between the axes; it begins lower where the upright axis has a title."""


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, even or logarithmic."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value stands: 0 at the low end, 1 at the high one; beyond them at the nearer one."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)

    def name(self, tick: float) -> str:
        """A tick's label: powers of ten on a logarithmic scale."""
        if self.log and tick != 1:
            return "10" + str(round(math.log10(tick))).translate(_RAISED)
        return f"{tick:g}".replace("-", "\u2212")


_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def linear(title: str, low: float, high: float) -> Axis:
    """Returns an even scale that encloses the range."""
    ticks = nice_ticks(low, high)
    return Axis(title, ticks[0], ticks[-1], ticks)


def logarithmic(title: str, low: float, high: float) -> Axis:
    """Returns a logarithmic scale from one power of ten to another that encloses the range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    step = math.ceil((last - first) / 6)
    return Axis(title, 10.0**first, 10.0**last, [10.0**i for i in range(last, first - 1, -step)], log=True)


def frame(
    x: Axis, y: Axis, bottom: float = BOTTOM
) -> tuple[list[str], Callable[[float, float], tuple[float, float]]]:
    """Draws two axes; returns the parts and the function that places (x, y) between them."""
    left = 14.0 + LETTER * max(len(y.name(tick)) for tick in y.ticks)
    top, right = TOP + 20 * bool(y.title), WIDTH - 14.0

    def place(across: float, up: float) -> tuple[float, float]:
        return left + (right - left) * x.share(across), bottom - (bottom - top) * y.share(up)

    parts = [f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="var(--line)"/>']
    if x.title:
        parts.append(text((left + right) / 2, bottom + 34, x.title))
    if y.title:
        parts.append(text(2, 6, y.title, "start"))
    for tick in y.ticks:
        _, height = place(x.low, tick)
        parts.append(f'<path d="M{left - 4},{height:.1f}h4" stroke="var(--line)"/>')
        parts.append(text(left - 7, height, y.name(tick), "end"))
    for tick in x.ticks:
        parts.append(text(place(tick, y.low)[0], bottom + 14, x.name(tick)))
    return parts, place


def legend(entries: Sequence[tuple[str, str, str]], y: float = BOTTOM + 56) -> tuple[list[str], float]:
    """Draws (stroke, mark about the origin, name) in columns below a drawing; returns its parts and where it ends.

    Either of stroke and mark may be empty.
    """
    left = 10.0
    wide = 44 + LETTER * max(len(name) for *_, name in entries)
    columns = max(1, min(len(entries), (WIDTH - 24) // wide))
    parts = []
    for k, (line, sign, name) in enumerate(entries):
        x, y_k = left + wide * (k % columns), y + 18 * (k // columns)
        if line:
            parts.append(f'<path d="M{x:.1f},{y_k:.1f}h26" fill="none" {line}/>')
        if sign:
            parts.append(f'<g transform="translate({x + 13:.1f},{y_k:.1f})">{sign}</g>')
        parts.append(text(x + 33, y_k, name, "start"))
    return parts, y + 18 * ((len(entries) - 1) // columns) + 12


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


# ---------------------------------------------------------------------------- strokes, marks, words


def stroke(k: int, colour: str = "", width: float = 1.5) -> str:
    """Returns the attributes of series k's lines, in its own colour if none is named."""
    dash = DASHES[k % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="var(--{colour or SERIES[k % len(SERIES)]})" stroke-width="{width:g}"{dashed}'


def polyline(points: Sequence[tuple[float, float]], attributes: str) -> str:
    """Returns a line through points."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{line}" fill="none" {attributes}/>'


def mark(k: int, x: float, y: float, colour: str = "", size: float = 1.0, title: str = "") -> str:
    """Returns series k's mark at a point, in its own colour if none is named; `title` shows under the pointer."""
    scale = f" scale({size:g})" if size != 1 else ""
    head = (
        f'<path d="{MARKS[k % len(MARKS)]}" transform="translate({x:.1f},{y:.1f}){scale}" '
        f'fill="var(--{colour or SERIES[k % len(SERIES)]})"'
    )
    return f"{head}><title>{escape(title)}</title></path>" if title else f"{head}/>"


def text(x: float, y: float, words: str, anchor: str = "middle", turn: float = 0.0) -> str:
    """Returns words at a point, turned by so many degrees."""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}" font-size="12" fill="var(--ink)"{turned}>'
        f"{escape(words)}</text>"
    )


def drawing(label: str, height: float, parts: Sequence[str]) -> Markup:
    """Returns the whole drawing; `label` says what it shows, for those who cannot see it."""
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return Markup("\n".join([head, *parts, "</svg>"]))
