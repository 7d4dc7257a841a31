"""The two passes of a merge, on opened models of one shape: statistics, then merged blocks.

The same code merges folders and state dicts, so both give the same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galenic.merge import methods
from galenic.merge.config import MergeConfig
from galenic.merge.io import TensorInfo, Weights
from galenic.merge.metagpt import cosines, effective_models, metagpt_coefficients, norm_warnings
from galenic.merge.statistics import float_names, gram_matrices, grid, total, trim_thresholds
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


def merged_blocks(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    statistics: Statistics,
    bar: Bar | None = None,
) -> Iterator[tuple[str, int, Tensor]]:
    """Second pass: yields (tensor name, first element, block in the output dtype) of the merged model.

    Raises:
        UserError: a merged value does not fit the output dtype; the tensor is named.
    """
    for name, info in output_tensors(config, base).items():
        for start, stop in grid(info.numel):
            if not info.dtype.is_floating_point:
                yield name, start, base.read(name, start, stop)
                continue
            merged = _merge_block(config, base, experts, statistics, name, start, stop)
            block = methods.round_once(merged, info.dtype)
            if not torch.isfinite(block).all():
                raise UserError(
                    f"'{name}': merged values do not fit {info.dtype}; use dtype: bfloat16 or float32"
                )
            yield name, start, block
            if bar:
                bar.update(stop - start)


def _merge_block(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    statistics: Statistics,
    name: str,
    start: int,
    stop: int,
) -> Tensor:
    """Merges one block in float64."""
    weights = statistics.coefficients
    blocks = [expert.read(name, start, stop) for expert in experts]
    if config.merge_method in ("metagpt", "linear"):
        return methods.weighted_sum(
            blocks, weights
        )  # coefficients sum to 1: the base cancels and is not read
    origin = base.read(name, start, stop).double()
    deltas = [block.double() - origin for block in blocks]
    if config.merge_method == "task_arithmetic":
        return methods.task_arithmetic(origin, deltas, weights)
    if config.merge_method == "ties":
        trimmed = [methods.trim(d, t) for d, t in zip(deltas, statistics.thresholds, strict=True)]
        return methods.ties(origin, trimmed, weights)
    dropped = []
    for delta, label, density in zip(deltas, config.names(), config.densities(), strict=True):
        kept = methods.keep_mask(config.seed, label, name, start, stop, density)
        dropped.append(methods.drop_and_rescale(delta, kept, density))
    return methods.task_arithmetic(origin, dropped, weights)
