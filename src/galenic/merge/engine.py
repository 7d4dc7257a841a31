"""The two passes of a merge, on opened models of one shape: statistics, then merged blocks.

The same code merges folders and state dicts, so both give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galenic.merge import methods
from galenic.merge.config import MergeConfig
from galenic.merge.io import TensorInfo, Weights
from galenic.merge.metagpt import cosines, effective_models, metagpt_coefficients, norm_warnings
from galenic.merge.statistics import (
    CACHED,
    all_finite,
    float_names,
    gram_matrices,
    grid,
    total,
    trim_thresholds,
)
from galenic.merge.workers import in_order
from galenic.runtime import Bar, UserError, folder_name


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the first pass learns; all the second pass needs besides the weights."""

    coefficients: list[float]
    """What each expert is multiplied by."""
    thresholds: list[float]
    """TIES only: smallest magnitude each task vector keeps."""
    summary: dict[str, Any]
    """The contents of `merge.json`."""


def measure(
    config: MergeConfig, base: Weights, experts: Sequence[Weights], bar: Bar | None = None
) -> Statistics:
    """First pass: norms and cosines of the task vectors, coefficients, thresholds.

    Raises:
        UserError: NaN or infinity in a weight, unequal integer buffers.
    """
    names, method = config.names(), config.merge_method
    matrix = total(gram_matrices(base, experts, bar))
    coefficients = config.weights()
    if method == "metagpt":
        coefficients = metagpt_coefficients(matrix).tolist()
    elif method == "linear":
        coefficients = [weight / sum(coefficients) for weight in coefficients]
    summary: dict[str, Any] = {
        "method": method,
        "base": folder_name(config.base_model),
        "experts": names,
        "norms": dict(zip(names, matrix.diagonal().sqrt().tolist(), strict=True)),
        "cosines": cosines(matrix),
        "coefficients": dict(zip(names, coefficients, strict=True)),
        "effective_models": effective_models(coefficients),
        "warnings": norm_warnings(names, matrix, coefficients if method == "metagpt" else None),
    }
    thresholds: list[float] = []
    if method == "ties":
        entries = sum(base.tensors[name].numel for name in float_names(base))
        keep = [max(1, round(density * entries)) for density in config.densities()]
        thresholds, kept = trim_thresholds(base, experts, keep)
        # More than the density where magnitudes tie, as they do in low-precision checkpoints.
        summary["kept"] = {name: n / entries for name, n in zip(names, kept, strict=True)}
    if method == "dare_linear":
        summary["densities"] = dict(zip(names, config.densities(), strict=True))
    return Statistics(coefficients=coefficients, thresholds=thresholds, summary=summary)


def output_tensors(config: MergeConfig, base: Weights) -> dict[str, TensorInfo]:
    """Returns the layout of the merged model: the base's tensors, floating-point ones in the asked dtype."""
    wanted = getattr(torch, config.dtype) if config.dtype else None
    return {
        name: TensorInfo(
            dtype=(wanted or info.dtype) if info.dtype.is_floating_point else info.dtype, shape=info.shape
        )
        for name, info in base.tensors.items()
    }


def merge_blocks(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    statistics: Statistics,
    write: Callable[[str, int, Tensor], None],
    bar: Bar | None = None,
    workers: int | None = None,
) -> None:
    """Second pass: calls `write(tensor name, first element, block in the output dtype)` for every block.

    `write` is called from several threads, each block once, in no particular order; it must have used the block
    when it returns.

    Raises:
        UserError: a merged value does not fit the output dtype; the tensor is named.
    """
    output = output_tensors(config, base)

    def one(block: tuple[str, int, int]) -> int:
        name, start, stop = block
        dtype = output[name].dtype
        if not dtype.is_floating_point:
            write(name, start, base.read(name, start, stop))
            return 0
        merged = torch.empty(stop - start, dtype=dtype)
        parts = _merge_block(config, base, experts, statistics, *block)
        for (first, last), part in zip(grid(stop - start, CACHED), parts, strict=True):
            merged[first:last] = methods.round_once(part, dtype)
        if not all_finite(merged):
            raise UserError(f"'{name}': merged values do not fit {dtype}; use dtype: bfloat16 or float32")
        write(name, start, merged)
        return stop - start

    blocks = [(name, start, stop) for name, info in output.items() for start, stop in grid(info.numel)]
    for elements in in_order(one, blocks, workers):
        if bar:
            bar.update(elements)


def _merge_block(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    statistics: Statistics,
    name: str,
    start: int,
    stop: int,
) -> Iterator[Tensor]:
    """Yields the merged block in float64, in parts that fit a core's cache."""
    method, weights = config.merge_method, statistics.coefficients
    blocks = [expert.read(name, start, stop) for expert in experts]
    # Coefficients that sum to 1: the base cancels and is not read.
    origin_block = None if method in ("metagpt", "linear") else base.read(name, start, stop)
    for first, last in grid(stop - start, CACHED):
        parts = [block[first:last] for block in blocks]
        if origin_block is None:
            yield methods.weighted_sum(parts, weights)
            continue
        origin = origin_block[first:last].double()
        deltas = [part.double() - origin for part in parts]
        if method == "task_arithmetic":
            yield methods.task_arithmetic(origin, deltas, weights)
        elif method == "ties":
            trimmed = [methods.trim(d, t) for d, t in zip(deltas, statistics.thresholds, strict=True)]
            yield methods.ties(origin, trimmed, weights)
        else:
            dropped = []
            for delta, label, density in zip(deltas, config.names(), config.densities(), strict=True):
                kept = methods.keep_mask(config.seed, label, name, start + first, start + last, density)
                dropped.append(methods.drop_and_rescale(delta, kept, density))
            yield methods.task_arithmetic(origin, dropped, weights)
