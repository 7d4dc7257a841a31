"""The two passes of a merge, on opened models of one shape: statistics, then merged blocks.

The same code merges folders and state dicts, so both give the same bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from galenic.merge import kernels, methods, spectral
from galenic.merge.adapters import Adapter, adapter_gram
from galenic.merge.blocks import (
    CHUNK,
    Block,
    Workspace,
    as_numpy,
    grid,
    is_running,
    layer_of,
    own_names,
    read_rows,
)
from galenic.merge.cache import remembered
from galenic.merge.config import COMMON_SHARE, MergeConfig
from galenic.merge.io import TensorInfo, Weights, all_finite
from galenic.merge.magnitudes import counts_memory
from galenic.merge.metagpt import cosines, effective_models, metagpt_coefficients, norm_warnings
from galenic.merge.statistics import Origin, gram_matrices, no_thinning, read_block, total
from galenic.merge.thinning import (
    DENSITIES,
    Thresholds,
    find_thresholds,
    read_thinned,
    row_of,
    task_vectors,
    thinning,
)
from galenic.merge.vocabulary import is_vocabulary
from galenic.merge.workers import WAITING, in_order
from galenic.ranks import share
from galenic.runtime import Bar, UserError, folder_name, progress

Result = TypeVar("Result")

_workspace = Workspace()

NANOSECOND = 1e-9
"""Seconds a thread takes for a weight of an expert in a pass, reading from memory included."""
FLOPS = 2e10
"""Operations a second of a thread in a singular value decomposition in float64, on the careful side."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the first pass learns; all the second pass needs besides the weights."""

    coefficients: Mapping[str, Sequence[float]]
    """Tensor -> what each expert is multiplied by in it."""
    origin: Mapping[str, float]
    """`slerp` only: tensor -> what the base is multiplied by."""
    thresholds: Thresholds
    """Methods that select by size only: magnitudes that bound what is kept."""
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
    weights = sum(base.tensors[name].numel for name in own_names(base))

    def shown(label: str, passes: int, work: Callable[[Bar | None], Result]) -> Result:
        with progress(passes * weights, label, "weights") if show else nullcontext() as bar:
            return work(bar)

    adapters = [expert for expert in experts if isinstance(expert, Adapter)]

    def gram(bar: Bar | None) -> dict[str, Tensor]:
        # Adapters of this base are measured by their factors; then hardly anything is read.
        if len(adapters) == len(experts) and all(adapter.base is base for adapter in adapters):
            return adapter_gram(base, adapters, bar)
        return gram_matrices(base, experts, bar)

    matrices = _remembered_gram(cache, "gram", lambda: shown("task vectors", 1, gram))
    matrix = total(matrices)
    summary: dict[str, Any] = {
        "method": config.merge_method,
        "base": folder_name(config.base_model),
        "experts": names,
        "norms": dict(zip(names, matrix.diagonal().sqrt().tolist(), strict=True)),
        "cosines": cosines(matrix),
    }
    thresholds = find_thresholds(config, base, experts, cache, shown, summary)
    weighing = matrices
    if parameters.norms == "after_trim" or config.thins == "sce":
        vectors = read_thinned(config, thresholds, base, experts)
        keyed_by = (
            (parameters.select_topk,)
            if config.thins == "sce"
            else (config.densities(), (names, config.seed) if config.draws else None)
        )
        weighing = _remembered_gram(
            cache,
            f"gram {config.thins} {keyed_by}",
            lambda: shown(
                "what is left of them", 1, lambda bar: gram_matrices(base, experts, bar, vectors=vectors)
            ),
        )
    origin: dict[str, float] = {}
    if config.merge_method == "slerp":
        weighing = _remembered_gram(
            cache,
            "gram of weights",
            lambda: shown("angles", 1, lambda bar: gram_matrices(Origin(base), [base, *experts], bar)),
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
    lead: Callable[[str], int] = lambda name: 0,
) -> None:
    """Second pass: calls `write(tensor name, first element, block in the output dtype)` for every block of `output`.

    Of several processes each does this for the tensors that are its share. `write` is called from several threads,
    each block once, in no particular order; it must have used the block when it returns. Blocks before the `first` are
    left out; `finished(n)` is called, in the calling thread, when the first n blocks are written. After its first
    `lead(name)` elements a tensor's blocks are best cut anew, for the sake of who writes them.

    Raises:
        UserError: a merged value does not fit the output dtype; the tensor is named.
    """

    def one(block: Block) -> int:
        dtype = output[block.name].dtype
        if not dtype.is_floating_point:
            write(block.name, block.start, base.read(*block))
            return 0
        by_entry = not (config.spectral or config.thins_together) or is_running(block.name)
        merge = _merge_entries if by_entry else _merge_rows
        merged = merge(config, base, experts, statistics, block, dtype)
        if merged is None:
            raise UserError(
                f"'{block.name}': merged values do not fit {dtype}; use dtype: bfloat16 or float32"
            )
        write(block.name, block.start, merged)
        return block.stop - block.start

    own = share({name: info.numel for name, info in output.items()})
    blocks = [
        Block(name, start, stop)
        for name, info in output.items()
        if name in own
        for start, stop in _grid(config, name, info, lead(name))
    ]
    if bar:
        bar.update(sum(block.stop - block.start for block in blocks[:first]))
    for count, elements in enumerate(
        in_order(one, blocks[first:], workers or _threads(config)), start=first + 1
    ):
        finished(count)
        if bar:
            bar.update(elements)


