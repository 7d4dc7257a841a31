"""The arithmetic of a merge, compiled: every weight is read once, worked on in registers, and written once.

`methods` says in a few operations on whole tensors what is computed; the loops here give the same numbers, bit for
bit, without a pass over memory for each operation. They let go of Python's lock, so threads run side by side. Numba
compiles them on first use and remembers the result on disk.

Weights come as numpy arrays: float64, float32, or the bits of bfloat16 in uint16. `origin` (n,) is a block of the
base and `rows` (T, n) the same block of the experts, all of one type; without an origin, rows are task vectors
already. All arithmetic is in float64, in tiles of TILE elements that stay in a core's first cache. Sums run over the
experts in order; products are added in a fixed number of lanes, so that no number depends on the processor's vectors.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from galenic.compiled import compiled

TILE = 1024
"""Elements worked on at a time; even, as random numbers come in pairs."""
LANES = TILE // 4
"""Sums of products that run side by side; a power of two."""
BLOCK = 64 * TILE
"""Elements whose products are summed in float64 lanes; sums over blocks are exact."""
COARSE_BITS, FINE_BITS = 16, 15
"""The upper and the lower bits of a magnitude's float32 pattern, 31 in all."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's step from state to state."""
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Its mixing of a state."""


# ---------------------------------------------------------------------------- bits


def _as(kind: Any, pointee: ir.Type) -> Any:
    """Returns a function that reads the bits of a number as another type of the same size."""

    @intrinsic
    def bits(context: Any, x: Any) -> Any:  # numba's interface: a signature and the code for it
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], pointee)

        return kind(x), generate

    return bits


_float32_of = _as(types.float32, ir.FloatType())
_float64_of = _as(types.float64, ir.DoubleType())
_int32_of = _as(types.int32, ir.IntType(32))
_int64_of = _as(types.int64, ir.IntType(64))


def _wide(x: Any) -> Any:
    """Returns a weight as float64."""


@overload(_wide, inline="always")
def _wide_of(x):  # numba compares signatures, so these are not annotated
    if isinstance(x, types.Integer):
        return lambda x: np.float64(_float32_of(np.int32(np.int32(x) << 16)))
    return lambda x: np.float64(x)


def _narrow(x: Any, out: Any, i: Any) -> None:
    """Writes a float64 that needs no more rounding than to float32 to `out[i]`."""


@overload(_narrow, inline="always")
def _narrow_of(x, out, i):
    if isinstance(out.dtype, types.Integer):

        def write(x, out, i):
            out[i] = _int32_of(np.float32(x)) >> 16

        return write

    def write(x, out, i):
        out[i] = x

    return write


class Rounding(NamedTuple):
    """How float64 becomes a narrower type, to nearest, ties to even, in one rounding."""

    dropped: int
    """Bits of float64's significand that are rounded away; 0 leaves that to the conversion."""
    normal: float
    """The least normal magnitude; below it the last bit is worth the same everywhere."""
    shifter: float
    """What has that last bit: added and subtracted, it rounds subnormal numbers."""
    too_large: float
    """The least magnitude, once rounded away, that the type cannot hold."""


ROUNDINGS = {
    "bfloat16": Rounding(45, 2.0**-126, 1.5 * 2.0**-81, 2.0**128),
    "float16": Rounding(42, 2.0**-14, 1.5 * 2.0**28, 2.0**16),
    "float32": Rounding(0, 0.0, 0.0, 2.0**128 - 2.0**103),
    "float64": Rounding(0, 0.0, 0.0, math.inf),
}
"""By the type's name. float16 is written as float32 whose values it has."""


@compiled
def _write(values: Any, count: int, rounding: Any, out: Any) -> Any:
    """Rounds a tile of float64 and writes it; returns the bits of the largest magnitude."""
    largest = np.int64(0)
    if rounding.dropped:
        half, kept = (1 << (rounding.dropped - 1)) - 1, -(1 << rounding.dropped)
        for i in range(count):
            x = values[i]
            bits = _int64_of(x)
            normal = _float64_of((bits + half + ((bits >> rounding.dropped) & 1)) & kept)
            subnormal = (x + rounding.shifter) - rounding.shifter
            # The sign of a zero is kept.
            values[i] = math.copysign(subnormal, x) if abs(x) < rounding.normal else normal
    for i in range(count):
        largest = max(largest, _int64_of(values[i]) & 0x7FFFFFFFFFFFFFFF)
        _narrow(values[i], out, i)
    return largest


# ---------------------------------------------------------------------------- task vectors, thinned


