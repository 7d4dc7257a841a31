"""The merging methods on one block of one tensor: pure functions, float64 in and out.

Shapes: `origin` (n,) is a block of the base, `experts` and `deltas` T blocks of the experts and of their task vectors.
Sums run over the experts in their given order. `round_once` is the only rounding to the output type.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def weighted_sum(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns `sum_t w_t x_t` in float64.

    With weights that sum to 1 and experts as blocks: the weight average (Model Soups, arXiv 2203.05482), and
    MetaGPT, whose base cancels.
    """
    result = torch.zeros(blocks[0].shape, dtype=torch.float64)
    for block, weight in zip(blocks, weights, strict=True):
        result += weight * block.double()
    return result


def task_arithmetic(origin: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns `theta_0 + sum_t lambda_t tau_t`. Source: Ilharco et al., arXiv 2212.04089, section 2."""
    return origin.double() + weighted_sum(deltas, weights)


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Zeroes the entries whose float32 magnitude is below `threshold`; ties are kept.

    Source: TIES-Merging, arXiv 2306.01708, Algorithm 1, step 1: each task vector keeps its top entries over the
    whole model, so the threshold is the model's, not the tensor's.
    """
    return delta.where(delta.float().abs() >= threshold, 0.0)


def ties(origin: Tensor, trimmed: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elects a sign per entry and averages the trimmed task vectors that agree with it, added with lambda = 1.

        gamma = sgn(sum_t w_t tau_t),   tau = sum_{t: sgn(tau_t) = gamma} w_t tau_t / sum_{t: ...} w_t

    Where trimmed entries are all zero or cancel exactly, nothing is elected and the base stays. The paper's weights
    are all 1.

    Source: TIES-Merging, arXiv 2306.01708, Algorithm 1, steps 2 and 3.
    """
    elected = torch.sign(weighted_sum(trimmed, weights))
    agrees = [((torch.sign(delta) == elected) & (elected != 0)).double() for delta in trimmed]
    share = weighted_sum(agrees, weights)
    mean = weighted_sum([d * a for d, a in zip(trimmed, agrees, strict=True)], weights)
    return origin.double() + torch.where(share > 0, mean / share.where(share > 0, 1.0), 0.0)


def drop_and_rescale(delta: Tensor, kept: Tensor, density: float) -> Tensor:
    """Keeps the entries of a mask and divides them by the density, which leaves the expectation as it was.

    Source: DARE, "Language Models are Super Mario", arXiv 2311.03099, section 3.
    """
    return delta * kept / density


# ---------------------------------------------------------------------------- keyed random numbers


def keep_mask(seed: int, model: str, tensor: str, start: int, stop: int, density: float) -> Tensor:
    """Decides for the elements [start, stop) of a tensor whether they are kept, each with probability `density`.

    The decision is a function of (seed, model, tensor, element) alone: it is the same in any order, on any number
    of threads and machines, and whichever other models or tensors are merged. The generator is SplitMix64 (Steele,
    Lea, Flood, OOPSLA 2014) used as a counter: element i takes the (i + 1)-th number of the stream that the
    names seed.

    Returns:
        (stop - start,) bool.
    """
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    index = np.arange(start + 1, stop + 1, dtype=np.uint64)
    bits = index * np.uint64(0x9E3779B97F4A7C15) + key
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = bits ^ (bits >> np.uint64(31))
    return torch.from_numpy((bits >> np.uint64(11)) < np.uint64(round(density * 2**53)))


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
    nearest = values.float()
    error = values - nearest.double()
    even = (nearest.view(torch.int32) & 1) == 0
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).float())
    return torch.where((error != 0) & even, other, nearest).to(dtype)
