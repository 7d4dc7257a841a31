"""What experiments over seeds share: resumable units of work on one thread each, paired intervals, tables, figures.

A unit is one training run (or a few that share a beginning) with one seed. It writes one JSON file, atomically; a
script that is killed and started again computes the missing ones only.
"""

import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galenic.runtime import duration, read_json, write_json

# ---------------------------------------------------------------------------- units


def run_units(
    work: Callable[..., dict[str, Any]],
    units: dict[str, dict[str, Any]],
    folder: Path,
    *,
    workers: int,
    settings: Any = None,
    needs: Mapping[str, Collection[str]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Computes `work(**arguments)` of every unit whose result is not on disk yet, in processes of one thread each.

    Args:
        work: a function of a module; its result is written as JSON.
        units: name -> keyword arguments; begun in this order, as far as `needs` allows.
        folder: holds `<name>.json`, each with a fingerprint of the unit's arguments and `settings`: a file made with
            others is made again.
        workers: processes at a time.
        settings: what else the results depend on, as JSON.
        needs: name -> units that have to be done before it begins.

    Returns:
        Name -> result, in the order of `units`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = {name: fingerprint([arguments, settings]) for name, arguments in units.items()}
    missing = [name for name in units if stored(folder / f"{name}.json", keys[name]) is None]
    if missing:
        # Children read these when they load their libraries, which is before any code of ours runs there.
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        started = time.monotonic()
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        waiting, running, done = list(missing), dict[Future[None], str](), 0
        try:
            while waiting or running:
                open_units = {*waiting, *running.values()}
                for name in list(waiting):
                    if len(running) < workers and open_units.isdisjoint((needs or {}).get(name, ())):
                        waiting.remove(name)
                        submitted = pool.submit(_one, work, units[name], folder / f"{name}.json", keys[name])
                        running[submitted] = name
                if not running:
                    raise ValueError(f"units that need each other: {waiting}")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, done = running.pop(future), done + 1
                    future.result()
                    elapsed = time.monotonic() - started
                    left = elapsed / done * (len(missing) - done)
                    print(
                        f"  {done} of {len(missing)} units: {name}; {duration(elapsed)}, "
                        f"about {duration(left)} left",
                        file=sys.stderr,
                        flush=True,
                    )
        finally:
            pool.shutdown(cancel_futures=True)  # where one failed, those not begun would fail as well
    return {name: read_json(folder / f"{name}.json")["result"] for name in units}


def _one(work: Callable[..., dict[str, Any]], arguments: dict[str, Any], path: Path, key: str) -> None:
    started = time.monotonic()
    result = work(**arguments) | {"seconds": round(time.monotonic() - started, 1)}
    write_json(path, {"key": key, "result": result})


def fingerprint(value: Any) -> str:
    """Returns a hash of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def stored(path: Path, key: str) -> dict[str, Any] | None:
    """Returns the result in a unit's file, or None if there is none made with this key."""
    if not path.exists():
        return None
    found = read_json(path)
    return found["result"] if found["key"] == key else None


# ---------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95% interval (Student's t)."""

    mean: float
    margin: float

    def words(self, digits: int = 3, sign: bool = False) -> str:
        """`+0.012 ± 0.004`."""
        return f"{self.mean:{'+' if sign else ''}.{digits}f} ± {self.margin:.{digits}f}"

    @property
    def decided(self) -> bool:
        """Zero lies outside."""
        return abs(self.mean) > self.margin


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean of independent values and its 95% interval; one value has none (infinite)."""
    from galenic.flatten.curvature import student_quantile

    if len(values) < 2:
        return Interval(values[0] if values else math.nan, math.inf)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), student_quantile(0.95, len(values) - 1) * spread)


def paired(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Returns the interval of the differences values - reference, seed by seed."""
    return interval([a - b for a, b in zip(values, reference, strict=True)])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yields a Markdown table: the first column to the left, the others to the right."""
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def band(curves: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (mean, low, high) of curves over seeds, point by point; low to high is the mean's 95% interval."""
    points = [interval(column) for column in zip(*curves, strict=True)]
    mean = np.array([point.mean for point in points])
    margin = np.array([point.margin for point in points])
    return mean, mean - margin, mean + margin


# ---------------------------------------------------------------------------- figures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, safe for the colour-blind."""
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))


@contextmanager
def figure(path: Path, panels: int = 1, height: float = 3.0) -> Iterator[Any]:
    """Yields the axes of a figure of `panels` side by side and writes it as SVG; the same numbers give the same bytes.

    Text stays text, the ground is white: it is read on pages of either shade.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "galenic",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(4.4 * panels, height), layout="constrained")
        canvas = FigureCanvasSVG(drawn)
        axes = drawn.subplots(1, panels)
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_svg(str(path), metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def draw_band(axes: Any, k: int, name: str, x: Sequence[float], curves: Sequence[Sequence[float]]) -> None:
    """Draws the mean of curves over seeds with its 95% interval, in series k's colour and dashes."""
    mean, low, high = band(curves)
    axes.plot(x, mean, color=COLOURS[k], linestyle=DASHES[k], linewidth=1.4, label=name)
    axes.fill_between(x, low, high, color=COLOURS[k], alpha=0.15, linewidth=0)


def log_scale(axes: Any) -> None:
    """Makes the upright axis logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
