"""The statistics pass: Gram matrices of task vectors, and the magnitude threshold of TIES.

Everything streams over a fixed grid: chunks of `CHUNK` elements are read by several threads, products are summed in
float32 inside blocks of `BLOCK` elements, and block sums are added exactly (`math.fsum`). The result depends neither
on the chunk size nor on the number of threads.
"""

import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from galenic.merge.io import Checkpoint, StateDict, TensorInfo, Weights, all_finite, check_same_tensors
from galenic.merge.workers import Workspace, in_order
from galenic.runtime import Bar, UserError

BLOCK = 4096
"""Elements whose products are summed in the working precision."""
CACHED = 16 * BLOCK
"""Elements computed at a time: half a MiB in float64, so that they stay in a core's cache from step to step."""
CHUNK = 8 * CACHED
"""Elements read and written at a time, 1 MiB in bfloat16: file systems are slow with smaller parts."""

_workspace = Workspace()

SAMPLE = 1 << 20
"""Entries that say about where a magnitude of some rank lies."""
DOUBT = 0.01
"""How far, as a share of all entries, ranks in a sample may be off."""
BINS = 1 << 20
"""Bins that the magnitudes of a range are counted in."""
LARGEST_KEY = 0x7FFFFFFF


def grid(numel: int, chunk: int = CHUNK, row: int = 1) -> Iterator[tuple[int, int]]:
    """Yields the [start, stop) ranges a tensor is processed in: `chunk` elements at most, in whole rows."""
    chunk = max(1, chunk // row) * row
    for start in range(0, numel, chunk):
        yield start, min(start + chunk, numel)


def float_names(weights: Weights) -> list[str]:
    """Returns the names of the tensors that are merged; integer and boolean buffers are not."""
    return [name for name, info in weights.tensors.items() if info.dtype.is_floating_point]


def float_blocks(weights: Weights, chunk: int = CHUNK) -> Iterator[tuple[str, int, int]]:
    """Yields (tensor name, start, stop) of every block of every merged tensor."""
    for name in float_names(weights):
        for start, stop in grid(weights.tensors[name].numel, chunk):
            yield name, start, stop


def layer_of(name: str) -> str:
    """Names the layer a tensor belongs to: what stands up to its first number, or the tensor itself.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
        ('model.layers.3', 'lm_head.weight')
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else name


# ---------------------------------------------------------------------------- Gram matrices


class Origin:
    """A model whose weights are all zero: task vectors from it are the models themselves."""

    def __init__(self, model: Weights) -> None:
        self.label = "the origin"
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in model.tensors.items() if info.dtype.is_floating_point
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns zeros."""
        return torch.zeros(stop - start, dtype=self.tensors[name].dtype)


def gram(
    base: Weights | Mapping[str, Tensor] | str | Path,
    experts: Sequence[Weights | Mapping[str, Tensor] | str | Path],
) -> dict[str, Tensor]:
    """Computes the Gram matrix of the experts' task vectors, tensor by tensor.

    Args:
        base: the model the experts were fine-tuned from: a folder, a state dict or opened weights.
        experts: T models with the same tensors.

    Returns:
        For each floating-point tensor, in the base's order, a (T, T) float64 matrix of the inner products
        `<theta_i - theta_0, theta_j - theta_0>`. Their sum over tensors is the Gram matrix of the whole models.

    Raises:
        UserError: the models' tensors differ, a weight is NaN or infinite, or an integer buffer is not equal.
    """
    with ExitStack() as stack:
        opened = [
            _open(model, label, stack)
            for model, label in zip(
                [base, *experts], ["base", *(f"expert {i}" for i in range(len(experts)))], strict=True
            )
        ]
        check_same_tensors(opened[0], opened[1:])
        return gram_matrices(opened[0], opened[1:])


def _open(model: Weights | Mapping[str, Tensor] | str | Path, label: str, stack: ExitStack) -> Weights:
    if isinstance(model, str | Path):
        return stack.enter_context(Checkpoint(model, str(model)))
    return StateDict(model, label) if isinstance(model, Mapping) else model


def gram_matrices(
    base: Weights,
    experts: Sequence[Weights],
    bar: Bar | None = None,
    chunk: int = CHUNK,
    workers: int | None = None,
    thin: Callable[[str, int, list[Tensor]], list[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Does the work of `gram` on checked, opened models; also checks integer buffers for equality.

    Args:
        base: the base model.
        experts: T models with the same tensors.
        bar: advanced by the number of elements.
        chunk: elements read at a time, a multiple of `BLOCK`; the result does not depend on it.
        workers: threads; the result does not depend on it.
        thin: applied to the task vectors of a part (tensor name, first element, T of float64) before the products.
    """
    assert chunk % BLOCK == 0
    for name, info in base.tensors.items():
        if not info.dtype.is_floating_point:
            _check_equal(name, base, experts)
    count = len(experts)
    sums = {name: array("d") for name in float_names(base)}

    def block_sums(block: tuple[str, int, int]) -> list[float]:
        name, start, stop = block
        products = []
        for first, deltas in enumerate(task_vectors(name, start, stop, base, experts)):
            if thin is not None:
                deltas = torch.stack(thin(name, start + first * CACHED, list(deltas.double())))
            products.append(_block_products(deltas))
        products = torch.cat(products)
        if not torch.isfinite(products).all():
            _name_not_finite(name, start, stop, [base, *experts])
        return products.flatten().tolist()

    blocks = list(float_blocks(base, chunk))
    for (name, start, stop), values in zip(blocks, in_order(block_sums, blocks, workers), strict=True):
        sums[name].extend(values)
        if bar:
            bar.update(stop - start)
    matrices = {}
    for name, values in sums.items():
        entries = [math.fsum(values[i :: count * count]) for i in range(count * count)]
        matrices[name] = torch.tensor(entries, dtype=torch.float64).view(count, count)
    return matrices


def _block_products(deltas: Tensor) -> Tensor:
    """Returns the (n / BLOCK, T, T) inner products of (T, n) task vectors inside each block, zeros beyond the end."""
    count, size = deltas.shape
    full = size // BLOCK * BLOCK
    parts = deltas[:, :full].view(count, -1, BLOCK).transpose(0, 1)
    products = torch.bmm(parts, parts.transpose(1, 2))
    if full < size:
        last = pad(deltas[:, full:], (0, BLOCK - (size - full)))[None]
        products = torch.cat([products, torch.bmm(last, last.transpose(1, 2))])
    return products


def task_vectors(
    name: str, start: int, stop: int, base: Weights, experts: Sequence[Weights]
) -> Iterator[Tensor]:
    """Yields the task vectors of a block in parts of (T, up to CACHED), float32 (float64 if any model is).

    A part's memory is the calling thread's and is overwritten by the next part.
    """
    models = [base, *experts]
    wide = torch.float64 if any(m.tensors[name].dtype == torch.float64 for m in models) else torch.float32
    origin, *blocks = [model.read(name, start, stop) for model in models]
    for first, last in grid(stop - start, CACHED):
        deltas = _workspace.buffer("deltas", (len(experts), last - first), wide)
        own = _workspace.buffer("origin", (last - first,), wide).copy_(origin[first:last])
        for delta, block in zip(deltas, blocks, strict=True):
            delta.copy_(block[first:last]).sub_(own)
        yield deltas


def total(matrices: Mapping[str, Tensor]) -> Tensor:
    """Adds per-tensor (T, T) Gram matrices exactly, whatever their order.

    Raises:
        UserError: there is nothing to add.
    """
    if not matrices:
        raise UserError("the models hold no floating-point tensors: there is nothing to merge")
    rows = torch.stack(list(matrices.values())).flatten(1).T.tolist()
    count = next(iter(matrices.values())).shape[0]
    return torch.tensor([math.fsum(row) for row in rows], dtype=torch.float64).view(count, count)


def _check_equal(name: str, base: Weights, experts: Sequence[Weights]) -> None:
    for expert in experts:
        for start, stop in grid(base.tensors[name].numel):
            if not torch.equal(base.read(name, start, stop), expert.read(name, start, stop)):
                raise UserError(
                    f"{expert.label}: buffer '{name}' differs from {base.label}; integer and boolean tensors cannot "
                    "be merged, they must be equal"
                )


def _name_not_finite(name: str, start: int, stop: int, models: Sequence[Weights]) -> None:
    for model in models:
        block = model.read(name, start, stop)
        if not all_finite(block):
            index = start + int(torch.nonzero(~torch.isfinite(block))[0])
            raise UserError(
                f"{model.label}: '{name}' holds NaN or infinity (element {index}); mend or leave out the model, "
                "or set allow_non_finite, if it is an expert"
            )
    raise UserError(f"'{name}': a task vector is too large for float32 squares (elements {start} to {stop})")


# ---------------------------------------------------------------------------- thresholds


def trim_thresholds(
    base: Weights,
    experts: Sequence[Weights],
    keep: Sequence[int],
    bar: Bar | None = None,
    chunk: int = CHUNK,
    workers: int | None = None,
) -> tuple[list[float], list[int]]:
    """Finds, per expert, the magnitude of its `keep`-th largest task-vector entry over the whole model.

    Args:
        base: the base model.
        experts: T models with the same tensors.
        keep: how many entries to keep of each, at least 1.
        bar: advanced by the number of elements.
        chunk: elements read at a time.
        workers: threads; the result does not depend on it.

    Returns:
        T thresholds, and how many entries reach them: `keep`, or more where magnitudes tie.
    """
    blocks = list(float_blocks(base, chunk))
    over = partial(in_order, workers=workers)
    found = _largest(blocks, base, experts, [[rank] for rank in keep], torch.abs, over, bar)
    return [threshold for [(threshold, _)] in found], [reached for [(_, reached)] in found]


def tensor_thresholds(
    base: Weights,
    experts: Sequence[Weights],
    ranks: Callable[[int], Sequence[Sequence[int]]],
    magnitudes: Callable[[Tensor], Tensor] = torch.abs,
    bar: Bar | None = None,
    workers: int | None = None,
) -> dict[str, list[list[float]]]:
    """Finds magnitudes of given rank in every tensor by itself.

    Args:
        base: the base model.
        experts: T models with the same tensors.
        ranks: number of elements -> for each row of `magnitudes` the ranks wanted, 1 for the largest.
        magnitudes: (T, n) task vectors -> (S, n) float32, not negative: what is ranked. Default: the T magnitudes.
        bar: advanced by the number of elements.
        workers: threads; the result does not depend on it.

    Returns:
        Tensor -> S lists of magnitudes, float32 numbers, in the order of their ranks.
    """

    def one(name: str) -> list[list[float]]:
        blocks = [(name, start, stop) for start, stop in grid(base.tensors[name].numel)]
        wanted = ranks(base.tensors[name].numel)
        rows = _largest(blocks, base, experts, wanted, magnitudes, map) if blocks else []
        return [[value for value, _ in row] for row in rows]

    names = float_names(base)
    found = {}
    for name, rows in zip(names, in_order(one, names, workers), strict=True):
        found[name] = rows
        if bar:
            bar.update(base.tensors[name].numel)
    return found


_Blocks = Sequence[tuple[str, int, int]]


def _largest(
    blocks: _Blocks,
    base: Weights,
    experts: Sequence[Weights],
    ranks: Sequence[Sequence[int]],
    magnitudes: Callable[[Tensor], Tensor],
    over: Callable[[Callable[[tuple[str, int, int]], Any], _Blocks], Iterable[Any]],
    bar: Bar | None = None,
) -> list[list[tuple[float, int]]]:
    """Finds for each row of magnitudes its values of the given ranks, and how many entries reach each.

    Exact selection in bounded memory, on the bit patterns of the magnitudes, the keys, which are ordered as they are. A
    sample says within which keys an answer most likely lies; a pass counts what is larger, what equals the ends (in
    low-precision checkpoints most magnitudes are equal to many), and the keys between them. That most often gives the
    answer; where not, a pass over what is left does. `over` maps a function over blocks, in their order.
    """

    def keys_of(block: tuple[str, int, int]) -> Any:
        parts = [
            _magnitude_keys(magnitudes(deltas)).numpy() for deltas in task_vectors(*block, base, experts)
        ]
        return np.concatenate(parts, axis=1)

    def count(ranges: Sequence[Sequence["_Range"]]) -> None:
        def one(block: tuple[str, int, int]) -> list[list[tuple[int, int, int, Any, Any]]]:
            return [
                [searched.count(keys) for searched in row]
                for row, keys in zip(ranges, keys_of(block), strict=True)
            ]

        for (_, start, stop), found in zip(blocks, over(one, blocks), strict=True):
            for row, counted in zip(ranges, found, strict=True):
                for searched, more in zip(row, counted, strict=True):
                    searched.add(*more)
            if bar:
                bar.update(stop - start)

    step = max(1, len(blocks) * BLOCK // SAMPLE)
    piece = max(BLOCK, SAMPLE // len(blocks))
    pieces = [(name, start, min(start + piece, stop)) for name, start, stop in blocks[::step]]
    sample = np.concatenate(list(over(keys_of, pieces)), axis=1)
    size = sum(stop - start for _, start, stop in blocks)
    doubt = DOUBT if sample.shape[1] < size else 0.0
    ranges = [
        [_Range(rank, *_around(np.sort(keys), rank / size, doubt)) for rank in row]
        for row, keys in zip(ranks, sample, strict=True)
    ]
    count(ranges)
    bar = None
    while not all(searched.narrowed() for row in ranges for searched in row):
        count(ranges)
    return [[(_magnitude(searched.least), searched.reached) for searched in row] for row in ranges]


class _Range:
    """Keys from `least` to `greatest`, among which the `rank`-th largest of all keys is looked for."""

    def __init__(self, rank: int, least: int, greatest: int) -> None:
        self.rank = rank
        self.reached = 0
        """How many keys are as large as the answer, once it is known."""
        self._look_in(least, greatest)

    def _look_in(self, least: int, greatest: int) -> None:
        self.least, self.greatest = least, greatest
        self._shift = max(0, (greatest - least).bit_length() - BINS.bit_length() + 1)
        self._larger = self._at_greatest = self._at_least = 0
        self._between = np.zeros((greatest - least >> self._shift) + 1, dtype=np.int64)

    def count(self, keys: Any) -> tuple[int, int, int, Any, Any]:
        """Counts keys: the larger ones, those at the ends, and those between them by bin (bins, how many in each)."""
        larger = int(np.count_nonzero(keys > self.greatest))
        at_greatest = int(np.count_nonzero(keys == self.greatest))
        above_least = keys > self.least
        nothing = np.zeros(0, dtype=np.int64)
        if self.least == self.greatest:
            return larger, at_greatest, 0, nothing, nothing
        at_least = int(np.count_nonzero(keys == self.least))
        if np.count_nonzero(above_least) == larger + at_greatest:
            return larger, at_greatest, at_least, nothing, nothing
        between = keys[np.logical_and(above_least, keys < self.greatest, out=above_least)]
        bins = (between - self.least) >> self._shift
        if len(bins) < BINS // 16:
            return larger, at_greatest, at_least, *np.unique(bins, return_counts=True)
        times = np.bincount(bins)
        different = np.flatnonzero(times)
        return larger, at_greatest, at_least, different, times[different]

    def add(self, larger: int, at_greatest: int, at_least: int, bins: Any, times: Any) -> None:
        """Adds what `count` found in some of the keys."""
        self._larger += larger
        self._at_greatest += at_greatest
        self._at_least += at_least
        self._between[bins] += times

    def narrowed(self) -> bool:
        """Whether what was counted gives the answer, `least` then; if not, all keys must be counted again."""
        if self.reached:
            return True
        least, greatest, shift = self.least, self.greatest, self._shift
        left = self.rank - self._larger
        if left <= 0:
            self._look_in(greatest + 1, LARGEST_KEY)
        elif left <= self._at_greatest:
            self._found(greatest, self._larger + self._at_greatest)
        elif (left := left - self._at_greatest) <= (between := int(self._between.sum())):
            above = self._between[::-1].cumsum()
            place = int(np.searchsorted(above, left))
            bin_ = len(above) - 1 - place
            if shift:
                first = least + (bin_ << shift)
                self._look_in(max(first, least + 1), min(first + (1 << shift), greatest) - 1)
            else:
                self._found(least + bin_, self.rank - left + int(above[place]))
        elif left <= between + self._at_least:
            self._found(least, self.rank - left + between + self._at_least)
        else:
            self._look_in(0, least - 1)
        return self.reached > 0

    def _found(self, key: int, reached: int) -> None:
        self._look_in(key, key)
        self.reached = reached


def _around(keys: Any, share: float, doubt: float) -> tuple[int, int]:
    """Returns the keys, of sorted ones, that rank `share + doubt` and `share - doubt` from above."""
    ranks = [round((share + way * doubt) * len(keys)) for way in (1, -1)]
    least, greatest = (int(keys[-min(max(rank, 1), len(keys))]) for rank in ranks)
    return least, greatest


def _magnitude(key: int) -> float:
    return float(np.int32(key).view(np.float32))


def _magnitude_keys(deltas: Tensor) -> Tensor:
    """Returns the float32 bits of the magnitudes as int32, in their order."""
    return deltas.float().view(torch.int32).bitwise_and_(0x7FFFFFFF)  # all but the sign bit
