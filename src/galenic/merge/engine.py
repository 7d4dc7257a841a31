"""The two passes of a merge, on opened models of one shape: statistics, then merged blocks.

The same code merges folders and state dicts, so both give the same bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from galenic.merge import methods, spectral
from galenic.merge.adapters import Adapter, adapter_gram
from galenic.merge.cache import remembered
from galenic.merge.config import COMMON_SHARE, MergeConfig
from galenic.merge.io import TensorInfo, Weights, all_finite
from galenic.merge.metagpt import cosines, effective_models, metagpt_coefficients, norm_warnings
from galenic.merge.statistics import (
    CACHED,
    CHUNK,
    Origin,
    float_names,
    gram_matrices,
    grid,
    layer_of,
    tensor_thresholds,
    total,
    trim_thresholds,
)
from galenic.merge.vocabulary import is_vocabulary
from galenic.merge.workers import Workspace, in_order
from galenic.runtime import Bar, UserError, folder_name, progress

Result = TypeVar("Result")

_workspace = Workspace()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the first pass learns; all the second pass needs besides the weights."""

    coefficients: Mapping[str, Sequence[float]]
    """Tensor -> what each expert is multiplied by in it."""
    origin: Mapping[str, float]
    """`slerp` only: tensor -> what the base is multiplied by."""
    thresholds: Mapping[str, list[list[float]]]
    """Methods that select by size only: tensor -> magnitudes that bound what is kept, as `_thinned` reads them."""
    summary: dict[str, Any]
    """The contents of `merge.json`."""


def measure(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    cache: Path | None = None,
    show: bool = False,
) -> Statistics:
    """First pass: norms and cosines of the task vectors, thresholds, coefficients.

    What `cache` (of `cache.statistics_file`) remembers of these models is not computed again; `show` draws a progress
    bar for what is.

    Raises:
        UserError: NaN or infinity in a weight, unequal integer buffers.
    """
    names, parameters = config.names(), config.parameters
    weights = sum(base.tensors[name].numel for name in float_names(base))

    def shown(label: str, work: Callable[[Bar | None], Result]) -> Result:
        with progress(weights, label, "weights") if show else nullcontext() as bar:
            return work(bar)

    adapters = [expert for expert in experts if isinstance(expert, Adapter)]

    def gram(bar: Bar | None) -> dict[str, Tensor]:
        # Adapters of this base are measured by their factors; then hardly anything is read.
        if len(adapters) == len(experts) and all(adapter.base is base for adapter in adapters):
            return adapter_gram(base, adapters, bar)
        return gram_matrices(base, experts, bar)

    matrices = _remembered_gram(cache, "gram", lambda: shown("task vectors", gram))
    matrix = total(matrices)
    summary: dict[str, Any] = {
        "method": config.merge_method,
        "base": folder_name(config.base_model),
        "experts": names,
        "norms": dict(zip(names, matrix.diagonal().sqrt().tolist(), strict=True)),
        "cosines": cosines(matrix),
    }
    thresholds = _thresholds(config, base, experts, cache, shown, summary)
    weighing = matrices
    if parameters.norms == "after_trim" or config.thins == "sce":
        thin = partial(_thinned, config, thresholds, base)
        keyed_by = (
            (parameters.select_topk,)
            if config.thins == "sce"
            else (config.densities(), (names, config.seed) if config.draws else None)
        )
        weighing = _remembered_gram(
            cache,
            f"gram {config.thins} {keyed_by}",
            lambda: shown("what is left of them", lambda bar: gram_matrices(base, experts, bar, thin=thin)),
        )
    origin: dict[str, float] = {}
    if config.merge_method == "slerp":
        weighing = _remembered_gram(
            cache,
            "gram of weights",
            lambda: shown("angles", lambda bar: gram_matrices(Origin(base), [base, *experts], bar)),
        )
        t = 0.5 if parameters.t is None else parameters.t
        both = {name: methods.slerp_coefficients(matrix, t) for name, matrix in weighing.items()}
        origin = {name: first for name, (first, _) in both.items()}
        coefficients = {name: [second] for name, (_, second) in both.items()}
    else:
        coefficients = _coefficients(config, weighing)
    mean = [
        _mean([(coefficients[name][t], base.tensors[name].numel) for name in matrices])
        for t in range(len(names))
    ]
    by_tensor = config.merge_method in ("sce", "model_stock", "slerp") or parameters.scope == "tensor"
    summary |= {
        "scope": "tensor" if by_tensor else parameters.scope or "global",
        "coefficients": dict(zip(names, mean, strict=True)),  # their mean over the weights, if they differ
        "effective_models": effective_models(mean),
        "units": _units(names, matrices, coefficients, by_tensor),
        "warnings": norm_warnings(names, matrix, mean if config.merge_method == "metagpt" else None),
    }
    return Statistics(coefficients=coefficients, origin=origin, thresholds=thresholds, summary=summary)


