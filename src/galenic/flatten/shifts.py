"""The shifts themselves: pure functions on a weight matrix and the Gram matrix of its inputs, in float64.

Shapes: inputs A (N, d), Gram C = A^T A = Q diag(lambda) Q^T (d, d), weight W (K, d) as in `torch.nn.Linear`,
outputs Z = A W^T. A shift multiplies W's components along the eigenvectors by factors f in [0, 1]:

    W' = W - (D Q) diag(1 - f) Q^T,    D = W, or W - W_0 when anchored to a base,

    relative output change   ||A (W' - W)^T|| / ||A D^T|| = sqrt(sum_j lambda_j (1 - f_j)^2 d_j / sum_j lambda_j d_j)

with d_j = ||D q_j||^2: relative to the outputs, or, anchored, to what the difference from the base adds to them. (A
task vector's share of a layer's outputs is small: one percent of the whole can be all that fine-tuning taught.) All
of it needs only C: exact on a whole data set in O(d^2) memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from galenic.flatten.spectra import Spectrum, row_spectrum, spectrum
from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A shifted weight and what it was predicted to do."""

    weight: Tensor
    """In the shape and dtype of the original."""
    bias: Tensor | None = None
    """The shifted bias, where it was free to move."""
    rank: int
    """Directions the inputs span, over all groups."""
    dimension: int
    """Directions there are, over all groups."""
    noop: bool
    """The weight is the original, bit for bit."""
    moved: float
    """||W' - W|| / norm_before, before rounding to the dtype."""
    output_change: float
    """Predicted ||A (W' - W)^T|| / ||A D^T|| on the data of the Gram matrix, before rounding to the dtype; D is the
    weight, or its distance to the base when anchored."""
    rounded_change: float
    """The same of the rounded weight (and bias)."""
    outputs: float
    """||A D^T||_F on that data."""
    norm_before: float
    """Frobenius norm of the weight; of its distance to the base when anchored."""
    norm_after: float
    removed: Tensor | None = None
    """(G, m), 1 - f: the share of each component that was taken away; None where a shift is no such map."""


# ---------------------------------------------------------------------------- the shifts


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


def stochastic(weight: Tensor, rows: Tensor, base: Tensor | None = None) -> Tensor:
    """Returns the weight of least norm with the same outputs on a few rows: stochastic optimum shifting.

        W' = W P_b,    P_b = the projector on the span of the n rows (see `row_spectrum`)

    It keeps the outputs of these rows alone. For n < d it is a random truncation: outputs of other data move by
    ||A (I - P_b) W^T||, which is small only if the rows resemble all data: every class several times. The leading
    directions of the full Gram matrix (`truncated`) cost about the same and are never worse at equal rank.

    Args:
        weight: (K, d).
        rows: (n, d) inputs of the layer; see `choose_rows`.
        base: (K, d) to stay close to.

    Source: "SOS" of arXiv 2405.14111, which eliminates dependent rows before inverting A A^T; not needed here.
    """
    if rows.ndim != 2 or not len(rows):
        raise UserError(f"stochastic: give rows of inputs, (n, d); got shape {list(rows.shape)}")
    if not torch.isfinite(rows).all():
        raise UserError("stochastic: the rows hold NaN or infinity")
    return shift_weight(weight, row_spectrum(rows), output_budget=0.0, base=base).weight


