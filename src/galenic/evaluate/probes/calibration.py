"""Calibration: are the options' probabilities as often right as they say?

The options' scores are taken as log-probabilities and made to add up to 1; the confidence is that of the pick.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from galenic.evaluate.statistics import calibration_error, summary

from .config import CalibrationConfig


def probabilities(scores: Sequence[float]) -> np.ndarray:
    """Returns exp(s_i) / sum_j exp(s_j)."""
    shifted = np.exp(np.asarray(scores, dtype=np.float64) - max(scores))
    return shifted / shifted.sum()


PROTOCOL = (
    "softmax over the options' scores; confidence is the pick's share; expected calibration error over bins of equal "
    "width (error) and of equally many answers (error_mass), 95% interval by the basic bootstrap; by_chance is what a "
    "perfectly calibrated model of the same confidences would show on average, so "
    "only an error above it means anything"
)


def measure(
    config: CalibrationConfig, rows: Sequence[Mapping[str, Any]], scorings: Sequence[str], seed: int
) -> dict[str, Any]:
    """Returns {kind: {scoring: numbers}} of the multiple-choice rows.

    Args:
        config: how many bins.
        rows: of multiple choice: `answer` and, under each scoring's name, the options' scores.
        scorings: the headline's first; others are told as well.
        seed: of the intervals.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if all(isinstance(row.get(scoring), list) for scoring in scorings):
            kinds.setdefault(row["kind"], []).append(row)
    return {
        kind: {scoring: _one(config, inside, scoring, seed) for scoring in scorings}
        for kind, inside in kinds.items()
    }


def _one(
    config: CalibrationConfig, rows: Sequence[Mapping[str, Any]], scoring: str, seed: int
) -> dict[str, Any]:
    shares = [probabilities(row[scoring]) for row in rows]
    picks = [int(np.argmax(share)) for share in shares]
    confidence = [float(share[pick]) for share, pick in zip(shares, picks, strict=True)]
    right = [float(pick == row["answer"]) for pick, row in zip(picks, rows, strict=True)]
    found: dict[str, Any] = {"n": len(rows)}
    for name, by in (("error", "width"), ("error_mass", "mass")):
        one = calibration_error(confidence, right, bins=config.bins, by=by, seed=seed)
        value = one.error
        found[name] = {"value": value.value, "low": value.low, "high": value.high, "n": len(rows)}
        found[name] |= {"by_chance": one.by_chance, "bins": one.bins}
    return found | {"confidence": summary(confidence), "accuracy": summary(right)}
