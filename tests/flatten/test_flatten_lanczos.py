import pytest
import torch
from curvature_problems import Problem, operator_of, source
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.flatten.lanczos import extreme_eigenvalues, lanczos, spectral_density
from galenic.flatten.products import hessian, probe_matrix, probe_seeds
from galenic.runtime import UserError


def problem_operator(seed, **how):
    problem = Problem(seed, **how)
    return hessian(problem.loss_fn, problem.parameters, problem.batches), problem.dense_hessian()


def spectrum(values):
    """A symmetric matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    noise = torch.randn(len(values), len(values), dtype=torch.float64, generator=source())
    basis = torch.linalg.qr(noise).Q
    return (basis * values) @ basis.T


@pytest.mark.parametrize("seed", range(5))
def test_eigenvalues_at_both_ends_are_within_their_bounds(seed):
    operator, dense = problem_operator(seed)
    exact = torch.linalg.eigvalsh(dense)
    found = extreme_eigenvalues(operator, 3, generator=source(seed), tolerance=1e-5)
    assert ((found.largest - exact.flip(0)[:3]).abs() <= found.largest_bounds).all()
    assert ((found.smallest - exact[:3]).abs() <= found.smallest_bounds).all()
    assert max(found.largest_bounds.max(), found.smallest_bounds.max()) <= 1e-5 * exact.abs().max()


@given(steps=st.integers(2, 40), count=st.integers(1, 10), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_bounds_hold_before_convergence(steps, count, seed):
    """Some eigenvalue lies within the bound of each value, however few the steps."""
    count = min(count, steps // 2)
    exact = torch.randn(40, dtype=torch.float64, generator=source(seed)) ** 3
    found = extreme_eigenvalues(
        operator_of(spectrum(exact)), count, generator=source(seed), steps=steps, tolerance=0
    )
    for values, bounds in ((found.largest, found.largest_bounds), (found.smallest, found.smallest_bounds)):
        assert ((values[:, None] - exact).abs().amin(1) <= bounds).all()


def test_stops_once_it_knows():
    spent, matrix = [], spectrum([*torch.linspace(0, 1, 200).tolist(), 50.0, -20.0])
    operator = operator_of(matrix)
    counted = type(operator)(
        size=operator.size,
        device=operator.device,
        epsilon=operator.epsilon,
        product=lambda v: (spent.append(1), matrix @ v)[1],
    )
    found = extreme_eigenvalues(counted, 1, generator=source())
    assert len(spent) < 12
    torch.testing.assert_close(float(found.largest), 50.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(float(found.smallest), -20.0, rtol=1e-3, atol=0)


def test_full_steps_give_the_whole_spectrum_with_repeats():
    values = [5.0, 5, 5, 1, 1, 0, 0, 0, 0, -2]
    found = lanczos(operator_of(spectrum(values)), torch.ones(10), 10)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(found.matrix), torch.tensor(values, dtype=torch.float64).sort().values
    )
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(10, dtype=torch.float64))
    assert found.residual == 0


def test_the_basis_stays_orthonormal_where_plain_lanczos_loses_it():
    matrix = spectrum([*torch.linspace(0, 1, 99).tolist(), 1e6])
    found = lanczos(operator_of(matrix), torch.ones(100), 60)
    eye = torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(found.basis.T @ found.basis, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.basis.T @ matrix @ found.basis, found.matrix, rtol=0, atol=1e-8)


def test_a_zero_matrix_has_zero_eigenvalues():
    found = extreme_eigenvalues(operator_of(torch.zeros(6, 6, dtype=torch.float64)), 2, generator=source())
    assert found.largest.tolist() == [0, 0] and found.smallest_bounds.tolist() == [0, 0]


def test_float32_products_have_bounds_that_include_their_rounding():
    operator, _ = problem_operator(0, dtype=torch.float32)
    exact = torch.linalg.eigvalsh(Problem(0, dtype=torch.float32).dense_hessian().double())
    found = extreme_eigenvalues(operator, 2, generator=source())
    assert ((found.largest - exact.flip(0)[:2]).abs() <= found.largest_bounds).all()
    assert found.largest_bounds.min() > 1e-7 * exact.max()


# ---------------------------------------------------------------------------- density


def test_moments_are_exact_given_the_probe():
    """u^T A^p u for every p below twice the steps."""
    matrix = problem_operator(1)[1]
    found = spectral_density(operator_of(matrix), probes=4, steps=5, generator=source(2))
    starts = probe_matrix(probe_seeds(4, source(2)), operator_of(matrix)) / len(matrix) ** 0.5
    for power in range(10):
        exact = (starts * (torch.linalg.matrix_power(matrix, power) @ starts)).sum(0)
        torch.testing.assert_close(found.moments(power), exact, rtol=1e-9, atol=1e-13)


def test_moments_of_the_density_are_those_of_the_spectrum():
    operator, dense = problem_operator(2)
    values = torch.linalg.eigvalsh(dense)
    found = spectral_density(operator, probes=60, steps=12, generator=source())
    for power in range(1, 5):
        moments = found.moments(power)
        error = moments.std() / len(moments) ** 0.5
        assert abs(moments.mean() - (values**power).mean()) <= 3.5 * error


def test_the_density_integrates_to_one_and_finds_the_gap():
    matrix = spectrum([0.0] * 30 + [1.0] * 10)
    found = spectral_density(operator_of(matrix), probes=50, steps=6, generator=source())
    grid = torch.linspace(-1, 2, 3001, dtype=torch.float64)
    density = found.at(grid, 0.02)
    torch.testing.assert_close(float(torch.trapezoid(density, grid)), 1.0, rtol=1e-9, atol=0)
    upper = torch.trapezoid(density[grid > 0.5], grid[grid > 0.5])
    assert abs(upper - 0.25) < 0.03 and density[(grid > 0.2) & (grid < 0.8)].max() < 1e-9


def test_refusals():
    operator = operator_of(torch.eye(3))
    with pytest.raises(UserError, match="count: 60 eigenvalues at either end of 100 steps"):
        extreme_eigenvalues(operator, 60, generator=source())
    with pytest.raises(UserError, match="probes: 0, steps: 3"):
        spectral_density(operator, probes=0, steps=3, generator=source())
    with pytest.raises(UserError, match="steps: 0"):
        lanczos(operator, torch.ones(3), 0)
