"""How entries of the task vectors are taken away before they are merged: thresholds, chances, and their application.

What the compiled loops do is handed to them as `kernels.Thinning`. Two ways look at more than an entry at a time, DELLA
at the ranks inside a row and SCE at the variance between the experts; `task_vectors` thins for them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galenic.merge import kernels, methods
from galenic.merge.blocks import Block, float_names
from galenic.merge.cache import remembered
from galenic.merge.config import MergeConfig
from galenic.merge.io import TensorInfo, Weights
from galenic.merge.magnitudes import model_thresholds, tensor_thresholds
from galenic.merge.statistics import Vectors, no_thinning, read_block
from galenic.runtime import Bar

Thresholds = Mapping[str, list[list[float]]]
"""Tensor -> for each expert (for SCE: once) the magnitudes that bound what is kept."""
Shown = Callable[[str, int, Callable[[Bar | None], Any]], Any]
"""(label, passes, work) -> what the work returns; it is given a progress bar for so many passes over the weights."""

DENSITIES = [k / 20 for k in range(1, 20)]
"""TIES: densities whose thresholds are found along with the one asked for, so that a sweep reads nothing again."""


def find_thresholds(
    config: MergeConfig,
    base: Weights,
    experts: Sequence[Weights],
    cache: Path | None,
    shown: Shown,
    summary: dict[str, Any],
) -> Thresholds:
    """Finds the magnitudes that bound what is kept, and adds to the summary how much that is."""
    names, densities, floats = config.names(), config.densities(), float_names(base)
    if config.thins in ("dare", "della", "breadcrumbs"):
        summary["densities"] = dict(zip(names, densities, strict=True))
    if config.thins == "ties":
        weights = sum(base.tensors[name].numel for name in floats)
        found = _of_densities(densities, weights, base, experts, cache, shown)
        # More than the density where magnitudes tie, as they do in low-precision checkpoints.
        summary["kept"] = {name: n / weights for name, (_, n) in zip(names, found, strict=True)}
        return {name: [[threshold] for threshold, _ in found] for name in floats}
    if config.thins == "breadcrumbs":
        shares = list(zip(config.gammas(), densities, strict=True))

        def ranks(numel: int) -> list[list[int]]:
            found = []
            for gamma, density in shares:
                first = min(int(gamma * numel), numel - 1)
                found.append([first + 1, min(numel, first + max(1, int(density * numel)))])
            return found

        return remembered(
            cache,
            f"breadcrumbs {shares}",
            lambda: shown("thresholds", 2, lambda bar: tensor_thresholds(base, experts, ranks, bar=bar)),
        )
    if config.thins == "sce":
        share = config.parameters.select_topk or 1.0

        def rank(numel: int) -> list[list[int]]:
            return [[max(1, round(share * numel))]]

        def variances(block: Block) -> tuple[None, Any]:
            return None, methods.variances(torch.stack(wide(base, experts, block)[1])).numpy()

        return remembered(
            cache,
            f"sce {share}",
            lambda: shown(
                "thresholds", 2, lambda bar: tensor_thresholds(base, experts, rank, variances, bar)
            ),
        )
    return {}


def _of_densities(
    densities: Sequence[float],
    weights: int,
    base: Weights,
    experts: Sequence[Weights],
    cache: Path | None,
    shown: Shown,
) -> list[tuple[float, int]]:
    """Returns each expert's threshold for its density over the whole model, and how many entries reach it."""
    keep = [max(1, round(density * weights)) for density in densities]
    usual = [max(1, round(density * weights)) for density in DENSITIES]

    def compute(ranks: Sequence[Sequence[int]]) -> list[dict[str, tuple[float, int]]]:
        found = shown("thresholds", 2, lambda bar: model_thresholds(base, experts, ranks, bar))
        return [
            {str(rank): pair for rank, pair in zip(own, pairs, strict=True)}
            for own, pairs in zip(ranks, found, strict=True)
        ]

    known = remembered(cache, "thresholds", lambda: compute([sorted({k, *usual}) for k in keep]))
    if not all(str(k) in own for k, own in zip(keep, known, strict=True)):
        known = remembered(cache, f"thresholds {keep}", lambda: compute([[k] for k in keep]))
    return [tuple(own[str(k)]) for k, own in zip(keep, known, strict=True)]


def thinning(config: MergeConfig, thresholds: Thresholds, name: str) -> kernels.Thinning:
    """Returns what the compiled loops take away from the task vectors of a tensor."""
    whole = no_thinning(len(config.models))
    if config.thins in ("ties", "breadcrumbs"):
        # TIES knows one bound, breadcrumbs the largest kept magnitude and the least.
        bounds = thresholds[name]
        limits = np.array([methods.largest_below(own[-1]) for own in bounds])
        largest = (
            whole.largest if config.thins == "ties" else np.array([own[0] for own in bounds], np.float32)
        )
        return whole._replace(trims=True, limits=limits, largest=largest)
    if config.thins == "dare":
        return whole._replace(
            draws=True,
            keys=np.array([methods.stream(config.seed, label, name) for label in config.names()], np.uint64),
            bounds=np.array([methods.bound(density) for density in config.densities()]),
            densities=np.array(config.densities(), dtype=np.float64),
        )
    return whole


def read_thinned(
    config: MergeConfig, thresholds: Thresholds, base: Weights, experts: Sequence[Weights]
) -> Callable[[Block], Vectors]:
    """Returns what reads a block for `statistics.gram_matrices`, so that only what is left is measured."""
    whole = no_thinning(len(experts))

    def read(block: Block) -> Vectors:
        if config.thins_together:
            _, deltas = task_vectors(config, thresholds, base, experts, block)
            return None, torch.stack(deltas).numpy(), whole
        return *read_block(base, experts, block), thinning(config, thresholds, block.name)

    return read


# ---------------------------------------------------------------------------- more than an entry at a time


def wide(base: Weights, experts: Sequence[Weights], block: Block) -> tuple[Tensor, list[Tensor]]:
    """Returns a block of the base and of the task vectors in float64."""
    origin = base.read(*block).double()
    return origin, [expert.read(*block).double().sub_(origin) for expert in experts]


def row_of(config: MergeConfig, info: TensorInfo) -> int:
    """Returns how many elements must be looked at together: DELLA ranks the rows of a matrix, or all of a vector."""
    return max(1, info.shape[-1]) if config.thins == "della" and info.shape else 1


def task_vectors(
    config: MergeConfig,
    thresholds: Thresholds,
    base: Weights,
    experts: Sequence[Weights],
    block: Block,
) -> tuple[Tensor, list[Tensor]]:
    """Returns a block of the base and of the task vectors as DELLA or SCE thin them, in float64."""
    origin, deltas = wide(base, experts, block)
    if config.thins == "sce":
        [[least]] = thresholds[block.name]
        selected = methods.variances(torch.stack(deltas))[0] >= least
        return origin, [delta * selected for delta in deltas]
    if config.thins != "della":
        return origin, deltas
    dropped = []
    row = row_of(config, base.tensors[block.name])
    numbers = zip(deltas, config.names(), config.densities(), config.epsilons(), strict=True)
    for delta, label, density, epsilon in numbers:
        chance = methods.keep_probabilities(delta, row, density, epsilon)
        kept = methods.keep_mask(config.seed, label, *block, chance)
        dropped.append(methods.drop_and_rescale(delta, kept, chance))
    return origin, dropped
