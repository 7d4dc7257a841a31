"""Shifting the layers of a model, and measuring what a shift really did to a layer's outputs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from galenic.flatten.shifts import Shift, Spectrum, shift_weight, spectrum
from galenic.flatten.statistics import Statistics, run_batch
from galenic.runtime import UserError


@torch.no_grad()
def shift(
    model: nn.Module,
    statistics: Statistics,
    *,
    output_budget: float = 0.01,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Shift]:
    """Shifts every layer that statistics were collected for, in place, all at once.

    Exact shifts leave the inputs of later layers as they were, so one set of statistics serves all layers. Ridge
    shifts move them a little: each budget holds for the layer's own, original inputs.

    Args:
        model: the model the statistics came from.
        statistics: of `collect`.
        output_budget: relative output change allowed per layer; 0 is the exact, output-preserving shift.
        base: layer name -> weight of a base model to stay close to, for an expert that will be merged: its task
            vectors get shorter, never longer.

    Returns:
        Layer name -> what was done, in the model's order.

    Raises:
        UserError: the base lacks a layer, or shapes do not fit.
    """
    shifts = propose(model, statistics, output_budget, base)
    for name, proposal in shifts.items():
        weight_of(model, name).copy_(proposal.weight)
    return shifts


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Returns the weight (outputs, inputs) of a layer by its dotted name."""
    return model.get_parameter(f"{name}.weight")


def propose(
    model: nn.Module, statistics: Statistics, output_budget: float, base: Mapping[str, Tensor] | None = None
) -> dict[str, Shift]:
    """Computes the shifts of all layers without touching the model; see `shift`."""
    spectra: dict[str, Spectrum] = {}
    proposals = {}
    for name, _ in model.named_modules():
        if name not in statistics.owner:
            continue
        if base is not None and name not in base:
            raise UserError(f"base: lacks layer '{name}'")
        owner = statistics.owner[name]
        if owner not in spectra:
            spectra[owner] = spectrum(statistics.grams[owner])
        proposals[name] = shift_weight(
            weight_of(model, name),
            spectra[owner],
            output_budget=output_budget,
            base=base[name] if base is not None else None,
        )
    return proposals


@torch.no_grad()
def output_changes(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor | None]], shifts: Mapping[str, Shift]
) -> dict[str, float]:
    """Measures, on real forward passes of the unshifted model, how far each layer's outputs would move.

    This checks the prediction without its algebra: rows pass through the rounded, shifted weights.

    Args:
        model: the model before shifting.
        batches: (batch, mask of the rows that count or None) pairs, as `run_batch` takes them.
        shifts: proposals for its layers.

    Returns:
        Layer name -> ||A (W' - W)^T||_F / ||A W^T||_F.
    """
    sums = {name: [0.0, 0.0] for name in shifts}
    modules = dict(model.named_modules())
    masks = Statistics()
    differences = {name: s.weight.double() - weight_of(model, name).double() for name, s in shifts.items()}

    def watch(name: str, module: Any, inputs: Tensor, outputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        produced = outputs.reshape(-1, outputs.shape[-1]) - (0 if module.bias is None else module.bias)
        if masks.mask is not None and masks.mask.numel() == len(rows):
            keep = masks.mask.reshape(-1).bool()
            rows, produced = rows[keep], produced[keep]
        moved = rows @ differences[name].to(rows.dtype).T
        sums[name][0] += float(moved.double().square().sum())
        sums[name][1] += float(produced.double().square().sum())

    handles = [
        modules[name].register_forward_hook(lambda m, i, o, name=name: watch(name, m, i[0], o))
        for name in shifts
    ]
    try:
        for batch, mask in batches:
            run_batch(model, batch, masks, mask)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (moved / produced) ** 0.5 if produced else 0.0 for name, (moved, produced) in sums.items()}
