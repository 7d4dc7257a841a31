"""Sharpness that scale cannot fake, and comparison of curvature at equal loss.

Plain Hessian traces mislead twice. Rescaling a ReLU network's layers (Dinh et al. 2017, arXiv 1703.04933) changes the
trace and not the function: `adaptive` measures in units of each weight. And the trace of softmax cross-entropy shrinks
with confidence, so of two networks the one with the smaller loss seems flatter: `matching_scale` brings both to one
loss first.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from galenic.flatten.products import (
    Operator,
    check_data,
    check_finite,
    distinct,
    flatten,
    gradients_of,
    restored,
    scaled,
    shaped_like,
)
from galenic.runtime import UserError

LARGEST_SCALE = 1e9
"""Logits are multiplied by less than this and more than its inverse."""


def adaptive(operator: Operator, parameters: Iterable[Tensor]) -> Operator:
    """Returns D A D with D = diag(|w|): a Hessian in units of each weight's size.

        tr(D H D) = sum_i w_i^2 H_ii,    lambda_max(D H D) = lim 2/rho^2 max_{|eps / w| <= rho} L(w + eps) - L(w)

    (the limit at a minimum). Rescalings that leave the function alone, w_i -> c_i w_i, leave D H D alone, entry by
    entry up to sign: its trace by any estimator of `traces`, its largest eigenvalue and its density are free of scale.

    Args:
        operator: the Hessian or Gauss-Newton matrix by the very same parameters.
        parameters: as given to `products.hessian`.

    Source: the element-wise normalisation T_w = diag(|w|) of ASAM, Kwon et al. 2021, arXiv 2102.11600, without its
    additive constant, which would bring scale back. Not the row and column scales of normalised flat minima (Tsuzuku
    et al. 2019, arXiv 1901.04653).
    """
    scale = flatten(distinct(parameters)).abs().to(operator.device)
    if len(scale) != operator.size:
        raise UserError(
            f"{len(scale)} weights for a matrix of {operator.size} rows; give the parameters it is of"
        )
    return scaled(operator, scale)


def adaptive_sharpness(
    loss_fn: Callable[[Any], tuple[Tensor, int]],
    parameters: Iterable[Tensor],
    batches: Sequence[Any],
    *,
    rho: float,
) -> float:
    """Returns how much the mean loss rises after ASAM's step of size rho.

        S = L(w + eps) - L(w),    eps = rho w^2 g / | |w| g |_2    (entry by entry),    g = dL/dw

    eps is the steepest step with |eps / w|_2 <= rho: one step towards the worst case, not the worst case. Zero where
    the gradient is zero. Rescalings that leave the function alone leave S alone. Weights come back bit for bit, also
    after errors.

    Args:
        loss_fn: batch -> (summed loss, number of samples or tokens).
        parameters: what to step in; a tied one counts once.
        batches: the data, gone through twice.
        rho: the step's size, above zero.

    Raises:
        UserError: rho not above zero, no parameters or batches, a loss that is NaN or infinite.

    Source: Kwon et al. 2021, arXiv 2102.11600, equations 5 and 9 with p = 2, T_w = diag(|w|), over the whole data.
    """
    if not rho > 0:
        raise UserError(f"rho: {rho}; above 0")
    tensors = distinct(parameters)
    before, slope = _loss_and_gradient(loss_fn, tensors, batches)
    weights = flatten(tensors)
    length = (weights * slope).norm()
    if length == 0:
        return 0.0
    step = shaped_like(tensors, rho * weights**2 * slope / length)
    with restored(dict(enumerate(tensors))), torch.no_grad():
        for tensor, part in zip(tensors, step, strict=True):
            tensor += part
        return mean_loss(loss_fn, batches) - before


def _loss_and_gradient(
    loss_fn: Callable[[Any], tuple[Tensor, int]], tensors: list[Tensor], batches: Sequence[Any]
) -> tuple[float, Tensor]:
    total, count, slope = 0.0, 0, 0.0 * flatten(tensors)
    for batch in batches:
        loss, number = loss_fn(batch)
        check_finite(loss)
        total, count = total + float(loss.detach()), count + number
        slope += flatten(gradients_of(loss, tensors))
    check_data(count, slope)
    return total / count, slope / count


@torch.no_grad()
def mean_loss(loss_fn: Callable[[Any], tuple[Tensor, int]], batches: Iterable[Any]) -> float:
    """Returns the mean loss over all samples (or tokens) of all batches; NaN stays NaN.

    Raises:
        UserError: there are no batches.
    """
    total, count = 0.0, 0
    for batch in batches:
        loss, number = loss_fn(batch)
        total, count = total + float(loss.detach()), count + number
    if not count:
        raise UserError("there are no batches: a loss needs data")
    return total / count


# ---------------------------------------------------------------------------- equal loss


def matching_scale(
    batches: Iterable[tuple[Tensor, Tensor]], loss: float, *, tolerance: float = 1e-12
) -> float:
    """Finds the scale c of all logits at which the mean cross-entropy equals a given one.

        L(c) = mean_i -log softmax(c z_i)[y_i] = loss

    L is convex in c, and monotone on the side of its minimum where the network (c = 1) is: it is solved there, by
    Newton's method inside a bracket. So c is 1 for the network's own loss and moves without jumps. To compare two
    networks, bring both to one loss and take their traces with the loss of c z.

    Args:
        batches: (logits (N, K), targets (N,)) pairs, gone through about ten times: a list, or an object whose
            iteration computes the logits anew. Targets of -100 do not count.
        loss: the wanted mean loss in nats.
        tolerance: how near the loss must come, relative to it.

    Raises:
        UserError: no scale on that side gives the loss (the nearest is said), logits that are NaN, or no batches.

    Source: derived; dL/dc = mean <p_i - y_i, z_i> with p_i at c.
    """
    value, slope = loss_at_scale(batches, 1.0)
    if not math.isfinite(value):
        raise UserError(f"the loss is {value}: the network cannot be brought to another")
    rising = slope > 0
    scale, low, high = 1.0, 0.0, math.inf
    for _ in range(200):
        if (slope > 0) == rising and abs(value - loss) <= tolerance * loss:
            return scale
        if rising:
            above = value < loss or slope < 0
        else:
            above = value > loss and slope < 0
        low, high = (scale, high) if above else (low, scale)
        middle = 2 * scale if high == math.inf else (low + high) / 2
        newton = scale - (value - loss) / slope if slope else middle
        following = newton if low < newton < min(high, 4 * scale) else middle
        if following in (scale, low, high) or not 1 / LARGEST_SCALE < following < LARGEST_SCALE:
            break
        scale = following
        value, slope = loss_at_scale(batches, scale)
    raise UserError(
        f"loss: no scale of the logits gives {loss:.6g}; the nearest is {value:.6g}, at {scale:.3g} times the logits"
    )


@torch.no_grad()
def loss_at_scale(batches: Iterable[tuple[Tensor, Tensor]], scale: float) -> tuple[float, float]:
    """Returns the mean cross-entropy at logits times a scale c, and its derivative by c.

        L = log(1 + sum_{j != y} exp(c d_j)),    dL/dc = sum_{j != y} p_j d_j,    d_j = z_j - z_y

    in float64 and in a form that stays accurate when the loss is tiny.
    """
    total, slope, count = 0.0, 0.0, 0
    for logits, targets in batches:
        rows = targets != -100
        z, y = logits[rows].double(), targets[rows][:, None]
        lead = z - z.gather(1, y)
        others = (scale * lead).scatter(1, y, -torch.inf)
        odds = others.logsumexp(1)
        total += float(torch.logaddexp(odds, torch.zeros_like(odds)).sum())
        shares = (others - odds[:, None]).exp() * odds.sigmoid()[:, None]
        slope += float((shares * lead).sum())
        count += len(y)
    if not count:
        raise UserError("there are no batches: a loss needs data")
    return total / count, slope / count
