"""Easy to hard: the documents of each source ranked by quality and difficulty, and divided into stages.

The report takes "easy" samples first, by quality and by the perplexity of an earlier model of the same data, and
gradually harder ones (section 4.2). It does not say how the two are weighed: here each counts half, by rank.
"""

import numpy as np

from galenic.corpus.tokens.shards import Shard
from galenic.runtime import UserError


def quantile_ranks(values: np.ndarray) -> np.ndarray:
    """Returns each value's place among all in (0, 1); equal values share the middle of their places.

        rank(v) = (number below v + half the number equal to v) / number

    Args:
        values: (n,) numbers; NaN are left out and stay NaN.

    Returns:
        (n,) float64.
    """
    known = ~np.isnan(values)
    ranks = np.full(len(values), np.nan)
    _, inverse, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - counts / 2
    ranks[known] = middles[inverse] / max(int(known.sum()), 1)
    return ranks


def hardness(quality: np.ndarray | None, difficulty: np.ndarray | None) -> np.ndarray:
    """Returns how hard each document is among all, in [0, 1]: low quality is hard, high difficulty is hard.

        hardness = mean of (1 - rank of quality, rank of difficulty), of those that are known; 1/2 if none is

    Args:
        quality: (n,), NaN unknown; or None.
        difficulty: (n,), NaN unknown; or None. One of the two must be given.

    Returns:
        (n,) float64.
    """
    parts = []
    if quality is not None:
        parts.append(1 - quantile_ranks(quality))
    if difficulty is not None:
        parts.append(quantile_ranks(difficulty))
    stacked = np.stack(parts)
    known = ~np.isnan(stacked)
    total, number = np.where(known, stacked, 0).sum(axis=0), known.sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), 0.5)


def divide(hard: np.ndarray, sizes: np.ndarray, stages: int, chance: np.ndarray) -> list[np.ndarray]:
    """Divides documents into stages from easy to hard, each of about the same size.

    A document belongs to the stage in which its middle falls when all are laid end to end. A stage too narrow for any
    takes the document that covers its own middle, so that none is empty.

    Args:
        hard: (n,) from `hardness`, at least one.
        sizes: (n,) tokens of an epoch, from 0 on; if all are 0, each counts 1.
        stages: how many.
        chance: (n,) different numbers that decide among equally hard ones.

    Returns:
        (members,) int64 numbers of the documents of each stage, ascending.
    """
    order = np.lexsort((chance, hard))
    weights = sizes[order].astype(np.float64)
    if not weights.any():
        weights[:] = 1
    ends = np.cumsum(weights)
    middles = (ends - weights / 2) * stages / ends[-1]
    edges = np.searchsorted(middles, np.arange(stages + 1))
    edges[-1] = len(order)  # a document without size may lie at the very end
    members = []
    for stage in range(stages):
        chosen = order[edges[stage] : edges[stage + 1]]
        if not weights[edges[stage] : edges[stage + 1]].any():
            own = np.searchsorted(ends * stages / ends[-1], stage + 0.5)
            chosen = order[own : own + 1]
        members.append(np.sort(chosen))
    return members


def stages_of(shard: Shard, source: str, stages: int, seed: int) -> list[np.ndarray]:
    """Divides a source into stages from easy to hard; takes about 60 bytes a document while it does.

    Raises:
        UserError: its documents have neither quality nor difficulty.
    """
    if all(scores is None or bool(np.isnan(scores).all()) for scores in (shard.quality, shard.difficulty)):
        raise UserError(
            f"order: easy-to-hard needs the quality or difficulty of documents, which the shards of '{source}' do not "
            "have; make them of a corpus with these columns (see corpus.difficulty_model), or take order: shuffled"
        )
    lengths = np.diff(shard.offsets)
    generator = np.random.Generator(np.random.Philox(key=[seed, len(shard)]))
    return divide(
        hardness(shard.quality, shard.difficulty),
        lengths * np.asarray(shard.weights, dtype=np.float64),
        stages,
        generator.permutation(len(shard)),
    )
