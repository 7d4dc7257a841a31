"""Shifting the layers of a model, and measuring what a shift really did to a layer's outputs."""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from galenic.flatten.layers import output_rows, outputs_with, weight_of
from galenic.flatten.shifts import Shift, shift_weight
from galenic.flatten.statistics import Statistics, run_batch
from galenic.flatten.weighted import checked_curvature_weighted, curvature_weighted
from galenic.runtime import UserError


class Kind(TypedDict, total=False):
    """Which shift to make, in words that `shift`, `propose`, `plan_shifts` and `select_shift` share."""

    output_budget: float
    """Relative output change allowed per layer; 0 is the exact, output-preserving shift. With a base it is relative to
    what the difference from the base adds to the outputs."""
    rank: int | None
    """Instead, truncation to so many directions."""
    energy: float | None
    """Instead, truncation to a share of the outputs' squared norm."""
    free_bias: bool
    """Layers that have a bias let it take over what their weight does along the inputs' mean."""
    base: Mapping[str, Tensor] | None
    """Layer name -> weight of a base model to stay close to, for an expert that will be merged: its task vectors get
    shorter, never longer."""
    metrics: Mapping[str, Tensor] | None
    """Layer name -> (d, d) matrix of `feature_curvature`: these layers are shifted exactly, to the smallest curvature
    instead of the smallest norm."""
    checks: Mapping[str, Tensor] | None
    """Layer name -> a second estimate of its metric from other random directions: the damping is chosen by it, and the
    layer stays if no shift lowers the trace there; see `checked_curvature_weighted`."""
    damping: float
    """Of metrics without checks, see `curvature_weighted`."""


@torch.no_grad()
def shift(model: nn.Module, statistics: Statistics, **kind: Unpack[Kind]) -> dict[str, Shift]:
    """Shifts every layer that statistics were collected for, in place, all at once.

    Exact shifts leave the inputs of later layers as they were, so one set of statistics serves all layers. Ridge
    shifts and truncation move them a little: each budget holds for the layer's own, original inputs.

    The stochastic shift of the paper is an exact one (`output_budget=0`) with statistics of a few samples, chosen by
    `choose_rows` and collected with `method="qr"`.

    Args:
        model: the model the statistics came from.
        statistics: of `collect`.
        kind: see `Kind`. Nothing at all is ridge with an output budget of 0.01.

    Returns:
        Layer name -> what was done, in the model's order.

    Raises:
        UserError: the base lacks a layer, shapes do not fit, or more than one kind of shift is asked for.
    """
    others = (kind.get(name) for name in ("rank", "energy", "metrics"))
    kind["output_budget"] = default_budget(kind.get("output_budget"), *others)
    shifts = propose(model, statistics, **kind)
    for name, proposal in shifts.items():
        install(model, name, proposal)
    return shifts


def default_budget(output_budget: float | None, *others: object) -> float:
    """Returns the output budget in effect: 0.01 if none is given, nor any of the others that decide a shift."""
    if output_budget is not None:
        return output_budget
    return 0.01 if all(other is None for other in others) else 0.0


@torch.no_grad()
def install(model: nn.Module, name: str, proposal: Shift) -> None:
    """Copies a shifted weight (and bias) into a model."""
    put(weight_of(model, name), proposal.weight)
    if proposal.bias is not None:
        put(model.get_parameter(f"{name}.bias"), proposal.bias)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor as it is, or all of one that processes share (a DTensor, as `fully_shard` makes)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole value into a tensor, or this process's share into one that processes share."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        # All processes hold the value: without a source rank none is sent.
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def propose(
    model: nn.Module,
    statistics: Statistics,
    output_budget: float = 0.0,
    base: Mapping[str, Tensor] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    free_bias: bool = False,
    metrics: Mapping[str, Tensor] | None = None,
    checks: Mapping[str, Tensor] | None = None,
    damping: float = 0.1,
) -> dict[str, Shift]:
    """Computes the shifts of all layers without touching the model; see `shift` and `Kind`."""
    if metrics and (output_budget or rank is not None or energy is not None):
        raise UserError(
            "metrics: curvature-weighted shifts are exact; leave output_budget, rank and energy out"
        )
    unknown = [name for name in metrics or {} if name not in statistics.owner]
    if unknown:
        raise UserError(f"metrics: there are no statistics of layer '{unknown[0]}'")
    proposals = {}
    for name, module in model.named_modules():
        if name not in statistics.owner:
            continue
        if base is not None and name not in base:
            raise UserError(f"base: lacks layer '{name}'")
        weight, bias = whole(weight_of(model, name)), getattr(module, "bias", None) if free_bias else None
        bias = bias if bias is None else whole(bias)
        inputs = statistics.spectrum(name, centred=bias is not None)
        anchor = base[name] if base is not None else None
        if metrics and name in metrics and checks and name in checks:
            proposals[name], _ = checked_curvature_weighted(
                weight, inputs, metrics[name], checks[name], base=anchor, bias=bias
            )
            continue
        if metrics and name in metrics:
            proposals[name] = curvature_weighted(
                weight, inputs, metrics[name], damping=damping, base=anchor, bias=bias
            )
            continue
        proposals[name] = shift_weight(
            weight,
            inputs,
            output_budget=output_budget,
            rank=rank,
            energy=energy,
            base=anchor,
            bias=bias,
        )
    return proposals


@torch.no_grad()
def output_changes(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor | None]],
    shifts: Mapping[str, Shift],
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Measures, on real forward passes of the unshifted model, how far each layer's outputs would move.

    This checks the prediction without its algebra: rows pass through the rounded, shifted weights.

    Args:
        model: the model before shifting.
        batches: (batch, mask of the rows that count or None) pairs, as `run_batch` takes them.
        shifts: proposals for its layers.
        base: what they are anchored to, by layer name.

    Returns:
        Layer name -> ||A (W' - W)^T||_F / ||A W^T||_F; anchored, / ||A (W - W_0)^T||_F.
    """
    sums = {name: [0.0, 0.0] for name in shifts}
    modules = dict(model.named_modules())
    masks = Statistics()
    weights = {name: s.weight.double() - weight_of(model, name).double() for name, s in shifts.items()}
    biases = {
        name: s.bias.double() - model.get_parameter(f"{name}.bias").double()
        for name, s in shifts.items()
        if s.bias is not None
    }

    added = {name: weight_of(model, name).double() - base[name].double() for name in shifts} if base else {}

    def watch(name: str, module: Any, inputs: Tensor, outputs: Tensor) -> None:
        if name in added:
            produced = outputs_with(module, inputs, added[name].to(inputs.dtype), None)
        else:
            produced = output_rows(module, outputs.detach()) - (0 if module.bias is None else module.bias)
        bias = biases[name].to(inputs.dtype) if name in biases else None
        moved = outputs_with(module, inputs, weights[name].to(inputs.dtype), bias)
        if masks.mask is not None and masks.mask.numel() == len(moved):
            keep = masks.mask.reshape(-1).bool()
            moved, produced = moved[keep], produced[keep]
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
