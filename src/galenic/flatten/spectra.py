"""Which directions a layer's inputs span, and how strongly: eigenvalues and eigenvectors of their Gram matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Principal directions of a layer's inputs: C = vectors diag(values) vectors^T, for each group if there are groups.

    Leading dimension G or none; m = d, or fewer where the inputs are known to lie in m directions.
    """

    values: Tensor
    """(G, m) float64, ascending, not negative: the eigenvalues of C."""
    vectors: Tensor
    """(G, d, m) float64, as orthonormal columns."""
    spanned: Tensor
    """(G, m) bool: the inputs have a component along this direction, as far as rounding lets tell."""
    mean: Tensor | None = None
    """(G, d): the inputs' mean, where C is that of the inputs less their mean."""
    rows: int = 0
    """With `mean`: the number of rows."""

    @property
    def rank(self) -> int:
        """Number of directions the inputs span, over all groups.

        From a Gram matrix, eigenvalues carry a rounding error of about d eps lambda_max; below that a direction
        counts as not spanned. (In singular values of the inputs: below 1.5e-8 sqrt(d) sigma_max.)
        """
        return int(self.spanned.sum())

    @property
    def dimension(self) -> int:
        """Number of directions there are, over all groups."""
        return self.vectors.shape[:-1].numel()


def spectrum(gram: Tensor) -> Spectrum:
    """Decomposes a Gram matrix.

    Args:
        gram: (d, d) or (G, d, d), symmetric, positive semi-definite up to rounding.

    Raises:
        UserError: not a square matrix of finite numbers.
    """
    if gram.ndim not in (2, 3) or gram.shape[-2] != gram.shape[-1]:
        raise UserError(f"a Gram matrix is square; got shape {list(gram.shape)}")
    if not torch.isfinite(gram).all():
        raise UserError("the Gram matrix holds NaN or infinity: so do the layer's inputs")
    values, vectors = eigh(gram.double())
    values = values.clamp_min(0)
    return Spectrum(values=values, vectors=vectors, spanned=values > _floor(values, values[..., -1:]))


def centred_spectrum(gram: Tensor, sums: Tensor, rows: int) -> Spectrum:
    """Decomposes the Gram matrix of the inputs less their mean, `C - n m m^T`, m = sums / n.

    Args:
        gram: (d, d) or (G, d, d), of the inputs as they are.
        sums: (d,) or (G, d), the sum of all rows.
        rows: n.
    """
    mean = sums.double() / max(rows, 1)
    lifted = rows * mean.square().sum(-1, keepdim=True)
    centred = spectrum(gram.double() - rows * mean.unsqueeze(-1) * mean.unsqueeze(-2))
    # The difference keeps the rounding errors of the larger matrix.
    floor = _floor(centred.values, centred.values[..., -1:] + lifted)
    return Spectrum(
        values=centred.values,
        vectors=centred.vectors,
        spanned=centred.values > floor,
        mean=mean,
        rows=rows,
    )


def row_spectrum(matrix: Tensor, mean: Tensor | None = None, rows: int = 0) -> Spectrum:
    """Returns the spectrum of C = A^T A from A itself or from its triangular factor, without forming C.

    A thin QR of A^T (or of A, if that is tall) and a singular value decomposition of the small factor: exact for
    dependent rows, where the paper's `A^T (A A^T)^-1` and a plain QR fail.

    Args:
        matrix: (n, d) or (G, n, d).
        mean: (d,) or (G, d) that was taken off the rows.
        rows: with `mean`, their number.
    """
    wide = matrix.double()
    n, d = wide.shape[-2:]
    if n < d:
        basis, factor = torch.linalg.qr(wide.mT)  # A^T = Q R: columns of Q U span the rows
        left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        vectors = basis @ left
    else:
        _, singular, right = torch.linalg.svd(torch.linalg.qr(wide, mode="r").R, full_matrices=False)
        vectors = right.mT
    singular, vectors = singular.flip(-1), vectors.flip(-1)
    largest = singular.amax(-1, keepdim=True) if singular.shape[-1] else singular
    if mean is not None:  # the centred rows keep the rounding errors of the longer ones
        largest = (largest.square() + rows * mean.square().sum(-1, keepdim=True)).sqrt()
    spanned = singular > max(n, d) * torch.finfo(torch.float64).eps * largest
    return Spectrum(values=singular.square(), vectors=vectors, spanned=spanned, mean=mean, rows=rows)


def _floor(values: Tensor, largest: Tensor) -> Tensor:
    """Returns the size below which an eigenvalue of a Gram matrix is rounding."""
    return values.shape[-1] * torch.finfo(torch.float64).eps * largest


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposes positive semi-definite matrices, by another way if one fails: solvers do, on low rank above all.

    In turn: `eigh` where the matrix lies, `eigh` in main memory, and the singular value decomposition there (for
    positive semi-definite matrices the same, up to rounding).

    Args:
        matrix: (..., d, d) float64.

    Returns:
        Eigenvalues (..., d), ascending, and eigenvectors (..., d, d) as columns.

    Raises:
        RuntimeError: all of them fail; what the last one said.
    """

    def by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
        left, singular, _ = torch.linalg.svd(matrix)
        return singular.flip(-1), left.flip(-1)

    ways: list[tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]] = [
        (torch.linalg.eigh, matrix),
        (torch.linalg.eigh, matrix.cpu()),
        (by_svd, matrix.cpu()),
    ]
    said: Exception | None = None
    for decompose, where in ways:
        try:
            values, vectors = decompose(where)
        except (RuntimeError, MemoryError) as error:  # torch.linalg.LinAlgError, out of memory
            said = error
            continue
        if torch.isfinite(values).all() and torch.isfinite(vectors).all():
            return values.to(matrix.device), vectors.to(matrix.device)
        said = RuntimeError("the eigensolver returned NaN")
    raise RuntimeError(f"no eigensolver succeeded: {said}")
