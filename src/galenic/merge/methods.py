"""The merging methods on one block of one tensor: pure functions, float64 in and out.

`kernels` has those loops that every weight goes through, to the same bits; here is what looks at more than an entry at
a time, and what is computed once a tensor.

Shapes: `origin` (n,) is a block of the base, `experts` and `deltas` T blocks of the experts and of their task vectors.
Sums run over the experts in their given order. `round_once` is the only rounding to the output type.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from galenic.merge.kernels import GOLDEN, MIX_1, MIX_2

NEARLY_PARALLEL = 0.9995
"""Cosine beyond which `slerp` goes straight, as dividing by the sine of the angle would lose digits."""


def weighted_sum(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns `sum_t w_t x_t` in float64."""
    result = blocks[0].double() * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        # Not add_(..., alpha): that is a fused multiply-add where the processor has one, so bits would depend on it.
        result += block.double() * weight
    return result


def largest_below(threshold: float) -> float:
    """Returns the largest float64 that rounds to a float32 below `threshold` (a float32); -1 if there is none.

    What is larger is kept by TIES, whose trimming keeps each task vector's top entries over the whole model, so that
    the threshold is the model's, not the tensor's (TIES-Merging, arXiv 2306.01708, Algorithm 1, step 1). Ties are kept.
    Magnitudes are compared as float32 numbers, the keys in which they are ranked. Breadcrumbs drop the entries above
    another threshold as well, outliers along with small changes (arXiv 2312.06795, section 3).
    """
    if threshold <= 0:
        return -1.0
    above = np.float32(threshold)
    below = np.nextafter(above, np.float32(0))
    midpoint = (float(above) + float(below)) / 2  # exact: both have 24 bits, side by side
    goes_up = np.float32(midpoint) == above  # a tie goes to the even neighbour
    return math.nextafter(midpoint, 0.0) if goes_up else midpoint


def ties(
    origin: Tensor,
    thinned: Sequence[Tensor],
    weights: Sequence[float],
    scale: float = 1.0,
    votes: Sequence[float] | None = None,
    normalize: bool = True,
) -> Tensor:
    """Elects a sign per entry, averages the thinned task vectors that agree with it, and adds that to the base.

        gamma = sgn(sum_t v_t tau_t),   tau = sum_{t: sgn(tau_t) = gamma} w_t tau_t / sum_{t: ...} w_t,
        theta_0 + scale tau

    Where thinned entries are all zero or cancel exactly, nothing is elected and the base stays. Weights are not
    negative, and not all zero. In TIES they are all 1; DELLA elects and fuses likewise. SCE (FuseChat, arXiv
    2408.07990, section 3.3) weighs by squared norms, but every task vector has the same vote.

    Args:
        origin: (n,) of the base.
        thinned: T task vectors, (n,) float64.
        weights: w.
        scale: of the merged task vector.
        votes: v. Default: w.
        normalize: whether to divide by the weights that agree; without, `tau` is their sum.

    Source: TIES-Merging, arXiv 2306.01708, Algorithm 1, steps 2 and 3.
    """
    elected = weighted_sum(thinned, votes or weights).sign_()
    agreeing = [
        (delta * elected).clamp_min_(0) for delta in thinned
    ]  # magnitudes; 0 where the sign is another
    merged = weighted_sum(agreeing, weights)
    if normalize:
        # In place of zero the least a positive sum of weights can be: there the numerator is zero as well.
        least = min(weight for weight in weights if weight)
        merged /= weighted_sum([part.sign_() for part in agreeing], weights).clamp_min_(least)
    return merged.mul_(elected * scale).add_(origin)


def keep_probabilities(delta: Tensor, row: int, density: float, epsilon: float) -> Tensor:
    """Returns the probability with which DELLA keeps each entry, by the rank of its magnitude in its row.

        p_i = density - epsilon + 2 epsilon r_i / (m - 1),   r_i = 0 (least) ... m - 1 (largest)

    Entries of one magnitude are ranked by their place. A row of one entry is kept with probability `density`.

    Source: DELLA-Merging, arXiv 2406.11617, section 3.1 (MAGPRUNE).

    Args:
        delta: (n,) task vector, whole rows.
        row: m, a divisor of n.
        density: mean of the probabilities.
        epsilon: half their range.

    Returns:
        (n,) float64.
    """
    if row == 1:
        return torch.full_like(delta, density, dtype=torch.float64)
    order = delta.abs().view(-1, row).argsort(dim=1, stable=True)
    steps = torch.linspace(density - epsilon, density + epsilon, row, dtype=torch.float64)
    return torch.empty_like(order, dtype=torch.float64).scatter_(1, order, steps.expand_as(order)).flatten()