def _mean(values: Sequence[tuple[float, int]]) -> float:
    """Returns the mean of (value, count) pairs; the value itself if there is but one."""
    if len({value for value, _ in values}) == 1:
        return values[0][0]
    return math.fsum(value * count for value, count in values) / sum(count for _, count in values)


def _remembered_gram(
    cache: Path | None, name: str, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    rows = remembered(cache, name, lambda: {key: matrix.tolist() for key, matrix in compute().items()})
    return {key: torch.tensor(matrix, dtype=torch.float64) for key, matrix in rows.items()}


def _thresholds(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    cache: Path | None,
    shown: "Callable[[str, Callable[[Bar | None], Any]], Any]",
    summary: dict[str, Any],
) -> Mapping[str, list[list[float]]]:
    """Finds the magnitudes that bound what is kept, and adds to the summary how much that is."""
    names, densities, floats = config.names(), config.densities(), float_names(base)
    if config.thins in ("dare", "della", "breadcrumbs"):
        summary["densities"] = dict(zip(names, densities, strict=True))
    if config.thins == "ties":
        weights = sum(base.tensors[name].numel for name in floats)
        keep = [max(1, round(density * weights)) for density in densities]
        found, kept = remembered(
            cache,
            f"thresholds {keep}",
            lambda: shown("thresholds", lambda bar: trim_thresholds(base, experts, keep, bar)),
        )
        # More than the density where magnitudes tie, as they do in low-precision checkpoints.
        summary["kept"] = {name: n / weights for name, n in zip(names, kept, strict=True)}
        return {name: [[threshold] for threshold in found] for name in floats}
    magnitudes: Callable[[Tensor], Tensor] = torch.abs
    if config.thins == "breadcrumbs":
        shares = list(zip(config.gammas(), densities, strict=True))

        def ranks(numel: int) -> list[list[int]]:
            found = []
            for gamma, density in shares:
                first = min(int(gamma * numel), numel - 1)
                found.append([first + 1, min(numel, first + max(1, int(density * numel)))])
            return found

        key = f"breadcrumbs {shares}"
    elif config.thins == "sce":
        share = config.parameters.select_topk or 1.0

        def ranks(numel: int) -> list[list[int]]:
            return [[max(1, round(share * numel))]]

        key, magnitudes = f"sce {share}", methods.variances
    else:
        return {}
    return remembered(
        cache,
        key,
        lambda: shown("thresholds", lambda bar: tensor_thresholds(base, experts, ranks, magnitudes, bar)),
    )


def _coefficients(config: MergeConfig, matrices: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Returns what each expert is multiplied by, tensor by tensor."""
    weights, numbers = config.weights(), config.parameters
    if config.merge_method == "model_stock":
        count = len(weights)
        return {name: [methods.model_stock_ratio(m) / count] * count for name, m in matrices.items()}
    if config.merge_method not in ("metagpt", "sce"):
        if config.normalizes and not config.elects:
            weights = [weight / sum(weights) for weight in weights]
        return dict.fromkeys(matrices, weights)
    scope = "tensor" if config.merge_method == "sce" else numbers.scope or "global"
    unit_of = {"layer": layer_of, "tensor": str}.get(scope, lambda name: "")
    units: dict[str, dict[str, Tensor]] = {}
    for name, matrix in matrices.items():
        units.setdefault(unit_of(name), {})[name] = matrix
    power = 2.0 if numbers.norm_power is None else numbers.norm_power
    limit = 1.0 if numbers.max_coefficient is None else numbers.max_coefficient
    found = {
        unit: metagpt_coefficients(members, norm_power=power, max_coefficient=limit).tolist()
        for unit, members in units.items()
    }
    return {name: found[unit_of(name)] for name in matrices}


def _units(
    names: Sequence[str],
    matrices: Mapping[str, Tensor],
    coefficients: Mapping[str, Sequence[float]],
    by_tensor: bool,
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns norms and coefficients per layer, or per tensor: where in the network the experts differ."""
    members: dict[str, dict[str, Tensor]] = {}
    for name, matrix in matrices.items():
        members.setdefault(name if by_tensor else layer_of(name), {})[name] = matrix
    return {
        unit: {
            "norms": dict(zip(names, total(inside).diagonal().sqrt().tolist(), strict=True)),
            "coefficients": dict(zip(names, coefficients[next(iter(inside))], strict=True)),
        }
        for unit, inside in members.items()
    }


def output_tensors(
    config: MergeConfig, base: Weights, stored: Weights | None = None
) -> dict[str, TensorInfo]:
    """Returns the layout of the merged model: the base's tensors, floating-point ones in the asked dtype.

    Args:
        config: of the merge.
        base: the base as it is merged, perhaps with rearranged rows.
        stored: the base as it is on disk, whose dtypes the output has if none is asked for. Default: `base`.
    """
    dtypes = (stored or base).tensors
    wanted = getattr(torch, config.output_dtype) if config.output_dtype else None
    return {
        name: TensorInfo(
            dtype=wanted if wanted and info.dtype.is_floating_point else dtypes[name].dtype, shape=info.shape
        )
        for name, info in base.tensors.items()
    }


def merge_blocks(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    statistics: Statistics,
    output: Mapping[str, TensorInfo],
    write: Callable[[str, int, Tensor], None],
    bar: Bar | None = None,
    workers: int | None = None,
    first: int = 0,
    finished: Callable[[int], None] = lambda blocks: None,
    forks: bool = False,
) -> None:
    """Second pass: calls `write(tensor name, first element, block in the output dtype)` for every block of `output`.

    `write` is called from several threads, or processes with `forks`, each block once, in no particular order; it must
    have used the block when it returns. Blocks before the `first` are left out; `finished(n)` is called, in the
    calling thread, when the first n blocks are written.

    Raises:
        UserError: a merged value does not fit the output dtype; the tensor is named.
    """

    def one(block: tuple[str, int, int]) -> int:
        name, start, stop = block
        dtype = output[name].dtype
        if not dtype.is_floating_point:
            write(name, start, base.read(name, start, stop))
            return 0
        merged = torch.empty(stop - start, dtype=dtype)
        parts = _merge_block(config, base, experts, statistics, *block)
        for (first, last), part in zip(_parts(config, base, name, start, stop), parts, strict=True):
            merged[first:last] = methods.round_once(part, dtype)
        if not all_finite(merged):
            raise UserError(f"'{name}': merged values do not fit {dtype}; use dtype: bfloat16 or float32")
        write(name, start, merged)
        return stop - start

    blocks = [
        (name, start, stop)
        for name, info in output.items()
        for start, stop in grid(info.numel, row=_row(config, name, info))
    ]
    if bar:
        bar.update(sum(stop - start for _, start, stop in blocks[:first]))
    for count, elements in enumerate(in_order(one, blocks[first:], workers, forks), start=first + 1):
        finished(count)
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
    weights = statistics.coefficients[name]
    blocks = [expert.read(name, start, stop) for expert in experts]
    origin_block = None if config.base_cancels else base.read(name, start, stop)
    for first, last in _parts(config, base, name, start, stop):
        parts = [block[first:last] for block in blocks]
        if origin_block is None:
            yield methods.weighted_sum(parts, weights)
            continue
        if config.spectral:
            origin = origin_block[first:last].double()
            deltas = [(part.double() - origin) * weight for part, weight in zip(parts, weights, strict=True)]
            yield origin + _spectral(config, name, base.tensors[name].shape, deltas) * config.scale
            continue
        if config.merge_method == "slerp":
            yield methods.weighted_sum(
                [origin_block[first:last], *parts], [statistics.origin[name], *weights]
            )
            continue
        shape = (last - first,)
        origin = _workspace.buffer("origin", shape, torch.float64).copy_(origin_block[first:last])
        deltas = [
            _workspace.buffer(f"delta {t}", shape, torch.float64).copy_(part).sub_(origin)
            for t, part in enumerate(parts)
        ]
        deltas = _thinned(config, statistics.thresholds, base, name, start + first, deltas)
        if config.elects:
            votes = [1.0] * len(deltas) if config.merge_method == "sce" else None
            yield methods.ties(origin, deltas, weights, config.scale, votes, config.normalizes)
        else:
            yield methods.task_arithmetic(origin, deltas, [weight * config.scale for weight in weights])


def _row(config: MergeConfig, name: str, info: TensorInfo) -> int:
    """Returns how many elements must be looked at together.

    DELLA ranks the rows of a matrix, or all of a vector; singular spaces are those of a whole matrix.
    """
    if config.spectral and len(info.shape) == 2 and not is_vocabulary(name):
        return max(1, info.numel)
    return max(1, info.shape[-1]) if config.thins == "della" and info.shape else 1


def memory_for_blocks(config: MergeConfig, output: Mapping[str, TensorInfo], experts: int) -> int:
    """Returns about how many bytes the blocks under way take, in all threads."""
    row = max((_row(config, name, info) for name, info in output.items()), default=1)
    # Per model a block as stored (8 bytes at most) and a few parts in float64; singular vectors are parts too.
    models = experts + 2 + 2 * experts * config.spectral
    return (8 * max(CHUNK, row) + 4 * 8 * max(CACHED, row)) * models * torch.get_num_threads()


def _spectral(config: MergeConfig, name: str, shape: tuple[int, ...], deltas: list[Tensor]) -> Tensor:
    """Merges weighted task vectors: matrices in their singular spaces, everything else by the mean."""
    if len(shape) != 2 or is_vocabulary(name):
        return methods.weighted_sum(deltas, [1 / len(deltas)] * len(deltas))
    matrices = [delta.view(shape) for delta in deltas]
    if config.merge_method == "tsv":
        return spectral.tsv(matrices).flatten()
    if config.merge_method == "iso_c":
        return spectral.iso_c(matrices).flatten()
    share = config.parameters.common_share
    return spectral.iso_cts(matrices, COMMON_SHARE if share is None else share).flatten()


def _parts(config: MergeConfig, base: Weights, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yields the [first, last) ranges of a block that are computed at a time."""
    return grid(stop - start, CACHED, _row(config, name, base.tensors[name]))


def _thinned(
    config: MergeConfig,
    thresholds: Mapping[str, list[list[float]]],
    base: Weights,
    name: str,
    start: int,
    deltas: list[Tensor],
) -> list[Tensor]:
    """Takes entries away from the task vectors (float64) of the elements from `start` on, as the method says."""
    if config.thins == "ties":
        return [methods.trim(delta, least) for delta, [least] in zip(deltas, thresholds[name], strict=True)]
    if config.thins == "breadcrumbs":
        limits = thresholds[name]
        return [
            methods.between(delta, least, largest)
            for delta, [largest, least] in zip(deltas, limits, strict=True)
        ]
    if config.thins == "sce":
        [[least]] = thresholds[name]
        selected = methods.variances(torch.stack(deltas).float())[0] >= least
        return [delta * selected for delta in deltas]
    if not config.draws:
        return deltas
    dropped = []
    row = _row(config, name, base.tensors[name])
    numbers = zip(deltas, config.names(), config.densities(), config.epsilons(), strict=True)
    for delta, label, density, epsilon in numbers:
        chance = (
            methods.keep_probabilities(delta, row, density, epsilon) if config.thins == "della" else density
        )
        kept = methods.keep_mask(config.seed, label, name, start, start + len(delta), chance)
        dropped.append(methods.drop_and_rescale(delta, kept, chance))
    return dropped
