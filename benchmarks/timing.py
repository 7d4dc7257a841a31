"""What the speed benchmarks share: what they ran on, fair turns, medians with intervals."""

import math
import os
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import NamedTuple


class Interval(NamedTuple):
    median: float
    low: float
    high: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Median and its order-statistic interval: the innermost pair of ranks that holds the true median so surely.

    Ranks k and n + 1 - k hold it with probability 1 - 2 P(Binomial(n, 1/2) < k), whatever the distribution. Fewer
    than six values never reach 95%: then the interval is the whole range.
    """
    ordered, n = sorted(values), len(values)
    rank, outside = 1, 2 * 0.5**n
    while outside + (more := 2 * math.comb(n, rank) * 0.5**n) <= 1 - confidence:
        rank, outside = rank + 1, outside + more
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


def take_turns(
    contenders: dict[str, Callable[[], float]],
    repeats: int,
    seconds: float = 0.0,
    patience: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Runs all contenders in turn, `repeats` times or until `seconds` have passed, whichever is later.

    Value i of one contender and value i of another were measured within one turn, so their ratio does not notice
    that the machine was slower an hour, or a second, earlier. Each turn has an order of its own: whoever comes after a
    long wait finds its caches cold, and it should not always be the same one.

    Args:
        contenders: name -> function that does the work once and returns the seconds of the part that counts.
        repeats: turns at least.
        seconds: for quick work: turns go on for at least so long.
        patience: name -> seconds after which a slow contender, having had three turns, sits out the rest.

    Returns:
        Name -> seconds of each turn.
    """
    names, times = list(contenders), {name: [] for name in contenders}
    patience = patience or {}
    shuffle = random.Random(0).sample
    begin, turn = perf_counter(), 0
    while turn < repeats or perf_counter() - begin < seconds:
        for name in shuffle(names, len(names)):
            if len(times[name]) < 3 or sum(times[name]) < patience.get(name, math.inf):
                times[name].append(contenders[name]())
        turn += 1
    return times


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median and 95% interval of the ratios within each turn that both took."""
    return median_interval([a / b for a, b in zip(numerator, denominator, strict=False)])


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def conditions(threads: int, *more: str) -> str:
    """The line above every table: date, machine, versions, and how busy the machine was before we began."""
    load = f"{os.getloadavg()[0]:.2f}"
    parts = [
        f"{date.today()}",
        f"{processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}",
    ]
    parts += [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return "; ".join([*parts, *more, f"load average {load} at the start"])