class Thinning(NamedTuple):
    """What is taken away from the task vectors; arrays have one entry for each of the T experts."""

    trims: bool
    """Whether entries are dropped by their magnitude."""
    limits: Any
    """float64: entries of at most this magnitude are dropped."""
    largest: Any
    """float32: so are those of a greater magnitude."""
    draws: bool
    """Whether entries are dropped by chance."""
    keys: Any
    """uint64: seeds of the random numbers."""
    bounds: Any
    """int64: entries whose random number is below are kept."""
    densities: Any
    """float64: what the kept ones are divided by."""


@compiled
def _task_vectors(origin: Any, rows: Any, first: int, count: int, tau: Any) -> None:
    """Fills a tile (T, TILE) with the task vectors of `count` elements from the `first` on, zeros beyond."""
    for t in range(len(rows)):
        row, delta = rows[t, first : first + count], tau[t]
        if origin is None:
            for i in range(count):
                delta[i] = _wide(row[i])
        else:
            base = origin[first : first + count]
            for i in range(count):
                delta[i] = _wide(row[i]) - _wide(base[i])
        for i in range(count, TILE):
            delta[i] = 0.0


@compiled
def _thin(tau: Any, start: int, thinning: Any, numbers: Any) -> None:
    """Drops entries of a tile whose first element is the tensor's `start`-th, an even number."""
    for t in range(len(tau)):
        delta = tau[t]
        if thinning.trims:
            limit, largest = thinning.limits[t], thinning.largest[t]
            for i in range(TILE):
                size = abs(delta[i])
                delta[i] = delta[i] if size > limit and np.float32(size) <= largest else 0.0
        if thinning.draws:
            key, pair = thinning.keys[t], np.uint64(start // 2)
            for j in range(TILE // 2):
                state = key + (pair + np.uint64(j + 1)) * GOLDEN
                state = (state ^ (state >> np.uint64(30))) * MIX_1
                state = (state ^ (state >> np.uint64(27))) * MIX_2
                numbers[j] = state ^ (state >> np.uint64(31))
            halves, bound, density = numbers.view(np.int32), thinning.bounds[t], thinning.densities[t]
            for i in range(TILE):
                delta[i] = delta[i] * (1.0 if halves[i] < bound else 0.0) / density


# ---------------------------------------------------------------------------- the two passes


@compiled
def products(origin: Any, rows: Any, start: int, thinning: Any, sums: Any) -> None:
    """Adds up the products of task vectors in every BLOCK.

    Args:
        origin: (n,) of the base, or None.
        rows: (T, n) of the experts.
        start: place of the first element in its tensor, even.
        thinning: applied to the task vectors first.
        sums: (ceil(n / BLOCK), T, T) float64, overwritten.
    """
    count, size = rows.shape
    tau, numbers = np.empty((count, TILE)), np.empty(TILE // 2, np.uint64)
    lanes = np.empty((count * (count + 1) // 2, LANES))
    for block in range(len(sums)):
        lanes[:] = 0.0
        for first in range(block * BLOCK, min((block + 1) * BLOCK, size), TILE):
            _task_vectors(origin, rows, first, min(TILE, size - first), tau)
            _thin(tau, start + first, thinning, numbers)
            pair = 0
            for s in range(count):
                for t in range(s, count):
                    for i in range(LANES):
                        j, k, m = i + LANES, i + 2 * LANES, i + 3 * LANES
                        lanes[pair, i] += (tau[s, i] * tau[t, i] + tau[s, j] * tau[t, j]) + (
                            tau[s, k] * tau[t, k] + tau[s, m] * tau[t, m]
                        )
                    pair += 1
        pair = 0
        for s in range(count):
            for t in range(s, count):
                lane, half = lanes[pair], LANES // 2
                while half:
                    for i in range(half):
                        lane[i] += lane[i + half]
                    half //= 2
                sums[block, s, t] = sums[block, t, s] = lane[0]
                pair += 1


class Fusing(NamedTuple):
    """How thinned task vectors become one."""

    weights: Any
    """(T,) float64."""
    elects: bool
    """Whether only those count that have the elected sign."""
    votes: Any
    """(T,) float64: what each counts in the election."""
    normalizes: bool
    """Whether the sum of those that count is divided by the sum of their weights."""
    least: float
    """The least that a positive sum of weights can be."""
    scale: float
    """What the elected sum is multiplied by."""


@compiled
def merged(origin: Any, rows: Any, start: int, thinning: Any, fusing: Any, rounding: Any, out: Any) -> float:
    """Merges a block.

    Args:
        origin: (n,) of the base, or None, where the result is a sum of the rows.
        rows: (T, n) of the experts.
        start: place of the first element in its tensor, even.
        thinning: applied to the task vectors.
        fusing: of the task vectors to one, which is added to the origin.
        rounding: of the result.
        out: (n,) uint16 for bfloat16, float32 or float64; overwritten.

    Returns:
        The largest magnitude, before the rounding to float32 if there is one; NaN if a value is.
    """
    count, size = rows.shape
    tau, numbers = np.empty((count, TILE)), np.empty(TILE // 2, np.uint64)
    result, elected, agreeing = np.empty(TILE), np.empty(TILE), np.empty(TILE)
    largest = np.int64(0)
    plain = not (thinning.trims or thinning.draws or fusing.elects)
    for first in range(0, size, TILE):
        length = min(TILE, size - first)
        if plain:
            _plain_sum(origin, rows, first, length, fusing.weights, result)
        else:
            _task_vectors(origin, rows, first, length, tau)
            _thin(tau, start + first, thinning, numbers)
            if fusing.elects:
                _elect(tau, fusing, elected, agreeing, result)
            else:
                _weighted_sum(tau, fusing.weights, result)
        if origin is not None:
            base = origin[first : first + length]
            for i in range(length):
                result[i] += _wide(base[i])
        largest = max(largest, _write(result, length, rounding, out[first : first + length]))
    return _float64_of(largest)


@compiled
def _plain_sum(origin: Any, rows: Any, first: int, count: int, weights: Any, result: Any) -> None:
    """As `_weighted_sum` of whole task vectors, which need not be written down for that."""
    for t in range(len(rows)):
        row, weight = rows[t, first : first + count], weights[t]
        base = row if origin is None else origin[first : first + count]
        for i in range(count):
            delta = _wide(row[i]) if origin is None else _wide(row[i]) - _wide(base[i])
            result[i] = delta * weight if t == 0 else result[i] + delta * weight


@compiled
def _weighted_sum(tau: Any, weights: Any, result: Any) -> None:
    for i in range(TILE):
        result[i] = tau[0, i] * weights[0]
    for t in range(1, len(tau)):
        delta, weight = tau[t], weights[t]
        for i in range(TILE):
            result[i] += delta[i] * weight


@compiled
def _elect(tau: Any, fusing: Any, elected: Any, agreeing: Any, result: Any) -> None:
    """As `methods.ties`, without the origin."""
    _weighted_sum(tau, fusing.votes, elected)
    for i in range(TILE):
        elected[i] = (1.0 if elected[i] > 0 else 0.0) - (1.0 if elected[i] < 0 else 0.0)
        result[i] = agreeing[i] = 0.0
    for t in range(len(tau)):
        delta, weight = tau[t], fusing.weights[t]
        for i in range(TILE):
            size = max(delta[i] * elected[i], 0.0)
            result[i] += size * weight
            agreeing[i] += weight if size > 0 else 0.0
    if fusing.normalizes:
        for i in range(TILE):
            result[i] /= max(agreeing[i], fusing.least)
    for i in range(TILE):
        result[i] *= elected[i] * fusing.scale


# ---------------------------------------------------------------------------- magnitudes, counted


@compiled
def count_coarse(origin: Any, rows: Any, counts: Any) -> None:
    """Counts magnitudes of task vectors, rounded to float32, by the upper bits of their patterns.

    Args:
        origin: (n,) of the base, or None.
        rows: (T, n) of the experts.
        counts: (T, 2^COARSE_BITS) int64, added to.
    """
    count, size = rows.shape
    tau, keys = np.empty((count, TILE)), np.empty(TILE, np.int32)
    for first in range(0, size, TILE):
        length = min(TILE, size - first)
        _task_vectors(origin, rows, first, length, tau)
        for t in range(count):
            _keys(tau[t], keys)
            own = counts[t]
            for i in range(length):
                own[keys[i] >> FINE_BITS] += 1


@compiled
def count_fine(origin: Any, rows: Any, places: Any, counts: Any) -> None:
    """Counts magnitudes by their lower bits, in a place that the upper bits tell.

    What nobody asks for has a place too: a processor guesses wrongly too often what to leave out.

    Args:
        origin: (n,) of the base, or None.
        rows: (T, n) of the experts.
        places: (T, 2^COARSE_BITS) uint32, which of the `counts`.
        counts: (P, 2^FINE_BITS) int64, added to.
    """
    count, size = rows.shape
    tau, keys = np.empty((count, TILE)), np.empty(TILE, np.int32)
    for first in range(0, size, TILE):
        length = min(TILE, size - first)
        _task_vectors(origin, rows, first, length, tau)
        for t in range(count):
            _keys(tau[t], keys)
            own = places[t]
            for i in range(length):
                counts[own[keys[i] >> FINE_BITS], keys[i] & ((1 << FINE_BITS) - 1)] += 1


@compiled
def _keys(delta: Any, keys: Any) -> None:
    """Returns the float32 patterns of magnitudes, which are ordered as they are."""
    for i in range(TILE):
        keys[i] = _int32_of(np.float32(delta[i])) & 0x7FFFFFFF
