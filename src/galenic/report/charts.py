"""The page's drawings: numbers in, SVG out.

Colours are names, not values: the drawing holds placeholders that become the page's CSS variables, so one drawing is
right by day and by night. Colours follow Okabe and Ito, safe for the colour-blind, and one meaning keeps one colour;
no chart tells anything by colour alone. Text stays text. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from galenic.runtime import human

from .data import Chart, Row
from .svg import SERIES

COLOURS = (
    *("ink", "muted", "line", "card"),
    *("general", "medical-basic", "medical-advanced"),
    *("base", "expert", "merge", "aligned", "flattened", "other"),
    *("bad", "good", "first", "second", "third", "fourth", "fifth", "sixth"),
)
"""Names of the page's CSS variables `--<name>`."""
MARKERS = ("o", "s", "D", "^", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
LONG = 18
"""Letters of a name that fit on one line beside a drawing."""
WIDTH = 4.8  # inches; with 9.5 point letters it reads well on a phone and beside another chart on a desk
_STYLE = {
    "svg.hashsalt": "galenic",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def colour(name: str) -> str:
    """Returns the placeholder of a named colour."""
    return f"#fe00{COLOURS.index(name):02x}"


def draw(key: str, label: str, height: float, paint: Callable[[Axes], None]) -> Markup:
    """Draws one chart as inline SVG.

    Args:
        key: unique on the page; the chart's ids begin with it.
        label: what the chart shows, for those who cannot see it.
        height: in inches.
        paint: draws on the axes.
    """
    return draw_figure(key, label, height, lambda figure: paint(figure.add_subplot()))


def draw_figure(key: str, label: str, height: float, paint: Callable[[Figure], None]) -> Markup:
    """Draws as `draw` does; `paint` makes its axes itself."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        paint(figure)
        figure.patch.set_visible(False)
        for axes in figure.axes:
            _dress(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.print_svg(buffer, metadata=nothing)
    return Markup(_inline(buffer.getvalue(), key, label))


def _dress(axes: Axes) -> None:
    """Gives axes the page's colours."""
    for side in axes.spines.values():
        side.set_color(colour("line"))
    axes.tick_params(colors=colour("muted"), length=3)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(colour("ink"))
    legend = axes.get_legend()
    for text in legend.get_texts() if legend else []:
        text.set_color(colour("ink"))
    axes.tick_params(axis="both", labelcolor=colour("ink"))
    axes.patch.set_visible(False)


def _inline(text: str, key: str, label: str) -> str:
    """Makes a stand-alone SVG file part of a page: own ids, the page's colours and fonts, its own size."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{key}-\1"', text)
    text = re.sub(r"#fe00([0-9a-f]{2})", lambda match: f"var(--{COLOURS[int(match[1], 16)]})", text)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    head = f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{escape(label)}">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    return re.sub(r"\n\s*", "\n", text)


def _joined(
    x_name: str, lines: dict[str, tuple[Sequence[float], Sequence[float]]]
) -> tuple[tuple[str, ...], list[Row]]:
    """Columns and rows of lines over one axis: a row for each place where any has a value."""
    tables = [dict(zip(*line, strict=True)) for line in lines.values()]
    places = sorted({place for table in tables for place in table})
    return (x_name, *lines), [(place, *(table.get(place) for table in tables)) for place in places]


def _counts(axis: str, axes: Axes) -> None:
    getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(5))


def smooth(values: Sequence[float], half: int) -> np.ndarray:
    """Mean over the `half` values before and after each; fewer on both sides near the ends, so it does not lag."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def thin(count: int, points: int) -> np.ndarray:
    """Returns at most `points` indices spread over `count`, both ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, points)).round().astype(int))


# ---------------------------------------------------------------------------- training


def curves(
    key: str,
    label: str,
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    y_title: str,
    phases: Sequence[tuple[str, float, float]] = (),
    crosses: Sequence[tuple[float, float]] = (),
    smoothed: bool = True,
    log: bool = False,
) -> Chart:
    """Draws quantities over training tokens.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        lines: name -> (tokens, values).
        y_title: axis title with its unit.
        phases: (name, first token, last token), marked by boundaries and numbers.
        crosses: (tokens, value) of points to mark with a cross.
        smoothed: a moving average over the raw values.
        log: logarithmic values.
    """

    def paint(axes: Axes) -> None:
        for index, (name, (tokens, values)) in enumerate(lines.items()):
            shade = colour(SERIES[index % len(SERIES)])
            keep = thin(len(values), 300)
            x, y = np.asarray(tokens, dtype=float), np.asarray(values, dtype=float)
            if smoothed:
                axes.plot(x[keep], y[keep], color=shade, linewidth=0.7, alpha=0.35)
                y = smooth(values, max(1, len(values) // 50))
            width = 1.6 if smoothed or len(values) < 3 else 1.2
            axes.plot(
                x[keep],
                y[keep],
                color=shade,
                linewidth=width,
                linestyle=DASHES[index % len(DASHES)],
                label=name,
            )
        if crosses:
            x, y = zip(*crosses, strict=True)
            axes.plot(x, y, "x", color=colour("bad"), markersize=6, markeredgewidth=1.8, label="skipped step")
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        for index, (_, first, last) in enumerate(phases):
            if index:
                axes.axvline(first, color=colour("muted"), linewidth=0.9, linestyle=(0, (3, 3)))
            axes.annotate(
                f"phase {index + 1}",
                ((first + last) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                color=colour("muted"),
                fontsize=9,
            )
        axes.set_xlabel("training tokens")
        axes.set_ylabel(y_title)
        _counts("x", axes)
        if len(lines) > 1 or crosses:
            axes.legend(loc="best")

    columns, rows = _joined("training tokens", lines)
    names = (columns[0], y_title.split(" (")[0]) if len(lines) == 1 else columns
    return Chart(svg=draw(key, label, 2.7, paint), columns=names, rows=rows)


Line = tuple[Sequence[float], Sequence[float]]
"""(tokens, values)."""


def panels(
    key: str,
    label: str,
    lines: dict[str, tuple[str, Line]],
    *,
    smoothed: bool,
    phases: Sequence[tuple[str, float, float]] = (),
) -> Chart:
    """Draws a small field for each quantity over training tokens, all on the same scales.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        lines: name -> (colour, its line).
        smoothed: a moving average over the raw values; else each value has a mark.
        phases: (name, first token, last token), marked by their boundaries.
    """
    columns = 3
    rows = -(-len(lines) // columns)

    def paint(figure: Figure) -> None:
        fields = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for place, ((name, (shade, (tokens, values))), axes) in enumerate(
            zip(lines.items(), fields, strict=False)
        ):
            x, y = np.asarray(tokens, dtype=float), np.asarray(values, dtype=float)
            keep = thin(len(x), 120)
            if smoothed:
                axes.plot(x[keep], y[keep], color=colour(shade), linewidth=0.5, alpha=0.35)
                y = smooth(values, max(1, len(values) // 30))
            marker = None if smoothed else "."
            axes.plot(x[keep], y[keep], color=colour(shade), linewidth=1.5, marker=marker, markersize=4)
            axes.set_title(name, color=colour("ink"), fontsize=9, loc="left", pad=2)
            for _, first, _ in phases[1:]:
                axes.axvline(first, color=colour("muted"), linewidth=0.7, linestyle=(0, (3, 3)))
            _counts("x", axes)
            axes.xaxis.set_major_locator(MaxNLocator(2))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelsize=8.5, labelbottom=place + columns >= len(lines))
            axes.grid(axis="y", color=colour("line"), linewidth=0.5, alpha=0.6)
        for axes in fields[len(lines) :]:
            axes.set_visible(False)

    names, table = _joined("training tokens", {name: line for name, (_, line) in lines.items()})
    return Chart(svg=draw_figure(key, label, 0.35 + 0.95 * rows, paint), columns=names, rows=table)


def measures(key: str, label: str, lines: dict[str, Line], *, smoothed: bool = True) -> Chart:
    """Draws a small field for each quantity over training steps, each on a scale of its own.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        lines: name with its unit -> (steps, values).
        smoothed: a moving average over the raw values.
    """
    columns = 2
    rows = -(-len(lines) // columns)

    def paint(figure: Figure) -> None:
        fields = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
        for place, ((name, (steps, values)), axes) in enumerate(zip(lines.items(), fields, strict=False)):
            x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
            keep = thin(len(x), 200)
            if smoothed:
                axes.plot(x[keep], y[keep], color=colour("first"), linewidth=0.6, alpha=0.35)
                y = smooth(values, max(1, len(values) // 30))
            axes.plot(x[keep], y[keep], color=colour("first"), linewidth=1.5)
            axes.set_title(name, color=colour("ink"), fontsize=9, loc="left", pad=3)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelsize=8.5, labelbottom=place + columns >= len(lines))
            axes.grid(axis="y", color=colour("line"), linewidth=0.5, alpha=0.6)
        for axes in fields[len(lines) :]:
            axes.set_visible(False)

    names, table = _joined("step", lines)
    return Chart(svg=draw_figure(key, label, 0.4 + 1.1 * rows, paint), columns=names, rows=table)


def dots(
    key: str, label: str, rows: Sequence[str], columns: dict[str, Sequence[float | None]], *, x_title: str
) -> Chart:
    """Draws one line a row with one mark a column: how a number moves from column to column.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        rows: names, from the top.
        columns: name -> a value for each row, or None.
        x_title: axis title with its unit.
    """
    beside = min(len(columns), 3 if max(map(len, columns)) <= LONG else 1)
    deep = -(-len(columns) // beside)

    def paint(axes: Axes) -> None:
        for row in range(len(rows)):
            values = [value for column in columns.values() if (value := column[row]) is not None]
            if values:
                axes.plot(
                    [min(values), max(values)], [row, row], color=colour("line"), linewidth=1.4, zorder=1
                )
        for index, (name, values) in enumerate(columns.items()):
            points = [(value, row) for row, value in enumerate(values) if value is not None]
            axes.plot(
                [value for value, _ in points],
                [row for _, row in points],
                MARKERS[index % len(MARKERS)],
                color=colour(SERIES[index % len(SERIES)]),
                markersize=5.5,
                label=name,
            )
        rows_axis(axes, rows)
        axes.set_xlabel(x_title)
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=beside, columnspacing=1.0,
                    handletextpad=0.2)  # fmt: skip

    return Chart(
        svg=draw(key, label, 0.9 + row_height(rows) * len(rows) + 0.2 * deep, paint),
        columns=("", *(f"{name}: {x_title}" for name in columns)),
        rows=[(name, *(values[i] for values in columns.values())) for i, name in enumerate(rows)],
    )


def fold(name: str) -> str:
    """Breaks a long name of a run and a model after the run."""
    return name.replace(": ", ":\n", 1) if len(name) > LONG else name


def row_height(names: Sequence[str]) -> float:
    """Inches that a row of a drawing needs, more where a name takes two lines."""
    return 0.38 if any("\n" in fold(name) for name in names) else 0.24


def rows_axis(axes: Axes, names: Sequence[str]) -> None:
    """Makes the upright axis a list of names, from the top."""
    axes.set_yticks(range(len(names)), [fold(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=colour("line"), linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)


# ---------------------------------------------------------------------------- flattening


def before_after(key: str, label: str, values: Sequence[tuple[str, float, float]], *, x_title: str) -> Chart:
    """Draws (name, mean, half width of its 95% interval) as points with whiskers."""

    def paint(axes: Axes) -> None:
        for row, (_, mean, half) in enumerate(values):
            axes.errorbar(
                mean,
                row,
                xerr=half,
                fmt=MARKERS[row % len(MARKERS)],
                color=colour(("base", "flattened", "merge")[min(row, 2)]),
                markersize=7,
                capsize=4,
                linewidth=1.6,
            )
        rows_axis(axes, [name for name, _, _ in values])
        axes.set_xlabel(x_title)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return Chart(
        svg=draw(key, label, 1.0 + max(0.35, row_height([name for name, *_ in values])) * len(values), paint),
        columns=("", x_title, "low", "high"),
        rows=[(name, mean, mean - half, mean + half) for name, mean, half in values],
    )
