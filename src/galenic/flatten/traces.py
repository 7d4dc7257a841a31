"""Trace estimators that spend some products on the large eigenvalues, and the last layer's trace in closed form.

`hutchinson`, `hutchpp` and `xtrace` take any operator, count their cost in products and are unbiased. They hold
(size, products) float64 vectors, 0.5 GB for 64 products of a million parameters, some two or three times; where that is
too much, `curvature.hessian_trace` and `softmax_trace` hold none.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from galenic.flatten.curvature import TraceEstimate
from galenic.flatten.products import (
    Operator,
    check_data,
    distinct,
    gradients_of,
    probe_matrix,
    probe_seeds,
)
from galenic.runtime import Bar, UserError


def hutchinson(operator: Operator, *, products: int, generator: torch.Generator) -> TraceEstimate:
    """Estimates tr A = E[v^T A v] with random signs v, by `products` products in one pass over the data.

    For a Hessian it gives what `curvature.hessian_trace` gives, probe for probe.

    Raises:
        UserError: fewer than two products.

    Source: Hutchinson 1990. Variance of one probe: 2 (|A|_F^2 - sum_i A_ii^2).
    """
    _at_least(products, 2)
    probes = probe_matrix(probe_seeds(products, generator), operator)
    return TraceEstimate(values=(probes * operator.product(probes)).sum(0).cpu())


def hutchpp(operator: Operator, *, products: int, generator: torch.Generator) -> TraceEstimate:
    """Estimates a trace by Hutch++: the part that a sketch catches exactly, the rest by Hutchinson.

        tr A = tr(Q^T A Q) + E[g^T (I - Q Q^T) A (I - Q Q^T) g],    Q = an orthonormal basis of A S

    with random signs S (size, m/3) and g (m/3 of them), two passes over the data. Given Q, the probes' values are
    independent and unbiased: their standard error is Hutchinson's.

    Args:
        operator: a symmetric matrix.
        products: m, the products to spend, at least 6, rounded down to a multiple of three.
        generator: source of all probes; the same state gives the same.

    Raises:
        UserError: fewer than six products.

    Source: Meyer, Musco, Musco, Woodruff 2021, arXiv 2010.09649, Algorithm 1 (with equal thirds).
    """
    _at_least(products, 6)
    third = products // 3
    seeds = probe_seeds(2 * third, generator)
    width = min(third, operator.size)
    basis, _ = torch.linalg.qr(operator.product(probe_matrix(seeds[:width], operator)))
    probes = probe_matrix(seeds[third:], operator)
    rest = probes - basis @ (basis.T @ probes)
    images = operator.product(torch.cat([basis, rest], 1))
    caught = (basis * images[:, :width]).sum()
    return TraceEstimate(values=(caught + (rest * images[:, width:]).sum(0)).cpu())


def xtrace(operator: Operator, *, products: int, generator: torch.Generator) -> TraceEstimate:
    """Estimates a trace by XTrace: every probe serves both as sketch and, left out of it, as a test vector.

        tr_i = tr(Q_i^T A Q_i) + w_i^T (I - Q_i Q_i^T) A (I - Q_i Q_i^T) w_i,    tr A = E[mean_i tr_i]

    with random signs w_i, i = 1 ... k, k = m/2, and Q_i an orthonormal basis of A times all probes but w_i. With
    A W = Q R, Q_i Q_i^T = Q (I - s_i s_i^T) Q^T where s_i is the i-th column of R^-T at unit length, so that the
    products A W and A Q are all that is needed: two passes over the data.

    The tr_i share their probes, and std(tr_i) / sqrt(k), the paper's error, came out 6 to 26% too small on Hessians of
    small networks. The error given here is the jackknife's over probes, which Efron and Stein show to be no smaller in
    the mean square than that of k - 1 probes (9 to 48% above the true one on Hessians of 363 rows; more where k nears
    the size). With t_j the same estimate without probe j, from the same products,

        values_j = mean_i tr_i + (k - 1) (mean t - t_j),    standard error^2 = (k - 1) / k sum_j (t_j - mean t)^2

    Args:
        operator: a symmetric matrix.
        products: m, the products to spend, at least 6, rounded down to an even number.
        generator: source of the probes; the same state gives the same.

    Raises:
        UserError: fewer than six products.

    Source: Epperly, Tropp, Webber 2024, arXiv 2301.07825, with sign probes, not re-scaled; Efron, Stein 1981, "The
    jackknife estimate of variance".
    """
    _at_least(products, 6)
    width = min(products // 2, operator.size)
    probes = probe_matrix(probe_seeds(products // 2, generator)[:width], operator)
    sketch = operator.product(probes)
    basis, triangle = torch.linalg.qr(sketch)
    images = operator.product(basis)
    core = basis.T @ images  # (k, k): the matrix in the basis
    if width == operator.size:  # the basis spans everything: no estimate
        return TraceEstimate(values=core.trace().cpu().expand(products // 2))
    known = (core, basis.T @ probes, images.T @ probes, (probes * sketch).sum(0))
    mean = _exchanged(triangle, *known).mean()
    without = torch.stack([_without(j, triangle, *known).mean() for j in range(width)])
    return TraceEstimate(values=(mean + (width - 1) * (without.mean() - without)).cpu())


def _exchanged(triangle: Tensor, core: Tensor, inside: Tensor, mixed: Tensor, forms: Tensor) -> Tensor:
    """Returns XTrace's (k,) estimates tr_i from what is left when the long vectors have been multiplied.

    Args:
        triangle: (k, k), R of A W = Q R.
        core: (k, k), Q^T A Q.
        inside: (k, k), Q^T W.
        mixed: (k, k), Q^T A W.
        forms: (k,), w_i^T A w_i.
    """
    left_out = _left_out(triangle)  # columns s_i
    inside = inside - left_out * (left_out * inside).sum(0)  # Q_i^T w_i in the basis Q
    caught = core.trace() - (left_out * (core @ left_out)).sum(0)
    return caught + forms - 2 * (mixed * inside).sum(0) + (inside * (core @ inside)).sum(0)


def _without(j: int, triangle: Tensor, core: Tensor, inside: Tensor, mixed: Tensor, forms: Tensor) -> Tensor:
    """Returns the (k - 1,) estimates that XTrace would have made without probe j."""
    others = [i for i in range(len(forms)) if i != j]
    turn, triangle = torch.linalg.qr(triangle[:, others])
    inside, mixed = turn.T @ inside[:, others], turn.T @ mixed[:, others]
    return _exchanged(triangle, turn.T @ core @ turn, inside, mixed, forms[others])


def _left_out(triangle: Tensor) -> Tensor:
    """Returns the unit columns of R^-T for an upper triangular R.

    A matrix of low rank leaves zeros on R's diagonal. Rounding size in their place keeps the columns finite; which
    direction of the kernel they then take does not matter, for the matrix is zero there.
    """
    triangle = triangle / triangle.abs().max().clamp(min=torch.finfo(triangle.dtype).tiny)
    pivots = triangle.diagonal()
    floor = torch.finfo(triangle.dtype).eps * len(pivots)
    raised = triangle + torch.diag(torch.where(pivots.abs() < floor, floor - pivots, 0.0))
    identity = torch.eye(len(pivots), dtype=triangle.dtype, device=triangle.device)
    columns = torch.linalg.solve_triangular(raised.T, identity, upper=False)
    return columns / columns.norm(dim=0)


def softmax_trace(
    outputs_fn: Callable[[Any], Tensor],
    parameters: Iterable[Tensor],
    batches: Sequence[Any],
    *,
    probes: int,
    generator: torch.Generator,
    bar: Bar | None = None,
) -> TraceEstimate:
    """Estimates the Gauss-Newton trace of the mean softmax cross-entropy, by one backward pass a probe and batch.

        tr G = (1/N) sum_b E|sum_{i in b} J_i^T S_i u_i|^2,    S_i S_i^T = diag(p_i) - p_i p_i^T,
        S_i u = sqrt(p_i) u - p_i <sqrt(p_i), u>

    with random signs u_i over the logits of each row. Probing on the side of the logits needs no second derivative,
    so each probe costs a third or a quarter of a Hessian product, and every batch has its own probes, so that
    their errors average out: smaller batches give a smaller error. For networks that are piecewise linear in each
    weight (ReLU, max-pooling; no batch statistics) this is the Hessian's trace too, for others near a perfect fit.

    Args:
        outputs_fn: batch -> (N, K) logits of the rows that count.
        parameters: what to differentiate by, all of one device; a tied one counts once.
        batches: the data, gone through once; one graph of first derivatives is alive at a time.
        probes: at least 2.
        generator: source of the probes; the same state gives the same, so that two models can be compared.
        bar: advanced by one for each backward pass.

    Raises:
        UserError: fewer than two probes, no parameters or batches, a derivative that is NaN or infinite.

    Source: derived; Hutchinson's estimator for S^T J J^T S, whose trace is that of G.
    """
    _at_least(probes, 2, "probes")
    tensors = distinct(parameters)
    sources = [torch.Generator().manual_seed(seed) for seed in probe_seeds(probes, generator)]
    squares = torch.zeros(probes, dtype=torch.float64)
    count = 0
    for batch in batches:
        logits = outputs_fn(batch)
        if not torch.isfinite(logits).all():
            raise UserError("the logits hold NaN or infinity; look for a broken model or a bad batch")
        count += len(logits)
        shares = logits.detach().softmax(-1)
        roots = shares.sqrt()
        for index, source in enumerate(sources):
            drawn = torch.randint(0, 2, logits.shape, generator=source, dtype=torch.int8).mul_(2).sub_(1)
            weighted = roots * drawn.to(roots)
            pulled = weighted - shares * weighted.sum(-1, keepdim=True)
            parts = gradients_of(logits, tensors, pulled, retain_graph=True)
            # In the type itself, but for half ones: its cascaded sum is good to rounding, and reading is what costs.
            squares[index] += sum(
                float(part.square().sum(dtype=torch.promote_types(part.dtype, torch.float32)))
                for part in parts
            )
            if bar:
                bar.update()
        del logits  # this batch's graph, before the next one grows
    check_data(count, squares)
    return TraceEstimate(values=squares / count)


def last_layer_trace(inputs: Tensor, logits: Tensor, *, bias: bool = True) -> Tensor:
    """Returns each row's share of the Hessian trace of a linear layer under softmax cross-entropy.

        tr H_i = (|a_i|^2 + [bias]) (1 - |p_i|^2),    z_i = W a_i + b,    p_i = softmax(z_i)

    The mean over all rows of all batches is the trace of the layer's block of the Hessian of the mean loss; targets do
    not enter. Rows whose target is ignored must be left out.

    Args:
        inputs: (N, d) inputs a_i of the layer.
        logits: (N, K) its outputs.
        bias: whether the layer has a bias.

    Returns:
        (N,) float64, accurate at any confidence: 1 - |p|^2 is summed without cancellation.

    Source: derived; the Hessian by the logits is diag(p) - p p^T, and z is linear in W and b.
    """
    shares = torch.softmax(logits.detach().double(), -1)
    top, best = shares.max(-1, keepdim=True)
    others = shares.scatter(-1, best, 0.0)
    curvature = top[..., 0] * others.sum(-1) + (others * (1 - others)).sum(-1)
    return (inputs.detach().double().square().sum(-1) + float(bias)) * curvature


def _at_least(number: int, least: int, name: str = "products") -> None:
    if number < least:
        raise UserError(f"{name}: {number} gives no standard error; at least {least}")
