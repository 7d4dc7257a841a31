import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.flatten import minimum_norm
from galenic.flatten.shifts import removed_share, ridge, shift_weight, solve_damping, spectrum
from galenic.runtime import UserError


def data(rows, width, outputs, rank=None, seed=0):
    """Inputs (rows, width) of a given rank and a weight, float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if rank is not None:
        inputs = inputs[:, :rank] @ torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(outputs, width, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 5), st.integers(0, 10**6))
def test_minimum_norm_is_the_least_squares_solution_of_least_norm(rows, width, outputs, seed):
    a, w = data(rows, width, outputs, seed=seed)
    shifted = minimum_norm(w, a.T @ a)
    expected = torch.linalg.lstsq(a, a @ w.T, driver="gelsd").solution.T
    torch.testing.assert_close(shifted, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(a @ shifted.T, a @ w.T, rtol=1e-7, atol=1e-7)
    assert shifted.norm() <= w.norm() * (1 + 1e-12)


def test_minimum_norm_is_the_papers_formula_for_independent_rows():
    a, w = data(5, 20, 3)
    paper = a.T @ torch.linalg.solve(a @ a.T, a @ w.T)
    torch.testing.assert_close(minimum_norm(w, a.T @ a), paper.T, rtol=1e-9, atol=1e-10)


def test_full_rank_is_a_noop_bit_for_bit():
    a, w = data(50, 8, 3)
    shift = shift_weight(w, spectrum(a.T @ a), output_budget=0.0)
    assert shift.noop and shift.rank == 8 and torch.equal(shift.weight, w) and shift.output_change == 0
    assert shift.norm_before == shift.norm_after


def test_rank_deficient_is_no_noop():
    a, w = data(50, 8, 3, rank=5)
    shift = shift_weight(w, spectrum(a.T @ a), output_budget=0.0)
    assert not shift.noop and shift.rank == 5 and shift.norm_after < shift.norm_before
    assert shift.output_change < 1e-7


def test_inputs_that_are_all_zero():
    shift = shift_weight(torch.ones(2, 3), spectrum(torch.zeros(3, 3)), output_budget=0.0)
    assert shift.rank == 0 and not shift.weight.any() and shift.output_change == 0
    assert not shift_weight(torch.ones(2, 3), spectrum(torch.zeros(3, 3)), output_budget=0.1).weight.any()


# ---------------------------------------------------------------------------- ridge


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(1, 10), st.floats(1e-6, 0.9), st.integers(0, 10**6), st.booleans())
def test_ridge_meets_its_budget_and_predicts_what_it_does(rows, width, budget, seed, anchored):
    a, w = data(rows, width, 4, seed=seed)
    base = data(rows, width, 4, seed=seed + 1)[1] if anchored else None
    shift = shift_weight(w, spectrum(a.T @ a), output_budget=budget, base=base)
    start = w if base is None else w - base
    measured = float((a @ (shift.weight - w).T).norm() / (a @ start.T).norm())
    assert measured == pytest.approx(shift.output_change, rel=1e-6, abs=1e-9)
    assert shift.output_change <= budget * (1 + 1e-12)
    end = shift.weight if base is None else shift.weight - base
    assert shift.norm_before == pytest.approx(float(start.norm()))
    assert float(end.norm()) == pytest.approx(shift.norm_after) and shift.norm_after <= shift.norm_before * (
        1 + 1e-12
    )
    assert shift.output_change == pytest.approx(budget, rel=1e-9)  # the whole budget is used


def test_ridge_is_optimal_among_feasible_weights():
    a, w = data(30, 6, 3)
    shifted = ridge(w, a.T @ a, 0.2)
    allowed = 0.2 * (a @ w.T).norm()
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = shifted + 0.05 * torch.randn(w.shape, generator=generator, dtype=torch.float64)
        if (a @ (other - w).T).norm() <= allowed:
            assert other.norm() > shifted.norm()
    tangent = (w - shifted) @ (a.T @ a) / shifted  # stationarity: (W - W') C is a multiple of W'
    torch.testing.assert_close(tangent, tangent.mean().expand_as(tangent), rtol=1e-6, atol=0)


def test_ridge_matches_its_closed_form():
    a, w = data(30, 6, 3)
    c = a.T @ a
    inputs = spectrum(c)
    power = (w @ inputs.vectors).square().sum(0)
    damping = solve_damping(inputs.values, power, 0.01 * float(inputs.values @ power))
    expected = w @ c @ torch.linalg.inv(c + damping * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(ridge(w, c, 0.1), expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=8), st.floats(1e-10, 0.999), st.integers(0, 10**6)
)
def test_damping_solves_the_secular_equation_to_the_last_bit(values, share, seed):
    values = torch.tensor(sorted(values), dtype=torch.float64)
    power = torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    allowed = share * float(values @ power)
    damping = solve_damping(values, power, allowed)

    def change(mu):
        return float(values @ ((mu / (values + mu)).square() * power))

    assert change(damping) <= allowed < change(math.nextafter(damping, math.inf)) * (1 + 1e-15)
    assert change(damping) == pytest.approx(allowed, rel=1e-9)


def test_a_budget_beyond_everything_removes_everything():
    inputs = spectrum(torch.eye(3))
    assert removed_share(inputs, torch.ones(3, dtype=torch.float64), 3.0).tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------- anchored


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 10), st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.5]))
def test_anchored_shift_never_lengthens_a_task_vector(rows, width, seed, budget):
    a, w = data(rows, width, 4, seed=seed)
    base = w + 0.1 * data(rows, width, 4, seed=seed + 1)[1]
    shift = shift_weight(w, spectrum(a.T @ a), output_budget=budget, base=base)
    assert (shift.weight - base).norm() <= (w - base).norm() * (1 + 1e-12)
    if budget == 0:
        torch.testing.assert_close(a @ shift.weight.T, a @ w.T, rtol=1e-7, atol=1e-7)
        null = torch.eye(width, dtype=torch.float64) - torch.linalg.pinv(a) @ a
        torch.testing.assert_close((shift.weight - base) @ null, torch.zeros_like(w), rtol=0, atol=1e-6)


def test_a_plain_shift_can_lengthen_a_task_vector():
    a, w = data(3, 10, 4)
    base = w + 0.01 * data(3, 10, 4, seed=1)[1]
    assert (minimum_norm(w, a.T @ a) - base).norm() > (w - base).norm()


# ---------------------------------------------------------------------------- types and refusals


def test_low_precision_weights_are_rounded_once_and_tiny_shifts_are_noops():
    a, w = data(50, 8, 3)
    low = w.to(torch.bfloat16)
    expected = shift_weight(low.double(), spectrum(a.T @ a), output_budget=0.1).weight.to(torch.bfloat16)
    assert torch.equal(shift_weight(low, spectrum(a.T @ a), output_budget=0.1).weight, expected)
    assert shift_weight(low, spectrum(a.T @ a), output_budget=1e-7).noop


@pytest.mark.parametrize(
    ("weight", "gram", "budget", "base", "message"),
    [
        (torch.ones(2, 3), torch.eye(4), 0.1, None, "does not take 4 inputs"),
        (torch.ones(2, 3), torch.ones(3, 4), 0.1, None, "square"),
        (torch.ones(2, 3), torch.full((3, 3), math.nan), 0.1, None, "NaN"),
        (torch.ones(2, 3), torch.eye(3), 1.0, None, "budget"),
        (torch.ones(2, 3), torch.eye(3), -0.1, None, "budget"),
        (torch.ones(2, 3), torch.eye(3), 0.1, torch.ones(3, 2), "base's weight"),
    ],
)
def test_refusals(weight, gram, budget, base, message):
    with pytest.raises(UserError, match=message):
        shift_weight(weight, spectrum(gram), output_budget=budget, base=base)
