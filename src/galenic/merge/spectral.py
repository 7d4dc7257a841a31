"""Merging in the singular spaces of whole matrices: TSV-M, Iso-C and Iso-CTS. Pure functions, float64 in and out.

All three take T task matrices `tau_t` of one shape (m, n) and return the merged task matrix (m, n). They are defined
for the linear maps of a network; vectors, embeddings and heads are averaged instead, as in the papers' code.

A singular value below `NULL` times the largest has no direction of its own (experts from adapters, equal experts): its
component is left out wherever it would be made as long as the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NULL = 1e-9
"""Singular values below this share of the largest are rounding errors of float64 arithmetic on float32 weights."""


def tsv(deltas: Sequence[Tensor]) -> Tensor:
    """Merges by task singular vectors (TSV-M): each task's strongest directions, made orthogonal to the others'.

        tau_t ~ U_t S_t V_t^T with the first floor(min(m, n) / T) components of its SVD,
        U = [U_1 ... U_T],  V = [V_1 ... V_T],  S = diag(S_1 ... S_T),
        merged = U' S V'^T,  U' and V' the nearest matrices to U and V with orthonormal columns.

    With one task this is the task matrix. Where columns depend on each other, `nearest` is meant in the space they
    span, so that T equal experts give what one gives with its first components.

    Source: "Task Singular Vectors: Reducing Task Interference in Model Merging", arXiv 2412.00081, section 4 and
    Algorithm 1.
    """
    kept = min(deltas[0].shape) // len(deltas)
    parts = [_components(delta, kept) for delta in deltas]
    left, values, right = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return _orthogonal(left) * values @ _orthogonal(right).T


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """Merges with an isotropic spectrum (Iso-C): all directions of the summed task matrix get the same strength.

        sum_t tau_t = U S V^T,   merged = mean(S) U V^T,   mean over all min(m, n) singular values

    Source: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", arXiv 2502.04959,
    Algorithm 1.
    """
    total = sum(deltas[1:], deltas[0])
    left, values, right = _components(total, min(total.shape))
    return values.sum() / min(total.shape) * left @ right.T


def iso_cts(deltas: Sequence[Tensor], common_share: float) -> Tensor:
    """Merges with an isotropic spectrum in a common and in task-specific subspaces (Iso-CTS).

    The first k components U_c, S_c, V_c of `sum_t tau_t` are common. Of what each task has beyond them,

        tau_t - U_c U_c^T tau_t,

    the first s components are its own. With r = min(m, n): s = floor((1 - common_share) r / T) and k = r - T s. Then

        merged = mean(S) U' V'^T,   U' and V' nearest to [U_1 ... U_T U_c] and [V_1 ... V_T V_c] as in `tsv`,

    and the mean is over the r singular values of all of them.

    Source: as `iso_c`, Algorithm 2.

    Args:
        deltas: T task matrices.
        common_share: share of the directions that are common, in [0, 1]; the paper's is 0.8.
    """
    smaller = min(deltas[0].shape)
    own = int((1 - common_share) * smaller / len(deltas) + 1e-9)  # 0.2 * 10 / 2 is 1, not a little less
    common = _components(sum(deltas[1:], deltas[0]), smaller - own * len(deltas))
    beyond = [delta - common[0] @ (common[0].T @ delta) for delta in deltas]
    # What is left of a task that lies in the common space altogether is rounding error, whose size its own tells.
    parts = [
        _components(rest, own, float(torch.linalg.matrix_norm(delta, 2)))
        for rest, delta in zip(beyond, deltas, strict=True)
    ]
    left, values, right = (torch.cat(part, dim=-1) for part in zip(*parts, common, strict=True))
    return values.sum() / smaller * _orthogonal(left) @ _orthogonal(right).T


def _components(matrix: Tensor, count: int, scale: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U (m, c), S (c,), V (n, c) of the first `count` components, fewer where singular values are null."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    largest = max(float(values[0]) if len(values) else 0.0, scale)
    count = min(count, int((values > NULL * largest).sum()))
    return left[:, :count], values[:count], right[:count].T


def _orthogonal(columns: Tensor) -> Tensor:
    """Returns P Q^T of the SVD P D Q^T: the nearest matrix with orthonormal columns (Procrustes), (m, c).

    Directions the columns do not have (D null) are left out.
    """
    left, _, right = _components(columns, min(columns.shape))
    return left @ right.T
