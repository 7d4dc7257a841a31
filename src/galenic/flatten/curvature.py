"""Hessian trace by Hutchinson's estimator, with its standard error."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galenic.runtime import Bar, UserError


@dataclass(frozen=True, kw_only=True)
class TraceEstimate:
    """An unbiased estimate of a Hessian's trace."""

    values: Tensor
    """(probes,) float64: v^T H v of each probe. Estimates with equal seeds are paired."""

    @property
    def mean(self) -> float:
        """The estimate."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Standard deviation of the estimate over the choice of probes (not over data)."""
        return standard_error(self.values)


def standard_error(values: Tensor) -> float:
    """Returns the standard error of the mean of (n,) values."""
    return float(values.std() / len(values) ** 0.5)


def hessian_trace(
    loss_fn: Callable[[Any], tuple[Tensor, int]],
    parameters: Iterable[Tensor],
    batches: Sequence[Any],
    *,
    probes: int,
    generator: torch.Generator,
    bar: Bar | None = None,
) -> TraceEstimate:
    """Estimates the trace of the Hessian of the mean loss over all tokens (or samples) of all batches.

        tr H = E[v^T H v],    v with independent entries +1 and -1,    H = sum_b H_b / sum_b n_b

    where H_b is the Hessian of batch b's summed loss: batches of unequal size count by their size. Every probe sees
    all batches.

    Args:
        loss_fn: batch -> (summed loss, number of tokens); must allow a second derivative (attention: eager).
        parameters: what to differentiate by, all of one device.
        batches: the data, gone through once; one graph for first and second derivatives is alive at a time.
        probes: number of vectors v, at least 2.
        generator: source of the probes; the same state gives the same probes, so that two models can be compared.
        bar: advanced by one for each Hessian-vector product.

    Raises:
        UserError: fewer than two probes, no batches, or a loss that is NaN or infinite.

    Source: Hutchinson 1990; the loss-weighting of batches as in a single large batch.
    """
    if probes < 2:
        raise UserError(f"probes: {probes} gives no standard error; at least 2")
    tensors = [p for p in parameters if p.requires_grad]
    seeds = torch.randint(2**62, (probes,), generator=generator).tolist()
    products = torch.zeros(probes, dtype=torch.float64)
    count = 0
    for batch in batches:
        loss, tokens = loss_fn(batch)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()}: its curvature cannot be estimated")
        count += tokens
        gradients = torch.autograd.grad(
            loss, tensors, create_graph=True, allow_unused=True, materialize_grads=True
        )
        for index, seed in enumerate(seeds):
            products[index] += _quadratic_form(gradients, tensors, seed)
            if bar:
                bar.update()
    if not count:
        raise UserError("there are no batches: a Hessian needs data")
    return TraceEstimate(values=products / count)


def _quadratic_form(gradients: Sequence[Tensor], tensors: Sequence[Tensor], seed: int) -> float:
    """Returns v^T H v for the probe that a seed stands for; the gradients' graph is kept."""
    source = torch.Generator().manual_seed(seed)
    sizes = [tensor.numel() for tensor in tensors]
    signs = torch.randint(0, 2, (sum(sizes),), generator=source, dtype=torch.int8).mul_(2).sub_(1)
    probe = [
        part.view(tensor.shape).to(device=tensor.device, dtype=tensor.dtype)
        for part, tensor in zip(signs.split(sizes), tensors, strict=True)
    ]
    curved = [(g, v) for g, v in zip(gradients, probe, strict=True) if g.requires_grad]
    if not curved:
        return 0.0  # a loss that is linear in every parameter
    outputs, directions = zip(*curved, strict=True)
    hvp = torch.autograd.grad(
        outputs, tensors, directions, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return float(sum((v * h).sum(dtype=torch.float64) for v, h in zip(probe, hvp, strict=True)))
