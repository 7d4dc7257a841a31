"""Curvature-weighted shifts: the minimiser of the paper's stated objective, smallest Hessian trace at equal outputs.

A network is split into a body with parameters theta and features a_i (d), and a last layer V = W^T (d, K) with logits
z_i = V^T a_i and probabilities p_i = softmax(z_i). The Gauss-Newton trace of the body is quadratic in V,

    f(V) = (1/N) sum_i tr(H_i V^T M_i V),    M_i = J_i J_i^T,  J_i = d a_i / d theta,  H_i = diag(p_i) - p_i p_i^T

and H_i stays while outputs do. So on {V : A V = Z} it has a minimum, which plain minimum norm (all M_i = I, all H_i
alike) only bounds: the smallest norm can raise the trace. `curvature_weighted` solves it in closed form with
H_i M_i replaced by its average, `least_trace` by conjugate gradients as it stands. For networks of ReLUs and no
attention or normalisation over the batch, f is the trace of the true Hessian, and everywhere it is that of the
Gauss-Newton matrix. The largest eigenvalue may rise while the trace falls, and the norm does rise: measure both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from galenic.flatten.shifts import Shift, as_matrices, finished, squared_outputs
from galenic.flatten.spectra import Spectrum
from galenic.runtime import UserError

DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""What `checked_curvature_weighted` chooses from."""
FLAT = 1e-13
"""A direction less curved than this share of the steepest is flat, as far as float64 can tell."""


