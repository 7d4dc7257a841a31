"""How far a scorer agrees with labels it has not seen: figures with 95% intervals, by resampling whole groups.

Documents of one group (siblings in a terminology, sections of a guideline, corruptions of one text) resemble each
other, so an interval that counted documents as independent would be too narrow.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BINS = 15
RESAMPLES = 200


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 0, equal values sharing their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - counts + (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Spearman's rank correlation (Pearson's of the ranks); 0 if one of them is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else 0.0


def calibration_error(confidence: np.ndarray, outcome: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error: mean over bins of |mean confidence - mean outcome|, weighted by counts.

    Source: Naeini et al. 2015; equal-width bins on [0, 1].
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=confidence, minlength=bins) - np.bincount(
        place, weights=outcome, minlength=bins
    )
    return float(np.abs(gap).sum() / max(1, len(confidence)))


def macro_f1(labels: np.ndarray, chosen: np.ndarray) -> float:
    """Returns the mean F1 over the labels that occur."""
    found = []
    for label in np.unique(labels):
        hits = np.sum((labels == label) & (chosen == label))
        found.append(2 * hits / (np.sum(labels == label) + np.sum(chosen == label)))
    return float(np.mean(found)) if found else 0.0


def interval(groups: Sequence[str], figure: Callable[[np.ndarray], float], seed: int) -> list[float]:
    """Returns the 95% interval of a figure by resampling groups with replacement.

    Args:
        groups: of each document.
        figure: from row numbers to a figure.
        seed: of the resampling.
    """
    _, member = np.unique(np.array(groups), return_inverse=True)
    order = np.argsort(member, kind="stable")
    edges = np.searchsorted(member[order], np.arange(member.max() + 2))
    draw = np.random.Generator(np.random.PCG64(seed))
    values = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(0, len(edges) - 1, len(edges) - 1)
        values.append(figure(np.concatenate([order[edges[g] : edges[g + 1]] for g in chosen])))
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def score_figures(
    predicted: np.ndarray, targets: np.ndarray, groups: Sequence[str], origins: Sequence[str], seed: int
) -> dict[str, Any]:
    """Returns n, Spearman with its interval, mean absolute error, calibration error and the means by origin.

    Args:
        predicted: (n,) in [0, 1].
        targets: (n,) in [0, 1].
        groups: of each document.
        origins: of each document.
        seed: of the resampling.
    """
    p, t = predicted.astype(np.float64), targets.astype(np.float64)
    return {
        "n": len(p),
        "groups": len(set(groups)),
        "spearman": round(spearman(p, t), 4),
        "interval": interval(groups, lambda rows: spearman(p[rows], t[rows]), seed),
        "mean_absolute_error": round(float(np.abs(p - t).mean()), 4),
        "calibration_error": round(calibration_error(p, t), 4),
        "origins": {
            name: {
                "n": int(np.sum(here)),
                "label": round(float(t[here].mean()), 3),
                "score": round(float(p[here].mean()), 3),
            }
            for name in sorted(set(origins))
            for here in [np.array(origins) == name]
        },
    }


def class_figures(
    chosen: np.ndarray,
    probability: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    origins: Sequence[str],
    names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Returns n, accuracy with its interval, macro-F1, calibration error, recall by label and origin, confusions.

    Args:
        chosen: (n,) the labels chosen.
        probability: (n,) of the chosen ones.
        labels: (n,) the right ones.
        groups: of each document.
        origins: of each document.
        names: of the labels.
        seed: of the resampling.
    """
    hits = chosen == labels
    wrong: dict[tuple[int, int], int] = {}
    for a, b in zip(labels[~hits].tolist(), chosen[~hits].tolist(), strict=True):
        wrong[a, b] = wrong.get((a, b), 0) + 1
    worst = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:5]
    return {
        "n": len(labels),
        "groups": len(set(groups)),
        "accuracy": round(float(hits.mean()), 4),
        "interval": interval(groups, lambda rows: float(hits[rows].mean()), seed),
        "macro_f1": round(macro_f1(labels, chosen), 4),
        "calibration_error": round(calibration_error(probability.astype(np.float64), hits), 4),
        "labels": {
            names[label]: {
                "n": int(np.sum(labels == label)),
                "recall": round(float(hits[labels == label].mean()), 4),
            }
            for label in np.unique(labels)
        },
        "origins": {
            name: {"n": int(np.sum(here)), "accuracy": round(float(hits[here].mean()), 4)}
            for name in sorted(set(origins))
            for here in [np.array(origins) == name]
        },
        "confusions": [{"label": names[a], "taken_for": names[b], "n": count} for (a, b), count in worst],
    }
