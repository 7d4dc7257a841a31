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

HIGH_BINS, LOW_BINS = 1 << 15, 1 << 16
"""The 31 bits of a float32 magnitude, split in two: bins whose magnitudes differ by 0.8% at most, and single ones."""
WIDEST = 32
"""Bins a guess may span; a histogram of single magnitudes takes half a MiB of memory for each."""


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

    Exact selection in bounded memory. (Magnitudes are non-negative floats, whose bit patterns are ordered as they
    are.) A sample says in which bins of the upper bits the answers most likely lie; one pass counts what lies above
    these bins, and every single magnitude inside them. Where the sample misled, a histogram of all upper bits says
    the bins for certain, and a last pass counts in those. `over` maps a function over blocks, in their order.
    """

    def histograms(blocks: _Blocks) -> list[Tensor]:
        """Counts the upper bits, for each row (HIGH_BINS,)."""

        def one(block: tuple[str, int, int]) -> Any:
            counts = torch.zeros(len(ranks), HIGH_BINS, dtype=torch.int64)
            for deltas in task_vectors(*block, base, experts):
                for row, keys in zip(counts, _magnitude_keys(magnitudes(deltas)), strict=True):
                    row += torch.bincount(keys >> 16, minlength=HIGH_BINS)
            return counts.numpy()

        return list(torch.from_numpy(sum(over(one, blocks))))

    def select(bins: list[list[tuple[int, int]]]) -> list[list[tuple[float, int] | None]]:
        """Finds the answers that lie in their bins [first, last)."""

        def one(block: tuple[str, int, int]) -> list[list[tuple[int, Any]]]:
            found = [[(0, [])] * len(row) for row in bins]
            for deltas in task_vectors(*block, base, experts):
                for row, keys in enumerate(_magnitude_keys(magnitudes(deltas)).numpy()):
                    for i, (first, last) in enumerate(bins[row]):
                        least, beyond = first << 16, (last << 16) - 1
                        reaching, above = keys >= least, keys > beyond
                        more = np.count_nonzero(above)
                        inside = keys[np.logical_xor(reaching, above, out=above)] - least
                        found[row][i] = (found[row][i][0] + more, [*found[row][i][1], inside])
            return [[(above, np.concatenate(inside)) for above, inside in row] for row in found]

        above = [[0] * len(row) for row in bins]
        counts = [
            [torch.zeros((last - first) * LOW_BINS, dtype=torch.int64) for first, last in row] for row in bins
        ]
        for (_, start, stop), found in zip(blocks, over(one, blocks), strict=True):
            for row, answers in enumerate(found):
                for i, (more, inside) in enumerate(answers):
                    above[row][i] += int(more)
                    counts[row][i].index_add_(
                        0, torch.from_numpy(inside), torch.ones(len(inside), dtype=torch.int64)
                    )
            if bar:
                bar.update(stop - start)
        return [
            [
                _answer(rank - more, counted, more, first << 16)
                for rank, more, counted, (first, _) in zip(*columns, strict=True)
            ]
            for columns in zip(ranks, above, counts, bins, strict=True)
        ]

    sample = [(name, start, min(start + BLOCK, stop)) for name, start, stop in blocks]
    size, sampled = (sum(stop - start for _, start, stop in part) for part in (blocks, sample))
    doubt = 3 * sampled**-0.5 if sampled < size else 0.0
    guesses = [
        [_bins_around(counts, rank / size, doubt) for rank in row]
        for counts, row in zip(histograms(sample), ranks, strict=True)
    ]
    found = select(guesses)
    if any(answer is None for row in found for answer in row):
        bar = None
        found = select(
            [
                [_bins_around(counts, rank / size, 0.0) for rank in row]
                for counts, row in zip(histograms(blocks), ranks, strict=True)
            ]
        )
    return [[answer for answer in row if answer is not None] for row in found]


def _answer(rank: int, counts: Tensor, above: int, least: int) -> tuple[float, int] | None:
    """Returns the magnitude of the `rank`-th largest that was counted, and how many reach it; None if it was not."""
    if not 0 < rank <= int(counts.sum()):
        return None
    index, missing = _bin_from_above(counts, rank)
    key = torch.tensor(least + index, dtype=torch.int32)
    return key.view(torch.float32).item(), above + rank - missing + int(counts[index])


def _bins_around(histogram: Tensor, share: float, doubt: float) -> tuple[int, int]:
    """Returns the range [first, last) of bins of the items that rank from `share - doubt` to `share + doubt`."""
    total = int(histogram.sum())
    high, low = (
        _bin_from_above(histogram, min(max(round((share + way * doubt) * total), 1), total))[0]
        for way in (-1, 1)
    )
    middle = (high + low) // 2
    return max(low, middle - WIDEST // 2), min(high, middle + WIDEST // 2) + 1


def _magnitude_keys(deltas: Tensor) -> Tensor:
    """Returns the float32 bits of the magnitudes as int32, in their order."""
    return deltas.float().view(torch.int32).bitwise_and_(0x7FFFFFFF)  # all but the sign bit


def _bin_from_above(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Returns the bin of the `rank`-th largest item, and how many of that bin are among the `rank` largest."""
    above = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(above, rank))
    before = int(above[position - 1]) if position else 0
    return histogram.numel() - 1 - position, rank - before
