"""What shifts would do, layer by layer, before anything is changed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

from torch import Tensor, nn

from galenic.flatten.apply import Kind, install, propose
from galenic.flatten.layers import groups, weight_of
from galenic.flatten.shifts import Shift
from galenic.flatten.statistics import Statistics
from galenic.runtime import human_bytes

NOTHING = 1e-6
"""Share of the squared norm below which an exact shift is not worth making."""

SECONDS_PER_CUBE = 2e-10
"""Seconds of a float64 eigendecomposition per d^3 on two CPU cores: `benchmarks/flattening_speed.py` printed 8 to 18 s
at d = 4,096, on an idle and on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What would happen to one layer."""

    name: str
    kind: str
    """`Linear`, `Conv1d` or `Conv2d`."""
    rows: int
    """Rows the statistics were taken on."""
    dimension: int
    """Directions there are, over all groups."""
    rank: int
    """Directions the inputs span, over all groups."""
    action: Literal["shift", "no-op", "over budget"]
    reason: str
    """In words: why it is not shifted, or what rounding makes of an exact shift; empty if all is as asked."""
    output_change: float
    """Predicted relative change of its outputs, before rounding to the weight's type."""
    rounded_change: float
    """The same after rounding."""
    loss_bound: float | None
    """For the softmax head: the mean cross-entropy over these rows moves by at most this. Of other layers unknown."""
    norm_before: float
    norm_after: float
    memory: int
    """Bytes its matrices take at most, see `cost`."""
    seconds: float
    """Estimated time of its decomposition."""
    shift: Shift


def plan_shifts(
    model: nn.Module,
    statistics: Statistics,
    *,
    softmax_head: str | None = None,
    **kind: Unpack[Kind],
) -> list[LayerPlan]:
    """Computes what `shift` of the same arguments would do to each layer; the model stays as it is.

    Args:
        model: the model the statistics came from.
        statistics: of `collect`.
        softmax_head: the layer whose outputs are the logits of a cross-entropy that is averaged over all rows.
        kind: see `Kind`; nothing at all is the exact shift.
    """
    proposals = propose(model, statistics, **kind)
    budget = kind.get("output_budget", 0.0)
    exact = not budget and kind.get("rank") is None and kind.get("energy") is None
    plans = []
    for name, shift in proposals.items():
        module = model.get_submodule(name)
        action, reason = _verdict(shift, exact, budget)
        if shift.noop and shift.rank < shift.dimension and name in (kind.get("checks") or {}):
            reason = "no shift lowers the trace along random directions that it was not fitted to"
        memory, seconds = cost(weight_of(model, name), groups(module))
        change = max(shift.output_change, shift.rounded_change)
        plans.append(
            LayerPlan(
                name=name,
                kind=type(module).__name__,
                rows=statistics.count(name),
                dimension=shift.dimension,
                rank=shift.rank,
                action=action,
                reason=reason,
                output_change=shift.output_change,
                rounded_change=shift.rounded_change,
                loss_bound=loss_bound(change * shift.outputs, statistics.count(name))
                if name == softmax_head
                else None,
                norm_before=shift.norm_before,
                norm_after=shift.norm_after,
                memory=memory,
                seconds=seconds,
                shift=shift,
            )
        )
    return plans


def apply_plans(model: nn.Module, plans: Sequence[LayerPlan]) -> None:
    """Shifts the layers whose plan is to shift them, in place."""
    for plan in plans:
        if plan.action == "shift":
            install(model, plan.name, plan.shift)


def loss_bound(change: float, rows: int) -> float:
    """Bounds how far a mean cross-entropy moves when its logits do.

        |l(z + dz) - l(z)| <= sqrt(2) ||dz||_2  per row (the gradient p - y is no longer than that), so
        |L' - L| <= sqrt(2) / N sum_i ||dz_i|| <= sqrt(2) ||dZ||_F / sqrt(N)

    Args:
        change: ||dZ||_F over all rows.
        rows: N.
    """
    return math.sqrt(2) * change / math.sqrt(rows) if rows else 0.0


def cost(weight: Tensor, count: int = 1) -> tuple[int, float]:
    """Estimates bytes and seconds that a layer's shift takes, from its shape alone.

    Gram matrix, eigenvectors and the solver's two work arrays of d^2 numbers for each group, and three copies of the
    weight, in float64; a decomposition takes time of order d^3.

    Args:
        weight: the layer's.
        count: its groups.
    """
    width = weight[0].numel()
    return 8 * (4 * count * width**2 + 3 * weight.numel()), SECONDS_PER_CUBE * count * width**3


def _verdict(
    shift: Shift, exact: bool, budget: float
) -> tuple[Literal["shift", "no-op", "over budget"], str]:
    """Decides whether a shift is worth making and possible, and says why not."""
    dtype = str(shift.weight.dtype).removeprefix("torch.")
    if exact and shift.rank == shift.dimension:
        return "no-op", f"its inputs span all {shift.dimension} directions: there is nothing to take away"
    if exact and shift.moved**2 < NOTHING:
        return "no-op", "its weight has no component outside its inputs' span, as weight decay leaves it"
    if shift.noop:
        return "no-op", f"the shift is below one step of {dtype} everywhere"
    if budget and shift.rounded_change > 1.01 * budget:
        return "over budget", (
            f"rounding to {dtype} makes outputs move by {shift.rounded_change:.2g}, more than the budget {budget:g}: "
            "keep the weight in float32 or give a larger budget"
        )
    if exact and shift.rounded_change > max(1e-6, 10 * shift.output_change):
        return "shift", f"exact but for the rounding to {dtype}"
    return "shift", ""


def table(plans: Sequence[LayerPlan]) -> list[str]:
    """Returns plans as lines of text, one for each layer under a line of headings."""
    headings = ("layer", "rank", "outputs move", "loss moves", "norm", "memory", "seconds", "what")
    rows = [headings]
    for plan in plans:
        rows.append(
            (
                plan.name,
                f"{plan.rank}/{plan.dimension}",
                f"{plan.rounded_change:.2e}",
                "" if plan.loss_bound is None else f"<= {plan.loss_bound:.2e}",
                f"{plan.norm_before:.4g} -> {plan.norm_after:.4g}",
                human_bytes(plan.memory),
                f"{plan.seconds:.1g}",
                plan.action + (f": {plan.reason}" if plan.reason else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
