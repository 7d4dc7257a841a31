"""MetaGPT: the coefficients of task arithmetic in closed form, from norms alone.

Source: Zhou, Song, Wang, Chen, "MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic",
EMNLP 2024, arXiv 2406.11385.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from galenic.merge.statistics import total
from galenic.runtime import UserError

DOMINANT = 0.9
"""A coefficient above this is worth a warning: two task vectors whose norms differ threefold reach it."""


def metagpt_coefficients(
    gram: Tensor | Mapping[str, Tensor], *, norm_power: float = 2.0, max_coefficient: float = 1.0
) -> Tensor:
    """Returns MetaGPT's coefficients, one per expert.

        lambda_t = ||tau_t||^2 / sum_k ||tau_k||^2                               (Theorem 10)

    With c_t = ||tau_t||^2 this is a minimiser over lambda of

        sum_t c_t || sum_k lambda_k tau_k - tau_t ||^2,

    and the only one when the task vectors are linearly independent, whatever their correlation: the normal
    equations are (sum c) G lambda = G c with the Gram matrix G, so lambda = c / sum c. The paper assumes orthogonal
    task vectors to separate its upper bound; the result does not need it. As the coefficients sum to 1, the base
    cancels: theta_0 + sum lambda_t tau_t = sum lambda_t theta_t.

    Two knobs beyond the paper. Any c_t may weigh the distances: `norm_power` p sets c_t = ||tau_t||^p. And
    `max_coefficient` m bounds the coefficients, lambda_t = min(m, s c_t) with s such that they sum to 1.

    Args:
        gram: (T, T) Gram matrix of the task vectors, or per-tensor matrices whose sum it is.
        norm_power: p; 2 is the paper's, 0 the weight average. Zero task vectors get 0, unless p is 0.
        max_coefficient: m, from 1/T to 1.

    Returns:
        (T,) float64, non-negative, summing to 1. If every task vector is zero: 1/T each.

    Raises:
        UserError: the matrix is not square, its diagonal is not made of finite, non-negative squares, or m is less
            than 1/T.

    Example:
        >>> import torch
        >>> metagpt_coefficients(torch.tensor([[9.0, 2.0], [2.0, 1.0]])).tolist()
        [0.9, 0.1]
    """
    matrix = total(gram) if isinstance(gram, Mapping) else gram
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise UserError(f"a Gram matrix is square, one row per expert; got shape {list(matrix.shape)}")
    squares = matrix.diagonal().double()
    if not torch.isfinite(squares).all() or (squares < 0).any():
        raise UserError(f"squared norms are finite and not negative; got {squares.tolist()}")
    if not squares.any():
        return torch.full_like(squares, 1 / len(squares))
    positive = squares > 0
    weights = torch.full_like(squares, float(norm_power == 0))
    # An exact division by a power of two, so that powers of very large or small squares do not overflow.
    scale = squares[positive].max() if norm_power > 0 else squares[positive].min()
    scaled = torch.ldexp(squares[positive], torch.tensor(-math.frexp(float(scale))[1]))
    weights[positive] = scaled ** (norm_power / 2)
    return _capped(weights, max_coefficient)


def _capped(weights: Tensor, limit: float) -> Tensor:
    """Returns min(limit, s w) with s such that the sum is 1; where only zeros could take the rest, they share it."""
    count = len(weights)
    if limit * count < 1 - 1e-12:
        raise UserError(f"max_coefficient: {limit} is less than 1/{count}; {count} coefficients sum to 1")
    result = weights / math.fsum(weights.tolist())
    full = torch.zeros(count, dtype=torch.bool)
    while (result > limit).any() and not full.all():
        full |= result > limit
        rest, room = weights.where(~full, 0.0), 1 - limit * int(full.sum())
        share = (
            rest / math.fsum(rest.tolist()) if rest.any() else (~full).double() / max(1, int((~full).sum()))
        )
        result = torch.where(full, limit, share * room)
    return result


def effective_models(coefficients: Sequence[float]) -> float:
    """Returns how many equally weighted models the coefficients amount to: (sum lambda)^2 / sum lambda^2.

    For coefficients that sum to 1 this is 1 / sum lambda^2: T when all are equal, 1 when one model takes all.
    """
    squares = math.fsum(c * c for c in coefficients)
    return math.fsum(coefficients) ** 2 / squares if squares else 0.0


def cosines(gram: Tensor) -> list[list[float]]:
    """Returns the (T, T) cosines between task vectors; 0 beside a zero task vector, 1 on the diagonal."""
    norms = gram.diagonal().double().sqrt()
    scale = torch.outer(norms, norms)
    values = torch.where(scale > 0, gram.double() / scale.where(scale > 0, 1.0), 0.0).clamp(-1, 1)
    return values.fill_diagonal_(1.0).tolist()


def norm_warnings(names: Sequence[str], gram: Tensor, coefficients: Sequence[float] | None) -> list[str]:
    """Says in words what in the norms should make a reader careful.

    Args:
        names: T names of experts.
        gram: (T, T) Gram matrix of the whole models.
        coefficients: MetaGPT's, or None when another method sets them.
    """
    norms = gram.diagonal().double().sqrt().tolist()
    zero = [name for name, norm in zip(names, norms, strict=True) if norm == 0]
    if len(zero) == len(names):
        return ["every expert equals the base: all task vectors are zero"]
    warnings = [f"expert '{name}' equals the base: its task vector is zero" for name in zero]
    for name, coefficient in zip(names, coefficients or [], strict=False):
        if coefficient > DOMINANT and len(names) > 1:
            warnings.append(
                f"'{name}' gets {coefficient:.3f} of the merge, as its task vector is by far the longest: the others "
                "hardly count. Equal training lengths or merge_method: linear would weigh them evenly."
            )
    return warnings
