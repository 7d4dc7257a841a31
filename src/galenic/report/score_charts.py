"""Drawings of scores: bars with intervals, points with intervals, and a radar of several measures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import charts
from .charts import DASHES, MARKERS, colour, row_height, rows_axis
from .data import Chart
from .svg import SERIES

Bar = tuple[str, str, float, float, float]
"""(name, group, value, low, high); low = value = high draws no whisker."""
Measure = tuple[float, float, float]
"""(value, low, high)."""


def bars(
    key: str, label: str, models: Sequence[Bar], *, mark: float | None, mark_name: str = "", x_title: str
) -> Chart:
    """Draws one bar a model with its interval, and a line to compare with.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        models: from the top.
        mark: where the line stands, if there is one.
        mark_name: what the line means.
        x_title: axis title with its unit.
    """

    def paint(axes: Axes) -> None:
        places = np.arange(len(models))
        shades = [colour(group) for _, group, *_ in models]
        values, low, high = np.array([numbers for _, _, *numbers in models]).T
        axes.barh(places, values, height=0.66, color=shades, alpha=0.85, linewidth=0)
        if np.any(low < high):
            whiskers = [values - low, high - values]
            axes.errorbar(
                values, places, xerr=whiskers, fmt="none", ecolor=colour("ink"), capsize=2.5, elinewidth=1.1
            )
        right = 1.06 * max(mark or 0.0, *(high for *_, high in models)) or 1.0
        if mark is not None:
            axes.axvline(mark, color=colour("ink"), linewidth=1.3, linestyle=(0, (4, 2)))
            axes.annotate(
                mark_name,
                (mark, 1.0),
                xycoords=("data", "axes fraction"),
                ha="right" if mark > 0.7 * right else "center",
                va="bottom",
                color=colour("ink"),
                fontsize=9,
            )
        rows_axis(axes, [name for name, *_ in models])
        axes.set_xlim(0, right)
        axes.set_xlabel(x_title)

    return Chart(
        svg=charts.draw(key, label, 1.0 + row_height([name for name, *_ in models]) * len(models), paint),
        columns=("model", x_title.split(" (")[0], "low", "high"),
        rows=[(name, *numbers) for name, _, *numbers in models],
    )


def differences(key: str, label: str, rows: Sequence[tuple[str, Measure, str]], *, x_title: str) -> Chart:
    """Draws differences as points with their intervals about a line at none.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        rows: (name, difference, verdict), from the top.
        x_title: axis title with its unit.
    """
    shades = {"better": "good", "worse": "bad"}

    def paint(axes: Axes) -> None:
        axes.axvline(0.0, color=colour("muted"), linewidth=1.0)
        for place, (_, (value, low, high), verdict) in enumerate(rows):
            axes.errorbar(
                value,
                place,
                xerr=[[value - low], [high - value]],
                fmt={"better": "^", "worse": "v"}.get(verdict, "o"),
                color=colour(shades.get(verdict, "muted")),
                markersize=6,
                capsize=3,
                linewidth=1.5,
            )
        rows_axis(axes, [name for name, *_ in rows])
        axes.set_xlabel(x_title)

    return Chart(
        svg=charts.draw(key, label, 1.0 + 0.28 * len(rows), paint),
        columns=("", x_title.split(" (")[0], "low", "high", "verdict"),
        rows=[(name, *measure, verdict) for name, measure, verdict in rows],
    )


def radar(key: str, label: str, measures: Sequence[str], models: dict[str, Sequence[Measure]]) -> Chart:
    """Draws each model as a closed line over measures from 0 to 100, its intervals as a band.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        measures: names, from the top, clockwise; at least 3.
        models: name -> (value, low, high) of each measure, in percent.
    """
    angles = np.linspace(0, 2 * np.pi, len(measures), endpoint=False)
    closed = np.append(angles, angles[0])
    most = max(high for values in models.values() for *_, high in values)
    rim = min(100.0, 10.0 * np.ceil(most / 10))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(projection="polar")
        axes.set_theta_zero_location("N")  # pyrefly: ignore[missing-attribute]
        axes.set_theta_direction(-1)  # pyrefly: ignore[missing-attribute]
        for place, (name, values) in enumerate(models.items()):
            line, low, high = (np.append(part, part[0]) for part in np.array(values).T)
            shade = colour(SERIES[place % len(SERIES)])
            axes.fill_between(closed, low, high, color=shade, alpha=0.13, linewidth=0)
            axes.plot(
                closed,
                line,
                color=shade,
                linewidth=1.6,
                linestyle=DASHES[place % len(DASHES)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=4,
                label=name,
            )
        axes.set_xticks(angles, measures)
        axes.set_ylim(0, rim)
        ticks = np.arange(0, rim + 1, 10.0 if rim <= 50 else 20.0)[1:]
        axes.set_yticks(ticks, [f"{tick:g}%" for tick in ticks])
        axes.set_rlabel_position(180 / len(measures))  # pyrefly: ignore[missing-attribute]
        axes.grid(color=colour("line"), linewidth=0.6)
        axes.spines["polar"].set_color(colour("line"))
        axes.tick_params(axis="x", pad=7)
        axes.tick_params(axis="y", labelsize=8)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, columnspacing=1.2)

    rows = [
        (name, measure, *values)
        for name, each in models.items()
        for measure, values in zip(measures, each, strict=True)
    ]
    svg = charts.draw_figure(key, label, 4.1 + 0.22 * -(-len(models) // 2), paint)
    return Chart(svg=svg, columns=("model", "measure", "right, %", "low", "high"), rows=rows)


def reliability(key: str, label: str, lines: dict[str, Sequence[tuple[float, float, float]]]) -> Chart:
    """Draws how often a model is right by how sure it is, a line a kind of questions; the diagonal is as it should be.

    Args:
        key: unique on the page.
        label: for those who cannot see it.
        lines: name -> (mean confidence, accuracy, answers) of each bin, all shares in [0, 1].
    """

    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=colour("muted"), linewidth=1.0, linestyle=(0, (4, 3)))
        for place, (name, bins) in enumerate(lines.items()):
            axes.plot(
                [100 * sure for sure, *_ in bins],
                [100 * right for _, right, _ in bins],
                color=colour(SERIES[place % len(SERIES)]),
                marker=MARKERS[place % len(MARKERS)],
                linestyle=DASHES[place % len(DASHES)],
                markersize=4.5,
                linewidth=1.4,
                label=name,
            )
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel("how sure, %")
        axes.set_ylabel("right, %")
        axes.legend(loc="upper left")

    rows = [(name, *numbers) for name, bins in lines.items() for numbers in bins]
    return Chart(
        svg=charts.draw(key, label, 3.2, paint),
        columns=("kind", "confidence", "accuracy", "answers"),
        rows=rows,
    )
