"""Intervals and averages: pure functions on numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution
RESAMPLES = 10_000
"""Draws of a bootstrap or a permutation test."""


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion.

    The set of p whose normal approximation would not reject the observed share at level z: the roots of
    (share - p)^2 = z^2 p (1 - p) / n. Unlike share +- z sqrt(share (1 - share) / n) it stays inside [0, 1] and has a
    width when every answer is right.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), pages 209-212.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n > 0")
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the roots are 0 and 1 exactly; rounding would leave them beside the share.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def normalised_average(scores: Mapping[str, float], experts: Mapping[str, float]) -> float | None:
    """Returns the mean over benchmarks of score / score of that benchmark's own expert.

    None when there are no experts or an expert scores 0, where the ratio has no meaning.

    Args:
        scores: benchmark -> the model's score.
        experts: benchmark -> the score of the expert of its domain.

    Source: MetaGPT (arXiv 2406.11385), section 4, "normalized average"; reproduces its Tables 1-3.
    """
    if not experts or any(score == 0 for score in experts.values()):
        return None
    return math.fsum(scores[name] / expert for name, expert in experts.items()) / len(experts)


# ---------------------------------------------------------------------------- graded scores


def mean_interval(scores: Sequence[float] | np.ndarray, z: float = Z95) -> tuple[float, float]:
    """Returns the interval of a mean of n scores in [0, 1], which need not be 0 or 1.

    Wilson's interval with the effective number of answers n m (1 - m) / s^2, where m is the mean and s^2 the scores'
    variance: as many right-or-wrong answers as would leave m equally uncertain. For scores of 0 and 1 it is `wilson`
    exactly. Where all scores are the same nothing is known of their spread, and the largest one possible is taken, n.

    Source: P. S. Kott, P. G. Andersson, O. Nerman, FCSM Research Conference 2001, who put an effective sample size into
    Wilson's interval; E. L. Korn, B. I. Graubard, Survey Methodology 24 (1998), pages 193-201, for that size.
    """
    values = _scores(scores)
    n, mean, variance = len(values), float(values.mean()), float(values.var())
    effective = n * mean * (1 - mean) / variance if variance > 1e-12 else n
    return wilson(mean * effective, effective, z) if 0 < mean < 1 else wilson(round(mean) * n, n, z)


def summary(scores: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Returns {"value", "low", "high", "n"} of scores in [0, 1]; no value without scores."""
    if not len(scores):
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = mean_interval(scores)
    return {"value": float(_scores(scores).mean()), "low": low, "high": high, "n": len(scores)}


