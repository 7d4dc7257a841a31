"""The fixed grid that models are processed in, and its blocks as the compiled loops want them.

The grid does not depend on the number of threads or on the machine, so neither does what is computed from it.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galenic.merge.io import Checkpoint, Weights
from galenic.merge.kernels import BLOCK
from galenic.ranks import share

CHUNK = 8 * BLOCK
"""Elements read and written at a time, 1 MiB in bfloat16: file systems are slow with smaller parts."""
PAGE = 4096
"""Buffers begin at multiples of this address, as writing past the page cache asks for."""


class Block(NamedTuple):
    """Consecutive elements of one tensor."""

    name: str
    """Of the tensor."""
    start: int
    """The first element."""
    stop: int
    """The element after the last one."""


def grid(numel: int, chunk: int = CHUNK, row: int = 1, lead: int = 0) -> Iterator[tuple[int, int]]:
    """Yields the [start, stop) ranges a tensor is processed in: `chunk` elements at most, in whole rows.

    The first range has `lead` elements more, so that the others begin where something else does.
    """
    chunk = max(1, chunk // row) * row
    start = 0
    while start < numel:
        stop = min(start + chunk + (0 if start else lead), numel)
        yield start, stop
        start = stop


def is_running(name: str) -> bool:
    """Whether a tensor holds running statistics of batch normalisation.

    They are measured, not trained, so they have no part in norms, and every method averages them.
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def float_names(weights: Weights) -> list[str]:
    """Returns the names of the tensors that have task vectors; buffers have none."""
    return [
        name
        for name, info in weights.tensors.items()
        if info.dtype.is_floating_point and not is_running(name)
    ]


def own_names(weights: Weights) -> list[str]:
    """Returns those of `float_names` that this process looks after, all of them if there is but one."""
    names = float_names(weights)
    own = share({name: weights.tensors[name].numel for name in names})
    return [name for name in names if name in own]


def own_blocks(weights: Weights, chunk: int = CHUNK) -> list[Block]:
    """Returns every block of every tensor of `own_names`."""
    return [
        Block(name, start, stop)
        for name in own_names(weights)
        for start, stop in grid(weights.tensors[name].numel, chunk)
    ]


def layer_of(name: str) -> str:
    """Names the layer a tensor belongs to: what stands up to its first number, or the tensor itself.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
        ('model.layers.3', 'lm_head.weight')
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else name


class Workspace(threading.local):
    """Buffers that a thread keeps from block to block: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns uninitialised memory of this thread, overwritten when the thread asks for the same use again."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        held = self._buffers.get(use)
        if held is None or held.numel() < size:
            held = torch.empty(size + PAGE, dtype=torch.uint8)
            first = -held.data_ptr() % PAGE
            held = self._buffers[use] = held[first : first + size]
        return held[:size].view(dtype).view(shape)


_workspace = Workspace()


def read_rows(models: Sequence[Weights], block: Block) -> Any:
    """Reads a block of all models into one array, of a type that holds the weights of each exactly.

    Returns:
        (models, elements) uint16 with the bits of bfloat16, float32 or float64; overwritten by the thread's next call.
    """
    name, start, stop = block
    kinds = {model.tensors[name].dtype for model in models}
    dtype = torch.bfloat16 if kinds == {torch.bfloat16} else torch.float32
    if torch.float64 in kinds:
        dtype = torch.float64
    rows = _workspace.buffer("rows", (len(models), stop - start), dtype)
    for row, model in zip(rows, models, strict=True):
        if isinstance(model, Checkpoint):
            model.read_into(row, name, start)
        else:
            row.copy_(model.read(name, start, stop))
    return as_numpy(rows)


def as_numpy(tensor: Tensor) -> Any:
    """Returns a tensor's memory as a numpy array; bfloat16, which numpy lacks, as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
