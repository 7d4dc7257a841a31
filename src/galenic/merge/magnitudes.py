"""Magnitudes of given rank among the entries of task vectors: exact selection in bounded memory.

A magnitude's float32 pattern, a whole number, is ordered as the magnitude is. One pass counts magnitudes by the upper
bits of their patterns, which tells in which of these groups each wanted rank lies; a second pass counts the lower
bits inside those groups. Many ranks cost no more than one.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from galenic.merge import kernels
from galenic.merge.blocks import CHUNK, Block, grid, own_blocks, own_names
from galenic.merge.io import Weights
from galenic.merge.kernels import COARSE_BITS, FINE_BITS
from galenic.merge.statistics import read_block
from galenic.merge.workers import in_order
from galenic.ranks import added_up, united
from galenic.runtime import Bar

Read = Callable[[Block], tuple[Any, Any]]
"""Returns a block's origin (n,) or None, and rows (S, n): what is ranked are the magnitudes of rows minus origin."""
Total = Callable[[Callable[[Block, Any], None], tuple[int, ...]], Any]
"""(count, shape) -> what `count` adds to counts of that shape in all blocks."""


def model_thresholds(
    base: Weights,
    experts: Sequence[Weights],
    ranks: Sequence[Sequence[int]],
    bar: Bar | None = None,
    chunk: int = CHUNK,
    workers: int | None = None,
) -> list[list[tuple[float, int]]]:
    """Finds, for each expert, magnitudes of given rank among all entries of its task vector.

    Args:
        base: the base model.
        experts: T models with the same tensors.
        ranks: for each expert the ranks wanted, 1 for the largest.
        bar: advanced twice by the number of elements.
        chunk: elements read at a time; the result does not depend on it.
        workers: threads; nor on them.

    Returns:
        For each expert and rank the magnitude, a float32 number, and how many entries reach it: the rank, or more
        where magnitudes tie.
    """
    blocks = own_blocks(base, chunk)

    def total(count: Callable[[Block, Any], None], shape: tuple[int, ...]) -> Any:
        own = threading.local()  # every thread has counts of its own
        every = [np.zeros(shape, dtype=np.int64)]

        def one(block: Block) -> None:
            if not hasattr(own, "counts"):
                own.counts = np.zeros(shape, dtype=np.int64)
                every.append(own.counts)
            count(block, own.counts)

        for block, _ in zip(blocks, in_order(one, blocks, workers), strict=True):
            if bar:
                bar.update(block.stop - block.start)
        return added_up(sum(every[1:], start=every[0]))

    return _largest(partial(read_block, base, experts), ranks, total)


def tensor_thresholds(
    base: Weights,
    experts: Sequence[Weights],
    ranks: Callable[[int], Sequence[Sequence[int]]],
    read: Read | None = None,
    bar: Bar | None = None,
    workers: int | None = None,
) -> dict[str, list[list[float]]]:
    """Finds magnitudes of given rank in every tensor by itself.

    Args:
        base: the base model.
        experts: T models with the same tensors.
        ranks: number of elements -> for each row that is read the ranks wanted, 1 for the largest.
        read: what is ranked. Default: the T task vectors.
        bar: advanced twice by the number of elements.
        workers: threads; the result does not depend on it.

    Returns:
        Tensor -> S lists of magnitudes, float32 numbers, in the order of their ranks.
    """
    read = read or partial(read_block, base, experts)

    def one(name: str) -> list[list[float]]:
        numel = base.tensors[name].numel
        if not numel:
            return []

        def total(count: Callable[[Block, Any], None], shape: tuple[int, ...]) -> Any:
            counts = np.zeros(shape, dtype=np.int64)
            for start, stop in grid(numel):
                count(Block(name, start, stop), counts)
            return counts

        return [[value for value, _ in row] for row in _largest(read, ranks(numel), total)]

    names = own_names(base)
    found = {}
    for name, rows in zip(names, in_order(one, names, workers), strict=True):
        found[name] = rows
        if bar:
            bar.update(2 * base.tensors[name].numel)
    return united(found)


def counts_memory(rows: int, ranks: int) -> int:
    """Returns how many bytes the counts of one thread take at most, for so many rows and ranks of each."""
    return 8 * rows * ((1 << COARSE_BITS) + (ranks << FINE_BITS)) + (8 << FINE_BITS)


def _largest(read: Read, ranks: Sequence[Sequence[int]], total: Total) -> list[list[tuple[float, int]]]:
    def coarse(block: Block, counts: Any) -> None:
        kernels.count_coarse(*read(block), counts)

    def fine(block: Block, counts: Any) -> None:
        kernels.count_fine(*read(block), places, counts)

    groups = [
        [_from_above(counts, rank) for rank in row]
        for row, counts in zip(ranks, total(coarse, (len(ranks), 1 << COARSE_BITS)), strict=True)
    ]
    wanted = sorted({(s, group) for s, row in enumerate(groups) for group, _ in row})
    others = len(wanted)
    places = np.full((len(ranks), 1 << COARSE_BITS), others, dtype=np.uint32)
    for place, (s, group) in enumerate(wanted):
        places[s, group] = place
    inside = total(fine, (len(wanted) + 1, 1 << FINE_BITS))
    found = []
    for s, (row, own) in enumerate(zip(ranks, groups, strict=True)):
        found.append([])
        for rank, (group, above) in zip(row, own, strict=True):
            counts = inside[places[s, group]]
            key, larger = _from_above(counts, rank - above)
            value = np.int32(group << FINE_BITS | key).view(np.float32)
            found[-1].append((float(value), int(above + larger + counts[key])))
    return found


def _from_above(counts: Any, rank: int) -> tuple[int, int]:
    """Returns the place in `counts` where the `rank`-th item from above lies, and how many lie above that place."""
    reached = counts[::-1].cumsum()
    place = int(np.searchsorted(reached, rank))
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0