def _scores(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("need at least one score, all in [0, 1]")
    return values


# ---------------------------------------------------------------------------- two models on the same items


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


def resampled_means(columns: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns the columns' means over items drawn anew with replacement, all columns from the same draw.

    The order of the items plays no part. Where few different rows occur, as with scores of 0 and 1, how often each is
    drawn is multinomial, which spares drawing them one by one.

    Args:
        columns: (items, columns) float.
        resamples: draws.
        seed: of the draws.

    Returns:
        (resamples, columns) float64.

    Source: B. Efron, The Annals of Statistics 7 (1979), pages 1-26.
    """
    rows = np.asarray(columns, dtype=np.float64)
    n, random = len(rows), np.random.Generator(np.random.Philox(key=seed))
    different, counts = np.unique(rows, axis=0, return_counts=True)
    if len(different) <= 32:
        return random.multinomial(n, counts / n, size=resamples) @ different / n
    rows = np.repeat(different, counts, axis=0)
    means = np.empty((resamples, rows.shape[1]))
    for first, count in _blocks(resamples, n):
        drawn = random.integers(n, size=(count, n)) + np.arange(count)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means[first : first + count] = times @ rows / n
    return means


def _blocks(resamples: int, n: int) -> Iterator[tuple[int, int]]:
    """Splits draws of n items into blocks (first, draws) of a few megabytes."""
    step = max(1, 2**19 // n)
    return ((first, min(step, resamples - first)) for first in range(0, resamples, step))


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Returns the 2.5% and the 97.5% quantile of a bootstrap's draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Returns mean(b) - mean(a) with the 95% percentile interval over items drawn anew, both models on the same ones.

    Models that answer every item alike have the interval [0, 0].

    Args:
        a: (items) scores of one model.
        b: (items) scores of the other on the same items.
        resamples: draws.
        seed: of the draws.

    Source: P. Koehn, EMNLP 2004 (W04-3250), section 4; Efron 1979.
    """
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    draws = resampled_means(difference[:, None], resamples=resamples, seed=seed)[:, 0]
    return Estimate(float(difference.mean()), *interval(draws))


def mcnemar(only_a: int, only_b: int) -> float:
    """Returns McNemar's exact two-sided p of "both models answer equally well" for right-or-wrong answers.

    Only items on which the models disagree tell something: of n = only_a + only_b of them, Binomial(n, 1/2) go to one
    model by chance, and p = min(1, 2 P(X <= min(only_a, only_b))). It is the exact test, not the mid-p one: it never
    claims more than its level and is a little cautious with few disagreements.

    Args:
        only_a: items that only the first model has right.
        only_b: items that only the second has right.

    Source: Q. McNemar, Psychometrika 12 (1947), pages 153-157; the exact form is the sign test.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"{only_a} and {only_b} items: counts are 0 or more")
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Returns the two-sided p of "each item's two scores could be swapped" for graded scores.

    Each difference gets a random sign; p is the share of draws, the observed one among them, whose sum is at least as
    far from 0. With scores of 0 and 1 it is what `mcnemar` computes exactly.

    Source: R. A. Fisher, The Design of Experiments (1935), section 21; (1 + hits) / (1 + draws) as in B. Phipson,
    G. K. Smyth, Statistical Applications in Genetics and Molecular Biology 9 (2010), 39.
    """
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    sizes, counts = np.unique(np.abs(difference[difference != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    random = np.random.Generator(np.random.Philox(key=seed))
    drawn = (2 * random.binomial(counts, 0.5, size=(resamples, len(sizes))) - counts) @ sizes
    # Sums that are equal on paper may differ in the last bits.
    hits = np.count_nonzero(np.abs(drawn) >= abs(difference.sum()) - 1e-9)
    return (1 + int(hits)) / (1 + resamples)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Returns p values adjusted for being looked at together: below 0.05 for one wrong claim in 20 sets of claims.

    The i-th smallest of m (from 0) becomes the largest of (m - j) p_j over j <= i, at most 1.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979), pages 65-70.
    """
    adjusted, highest = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - place) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


# ---------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """How far confidence is from accuracy."""

    error: Estimate
    """The expected calibration error."""
    by_chance: float
    """What a perfectly calibrated model of the same confidences would show on average."""
    bins: list[dict[str, float]]
    """For each bin that holds answers: mean `confidence`, `accuracy` and `n`."""


def calibration_error(
    confidence: Sequence[float] | np.ndarray,
    right: Sequence[float] | np.ndarray,
    *,
    bins: int = 10,
    by: Literal["width", "mass"] = "width",
    resamples: int = 2000,
    seed: int = 0,
) -> Calibration:
    """Returns the expected calibration error: sum over bins of n_bin / n |accuracy_bin - confidence_bin|.

    Args:
        confidence: (items) what the model gave its pick, in [0, 1].
        right: (items) whether the pick was right, 0 or 1.
        bins: at most so many.
        by: `width`: bins of equal width over [0, 1], the upper edge inside; `mass`: bins of about equally many answers,
            equal confidences in one bin.
        resamples: draws of the interval.
        seed: of the draws.

    Chance alone puts accuracy beside confidence: with few answers even a calibrated model shows an error, `by_chance`,
    found by drawing the answers' rightness from the confidences. The interval is the basic bootstrap's,
    [2 e - q(97.5%), 2 e - q(2.5%)], which takes the upward shift of the draws back; it is cut to [0, 1], widened to
    hold e, and reaches down to 0 if e is not above 97.5% of what calibrated answers show. Bins stay in all draws.

    Source: M. P. Naeini, G. F. Cooper, M. Hauskrecht, AAAI 2015 (equal width); K. Nguyen, B. O'Connor, EMNLP 2015
    (arXiv 1508.05154, equal mass); A. C. Davison, D. V. Hinkley, Bootstrap Methods (1997), section 5.2 (the interval);
    J. Broecker, L. A. Smith, Weather and Forecasting 22 (2007), pages 651-661 (what is due to chance).
    """
    p, hit = _scores(confidence), _scores(right)
    order = np.lexsort((hit, p))
    p, hit = p[order], hit[order]
    if by == "width":
        place = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    else:
        edges = np.unique(np.quantile(p, np.arange(1, bins) / bins, method="inverted_cdf"))
        place = np.searchsorted(edges, p, side="left")
    used, place = np.unique(place, return_inverse=True)
    member = (place[:, None] == np.arange(len(used))).astype(np.float64)
    gaps = member * (hit - p)[:, None]
    error = float(np.abs(gaps.mean(axis=0)).sum())
    low, high = interval(np.abs(resampled_means(gaps, resamples=resamples, seed=seed)).sum(axis=1))
    random = np.random.Generator(np.random.Philox(key=seed + 1))
    by_chance = np.concatenate(
        [
            np.abs(((random.random((count, len(p))) < p) - p) @ member / len(p)).sum(axis=1)
            for _, count in _blocks(resamples, len(p))
        ]
    )
    low, high = 2 * error - high, 2 * error - low
    low = 0.0 if error <= np.quantile(by_chance, 0.975) else max(0.0, min(error, low))
    found = [
        {"confidence": float(p[inside].mean()), "accuracy": float(hit[inside].mean()), "n": int(inside.sum())}
        for inside in member.T > 0
    ]
    return Calibration(
        error=Estimate(error, low, min(1.0, max(error, high))), by_chance=float(by_chance.mean()), bins=found
    )