def curvature_weighted(
    weight: Tensor,
    inputs: Spectrum,
    metric: Tensor,
    *,
    damping: float = 0.1,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Shift:
    """Shifts a last layer to the smallest weighted norm tr(V^T M V) with the same outputs.

        V' = V - N (N^T M N)^-1 N^T M V,    N = basis of the directions that the inputs do not span

    with M = metric + damping tr(metric) / d I. M = I gives the minimum norm; damping grows towards that.

    Args:
        weight: (K, d), V^T.
        inputs: spectrum of the features, of one group.
        metric: (d, d), positive semi-definite: mean_i (1 - |p_i|^2) J_i J_i^T of `feature_curvature`.
        damping: relative to the metric's mean eigenvalue. Less than 0.1 lets the norm grow for little trace.
        base: (K, d) to stay close to, in this norm.
        bias: (K,), with centred inputs.

    Raises:
        UserError: shapes that do not fit, or damping that is not positive.

    Source: minimiser of the objective of arXiv 2405.14111, `min tr(H) s.t. A V = Z`, derived with the average of
    H_i M_i in Kronecker form.
    """
    wide, distance = as_matrices(weight, inputs, base)  # (K, d), or (1, K, d) of a layer's statistics
    null = null_space(inputs)
    metric = damped(metric, len(null), damping)
    half = metric @ null
    inner = null.T @ half
    root = torch.linalg.cholesky((inner + inner.T) / 2)
    step = torch.cholesky_solve((distance @ half).mT, root).mT @ null.T
    return _moved(weight, wide - step, step, inputs, base, bias)


def checked_curvature_weighted(
    weight: Tensor,
    inputs: Spectrum,
    metric: Tensor,
    check: Tensor,
    *,
    dampings: Sequence[float] = DAMPINGS,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Shift, float | None]:
    """Shifts as `curvature_weighted` does, if a second estimate of the metric confirms that the trace falls.

    A metric from R random directions is right on average and wrong in each direction by about 1/sqrt(R); its minimiser
    goes where it is too small. With 48 of them the true trace rose by 20 to 32% in 20 of 20 networks
    (`benchmarks/flattening.py`). So each damping's shift is judged by tr(V^T check V), of directions that it was not
    fitted to: the best one is taken, or none.

    Args:
        weight: see `curvature_weighted`, as the following ones.
        inputs: see there.
        metric: what the shifts are fitted to.
        check: of other random directions, (d, d).
        dampings: to choose from; a large one is the minimum norm.
        base: see there.
        bias: see there.

    Returns:
        The shift, and its damping: None if it moves nothing.
    """
    wide, _ = as_matrices(weight, inputs, None)
    judge = check.double()

    def trace(value: Tensor) -> float:
        return float(((value @ judge) * value).sum())

    best, chosen, least = None, None, trace(wide)
    for damping in dampings:
        proposal = curvature_weighted(weight, inputs, metric, damping=damping, base=base, bias=bias)
        if (found := trace(proposal.weight.double().reshape(wide.shape))) < least:
            best, chosen, least = proposal, damping, found
    if best is None:
        best = _moved(weight, wide, torch.zeros_like(wide), inputs, base, bias)
    return best, chosen


def damped(metric: Tensor, width: int, damping: float) -> Tensor:
    """Returns a metric with a share of its mean eigenvalue added to all; of a zero metric, the identity.

    Raises:
        UserError: another shape than (width, width), numbers that are not finite, damping that is not positive.
    """
    if metric.shape != (width, width) or not torch.isfinite(metric).all():
        raise UserError(f"metric: needs {width} x {width} finite numbers; got shape {list(metric.shape)}")
    if not damping > 0:
        raise UserError(f"damping: {damping} is not positive")
    wide = metric.double()
    mean = float(wide.trace()) / width
    identity = torch.eye(width, dtype=torch.float64, device=metric.device)
    return (wide + wide.T) / 2 + damping * mean * identity if mean > 0 else identity


def null_space(inputs: Spectrum) -> Tensor:
    """Returns (d, d - rank) orthonormal columns: the directions that inputs of one group do not span.

    Raises:
        UserError: the inputs are of a convolution with several groups.
    """
    vectors, spanned = inputs.vectors, inputs.spanned
    if vectors.ndim == 3:
        if len(vectors) > 1:
            raise UserError("curvature-weighted shifts are for last layers; this one has several groups")
        vectors, spanned = vectors[0], spanned[0]
    unlisted = torch.linalg.qr(vectors, mode="complete").Q[:, vectors.shape[1] :]
    return torch.cat([vectors[:, ~spanned], unlisted], 1)


def least_trace(
    weight: Tensor,
    inputs: Spectrum,
    probabilities: Tensor,
    tangents: Tensor,
    *,
    iterations: int = 200,
    tolerance: float = 1e-10,
) -> Shift:
    """Shifts a last layer to the smallest Gauss-Newton trace of the body with the same outputs, sample by sample.

        min_Y  (1 / N R) sum_{i, r} s_ir^T V H_i V^T s_ir,    V = V_0 + N Y

    by conjugate gradients from Y = 0: no step raises it. With tangents whose (1/R) sum_r s_ir s_ir^T is M_i it is
    f(V) itself, with random ones of `feature_tangents` its unbiased estimate.

    Args:
        weight: (K, d).
        inputs: spectrum of the features.
        probabilities: (N, K) of the samples.
        tangents: (R, N, d), s_ir.
        iterations: at most.
        tolerance: on the gradient, relative to where it began.

    Source: the objective of arXiv 2405.14111; derivation in this module's head.
    """
    wide, _ = as_matrices(weight, inputs, None)
    null = null_space(inputs)
    start = wide.reshape(-1, len(null))
    p, s = probabilities.double(), tangents.double()

    def gradient(value: Tensor) -> Tensor:
        u = s @ value.T  # (R, N, K): V^T s
        curved = p * u - p * (p * u).sum(-1, keepdim=True)  # H_i V^T s
        return torch.einsum("rnk,rnd->kd", curved, s) / s.shape[:2].numel()

    step = torch.zeros(len(start), null.shape[1], dtype=torch.float64, device=null.device)
    slope = gradient(start)
    residual = -slope @ null
    direction, energy = residual.clone(), float(residual.square().sum())
    # Where nothing in the null space has curvature (features that never fire), what is left is rounding: stay.
    goal = max(tolerance**2 * energy, FLAT**2 * float(slope.square().sum()))
    steepest = 0.0
    for _ in range(iterations):
        if energy <= goal:
            break
        image = gradient(direction @ null.T) @ null
        curvature, length = float((direction * image).sum()), float(direction.square().sum())
        steepest = max(steepest, curvature / length)
        if curvature <= FLAT * steepest * length:
            break  # what is left of the gradient is rounding: a step along it would be of any length
        step += (energy / curvature) * direction
        residual -= (energy / curvature) * image
        last, energy = energy, float(residual.square().sum())
        direction = residual + (energy / last) * direction
    taken = -(step @ null.T)
    return _moved(weight, wide - taken, taken, inputs, None, None)


def _moved(
    weight: Tensor, shifted: Tensor, step: Tensor, inputs: Spectrum, base: Tensor | None, bias: Tensor | None
) -> Shift:
    change = float((inputs.values * (step @ inputs.vectors).square().sum(-2)).sum())
    outputs = squared_outputs(as_matrices(weight, inputs, base)[1], inputs)
    return finished(weight, shifted, inputs, change=change, outputs=outputs, base=base, bias=bias)


# ---------------------------------------------------------------------------- what the body's curvature is


def feature_curvature(
    body: nn.Module,
    head: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    *,
    probes: int = 48,
    generator: torch.Generator,
) -> Tensor:
    """Estimates the metric of `curvature_weighted`: M = mean_i (1 - |p_i|^2) J_i J_i^T.

    Unbiased: (1 / R) sum_r of the same with J_i u_r u_r^T J_i^T, u_r random signs; one forward-mode product each.

    Args:
        body: gives features (..., d); in eval mode meanwhile. Its attention must allow forward-mode derivatives
            (eager does).
        head: features -> logits (..., K).
        batches: tensors, tuples (the first item is the input) or mappings (keywords; a 2-D `attention_mask` of the
            features' leading shape leaves padding out).
        probes: R.
        generator: source of the signs.

    Returns:
        (d, d) float64.

    Raises:
        UserError: no batches, or fewer than one probe.
    """
    if probes < 1:
        raise UserError(f"probes: {probes}; at least 1")
    total, count = None, 0
    for batch in batches:
        weights = None
        for features, tangent in feature_tangents(body, batch, probes=probes, generator=generator):
            if weights is None:
                with torch.no_grad():
                    share = head(features).flatten(0, -2).double().softmax(-1)
                weights = 1 - share.square().sum(-1)
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                if mask is not None and mask.shape == features.shape[:-1]:
                    weights = weights * mask.flatten()
                    count += int(mask.sum())
                else:
                    count += len(weights)
            rows = tangent.flatten(0, -2).double()
            product = rows.T @ (weights[:, None] * rows)
            total = product if total is None else total.add_(product)
    if total is None or not count:
        raise UserError("there are no batches: the features' curvature needs data")
    return (total + total.T) / (2 * count * probes)


def feature_tangents(
    body: nn.Module, batch: Any, *, probes: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the features of a batch and their derivative J_i u_r along random signs u_r of all trainable parameters.

    Args:
        body: gives features (..., d).
        batch: see `feature_curvature`.
        probes: how many r.
        generator: source of the signs.
    """
    words = dict(batch) if isinstance(batch, Mapping) else {}
    given = () if words else (batch[0] if isinstance(batch, tuple | list) else batch,)
    parameters = {name: p.detach() for name, p in body.named_parameters() if p.requires_grad}
    training = [module for module in body.modules() if module.training]
    body.eval()
    try:
        for _ in range(probes):
            signs = {
                name: torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p)
                for name, p in parameters.items()
            }
            with torch.no_grad():
                features, tangent, *_ = jvp(
                    lambda p: functional_call(body, p, given, words), (parameters,), (signs,)
                )
            yield features, tangent
    finally:
        for module in training:
            module.training = True
