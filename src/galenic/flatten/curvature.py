"""Hessian trace by Hutchinson's estimator, with its standard error.

Beside it: `products` (Hessian and Gauss-Newton products), `traces` (Hutch++, XTrace, the last layer's closed form),
`lanczos` (Lanczos eigenvalues, spectral density), `sharpness` (measures free of scale, comparison at equal loss) and
`landscape` (the loss along filter-normalised directions).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galenic.flatten.products import (
    check_data,
    distinct,
    linearise_loss,
    probe_seeds,
    shaped_like,
    signs,
)
from galenic.runtime import Bar, UserError


@dataclass(frozen=True, kw_only=True)
class TraceEstimate:
    """An unbiased estimate of a matrix's trace."""

    values: Tensor
    """(n,) float64: estimates whose mean is the estimate, v^T H v of each probe for Hutchinson's. Estimates with equal
    seeds are paired."""

    @property
    def mean(self) -> float:
        """The estimate."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Standard deviation of the estimate over the choice of probes (not over data)."""
        return standard_error(self.values)

    @property
    def margin(self) -> float:
        """Half the width of the 95% interval: Student's quantile for this number of values times the error."""
        return student_quantile(0.95, len(self.values) - 1) * self.standard_error


def standard_error(values: Tensor) -> float:
    """Returns the standard error of the mean of (n,) values."""
    return float(values.std() / len(values) ** 0.5)


def student_quantile(confidence: float, degrees: int) -> float:
    """Returns t such that Student's distribution has the probability `confidence` between -t and t.

    With t = sqrt(n) tan(a), the density by the angle a is proportional to cos(a)^(n - 1).
    """
    angles = torch.linspace(0, torch.pi / 2, 100_001, dtype=torch.float64)
    share = torch.cumulative_trapezoid(angles.cos() ** (degrees - 1), angles)
    wanted = confidence * share[-1]
    index = int(torch.searchsorted(share, wanted))
    part = (wanted - share[index - 1]) / (share[index] - share[index - 1])
    return float(degrees**0.5 * (angles[index] + part * angles[1]).tan())


def hessian_trace(
    loss_fn: Callable[[Any], tuple[Tensor, int]],
    parameters: Iterable[Tensor],
    batches: Sequence[Any],
    *,
    probes: int,
    generator: torch.Generator,
    fresh: bool = False,
    blocks: int = 1,
    bar: Bar | None = None,
) -> TraceEstimate:
    """Estimates the trace of the Hessian of the mean loss over all tokens (or samples) of all batches.

        tr H = E[v^T H v],    v with independent entries +1 and -1,    H = sum_b H_b / sum_b n_b

    where H_b is the Hessian of batch b's summed loss: batches of unequal size count by their size. Every probe sees
    all batches, or each batch has its own (`fresh`): as tr H is the mean of the tr H_b, that is unbiased too, and the
    batches' errors average out where one probe would make the same on all. No vector is kept: memory does not grow
    with the number of probes.

    Args:
        loss_fn: batch -> (summed loss, number of tokens); must allow a second derivative (attention: eager).
        parameters: what to differentiate by, all of one device; a tied one counts once.
        batches: the data, gone through once; one graph for first and second derivatives is alive at a time.
        probes: number of vectors v, at least 2.
        generator: source of the probes; the same state gives the same probes, so that two models can be compared.
        fresh: draws new probes for every batch. With B batches of like Hessians the squared error is 1/B of that with
            shared probes, at the same cost; with unlike ones nothing is lost on average. But the estimate then
            depends on how the data are cut into batches.
        blocks: cuts the parameters into so many runs, in their order, and takes v^T H v of each run's diagonal block
            alone: the trace is the same, and what lies outside the blocks, often most of the error, is gone. Costs up
            to so many times more (a block's product goes back through a part of the network only); the number of
            layers is good for a network of a few.
        bar: advanced by one for each Hessian-vector product.

    Raises:
        UserError: fewer than two probes, less than one block, no parameters or batches, a loss or a product that is
            NaN or infinite.

    Source: Hutchinson 1990; the loss-weighting of batches as in a single large batch.
    """
    if probes < 2:
        raise UserError(f"probes: {probes} gives no standard error; at least 2")
    if blocks < 1:
        raise UserError(f"blocks: {blocks}; at least 1, the whole matrix")
    tensors = distinct(parameters)
    size = sum(tensor.numel() for tensor in tensors)
    shared = probe_seeds(probes, generator)
    forms = torch.zeros(probes, dtype=torch.float64)
    count = 0
    for batch in batches:
        tokens, multiply = linearise_loss(loss_fn, tensors, batch, blocks)
        count += tokens
        seeds = probe_seeds(probes, generator) if fresh else shared
        for index, seed in enumerate(seeds):
            probe = shaped_like(tensors, signs(seed, size))
            products = multiply(probe)
            forms[index] += float(
                sum((v * h).sum(dtype=torch.float64) for v, h in zip(probe, products, strict=True))
            )
            if bar:
                bar.update()
        del multiply  # this batch's graph, before the next one grows
    check_data(count, forms)
    return TraceEstimate(values=forms / count)
