"""The tables of benchmarks/flattening.py: numbers read off its runs, and their intervals."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flattening_methods import EQUAL_LOSS

from galenic.flatten.curvature import student_quantile
from galenic.runtime import read_json

Row = dict[str, Any]
Value = Callable[[Row], float | None]
"""A run -> a number, None where it was not measured."""

SHOWN = (
    "SOS",
    "truncated to K",
    "truncated to K-1",
    "ridge 0.1",
    "ridge 0.3",
    "selected",
    "early stopping",
    "head fitted anew by ridge",
)
CAUTIONS = (1.0, 2.0)
"""Standard errors that an improvement on validation must exceed; 1 is `select_shift`'s default."""


# ---------------------------------------------------------------------------- numbers


class Interval(NamedTuple):
    """A mean over seeds with half the width of its 95% interval (Student's t)."""

    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.margin:.2f}" if self.margin < math.inf else f"{self.mean:+.2f}"

    @property
    def low(self) -> float:
        return self.mean - self.margin

    @property
    def high(self) -> float:
        return self.mean + self.margin


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean of independent values and its 95% interval; one value has no interval."""
    count = len(values)
    if count < 2:
        return Interval(values[0] if values else math.nan, math.inf)
    quantile = student_quantile(0.95, count - 1)
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count))


def over_seeds(runs: Iterable[Row], value: Value) -> Interval:
    """Pools runs: the mean of each seed first, for runs of one seed share their data, then over seeds."""
    found = defaultdict(list)
    for run in runs:
        number = value(run)
        if number is not None and math.isfinite(number):
            found[run["run"]["seed"]].append(number)
    return interval([statistics.fmean(numbers) for numbers in found.values()])


def sign_test(values: Sequence[float]) -> tuple[int, int, float]:
    """Returns how many values are positive, how many are not zero, and the exact two-sided p of a fair coin."""
    moved = [value for value in values if value]
    up, count = sum(value > 0 for value in moved), len(moved)
    tail = sum(math.comb(count, k) for k in range(min(up, count - up) + 1)) / 2**count
    return up, count, min(1.0, 2 * tail)


# ---------------------------------------------------------------------------- what is read off a run


def gained(method: str, key: str = "accuracy", part: str = "test") -> Value:
    """A method's score less the original's."""

    def value(run: Row) -> float | None:
        rows = run["rows"]
        return None if method not in rows else rows[method][part][key] - rows["original"][part][key]

    return value


def curved(method: str, kind: str = "body", against: str = "matched") -> Value:
    """Logarithm of a method's trace over the original's at the same training loss (or as it is: `curvature`)."""

    def value(run: Row) -> float | None:
        rows = run["rows"]
        own = rows.get(method, {}).get("curvature")
        other = rows.get(method, {}).get("matched") if against == "matched" else rows["original"]["curvature"]
        if not own or not other or (kind == "top" and "top" not in own):
            return None
        return math.log(size(own, kind) / size(other, kind))

    return value


def size(curvature: dict[str, float], kind: str) -> float:
    return curvature["body"] + curvature["head"] if kind == "whole" else curvature[kind]


def ratio(found: Interval) -> str:
    """Writes an interval of logarithms as a ratio."""
    if math.isnan(found.mean):
        return "-"
    text = f"{math.exp(found.mean):.3f}"
    if math.isinf(found.margin):
        return text
    return f"{text} ({math.exp(found.low):.3f} to {math.exp(found.high):.3f})"


def condition(run: Row) -> str:
    """Says in words what a run is, but for its seed."""
    told = run["run"]
    words = [told["data"], told["net"], told["optimiser"], f"decay {told['decay']:g}"]
    words.append("20% noise" if told["noise"] else "clean")
    return ", ".join(words + ([told["trick"]] if told["trick"] != "none" else []))


def where(runs: Iterable[Row], **wanted: Any) -> list[Row]:
    """Returns the runs with these settings; a tuple allows several values."""

    def fits(run: Row) -> bool:
        return all(
            run["run"][key] in (value if isinstance(value, tuple) else (value,))
            for key, value in wanted.items()
        )

    return [run for run in runs if fits(run)]


# ---------------------------------------------------------------------------- tables


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["--:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracies(groups: dict[str, list[Row]]) -> str:
    """Test accuracy of the original and what each method adds, a line for each kind of run."""
    rows = []
    for name, runs in groups.items():
        own = [run["rows"]["original"] for run in runs]
        train = statistics.fmean(row["train"]["accuracy"] for row in own)
        mean = statistics.fmean(row["test"]["accuracy"] for row in own)
        changes = [str(over_seeds(runs, gained(method))) for method in SHOWN]
        rows.append([name, str(len(runs)), f"{train:.1f}", f"{mean:.2f}", *changes])
    return markdown(["run", "seeds", "train, %", "original, %", *SHOWN], rows)


def details(runs: list[Row]) -> str:
    """All that was measured of every method, in one kind of run."""
    rows = []
    for method in runs[0]["rows"]:
        own = [run["rows"][method] for run in runs if method in run["rows"]]
        moved = statistics.fmean(row["norm"] for row in own)
        loss = math.exp(statistics.fmean(math.log(row["train"]["loss"]) for row in own))
        cells = [method, f"{moved:.2f}", f"{loss:.2e}"]
        for key, digits in (("accuracy", 2), ("loss", 3), ("ece", 1)):
            if method == "original":
                cells.append(f"{statistics.fmean(row['test'][key] for row in own):.{digits}f}")
            else:
                found = over_seeds(runs, gained(method, key))
                cells.append(f"{found.mean:+.{digits}f} ± {found.margin:.{digits}f}")
        if method == "original":
            sizes = [statistics.fmean(row["curvature"][k] for row in own) for k in ("body", "head")]
            tops = [row["curvature"]["top"] for row in own if "top" in row["curvature"]]
            cells += [
                f"{sizes[0]:.1f}",
                f"{sum(sizes):.1f}",
                f"{statistics.fmean(tops):.2f}" if tops else "-",
            ]
        else:
            cells += [ratio(over_seeds(runs, curved(method, kind))) for kind in ("body", "whole", "top")]
        rows.append(cells)
    headings = ["method", "head norm", "train loss", "test, %", "NLL", "ECE, %"]
    return markdown([*headings, "trace, body", "trace, all", "top eigenvalue"], rows)


def trainings(runs: list[Row]) -> str:
    """Ways to train against the plain one, seed by seed."""
    rows = []
    for noise in (0.2, 0.0):
        for trick in TRICKS:
            both = against(runs, trick, noise)
            if not both:
                continue
            train = statistics.fmean(run["rows"]["original"]["train"]["accuracy"] for run in both)
            cells = ["noisy" if noise else "clean", TRICKS[trick], f"{train:.1f}"]
            cells += [str(over_seeds(both, against_plain(key))) for key in ("accuracy", "loss", "ece")]
            cells.append(ratio(over_seeds(both, equal_trace)))
            rows.append(cells)
    return markdown(
        ["labels", "training", "train, %", "test, points", "NLL", "ECE, %", f"trace at loss {EQUAL_LOSS}"],
        rows,
    )


TRICKS = {
    "shift": "SOS in training",
    "sam": "SAM",
    "mixup": "Mixup",
    "swa": "SWA",
    "smoothing": "label smoothing",
}


def against(runs: list[Row], trick: str, noise: float) -> list[Row]:
    """Returns the MLP's runs with a trick, each with the plain run of its seed beside it."""
    alike = where(runs, data="fashion", net="mlp", optimiser="sgd", decay=5e-4, noise=noise)
    plain = {run["run"]["seed"]: run for run in where(alike, trick="none")}
    chosen = where(alike, trick=trick)
    return [run | {"plain": plain[seed]} for run in chosen if (seed := run["run"]["seed"]) in plain]