def choose_rows(
    total: int, count: int, *, labels: Tensor | None = None, generator: torch.Generator
) -> Tensor:
    """Chooses samples for the stochastic shift, of every class equally many as far as there are.

    Args:
        total: number of samples to choose from.
        count: how many.
        labels: (total,) classes; without, all samples are alike.
        generator: source of the choice.

    Returns:
        (count,) indices, ascending.

    Raises:
        UserError: more than there are, or fewer than classes (a class without a row loses its outputs).
    """
    if not 1 <= count <= total:
        raise UserError(f"stochastic: {count} rows of {total}; give 1 to {total}")
    order = torch.randperm(total, generator=generator)
    if labels is None:
        return order[:count].sort().values
    if len(labels) != total:
        raise UserError(f"stochastic: {len(labels)} labels for {total} samples")
    classes, shuffled = labels.cpu().unique(return_inverse=True)
    if count < len(classes):
        raise UserError(
            f"stochastic: {count} rows cannot show {len(classes)} classes; give {len(classes)} at the very least, "
            f"better {5 * len(classes)}"
        )
    shuffled = shuffled[order]
    seen = torch.zeros(total, dtype=torch.int64)  # how many of its class come before a sample
    for label in range(len(classes)):
        places = (shuffled == label).nonzero().flatten()
        seen[places] = torch.arange(len(places))
    return order[seen.argsort(stable=True)[:count]].sort().values


def truncated(
    weight: Tensor,
    gram: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Returns the weight without its components along the weakest directions of the inputs.

        W' = W sum_{j in S} q_j q_j^T,    ||A (W' - W)^T||^2 = sum_{j not in S} lambda_j w_j

    The norm saved by dropping direction j is w_j at the price lambda_j w_j, so the ascending order of lambda is the
    best one. `ridge` saves more at the same price; truncation is what denoises (rank = number of classes).

    Args:
        weight: (K, d).
        gram: (d, d).
        rank: |S|.
        energy: instead, the share of the outputs' squared norm that the smallest such S keeps, in (0, 1]. (Of outputs,
            not of inputs: a single massive activation can hold most of the inputs'.)
        base: (K, d) to stay close to.
    """
    return shift_weight(weight, spectrum(gram), rank=rank, energy=energy, base=base).weight


def centre_gauge(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Takes the mean over classes off a softmax head: the shortest weight with the same probabilities on any input.

        W' = W - 1 1^T W / K,    b' = b - mean(b)

    All logits of an input move by the same number, which softmax does not see: losses, gradients and Hessians of
    earlier layers stay, whatever the norm says. **Only for softmax cross-entropy** (label smoothing included): not for
    sigmoid losses, a z-loss, capped logits, or a head whose weight is tied.

    Args:
        weight: (K, d).
        bias: (K,).
    """

    def centred(tensor: Tensor) -> Tensor:
        wide = tensor.detach().double()
        return (wide - wide.mean(0)).to(tensor.dtype)

    return centred(weight), None if bias is None else centred(bias)


