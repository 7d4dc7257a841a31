"""Differences of two models on the same items: pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from galenic.evaluate.statistics import Z95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of b less a over items, its 95% interval, and how likely one as large is if there is none."""

    value: float
    low: float
    high: float
    p: float
    n: int


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compares the scores of two models on the same items, item by item.

    With d_i = b_i - a_i: mean(d) +- 1.96 s / sqrt(n), where s is the standard deviation of d about its mean and n the
    number of items; p = erfc(|mean| sqrt(n) / (s sqrt(2))), two-sided. The normal law holds for dozens of items that
    differ; below that, `galenic evaluate --compare` is exact.

    Args:
        a: scores in [0, 1], shape (items,).
        b: of the other model, in the same order.
    """
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    n = len(gaps)
    mean = sum(gaps) / n
    variance = sum((gap - mean) ** 2 for gap in gaps) / max(n - 1, 1)
    error = math.sqrt(variance / n)
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    return Difference(value=mean, low=mean - Z95 * error, high=mean + Z95 * error, p=p, n=n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values for being several (Holm 1979): the k-th smallest of m times m - k + 1, never falling.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def verdict(difference: float, adjusted: float) -> str:
    """Returns `better`, `worse` or, from an adjusted p of 0.05 on, `undecided`."""
    if adjusted >= 0.05:
        return "undecided"
    return "better" if difference > 0 else "worse"
