"""The shifts themselves: pure functions on a weight matrix and the Gram matrix of its inputs, in float64.

Shapes: inputs A (N, d), Gram C = A^T A = Q diag(lambda) Q^T (d, d), weight W (K, d) as in `torch.nn.Linear`,
outputs Z = A W^T. A shift multiplies W's components along the eigenvectors by factors f in [0, 1]:

    W' = W - (D Q) diag(1 - f) Q^T,    D = W, or W - W_0 when anchored to a base,

    relative output change   ||A (W' - W)^T||_F / ||Z||_F = sqrt(sum_j lambda_j (1 - f_j)^2 d_j / sum_j lambda_j w_j)

with w_j = ||W q_j||^2, d_j = ||D q_j||^2. All of it needs only C: exact on a whole data set in O(d^2) memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigendecomposition of a Gram matrix."""

    values: Tensor
    """(d,) float64, ascending, not negative."""
    vectors: Tensor
    """(d, d) float64, eigenvectors as columns."""

    @property
    def rank(self) -> int:
        """Number of directions the inputs span, as far as float64 can tell from a Gram matrix.

        Eigenvalues carry a rounding error of about d eps lambda_max; below that a direction counts as not spanned.
        (In singular values of the inputs: below 1.5e-8 sqrt(d) sigma_max.)
        """
        tolerance = len(self.values) * torch.finfo(torch.float64).eps * float(self.values[-1])
        return int((self.values > tolerance).sum())


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A shifted weight and what it was predicted to do."""

    weight: Tensor
    """(K, d) in the dtype of the original."""
    rank: int
    """Directions the inputs span."""
    noop: bool
    """The weight is the original, bit for bit."""
    output_change: float
    """Predicted ||A (W' - W)^T|| / ||A W^T|| on the data of the Gram matrix, before rounding to the dtype."""
    norm_before: float
    """Frobenius norm of the weight; of its distance to the base when anchored."""
    norm_after: float


def spectrum(gram: Tensor) -> Spectrum:
    """Decomposes a Gram matrix.

    Args:
        gram: (d, d), symmetric, positive semi-definite up to rounding.

    Raises:
        UserError: not a square matrix of finite numbers.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise UserError(f"a Gram matrix is square; got shape {list(gram.shape)}")
    if not torch.isfinite(gram).all():
        raise UserError("the Gram matrix holds NaN or infinity: so do the layer's inputs")
    values, vectors = torch.linalg.eigh(gram.double())
    return Spectrum(values=values.clamp_min(0), vectors=vectors)


def minimum_norm(weight: Tensor, gram: Tensor, base: Tensor | None = None) -> Tensor:
    """Returns the weight of least norm with the same outputs on all data of the Gram matrix.

        W' = W P,    P = C^+ C = the orthogonal projector on the span of the inputs

    which solves `min ||W'||_F s.t. A W'^T = A W^T`. With `base`, the distance to the base is least instead:
    W' = W_0 + (W - W_0) P. If the inputs span everything (rank d), this is W itself.

    Args:
        weight: (K, d).
        gram: (d, d), A^T A; accumulate it in float64.
        base: (K, d) to stay close to.

    Returns:
        (K, d) in the dtype of `weight`, computed in float64 with one rounding.

    Source: Optimum Shifting, arXiv 2405.14111; the paper's A^T (A A^T)^-1 Z is (W P)^T.
    """
    return shift_weight(weight, spectrum(gram), output_budget=0.0, base=base).weight


def ridge(weight: Tensor, gram: Tensor, output_budget: float, base: Tensor | None = None) -> Tensor:
    """Returns the weight of least norm whose outputs move by at most a budget on the data of the Gram matrix.

        min ||W'||_F  s.t.  ||A (W' - W)^T||_F <= budget ||A W^T||_F    =>    W' = W C (C + mu I)^-1

    with the damping mu from `solve_damping`. No other weight has both smaller norm and smaller output change.

    Args:
        weight: (K, d).
        gram: (d, d), A^T A.
        output_budget: relative, in [0, 1).
        base: (K, d) to stay close to.
    """
    return shift_weight(weight, spectrum(gram), output_budget=output_budget, base=base).weight


def shift_weight(
    weight: Tensor, inputs: Spectrum, *, output_budget: float, base: Tensor | None = None
) -> Shift:
    """Shifts one weight: exactly for a budget of 0, else by ridge.

    Args:
        weight: (K, d).
        inputs: spectrum of the inputs' Gram matrix.
        output_budget: relative output change allowed, in [0, 1).
        base: (K, d) to stay close to instead of zero.

    Raises:
        UserError: shapes that do not fit, or a budget out of range.
    """
    if not 0 <= output_budget < 1:
        raise UserError(f"an output budget lies in [0, 1); got {output_budget}")
    if weight.ndim != 2 or weight.shape[1] != len(inputs.values):
        raise UserError(f"a weight of shape {list(weight.shape)} does not take {len(inputs.values)} inputs")
    if base is not None and base.shape != weight.shape:
        raise UserError(f"the base's weight has shape {list(base.shape)}, the model's {list(weight.shape)}")
    wide = weight.detach().double()
    distance = wide if base is None else wide - base.detach().double()
    along = distance @ inputs.vectors  # (K, d): components along the eigenvectors
    power = along.square().sum(0)
    outputs = inputs.values @ (power if base is None else (wide @ inputs.vectors).square().sum(0))
    removed = removed_share(inputs, power, output_budget**2 * float(outputs))
    moved = wide - (along * removed) @ inputs.vectors.T
    rounded = moved.to(weight.dtype)
    change = inputs.values @ (removed.square() * power)
    noop = torch.equal(rounded, weight)
    after = rounded.double() if base is None else rounded.double() - base.detach().double()
    return Shift(
        weight=weight.detach().clone() if noop else rounded,
        rank=inputs.rank,
        noop=noop,
        output_change=float((change / outputs).sqrt()) if outputs > 0 else 0.0,
        norm_before=float(distance.norm()),
        norm_after=float(after.norm()),
    )


def removed_share(inputs: Spectrum, power: Tensor, allowed: float) -> Tensor:
    """Returns 1 - f, (d,): which share of each eigen-component is taken away.

    Args:
        inputs: spectrum of the inputs.
        power: (d,) squared norms of the weight's components along the eigenvectors.
        allowed: largest squared output change; 0 takes away what the inputs do not span, and nothing else.
    """
    if allowed <= 0:
        unspanned = torch.zeros_like(inputs.values)
        unspanned[: len(inputs.values) - inputs.rank] = 1.0
        return unspanned
    if float(inputs.values @ power) <= allowed:
        return torch.ones_like(inputs.values)  # even dropping everything stays within the budget
    damping = solve_damping(inputs.values, power, allowed)
    return damping / (inputs.values + damping)


def solve_damping(values: Tensor, power: Tensor, allowed: float) -> float:
    """Solves the secular equation `sum_j lambda_j (mu / (lambda_j + mu))^2 w_j = allowed` for mu.

    The left side grows with mu from 0 to `sum_j lambda_j w_j`, so there is one solution; bisection on its logarithm
    finds it to the last bit, from below: the budget is never exceeded.

    Args:
        values: (d,) eigenvalues lambda, not negative.
        power: (d,) w.
        allowed: between 0 and the sum, exclusive.
    """

    def change(damping: float) -> float:
        return float(values @ ((damping / (values + damping)).square() * power))

    high = float(values[-1])
    while change(high) <= allowed:
        high *= 2
    low = high
    while change(low) > allowed:
        low /= 2
    while low < (middle := (low * high) ** 0.5) < high:
        low, high = (middle, high) if change(middle) <= allowed else (low, middle)
    return low