def against_plain(key: str) -> Value:
    def value(run: Row) -> float:
        return run["rows"]["original"]["test"][key] - run["plain"]["rows"]["original"]["test"][key]

    return value


def equal_trace(run: Row) -> float | None:
    """Logarithm of the ratio of whole traces, both networks' logits scaled to one training loss."""
    own, other = run["rows"]["original"].get("equal"), run["plain"]["rows"]["original"].get("equal")
    if not own or not other:
        return None
    return math.log(size(own, "whole") / size(other, "whole"))


def choice(run: Row, caution: float) -> int | None:
    """Returns which candidate is selected when an improvement must exceed so many standard errors."""
    tried = run["rows"]["selected"]["tried"]
    fit = [index for index, (mean, error) in enumerate(tried) if mean < -caution * error]
    return min(fit, key=lambda index: tried[index][0]) if fit else None


def change(run: Row, caution: float) -> float:
    """Returns the points that this selection changes."""
    rows, index = run["rows"], choice(run, caution)
    if index is None:
        return 0.0
    return rows["selected"]["candidates"][index] - rows["original"]["test"]["accuracy"]


def best_candidate(run: Row) -> float:
    """What the best choice would change, known only from the test."""
    rows = run["rows"]
    return max(0.0, max(rows["selected"]["candidates"]) - rows["original"]["test"]["accuracy"])


def selections(groups: dict[str, list[Row]]) -> str:
    """What choosing by validation changes, a line for each kind of run."""
    rows = []
    for name, runs in groups.items():
        cells = [name]
        for caution in CAUTIONS:
            kept = sum(choice(run, caution) is None for run in runs)
            worst = min(change(run, caution) for run in runs)
            found = over_seeds(runs, partial(change, caution=caution))
            cells += [str(found), f"{worst:+.2f}", f"{kept} of {len(runs)}"]
        rows.append([*cells, str(over_seeds(runs, best_candidate))])
    words = [
        f"{word}, caution {caution:g}" for caution in CAUTIONS for word in ("points", "worst run", "kept")
    ]
    return markdown(["run", *words, "best candidate"], rows)


def by_condition(runs: Iterable[Row]) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for run in runs:
        groups[condition(run)].append(run)
    return dict(groups)


def load(folder: Path) -> list[Row]:
    """Reads all runs of a folder."""
    return [read_json(path) for path in folder.glob("*.json")]