def _merge_entries(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    statistics: Statistics,
    block: Block,
    dtype: torch.dtype,
) -> Tensor | None:
    """Merges a block entry by entry, in the compiled loops; None if a value does not fit `dtype`.

    The result is overwritten by the thread's next one.
    """
    name, weights = block.name, statistics.coefficients.get(block.name, [])
    fusing = _fusing(config, weights)
    if is_running(name):
        origin, rows, fusing = None, read_rows(experts, block), _plain_mean(len(experts))
    elif config.base_cancels:
        origin, rows = None, read_rows(experts, block)
    elif config.merge_method == "slerp":  # a sum of the two models themselves
        origin, rows = None, read_rows([base, *experts], block)
        fusing = _fusing(config, [statistics.origin[name], *weights])
    else:
        origin, rows = read_block(base, experts, block)
    # float16 comes out of the loops as float32 with its values.
    kind = torch.float32 if dtype == torch.float16 else dtype
    merged = _workspace.buffer("merged", (block.stop - block.start,), kind)
    rounding = kernels.ROUNDINGS[str(dtype).removeprefix("torch.")]
    taken = no_thinning(len(rows)) if origin is None else thinning(config, statistics.thresholds, name)
    largest = kernels.merged(origin, rows, block.start, taken, fusing, rounding, as_numpy(merged))
    return merged.to(dtype) if largest < rounding.too_large else None


def _plain_mean(count: int) -> kernels.Fusing:
    weights = np.full(count, 1 / count)
    return kernels.Fusing(weights, elects=False, votes=weights, normalizes=False, least=1.0, scale=1.0)


def _fusing(config: MergeConfig, weights: Sequence[float]) -> kernels.Fusing:
    """Returns how the compiled loops make one task vector of several."""
    # An elected sum is multiplied by the scale once, a plain one entry by entry.
    factor = 1.0 if config.elects or config.base_cancels or config.merge_method == "slerp" else config.scale
    votes = [1.0] * len(weights) if config.merge_method == "sce" else weights
    return kernels.Fusing(
        weights=np.array(weights, dtype=np.float64) * factor,
        elects=config.elects,
        votes=np.array(votes, dtype=np.float64),
        normalizes=config.normalizes,
        least=min((weight for weight in weights if weight > 0), default=1.0),
        scale=config.scale,
    )


