"""Bin packing, compiled: millions of pieces in a second."""

import numpy as np

from galenic.compiled import compiled


def fill_bins(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Fills one bin after another: the longest piece that is left, then what fills the rest of the bin best.

    That is a piece, or a pair of pieces, of the largest sum that fits; of equal sums the one with the longest
    piece, and a single piece before a pair. It goes on until nothing that is left fits. With single pieces only, this
    is first-fit decreasing; to look one piece ahead left half of its padding or less on the starter's documents
    (benchmarks/tokens.py), but can do harm where most pieces are a third of a bin or longer. Both are tried.

    Pieces are counted by length, so that this takes O(pieces x lengths that occur) at worst, and O(pieces) where there
    are many, as the first pairs looked at then fit exactly.

    Args:
        lengths: (pieces,) int64, each in [1, capacity].
        capacity: of a bin.

    Returns:
        (order, bounds), int64: bin b holds the pieces order[bounds[b] : bounds[b + 1]]; of equally long pieces the
        first comes first.

    Raises:
        ValueError: a piece is empty or longer than a bin.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"pieces of {lengths.min()} to {lengths.max()} do not fit bins of {capacity}")
    by_length = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    ways = [_fill(counts, len(lengths), capacity, ahead) for ahead in (True, False)]
    places, bounds, bins = min(ways, key=lambda way: way[2])
    return by_length[places], bounds[: bins + 1].copy()


@compiled
def _fill(counts, pieces, capacity, ahead):
    """Returns places in the order of lengths, where bins begin, and how many bins there are."""
    waiting = counts.copy()
    # length -> where its next piece stands among all by length
    place = np.zeros(capacity + 2, dtype=np.int64)
    place[1:] = np.cumsum(counts)
    # length -> itself while pieces of it wait, else a shorter one on the way to the next that does
    shorter = np.arange(capacity + 1)
    chosen = np.empty(pieces, dtype=np.int64)
    bounds = np.zeros(pieces + 1, dtype=np.int64)
    done, bins = 0, 0
    longest = capacity
    while done < pieces:
        longest = _largest(waiting, shorter, longest)
        free = capacity
        length = longest
        while length > 0:
            chosen[done] = place[length]
            place[length] += 1
            waiting[length] -= 1
            done += 1
            free -= length
            length = _best(waiting, shorter, free) if ahead else _largest(waiting, shorter, free)
        bins += 1
        bounds[bins] = done
    return chosen, bounds, bins


@compiled
def _largest(waiting, shorter, length):
    """Returns the largest length up to `length` of a piece that waits, or 0; shortens the way for the next call."""
    found = length
    while found > 0 and waiting[found] == 0:
        if shorter[found] == found:
            shorter[found] = found - 1
        found = shorter[found]
    while length > found:
        shorter[length], length = found, shorter[length]
    return found


@compiled
def _best(waiting, shorter, free):
    """Returns the length of the next piece: alone or as the longer one of the pair that fills `free` best; or 0."""
    best = chosen = longer = _largest(waiting, shorter, free)
    while best < free and 2 * longer > best:
        other = _largest(waiting, shorter, min(free - longer, longer))
        if other == longer and waiting[longer] == 1:
            other = _largest(waiting, shorter, longer - 1)
        if other > 0 and longer + other > best:
            best, chosen = longer + other, longer
        longer = _largest(waiting, shorter, longer - 1)
    return chosen
