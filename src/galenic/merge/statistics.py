"""The statistics pass: Gram matrices of task vectors.

Blocks of the fixed grid are read by several threads, products are summed inside them, and the sums of blocks are added
exactly (`math.fsum`). The result depends neither on the size of what is read at a time nor on the number of threads.
"""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galenic.merge import kernels
from galenic.merge.blocks import CHUNK, Block, float_names, grid, own_blocks, read_rows
from galenic.merge.io import Checkpoint, StateDict, TensorInfo, Weights, all_finite, check_same_tensors
from galenic.merge.workers import in_order
from galenic.ranks import united
from galenic.runtime import Bar, UserError

Vectors = tuple[Any, Any, kernels.Thinning]
"""Origin, rows and thinning: what `kernels.products` takes."""


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
    vectors: Callable[[Block], Vectors] | None = None,
) -> dict[str, Tensor]:
    """Does the work of `gram` on checked, opened models; also checks integer buffers for equality.

    Args:
        base: the base model.
        experts: T models with the same tensors.
        bar: advanced by the number of elements.
        chunk: elements read at a time, a multiple of `kernels.BLOCK`; the result does not depend on it.
        workers: threads; the result does not depend on it.
        vectors: reads a block of the models and says how the task vectors are thinned. Default: not at all.
    """
    assert chunk % kernels.BLOCK == 0
    for name, info in base.tensors.items():
        # How many batches were seen differs between experts and means nothing in a merge: the base's is kept.
        if not info.dtype.is_floating_point and not name.endswith("num_batches_tracked"):
            _check_equal(name, base, experts)
    count = len(experts)
    whole = no_thinning(count)

    def read(block: Block) -> Vectors:
        origin, rows = read_block(base, experts, block)
        return origin, rows, whole

    read = vectors or read

    def block_sums(block: Block) -> Any:
        origin, rows, thinning = read(block)
        sums = np.empty((-(-rows.shape[1] // kernels.BLOCK), count, count))
        kernels.products(origin, rows, block.start, thinning, sums)
        if not np.isfinite(sums).all():
            _name_not_finite(block, [base, *experts])
        return sums

    blocks = own_blocks(base, chunk)
    found: dict[str, list[float]] = {}
    values = array("d")
    for block, sums in zip(blocks, in_order(block_sums, blocks, workers), strict=True):
        values.frombytes(sums.tobytes())
        if block.stop == base.tensors[block.name].numel:
            found[block.name] = [math.fsum(values[i :: count * count]) for i in range(count * count)]
            values = array("d")
        if bar:
            bar.update(block.stop - block.start)
    found, nothing = united(found), [0.0] * count * count
    return {
        name: torch.tensor(found.get(name, nothing), dtype=torch.float64).view(count, count)
        for name in float_names(base)
    }


def read_block(base: Weights, experts: Sequence[Weights], block: Block) -> tuple[Any, Any]:
    """Reads a block of the base, (n,), and of the experts, (T, n), as `blocks.read_rows`."""
    rows = read_rows([base, *experts], block)
    return rows[0], rows[1:]


def no_thinning(count: int) -> kernels.Thinning:
    """Returns the thinning that leaves `count` task vectors as they are."""
    return kernels.Thinning(
        trims=False,
        limits=np.full(count, -1.0),
        largest=np.full(count, np.inf, dtype=np.float32),
        draws=False,
        keys=np.zeros(count, dtype=np.uint64),
        bounds=np.zeros(count, dtype=np.int64),
        densities=np.ones(count),
    )


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


def _name_not_finite(block: Block, models: Sequence[Weights]) -> None:
    for model in models:
        found = model.read(*block)
        if not all_finite(found):
            index = block.start + int(torch.nonzero(~torch.isfinite(found))[0])
            raise UserError(
                f"{model.label}: '{block.name}' holds NaN or infinity (element {index}); mend or leave out the "
                "model, or set allow_non_finite, if it is an expert"
            )
    raise UserError(
        f"'{block.name}': a task vector is too large for squares (elements {block.start} to {block.stop})"
    )