def variances(deltas: Tensor) -> Tensor:
    """Returns the variance of (T, n) task vectors between the experts, (1, n) float32.

    Source: SCE's step S (FuseChat, arXiv 2408.07990, section 3.3).
    """
    wide = deltas.double()
    mean = weighted_sum(list(wide), [1 / len(wide)] * len(wide))
    squares = [(part - mean).square_() for part in wide]
    return weighted_sum(squares, [1 / len(wide)] * len(wide)).float()[None]


def model_stock_ratio(gram: Tensor) -> float:
    """Returns Model Stock's t: how far to go from the base to the mean of the experts.

        t = T cos / (1 + (T - 1) cos),   cos: mean of the cosines between the T task vectors

    A mean cosine that is not positive gives 0, the base: there is no common direction to follow. (The formula gives
    negative numbers of any size there.)

    Source: Model Stock, arXiv 2403.19522, equation 7; per tensor, as in its section 4.

    Args:
        gram: (T, T) Gram matrix of the task vectors of one tensor, T at least 2.
    """
    count = len(gram)
    norms = gram.diagonal().double().sqrt()
    scale = torch.outer(norms, norms)
    angles = torch.where(scale > 0, gram.double() / scale.where(scale > 0, 1.0), 0.0).clamp(-1, 1)
    rows, columns = torch.triu_indices(count, count, offset=1)
    cosine = math.fsum(angles[rows, columns].tolist()) / len(rows)
    return count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0


def slerp_coefficients(gram: Tensor, t: float) -> tuple[float, float]:
    """Returns what spherical interpolation multiplies two vectors by.

        sin((1 - t) theta) / sin(theta),   sin(t theta) / sin(theta),   theta: the angle between them

    Nearly parallel or opposite vectors (|cos| > 0.9995, as in mergekit) and zero vectors are interpolated on the
    straight line, 1 - t and t.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.

    Args:
        gram: (2, 2) Gram matrix of the vectors themselves.
        t: 0 for the first, 1 for the second.
    """
    norms = gram.diagonal().double().sqrt()
    cosine = float(gram[0, 1] / (norms[0] * norms[1])) if bool((norms > 0).all()) else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def drop_and_rescale(delta: Tensor, kept: Tensor, density: float | Tensor) -> Tensor:
    """Keeps the entries of a mask and divides them by their density, which leaves the expectation as it was.

    Source: DARE, "Language Models are Super Mario", arXiv 2311.03099, section 3.
    """
    return (delta * kept).div_(density)


# ---------------------------------------------------------------------------- keyed random numbers


def stream(seed: int, model: str, tensor: str) -> int:
    """Returns the 64-bit seed of the random numbers of one tensor of one model."""
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def bound(density: float) -> int:
    """Returns below which of the numbers from -2^31 to 2^31 - 1 an entry is kept with probability `density`."""
    return round(density * 2**32) - 2**31


def keep_mask(seed: int, model: str, tensor: str, start: int, stop: int, density: float | Tensor) -> Tensor:
    """Decides for the elements [start, stop) of a tensor whether they are kept, each with probability `density`.

    The decision is a function of (seed, model, tensor, element) alone: it is the same in any order, on any number
    of threads and machines, and whichever other models or tensors are merged. The generator is SplitMix64 (Steele,
    Lea, Flood, OOPSLA 2014) used as a counter: elements 2j and 2j + 1 take the lower and the upper 32 bits of
    the (j + 1)-th number of the stream that the names seed. A probability is thereby a multiple of 2^-32.

    Returns:
        (stop - start,) bool.
    """
    key, first = stream(seed, model, tensor), start // 2
    # numpy: its 64-bit products are vectorised, torch's are not.
    bits = np.arange(1, (stop + 1) // 2 - first + 1, dtype=np.uint64) * GOLDEN
    bits += np.uint64((key + first * int(GOLDEN)) % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * MIX_2
    bits ^= bits >> np.uint64(31)
    halves = torch.from_numpy(bits.view(np.int32)[start - 2 * first : stop - 2 * first]).long()
    if isinstance(density, Tensor):  # one for each element
        return halves < (density * 2**32).round_().long() - 2**31
    return halves < bound(density)


# ---------------------------------------------------------------------------- rounding


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 to `dtype`, to nearest, ties to even, in a single rounding.

    torch converts float64 to bfloat16 and float16 by way of float32, which rounds twice: a value just beside the
    midpoint of two bfloat16 numbers can land on the midpoint and then go the wrong way. Here the step to float32
    rounds to odd (of the two float32 neighbours of an inexact value, the one whose last bit is set), which keeps the
    side the value lies on; the second rounding is then the only one.

    Source: Boldo, Melquiond, "When double rounding is odd", 2005.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    return _round_to_odd(values).to(dtype)


def _round_to_odd(values: Tensor) -> Tensor:
    """Returns the float32 neighbour of each float64 whose last bit is set, or the value itself where it is exact."""
    nearest = values.float()
    error = values - nearest.double()
    even = (nearest.view(torch.int32) & 1) == 0
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).float())
    return torch.where((error != 0) & even, other, nearest)
