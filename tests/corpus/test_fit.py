import itertools
import math

import numpy as np
import pytest

from galenic.corpus.mixtures.fit import (
    RIDGES,
    Laws,
    agreement,
    cross_predict,
    fit,
    fit_law,
    minimise,
    paired_interval,
    project,
    ridge_fits,
    student_t,
    wild_losses,
)


def mixtures(n, d, seed=0, concentration=1.0):
    return np.random.default_rng(seed).dirichlet(np.full(d, concentration), n)


def exponential_losses(shares, noise=0.0, seed=1):
    """Three domains, each helped most by its own part and a little by the next."""
    slopes = np.array([[-2.5, -0.6, 0.3], [0.2, -3.0, -0.4], [0.0, 0.1, -1.8]])
    losses = np.array([1.5, 2.0, 1.0]) + np.exp(np.array([0.3, 0.5, 0.2]) + shares @ slopes.T)
    return losses + noise * np.random.default_rng(seed).standard_normal(losses.shape)


def test_closed_form_leave_one_out_is_that_of_refitting_without_each():
    generator = np.random.default_rng(0)
    features, target, weights = (
        generator.normal(size=(12, 3)),
        generator.normal(size=12),
        generator.random(12),
    )
    coefficients, left_out = ridge_fits(features, target, weights, (0.01, 1.0))
    total = weights.sum()
    for k, ridge in enumerate((0.01, 1.0)):
        for i in range(12):
            keep = np.arange(12) != i
            design = np.column_stack([np.ones(11), features[keep]])
            w = np.diag(weights[keep] / total)
            penalty = ridge * np.diag([0.0, 1, 1, 1])
            solved = np.linalg.solve(design.T @ w @ design + penalty, design.T @ w @ target[keep])
            assert left_out[k, i] == pytest.approx(solved[0] + features[i] @ solved[1:], abs=1e-8)
        w, design = np.diag(weights / total), np.column_stack([np.ones(12), features])
        slope = design.T @ w @ (target - design @ coefficients[k])
        assert slope == pytest.approx([0.0, *(ridge * coefficients[k, 1:])], abs=1e-9)


def test_the_exponential_law_is_found_again_on_mixtures_it_never_saw():
    shares = mixtures(40, 3)
    laws, left_out = fit(shares, exponential_losses(shares))
    assert laws.exponential.all()
    new = mixtures(200, 3, seed=9)
    assert laws.predict(new) == pytest.approx(exponential_losses(new), abs=0.02)
    scores = agreement(left_out[:, 0], exponential_losses(shares)[:, 0])
    assert scores["r2"] > 0.999 and scores["spearman"] > 0.99


def test_the_quadratic_law_is_chosen_and_found_where_it_holds():
    shares = mixtures(40, 3)

    def truth(shares):
        return (3 + shares @ [1.0, -1.0, 0.0] + shares**2 @ [0.0, 2.5, -2.0])[:, None]

    laws, _ = fit(shares, truth(shares))
    assert not laws.exponential.any()
    new = mixtures(100, 3, seed=4)
    assert laws.predict(new) == pytest.approx(truth(new), abs=1e-3)


def test_the_gradient_is_that_of_finite_differences():
    shares = mixtures(30, 3)
    losses = exponential_losses(shares)
    for law in ("exponential", "quadratic"):
        laws, _ = fit(shares, losses, laws=(law,))
        point, targets = np.array([0.2, 0.5, 0.3]), np.array([0.5, 0.1, 0.4])
        numeric = [
            ((laws.predict((point + step)[None]) - laws.predict((point - step)[None])) @ targets)[0] / 2e-6
            for step in np.eye(3) * 1e-6
        ]
        assert laws.gradient(point, targets) == pytest.approx(numeric, abs=1e-6)


def test_pure_noise_is_predicted_no_better_than_by_its_mean():
    shares = mixtures(24, 6)
    losses = np.random.default_rng(2).normal(3.0, 0.1, (24, 1))
    scores = agreement(cross_predict(shares, losses)[:, 0], losses[:, 0])
    assert scores["r2"] < 0.2  # fits and choices within the same runs would tell another story


def test_losses_that_do_not_change_are_constant():
    shares = mixtures(8, 3)
    for law in ("exponential", "quadratic"):
        for fields, left_out in fit_law(shares, np.full(8, 2.0), law):
            still = Laws(**{name: np.array([value]) for name, value in fields.items()})
            assert still.predict(mixtures(9, 3, seed=2)) == pytest.approx(2.0, abs=1e-6)
            assert left_out == pytest.approx(2.0, abs=1e-6)


def test_its_own_part_is_penalised_less():
    shares = mixtures(12, 6)
    losses = 2 - shares[:, 2] + 0.01 * np.random.default_rng(0).standard_normal(12)
    free, bound = fit_law(shares, losses, "quadratic", own=2), fit_law(shares, losses, "quadratic")
    k = RIDGES.index(1.0)

    def slope(fields):  # of the loss in the share, at a sixth
        return fields["linear"][2] + fields["square"][2] / 3

    assert abs(slope(free[k][0]) + 1) < abs(slope(bound[k][0]) + 1) / 2


