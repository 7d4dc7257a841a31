"""Eigenvalues at both ends of a spectrum and its density, by Lanczos with full re-orthogonalisation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from galenic.flatten.products import Operator, probe_matrix, probe_seeds
from galenic.runtime import UserError

EXHAUSTED = 100
"""A new direction shorter than this many spacings of the longest product is rounding."""


@dataclass(frozen=True, kw_only=True)
class Tridiagonal:
    """What Lanczos makes of a matrix A: A Q = Q T + beta q e_m^T."""

    matrix: Tensor
    """(m, m) float64: T."""

    basis: Tensor
    """(size, m) float64: Q, orthonormal."""

    residual: float
    """beta; zero when the basis spans all that there is."""


def lanczos(
    operator: Operator,
    start: Tensor,
    steps: int,
    *,
    enough: Callable[[Tridiagonal], bool] = lambda found: False,
) -> Tridiagonal:
    """Runs Lanczos with full re-orthogonalisation, one product and one pass over the data a step.

    Where the Krylov space of the start is exhausted, it goes on from a vector across all earlier ones (T gets a zero
    beside its diagonal): repeated eigenvalues appear too, and size steps give the whole spectrum.

    Args:
        operator: a symmetric matrix.
        start: (size,) the first vector, of any length but zero.
        steps: most steps m; as many vectors are kept.
        enough: asked after every step whether to stop.

    Source: Lanczos 1950; re-orthogonalised twice, Parlett 1998, "The Symmetric Eigenvalue Problem", section 6.9.
    """
    steps = min(steps, operator.size)
    basis = torch.zeros(steps, operator.size, dtype=torch.float64, device=operator.device)
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    vector, scale = start.to(basis) / start.norm(), 0.0
    for step in range(steps):
        basis[step] = vector
        image = operator.product(vector[:, None])[:, 0]
        scale = max(scale, float(image.norm()))
        matrix[step, step] = vector @ image
        done = step + 1
        image = _across(basis[:done], image)
        beta = float(image.norm())
        if beta <= EXHAUSTED * operator.epsilon * scale:
            beta = 0.0
        found = Tridiagonal(matrix=matrix[:done, :done], basis=basis[:done].T, residual=beta)
        if done == steps or enough(found):
            return found
        if beta == 0.0:
            fresh = torch.randn(operator.size, generator=source, dtype=torch.float64).to(basis)
            image = _across(basis[:done], fresh)
        matrix[step, done] = matrix[done, step] = beta
        vector = image / image.norm()
    raise UserError(f"steps: {steps}; at least 1")


def _across(basis: Tensor, vector: Tensor) -> Tensor:
    """Takes from a vector what lies in the span of the orthonormal rows; twice, as rounding asks."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


@dataclass(frozen=True, kw_only=True)
class Eigenvalues:
    """Approximate eigenvalues, each with a bound on its distance to a true one."""

    largest: Tensor
    """(k,) float64, descending."""

    largest_bounds: Tensor
    """(k,): an eigenvalue lies within this distance of each."""

    smallest: Tensor
    """(k,) float64, ascending: the most negative first."""

    smallest_bounds: Tensor
    """(k,): as above."""


def extreme_eigenvalues(
    operator: Operator,
    count: int,
    *,
    generator: torch.Generator,
    steps: int = 100,
    tolerance: float = 1e-4,
) -> Eigenvalues:
    """Finds the `count` largest and the `count` smallest eigenvalues.

        |lambda - theta| <= beta |e_m^T y|    for T y = theta y,    some eigenvalue lambda of A

    The bounds include the rounding of products. A bound says how near an eigenvalue is, not that none was passed
    over: a repeated one is found once unless the steps exhaust what the start reaches.

    Args:
        operator: a symmetric matrix.
        count: eigenvalues at either end; fewer if the matrix is smaller.
        generator: source of the start; the same state gives the same.
        steps: most products to spend; as many (size,) float64 vectors are kept. When they run out, the bounds tell.
        tolerance: stops early once every bound is below this times the largest |theta|.

    Raises:
        UserError: a count below one, or above half the steps.

    Source: Parlett 1998, "The Symmetric Eigenvalue Problem", theorem 13.2.1.
    """
    if not 1 <= count <= steps / 2:
        raise UserError(f"count: {count} eigenvalues at either end of {steps} steps; 1 to half the steps")

    def ends(found: Tridiagonal) -> Eigenvalues:
        values, vectors = torch.linalg.eigh(found.matrix)
        bounds = found.residual * vectors[-1].abs() + 10 * operator.epsilon * values.abs().max()
        return Eigenvalues(
            largest=values.flip(0)[:count],
            largest_bounds=bounds.flip(0)[:count],
            smallest=values[:count],
            smallest_bounds=bounds[:count],
        )

    def enough(found: Tridiagonal) -> bool:
        if len(found.matrix) < 2 * count:
            return False
        sides = ends(found)
        limit = tolerance * max(sides.largest.abs().max(), sides.smallest.abs().max())
        return bool(max(sides.largest_bounds.max(), sides.smallest_bounds.max()) <= limit)

    start = probe_matrix(probe_seeds(1, generator), operator)[:, 0]
    return ends(lanczos(operator, start, steps, enough=enough))


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """An estimate of the distribution of eigenvalues, as point masses."""

    nodes: Tensor
    """(probes, steps) float64: places on the axis of eigenvalues."""

    weights: Tensor
    """(probes, steps) float64: the share of eigenvalues there; each row adds up to one."""

    def moments(self, power: int) -> Tensor:
        """Returns (probes,) unbiased estimates of tr(A^power) / size; exact given the probe for power < 2 steps."""
        return (self.weights * self.nodes**power).sum(1)

    def at(self, grid: Tensor, width: float) -> Tensor:
        """Returns the density on a (n,) grid, each mass spread as a Gaussian of standard deviation `width`."""
        distance = (grid.double()[:, None, None] - self.nodes) / width
        bells = torch.exp(-0.5 * distance**2) / (width * (2 * torch.pi) ** 0.5)
        return (self.weights * bells).sum(2).mean(1)


def spectral_density(
    operator: Operator, *, probes: int, steps: int, generator: torch.Generator
) -> SpectralDensity:
    """Estimates the spectral density by stochastic Lanczos quadrature.

        (1/n) tr f(A) = E[u^T f(A) u] ~ mean over probes of sum_j y_1j^2 f(theta_j),    T y_j = theta_j y_j

    with T from `steps` Lanczos steps that start at u, random signs at unit length. Exact for polynomials f of degree
    below 2 steps, given the probes.

    Args:
        operator: a symmetric matrix.
        probes: number of starts; each takes `steps` products one after the other.
        steps: Lanczos steps; the basis of (size, steps) float64 of one probe is kept at a time.
        generator: source of the probes; the same state gives the same.

    Raises:
        UserError: no probes or steps.

    Source: Golub, Welsch 1969; Ubaru, Chen, Saad 2017; for networks Ghorbani, Krishnan, Xiao 2019, arXiv 1901.10159.
    """
    if probes < 1 or steps < 1:
        raise UserError(f"probes: {probes}, steps: {steps}; at least 1 of each")
    nodes, weights = [], []
    for seed in probe_seeds(probes, generator):
        found = lanczos(operator, probe_matrix([seed], operator)[:, 0], steps)
        values, vectors = torch.linalg.eigh(found.matrix)
        nodes.append(values)
        weights.append(vectors[0] ** 2)
    return SpectralDensity(nodes=torch.stack(nodes), weights=torch.stack(weights))
