"""Step 5, sample: how many times an epoch repeats each document, from its scores, classes and count.

    weight = min(most_repeats, source's own x repeats(rank of the score) x class factors x map(count))

Source: Baichuan-M1 report, section 2.1: documents found more often are repeated more (Figure 2: better than
deduplication alone), the best by score are repeated (Figure 3: the top 10% ten times, about as good as the top 33%
three times, both better than filtering only), at most ten repetitions, low quality removed, entertainment, commerce
and news fewer, science and technology more. It gives neither the map from counts nor the factors: those are ours.

Ranks are global, but no unit of work sees another's documents: each adds its scores to a `ScoreHistogram`, the
histograms are summed (whole numbers, so in any order), and the weights are a pure function of a unit and the sum.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from galenic.runtime import UserError

BINS = 4096
"""Of a histogram over [0, 1]: a rank is exact up to the documents that share a bin."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """From a document's scores, classes and count to how many times an epoch repeats it."""

    quality_floor: float = 0.0
    """Documents whose `quality` is below are dropped (report, section 2.1.2: low quality removed); none by default."""
    score: dict[str, float] = field(default_factory=dict)
    """Score -> its part in the mean that ranks documents, such as `{educational: 1, knowledge: 1}`."""
    rank_within: str = ""
    """Column (`group`, `source`, `language`, ...) within which documents are ranked; all together if empty."""
    score_tiers: dict[float, float] = field(default_factory=dict)
    """Top share by score -> repeats; what ranks below the last tier is dropped. The report's two: `{0.1: 10}` and
    `{0.33: 3}` (Figure 3); `{0.1: 10, 1.0: 1}` keeps the rest once. No tiers: scores change nothing."""
    count_map: dict[int, float] | Literal["log2"] = "log2"
    """How often a text was found -> factor: `log2` is 1 + log2(count); or points such as `{1: 1, 2: 1.5, 10: 3}`,
    linear in log2(count) between them and flat beyond. Ours: the report gives no map."""
    class_factors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Column -> class -> factor, such as `{general: {entertainment: 0.3}, content: {advertisement: 0}}`; 0 drops, 1 is
    the rest (report, sections 2.1.2 and 2.2.1: which classes; how much is ours)."""
    most_repeats: float = 10.0
    """Most repetitions of a document in an epoch, all factors together (report, section 2.1.2)."""

    def __post_init__(self) -> None:
        # JSON, on the command line too, has no keys but words.
        object.__setattr__(self, "score_tiers", _numbered("score_tiers", self.score_tiers, float))
        if not isinstance(self.count_map, str):
            object.__setattr__(self, "count_map", _numbered("count_map", self.count_map, int))
        if any(part < 0 for part in self.score.values()) or (self.score and not sum(self.score.values())):
            raise UserError(
                "sampling.score: the parts of scores must not be negative, and one must be above 0"
            )
        if bool(self.score) != bool(self.score_tiers):
            given, missing = ("score", "score_tiers") if self.score else ("score_tiers", "score")
            raise UserError(
                f"sampling.{given} needs sampling.{missing}: which scores rank, and what ranks earn"
            )
        if self.rank_within and not self.score:
            raise UserError("sampling.rank_within needs sampling.score: nothing is ranked without")
        if any(not 0 < top <= 1 for top in self.score_tiers):
            raise UserError("sampling.score_tiers: top shares must be in (0, 1]")
        repeats = [self.score_tiers[top] for top in sorted(self.score_tiers)]
        if any(worse > better for better, worse in pairwise(repeats)):
            raise UserError("sampling.score_tiers: a lower tier must not be repeated more than a higher one")
        if isinstance(self.count_map, dict) and (not self.count_map or min(self.count_map) < 1):
            raise UserError(
                "sampling.count_map: needs counts from 1 on, such as {1: 1, 2: 1.5, 10: 3}, or log2"
            )
        factors = {f"{column}.{name}": f for column, m in self.class_factors.items() for name, f in m.items()}
        points = self.count_map if isinstance(self.count_map, dict) else {}
        for kind, mapping in (
            ("score_tiers", self.score_tiers),
            ("count_map", points),
            ("class_factors", factors),
        ):
            for key, value in mapping.items():
                if not (math.isfinite(value) and value >= 0):
                    raise UserError(f"sampling.{kind}.{key}: {value} is not a number from 0 on")
        if not self.most_repeats > 0:
            raise UserError(f"sampling.most_repeats: {self.most_repeats} is not above 0")


def _numbered(name: str, mapping: Mapping[Any, float], kind: Callable[[Any], Any]) -> dict[Any, float]:
    """Returns a mapping with numbers for keys."""
    try:
        return {kind(key): value for key, value in mapping.items()}
    except ValueError as error:
        raise UserError(f"sampling.{name}: {error}; its keys are numbers") from None


# ---------------------------------------------------------------------------- ranks


class ScoreHistogram:
    """How much text has which score: fixed bins over [0, 1] (beyond: the outermost), whole numbers.

    Args:
        counts: (BINS,) int64 from `counts` of an earlier one, or nothing.
    """

    def __init__(self, counts: np.ndarray | None = None) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)

    def add(self, scores: np.ndarray, sizes: np.ndarray | None = None) -> None:
        """Adds documents.

        Args:
            scores: (n,); those that are not a number are left out.
            sizes: (n,) whole numbers (bytes, so that a share is a share of text); 1 each by default.
        """
        known = ~np.isnan(scores)
        sizes = np.ones(len(scores), dtype=np.int64) if sizes is None else np.asarray(sizes, dtype=np.int64)
        np.add.at(self.counts, _bin(scores[known]), sizes[known])

    def merge(self, other: "ScoreHistogram") -> None:
        """Adds another unit's documents."""
        self.counts += other.counts

    def above(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the share of text in better bins than each score's, and in those and its own; both (n,) in [0, 1]."""
        upto = np.cumsum(self.counts[::-1])[::-1]
        bins, total = _bin(scores), max(int(upto[0]), 1)
        return (upto[bins] - self.counts[bins]) / total, upto[bins] / total

    def quantile(self, share: float) -> float:
        """Returns the score below which `share` of the text lies, within a bin's width; nan if there is none."""
        total = int(self.counts.sum())
        if not total:
            return math.nan
        below = np.concatenate([[0], np.cumsum(self.counts)])
        bin = max(int(np.searchsorted(below[1:], share * total)), int(np.argmax(self.counts > 0)))
        return (bin + (share * total - below[bin]) / self.counts[bin]) / BINS


def _bin(scores: np.ndarray) -> np.ndarray:
    return np.clip((np.nan_to_num(scores) * BINS).astype(np.int64), 0, BINS - 1)


def rank_score(columns: Mapping[str, np.ndarray], sampling: Sampling) -> np.ndarray:
    """Returns the score that ranks documents, (n,): the weighted mean of those a document has; nan if it has none."""
    parts = [(np.asarray(_column(columns, name), dtype=np.float64), w) for name, w in sampling.score.items()]
    total = sum(
        (np.where(np.isnan(scores), 0.0, scores) * w for scores, w in parts), np.zeros(_size(columns))
    )
    mass = sum((np.where(np.isnan(scores), 0.0, w) for scores, w in parts), np.zeros(_size(columns)))
    return np.divide(total, mass, out=np.full(len(total), np.nan), where=mass > 0)


def add_ranks(
    histograms: dict[str, ScoreHistogram], columns: Mapping[str, np.ndarray], sampling: Sampling
) -> None:
    """Adds a unit's documents, those that stay, to the histograms of their `rank_within` values.

    Args:
        histograms: value of the column `rank_within` (or "") -> histogram; new ones are added.
        columns: as in `weights`.
        sampling: the rules.
    """
    if not sampling.score:
        return
    scores, kept, keys = (
        rank_score(columns, sampling),
        dropped(columns, sampling) == "",
        _keys(columns, sampling),
    )
    sizes = np.asarray(columns["bytes"]) if "bytes" in columns else np.ones(len(scores), dtype=np.int64)
    for key in sorted(set(keys.tolist())):
        chosen = kept & (keys == key)
        histograms.setdefault(key, ScoreHistogram()).add(scores[chosen], sizes[chosen])


def tier_repeats(above: np.ndarray, upto: np.ndarray, tiers: Mapping[float, float]) -> np.ndarray:
    """Returns the mean of the tiers' step function over each rank interval, (n,).

        f(u) = repeats of the first tier whose top share is at least u
        mean = integral of f over (above, upto] / (upto - above)

    Documents that share a bin share the ranks it covers, so each gets their mean: the text drawn in an epoch is the
    integral of f whatever the ties, and a better score never earns less.

    Args:
        above: (n,) share of text ranked better.
        upto: (n,) the same with the document's own bin, above `above`.
        tiers: top share -> repeats.
    """
    tops = np.array([0.0, *sorted(tiers)])
    repeats = np.array([tiers[top] for top in sorted(tiers)])
    areas = np.concatenate([[0.0], np.cumsum(repeats * np.diff(tops))])
    length = upto - above
    drawn = np.interp(upto, tops, areas) - np.interp(above, tops, areas)
    # Within one tier the mean is its repeats exactly; the quotient would be a rounding off.
    first, last = np.searchsorted(tops, above, side="right"), np.searchsorted(tops, upto, side="left")
    flat = np.append(repeats, 0.0)[np.minimum(first - 1, len(repeats))]
    return np.where(first == last, flat, np.divide(drawn, length, out=flat.copy(), where=length > 0))


# ---------------------------------------------------------------------------- weights


def count_factor(counts: np.ndarray, count_map: Mapping[int, float] | str) -> np.ndarray:
    """Returns the factor of documents found `counts` times, (n,): see `Sampling.count_map`."""
    logs = np.log2(np.maximum(np.asarray(counts, dtype=np.float64), 1.0))
    if isinstance(count_map, str):
        return 1.0 + logs
    points = sorted(count_map)
    return np.interp(logs, np.log2(points), [count_map[point] for point in points])


def class_factor(columns: Mapping[str, np.ndarray], sampling: Sampling) -> np.ndarray:
    """Returns the product of the factors of a document's classes, (n,)."""
    product = np.ones(_size(columns))
    for name, factors in sampling.class_factors.items():
        product *= np.array([factors.get(value, 1.0) for value in _column(columns, name).tolist()])
    return product


def dropped(columns: Mapping[str, np.ndarray], sampling: Sampling) -> np.ndarray:
    """Returns why documents are dropped whatever their rank, (n,) strings, empty for those that stay."""
    reasons = np.full(_size(columns), "", dtype=object)
    for name, factors in sampling.class_factors.items():
        values = _column(columns, name)
        for value in sorted(value for value, factor in factors.items() if factor == 0):
            reasons[(reasons == "") & (values == value)] = f"class {name}: {value}"
    if sampling.quality_floor > 0:
        low = np.asarray(_column(columns, "quality"), dtype=np.float64) < sampling.quality_floor
        reasons[(reasons == "") & low] = f"quality below {sampling.quality_floor:g}"
    return reasons


def weights(
    columns: Mapping[str, np.ndarray],
    sampling: Sampling,
    histograms: Mapping[str, ScoreHistogram] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many times an epoch repeats each document, and why it is dropped.

    Args:
        columns: name -> (n,) values; what the rules name, and if present `duplicates` (times found, 1 by default),
            `weight` (of the source, before scores and counts, 1 by default) and `bytes` (for shares of text).
        sampling: the rules.
        histograms: of all units, from `add_ranks`; of these documents alone if not given.

    Returns:
        Weights, (n,) float64 in [0, most_repeats], rounded to 4 places; and reasons, (n,) strings, empty where the
        weight is above 0. A document without any of the ranking scores is neither favoured nor dropped for it.

    Raises:
        UserError: a rule names a column that is not there.
    """
    reasons = dropped(columns, sampling)
    product = class_factor(columns, sampling)
    if "weight" in columns:
        product *= np.asarray(columns["weight"], dtype=np.float64)
    if "duplicates" in columns:
        product *= count_factor(columns["duplicates"], sampling.count_map)
    if sampling.score:
        if histograms is None:
            histograms = {}
            add_ranks(histograms, columns, sampling)
        scores, keys = rank_score(columns, sampling), _keys(columns, sampling)
        last = max((top for top, earned in sampling.score_tiers.items() if earned), default=0.0)
        for key in sorted(set(keys.tolist())):
            ranked = (keys == key) & ~np.isnan(scores)
            above, upto = histograms.get(key, ScoreHistogram()).above(scores[ranked])
            repeats = tier_repeats(above, upto, sampling.score_tiers)
            product[ranked] *= repeats
            below = np.flatnonzero(ranked)[repeats == 0]
            reasons[below[reasons[below] == ""]] = f"below the top {last:.4g} by score"
    result = np.round(np.minimum(sampling.most_repeats, product), 4)
    result[reasons != ""] = 0.0
    reasons[(reasons == "") & (result == 0)] = "weight 0"
    return result, reasons


def _column(columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in columns:
        raise UserError(
            f"sampling: documents have no column '{name}'; they have {', '.join(sorted(columns))}"
        )
    return np.asarray(columns[name])


def _keys(columns: Mapping[str, np.ndarray], sampling: Sampling) -> np.ndarray:
    if not sampling.rank_within:
        return np.full(_size(columns), "", dtype=object)
    return _column(columns, sampling.rank_within)


def _size(columns: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(columns.values())))