def test_one_law_and_one_ridge_serve_all_domains():
    shares = mixtures(30, 3)
    laws, left_out = fit(shares, exponential_losses(shares, noise=0.05))
    tried = [[fit_law(shares, exponential_losses(shares, noise=0.05)[:, i], "exponential") for i in range(3)]]
    assert laws.exponential.all() and any(
        all((tried[0][i][k][1] == left_out[:, i]).all() for i in range(3)) for k in range(len(RIDGES))
    )


def test_agreement_against_enumeration():
    scores = agreement(np.array([1.0, 2.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0, 5.0]))
    assert scores["rmse"] == pytest.approx(math.sqrt(2 / 4))
    assert scores["r2"] == pytest.approx(1 - 2 / (4 * np.var([1, 3, 2, 5])))
    ranks = np.corrcoef([0, 1.5, 1.5, 3], [0, 2, 1, 3])[0, 1]
    assert scores["spearman"] == pytest.approx(ranks)


def test_projection_is_the_nearest_point_within_bounds():
    generator = np.random.default_rng(7)
    low, high = np.array([0.0, 0.05, 0.0, 0.0]), np.array([0.5, 0.6, 0.2, 1.0])
    grid = [
        np.array([*three, 1 - sum(three)])
        for three in itertools.product(np.linspace(0, 1, 41), repeat=3)
        if -1e-9 <= 1 - sum(three)
    ]
    grid = np.array([point for point in grid if (point >= low - 1e-9).all() and (point <= high + 1e-9).all()])
    for _ in range(20):
        point = generator.normal(0.25, 0.6, 4)
        found = project(point, low, high)
        assert found.sum() == pytest.approx(1.0, abs=1e-12)
        assert (found >= low).all() and (found <= high).all()
        assert np.linalg.norm(found - point) <= np.linalg.norm(grid - point, axis=1).min() + 1e-12


def test_the_minimum_is_that_of_a_fine_grid_and_respects_its_bounds():
    shares = mixtures(60, 3)
    laws, _ = fit(shares, exponential_losses(shares))
    targets = np.array([0.6, 0.3, 0.1])
    grid = np.array(
        [(a, b, 1 - a - b) for a in np.arange(0, 1.001, 0.01) for b in np.arange(0, 1.001 - a, 0.01)]
    )
    grid = np.clip(grid, 0, 1)
    for high in (np.ones(3), np.array([0.3, 0.5, 1.0])):
        inside = grid[(grid <= high + 1e-9).all(axis=1)]
        found = minimise(laws, targets, np.zeros(3), high, shares)
        assert (found <= high).all() and found.sum() == pytest.approx(1.0)
        assert (laws.predict(found[None]) @ targets)[0] <= (laws.predict(inside) @ targets).min() + 1e-6


def test_wild_losses_keep_the_sizes_of_errors_and_move_whole_runs():
    fitted = np.arange(12.0).reshape(6, 2)
    errors = np.random.default_rng(0).normal(size=(6, 2))
    drawn = wild_losses(fitted, errors, np.random.default_rng(1)) - fitted
    assert np.abs(drawn) == pytest.approx(np.abs(errors))
    signs = np.sign(drawn / errors)
    assert (signs[:, 0] == signs[:, 1]).all() and len(set(signs[:, 0])) == 2


@pytest.mark.slow
def test_the_bootstrap_covers_the_true_gain_about_as_often_as_it_says():
    targets, prior, other = np.full(3, 1 / 3), np.array([0.7, 0.2, 0.1]), np.full(3, 1 / 3)
    gains = exponential_losses(np.array([prior, other])) @ targets
    inside = 0
    for trial in range(40):
        shares = mixtures(24, 3, seed=trial)
        losses = exponential_losses(shares, noise=0.03, seed=100 + trial)
        laws, left_out = fit(shares, losses)
        generator = np.random.default_rng(trial)
        drawn = []
        for _ in range(60):
            again, _ = fit(shares, wild_losses(laws.predict(shares), losses - left_out, generator))
            values = again.predict(np.array([prior, other])) @ targets
            drawn.append(values[0] - values[1])
        low, high = np.quantile(drawn, [0.025, 0.975])
        inside += low <= gains[0] - gains[1] <= high
    assert inside >= 33  # 38 expected at 95%; fewer than 33 has probability 0.004


@pytest.mark.parametrize(
    ("df", "value"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (200, 1.9719)]
)
def test_students_t_is_the_printed_table(df, value):
    assert student_t(df) == pytest.approx(value, abs=1e-4)


def test_the_paired_interval_by_hand():
    mean, low, high = paired_interval(np.array([0.1, 0.2, 0.3]))
    assert (mean, high - mean) == (pytest.approx(0.2), pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5))
    assert low == pytest.approx(2 * mean - high)