def _merge_rows(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    statistics: Statistics,
    block: Block,
    dtype: torch.dtype,
) -> Tensor | None:
    """Merges a block of whole rows, or a whole matrix; None if a value does not fit `dtype`."""
    weights = statistics.coefficients[block.name]
    origin, deltas = task_vectors(config, statistics.thresholds, base, experts, block)
    if config.spectral:
        weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
        merged = (
            origin + _spectral(config, block.name, base.tensors[block.name].shape, weighted) * config.scale
        )
    else:
        votes = [1.0] * len(deltas) if config.merge_method == "sce" else None
        merged = methods.ties(origin, deltas, weights, config.scale, votes, config.normalizes)
    merged = methods.round_once(merged, dtype)
    return merged if all_finite(merged) else None


def _grid(config: MergeConfig, name: str, info: TensorInfo, lead: int) -> Iterator[tuple[int, int]]:
    row = _row(config, name, info)
    # Random numbers come in pairs, so a block starts at an even place.
    return grid(info.numel, row=row, lead=lead - lead % 2 if row == 1 else 0)


def _row(config: MergeConfig, name: str, info: TensorInfo) -> int:
    """Returns how many elements must be looked at together: singular spaces are those of a whole matrix."""
    if config.spectral and len(info.shape) == 2 and not is_vocabulary(name):
        return max(1, info.numel)
    return row_of(config, info)


def _threads(config: MergeConfig) -> int:
    """Returns how many blocks are under way: matrices in their singular spaces wait for no disk and are large."""
    return torch.get_num_threads() + (0 if config.spectral else WAITING)


def memory_for_blocks(config: MergeConfig, output: Mapping[str, TensorInfo], experts: int) -> int:
    """Returns about how many bytes the blocks under way take, in all threads."""
    row = max((_row(config, name, info) for name, info in output.items()), default=1)
    whole = config.spectral or config.thins_together
    # Per model a block as stored (4 bytes, rarely 8); in float64, with room for what is computed, where rows are
    # looked at as a whole.
    each = (4 + 8 * 4 * whole) * max(CHUNK, row)
    models = experts + 2 + 2 * experts * config.spectral
    # In TIES every thread counts magnitudes of all the usual densities, and there is a sum; others count two at most.
    ranks = {"ties": len(DENSITIES) + 1, "breadcrumbs": 2, "sce": 1}.get(config.thins or "", 0)
    counts = counts_memory(experts, ranks) * (_threads(config) + 1) if ranks else 0
    return each * models * _threads(config) + counts


def arithmetic_seconds(
    config: MergeConfig, output: Mapping[str, TensorInfo], experts: int, passes: int
) -> float:
    """Returns about how long the arithmetic takes, by what benchmarks/merging_speed.py took on two cores of 2026."""
    flops = 0.0
    for name, info in output.items():
        if len(info.shape) == 2 and 1 < _row(config, name, info) == info.numel:
            # As many decompositions as experts, and about two of their sums, by 20 m n min(m, n) operations.
            flops += 20.0 * (experts + 2) * info.numel * min(info.shape)
    weights = sum(info.numel for info in output.values())
    return (NANOSECOND * passes * experts * weights + flops / FLOPS) / torch.get_num_threads()


def _spectral(config: MergeConfig, name: str, shape: tuple[int, ...], deltas: list[Tensor]) -> Tensor:
    """Merges weighted task vectors: matrices in their singular spaces, everything else by the mean."""
    if len(shape) != 2 or is_vocabulary(name):
        return methods.weighted_sum(deltas, [1 / len(deltas)] * len(deltas))
    matrices = [delta.view(shape).to(config.device) for delta in deltas]
    if config.merge_method == "tsv":
        merged = spectral.tsv(matrices)
    elif config.merge_method == "iso_c":
        merged = spectral.iso_c(matrices)
    else:
        share_ = config.parameters.common_share
        merged = spectral.iso_cts(matrices, COMMON_SHARE if share_ is None else share_)
    return merged.flatten().cpu()