def shift_weight(
    weight: Tensor,
    inputs: Spectrum,
    *,
    output_budget: float = 0.0,
    rank: int | None = None,
    energy: float | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Shift:
    """Shifts one weight: exactly for a budget of 0, else by ridge; or by truncation if a rank or an energy is given.

    With the spectrum of centred inputs the bias is free: b' = b + (W - W') m takes over what the weight did along
    the mean m, so that outputs move only by what the centred inputs make of W' - W. A bias is not multiplied into
    earlier layers' gradients, so its norm costs nothing there.

    Args:
        weight: (K, d), or of a convolution, of any shape that reshapes to (G, K / G, d).
        inputs: spectrum of the inputs' Gram matrix.
        output_budget: relative output change allowed, in [0, 1).
        rank: number of directions (of each group) to keep.
        energy: share of the outputs' squared norm to keep, in (0, 1].
        base: a weight to stay close to instead of zero.
        bias: (K,), with centred inputs.

    Raises:
        UserError: shapes that do not fit, or numbers out of range.
    """
    check_amount(output_budget, rank, energy)
    wide, distance = as_matrices(weight, inputs, base)
    along = distance @ inputs.vectors  # (G, K / G, m): components along the eigenvectors
    power = along.square().sum(-2)
    outputs = squared_outputs(distance, inputs, power)
    if rank is None and energy is None:
        removed = removed_share(inputs, power, output_budget**2 * outputs)
    else:
        removed = truncated_share(inputs, power, rank, energy)
    change = float((inputs.values * removed.square() * power).sum())
    shifted = wide - _taken(distance, along, inputs, removed)
    del wide, distance, along  # a wide layer's are large
    return finished(
        weight, shifted, inputs, change=change, outputs=outputs, base=base, bias=bias, removed=removed
    )


def shift_moments(
    shift: Shift, inputs: Spectrum, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Takes an optimizer's first moments through the linear map that a shift is.

        W' = W_0 + (W - W_0) F,  b' = b + (W - W') m   =>   M' = M F,  M_b' = M_b + (M - M') m,
        F = I - Q diag(1 - f) Q^T

    with W_0 = 0 unless anchored. A moment is a mean of past gradients, so a step along it would put back what the
    shift took away; a step along M' gives what shifting after a step along M would have given.

    Args:
        shift: of `shift_weight`.
        inputs: the spectrum it was made with.
        weight: the moment of the weight, in its shape.
        bias: the moment of the bias; it changes if the inputs are centred.

    Returns:
        Both in their dtypes, computed in float64 with one rounding.
    """
    if shift.removed is None:
        raise UserError("a curvature-weighted shift is no map along its inputs: it cannot take moments along")
    wide, _ = as_matrices(weight, inputs, None)
    taken = _taken(wide, wide @ inputs.vectors, inputs, shift.removed)
    if bias is not None and inputs.mean is not None:
        lost = (taken @ inputs.mean.unsqueeze(-1)).reshape(-1)
        bias = (bias.detach().double() + lost).to(bias.dtype)
    return (wide - taken).reshape(weight.shape).to(weight.dtype), bias


def _taken(distance: Tensor, along: Tensor, inputs: Spectrum, removed: Tensor) -> Tensor:
    """Returns D (I - F), what a shift takes away of D.

    Args:
        distance: (G, K / G, d), D.
        along: (G, K / G, m), its components along the eigenvectors, D Q; overwritten.
        inputs: spectrum of the inputs.
        removed: (G, m), 1 - f.
    """
    if inputs.vectors.shape[-1] < inputs.vectors.shape[-2]:  # directions that no input has are not listed
        return distance - along.mul_((1 - removed).unsqueeze(-2)) @ inputs.vectors.mT
    return along.mul_(removed.unsqueeze(-2)) @ inputs.vectors.mT


def check_amount(output_budget: float, rank: int | None, energy: float | None) -> None:
    """Refuses numbers out of range, and more than one of them.

    Raises:
        UserError: which, and what is allowed.
    """
    if not 0 <= output_budget < 1:
        raise UserError(f"an output budget lies in [0, 1); got {output_budget}")
    if (output_budget > 0) + (rank is not None) + (energy is not None) > 1:
        raise UserError("give one of output_budget, rank and energy: each decides the whole shift")
    if rank is not None and rank < 1:
        raise UserError(f"rank: {rank} keeps nothing; at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy: {energy} is not in (0, 1]")


def as_matrices(weight: Tensor, inputs: Spectrum, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns a weight, and its distance to a base or zero, as (G, K / G, d) matrices in float64 ((K, d) without G).

    Raises:
        UserError: shapes that do not fit.
    """
    *lead, width, _ = inputs.vectors.shape
    if weight.ndim < 2 or weight[0].numel() != width:
        raise UserError(f"a weight of shape {list(weight.shape)} does not take {width} inputs")
    if base is not None and base.shape != weight.shape:
        raise UserError(f"the base's weight has shape {list(base.shape)}, the model's {list(weight.shape)}")
    wide = weight.detach().double().reshape(*lead, -1, width)
    if base is None:
        return wide, wide
    return wide, wide - base.detach().to(weight.device).double().reshape(wide.shape)


def finished(
    weight: Tensor,
    shifted: Tensor,
    inputs: Spectrum,
    *,
    change: float,
    outputs: float,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    removed: Tensor | None = None,
) -> Shift:
    """Rounds a shifted weight once and tells what it does.

    Args:
        weight: the original.
        shifted: the new one in float64, in matrices.
        inputs: spectrum of the inputs.
        change: predicted squared output change.
        outputs: ||A D^T||_F^2, see `Shift`.
        base: what the original was to stay close to.
        bias: a bias that may move, with centred inputs.
        removed: see `Shift`.

    Raises:
        UserError: centred inputs without a bias.
    """
    wide, distance = as_matrices(weight, inputs, base)
    rounded = shifted.reshape(weight.shape).to(weight.dtype)
    noop = torch.equal(rounded, weight.detach())
    step = rounded.double().reshape(wide.shape) - wide
    rounding = float((inputs.values * (step @ inputs.vectors).square_().sum(-2)).sum())
    new_bias = None
    if inputs.mean is not None:
        if bias is None:
            raise UserError("centred inputs need a bias that takes the mean over")
        lost = (step @ inputs.mean.unsqueeze(-1)).reshape(-1)
        new_bias = (bias.detach().double() - lost).to(bias.dtype)
        rounding += inputs.rows * float((new_bias.double() - bias.detach().double() + lost).square().sum())
    length = float(distance.norm())
    return Shift(
        weight=weight.detach().clone() if noop else rounded,
        bias=new_bias,
        rank=inputs.rank,
        dimension=inputs.dimension,
        noop=noop,
        moved=float((shifted - wide).norm()) / length if length else 0.0,
        output_change=(change / outputs) ** 0.5 if outputs > 0 else 0.0,
        rounded_change=(rounding / outputs) ** 0.5 if outputs > 0 else 0.0,
        outputs=outputs**0.5,
        norm_before=length,
        norm_after=float((distance + step).norm()),
        removed=removed,
    )


def squared_outputs(wide: Tensor, inputs: Spectrum, power: Tensor | None = None) -> float:
    """Returns ||A W^T||_F^2, the mean's part included where the inputs are centred.

    Args:
        wide: (G, K / G, d) or (K, d), the weight.
        inputs: spectrum of the inputs.
        power: (G, m) squared norms of the weight's components along the eigenvectors, where they are known.
    """
    power = (wide @ inputs.vectors).square_().sum(-2) if power is None else power
    outputs = float((inputs.values * power).sum())
    if inputs.mean is not None:
        outputs += inputs.rows * float((wide @ inputs.mean.unsqueeze(-1)).square().sum())
    return outputs


# ---------------------------------------------------------------------------- how much of each direction


def removed_share(inputs: Spectrum, power: Tensor, allowed: float) -> Tensor:
    """Returns 1 - f: which share of each eigen-component is taken away.

    Args:
        inputs: spectrum of the inputs.
        power: (G, m) squared norms of the weight's components along the eigenvectors.
        allowed: largest squared output change, of all groups together; 0 takes away what the inputs do not span, and
            nothing else.
    """
    if allowed <= 0:
        return (~inputs.spanned).double()
    if float((inputs.values * power).sum()) <= allowed:
        return torch.ones_like(inputs.values)  # even dropping everything stays within the budget
    damping = solve_damping(inputs.values.flatten(), power.flatten(), allowed)
    return damping / (inputs.values + damping)


def truncated_share(
    inputs: Spectrum, power: Tensor, rank: int | None = None, energy: float | None = None
) -> Tensor:
    """Returns 1 on directions to drop and 0 on those to keep; see `truncated`.

    Args:
        inputs: spectrum of the inputs.
        power: (G, m) squared norms of the weight's components along the eigenvectors.
        rank: directions to keep in each group.
        energy: share of the outputs' squared norm to keep, over all groups.
    """
    removed = (~inputs.spanned).double()
    if rank is not None:
        removed[..., : max(0, inputs.values.shape[-1] - rank)] = 1.0
    if energy is not None:
        order = inputs.values.flatten().argsort()
        dropped = (inputs.values * power).flatten()[order].cumsum(0)  # when all up to here are dropped
        removed.view(-1)[order[dropped <= (1 - energy) * dropped[-1:]]] = 1.0
    return removed


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

    high = float(values.max())
    while change(high) <= allowed:
        high *= 2
    low = high
    while change(low) > allowed:
        low /= 2
    while low < (middle := (low * high) ** 0.5) < high:
        low, high = (middle, high) if change(middle) <= allowed else (low, middle)
    return low
