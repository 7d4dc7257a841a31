import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.evaluate.statistics import (
    Z95,
    Estimate,
    calibration_error,
    holm,
    mcnemar,
    mean_interval,
    normalised_average,
    paired_bootstrap,
    resampled_means,
    sign_flip,
    summary,
    wilson,
)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_ends_are_the_proportions_the_normal_test_just_accepts(n, share):
    successes = round(share * n)
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            # (share - p)^2 = z^2 p (1 - p) / n, exactly, in rationals
            p, z = Fraction(end), Fraction(Z95)
            left, right = (Fraction(successes, n) - p) ** 2, z * z * p * (1 - p) / n
            assert math.isclose(float(left), float(right), rel_tol=1e-6, abs_tol=1e-15)


def test_wilson_known_values():
    # Newcombe 1998, Statistics in Medicine 17, Table I, method 3: 81/263, 15/148, 0/20, 1/29
    for (successes, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)
    assert wilson(29, 29)[1] == 1.0
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_normalised_average_reproduces_the_papers_column():
    names = ["winogrande", "agieval", "gsm8k", "math", "mbpp", "humaneval"]
    experts = dict(zip(names, [62.67, 34.01, 47.16, 2.40, 24.80, 21.92], strict=True))
    metagpt = dict(zip(names, [64.25, 32.71, 45.41, 7.80, 21.20, 17.68], strict=True))
    average = dict(zip(names, [63.93, 31.36, 37.68, 7.00, 23.40, 20.12], strict=True))
    assert normalised_average(metagpt, experts) == pytest.approx(1.31, abs=0.01)
    assert normalised_average(average, experts) == pytest.approx(1.25, abs=0.01)
    assert normalised_average(experts, experts) == 1.0
    assert normalised_average({"a": 1.0}, {}) is None
    assert normalised_average({"a": 1.0}, {"a": 0.0}) is None


# ---------------------------------------------------------------------------- graded scores


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 400), share=st.floats(0, 1))
def test_the_interval_of_a_mean_is_wilsons_for_scores_of_0_and_1(n, share):
    right = round(share * n)
    assert mean_interval([1.0] * right + [0.0] * (n - right)) == pytest.approx(wilson(right, n), rel=1e-9)


def test_the_interval_of_graded_scores():
    # 10 scores of 0.4 and 10 of 0.6: variance 0.01, so worth 20 x 0.25 / 0.01 = 500 answers of which 250 are right
    assert mean_interval([0.4, 0.6] * 10) == pytest.approx(wilson(250, 500))
    assert mean_interval([0.25] * 8) == pytest.approx(
        wilson(2, 8)
    )  # no spread seen: the largest possible one
    assert summary([0.5, 1.0])["value"] == 0.75 and summary([0.5, 1.0])["n"] == 2
    assert summary([]) == {"value": None, "low": None, "high": None, "n": 0}
    for bad in ([], [1.5], [math.nan], [-0.1]):
        with pytest.raises(ValueError, match="at least one score"):
            mean_interval(bad)


def test_the_interval_of_graded_scores_holds_the_mean_95_times_in_100():
    random = np.random.Generator(np.random.Philox(key=7))
    for draw, mean in (
        (lambda: random.beta(0.5, 2, 40), 0.2),
        (lambda: random.choice([0, 0.5, 1], 40, p=[0.2, 0.3, 0.5]), 0.65),
    ):
        hits = [low <= mean <= high for low, high in (mean_interval(draw()) for _ in range(2000))]
        assert 0.93 < np.mean(hits) < 0.97


# ---------------------------------------------------------------------------- two models


def test_mcnemar_known_values():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 7) == mcnemar(7, 1) == 2 * (1 + 8) / 256
    # Agresti, Categorical Data Analysis, table of prime minister ratings: 150 and 86 changed their minds
    assert mcnemar(86, 150) == pytest.approx(3.7e-5, rel=0.02)
    with pytest.raises(ValueError, match="0 or more"):
        mcnemar(-1, 2)


@settings(deadline=None, max_examples=25)
@given(only_a=st.integers(0, 7), only_b=st.integers(0, 6))
def test_mcnemar_counts_all_outcomes_at_least_as_uneven(only_a, only_b):
    n = only_a + only_b
    uneven = [
        abs(2 * sum(coins) - n) >= abs(only_a - only_b) for coins in itertools.product((0, 1), repeat=n)
    ]
    assert mcnemar(only_a, only_b) == sum(uneven) / 2**n


def test_sign_flips_agree_with_mcnemar_and_with_enumeration():
    a, b = [1] * 3 + [0] * 9 + [1] * 5, [0] * 3 + [1] * 9 + [1] * 5
    assert sign_flip(a, b) == pytest.approx(mcnemar(3, 9), abs=0.015)
    x, y = np.array([0.1, 0.9, 0.3, 0.6, 0.2, 0.5]), np.array([0.4, 0.8, 0.9, 0.7, 0.8, 0.5])
    sums = [
        sum(s * d for s, d in zip(signs, y - x, strict=True))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    exact = np.mean(np.abs(sums) >= abs((y - x).sum()) - 1e-9)
    assert sign_flip(x, y) == pytest.approx(exact, abs=0.015)
    assert sign_flip([0.5, 1], [0.5, 1]) == 1.0


def test_the_bootstrap_is_the_enumerated_one():
    difference = np.array([0.0, 0.1, 0.5, -0.2, 0.3])
    means = [np.mean(drawn) for drawn in itertools.product(difference, repeat=5)]
    found = paired_bootstrap(np.zeros(5), difference, resamples=100_000)
    assert found.value == pytest.approx(0.14)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.011)
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == Estimate(0.0, 0.0, 0.0)
    assert paired_bootstrap([0, 0], [1, 1]) == Estimate(1.0, 1.0, 1.0)


@pytest.mark.parametrize("items", [30, 100])  # few different rows, and many
def test_both_ways_to_draw_have_the_moments_of_the_bootstrap(items):
    random = np.random.Generator(np.random.Philox(key=1))
    columns = random.random((items, 2))
    columns[:, 1] = 1 - columns[:, 0]
    drawn = resampled_means(columns, resamples=4000, seed=3)
    assert drawn.sum(axis=1) == pytest.approx(np.ones(4000))  # one draw for all columns
    assert drawn[:, 0].mean() == pytest.approx(columns[:, 0].mean(), abs=0.005)
    assert drawn[:, 0].std() == pytest.approx(columns[:, 0].std() / math.sqrt(items), rel=0.05)
    assert (resampled_means(columns[::-1], resamples=4000, seed=3) == drawn).all()
    assert (resampled_means(columns, resamples=4000, seed=4) != drawn).any()


def test_the_paired_interval_holds_the_difference_95_times_in_100():
    random = np.random.Generator(np.random.Philox(key=2))
    hits = []
    for _ in range(400):
        know = random.random(120)
        a, b = know < 0.5, (know < 0.45) | (random.random(120) < 0.2)
        found = paired_bootstrap(a, b, resamples=1000)
        hits.append(found.low <= 0.45 + 0.55 * 0.2 - 0.5 <= found.high)
    assert 0.92 < np.mean(hits) < 0.97


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_helps(p):
    adjusted = holm({str(i): value for i, value in enumerate(p)})
    assert list(adjusted) == [str(i) for i in range(len(p))]
    assert all(value <= adjusted[str(i)] <= 1 for i, value in enumerate(p))
    order = sorted(range(len(p)), key=lambda i: p[i])
    assert all(adjusted[str(i)] <= adjusted[str(j)] for i, j in itertools.pairwise(order))
    # the textbook's procedure: reject the smallest while p (m - i) <= level, then stop
    rejected = list(
        itertools.takewhile(lambda place: p[order[place]] * (len(p) - place) <= 0.05, range(len(p)))
    )
    assert [adjusted[str(i)] <= 0.05 for i in order] == [place in rejected for place in range(len(p))]


# ---------------------------------------------------------------------------- calibration


def test_calibration_error_by_hand():
    confidence, right = [0.95, 0.91, 0.55, 0.55, 0.2], [1, 0, 1, 1, 0]
    found = calibration_error(confidence, right, bins=10)
    assert found.error.value == pytest.approx((2 * abs(0.5 - 0.93) + 2 * abs(1 - 0.55) + 0.2) / 5)
    assert [row["n"] for row in found.bins] == [1, 2, 2]
    assert found.bins[1] == pytest.approx({"confidence": 0.55, "accuracy": 1.0, "n": 2})
    by_mass = calibration_error(confidence, right, bins=2, by="mass")
    assert [row["n"] for row in by_mass.bins] == [3, 2]  # equal confidences stay together
    assert by_mass.error.value == pytest.approx((abs(2 - 1.3) + abs(1 - 1.86)) / 5)


def test_calibration_bins_hold_their_upper_edge():
    assert [row["n"] for row in calibration_error([0.0, 0.1, 0.1001, 1.0], [0, 0, 0, 1]).bins] == [2, 1, 1]


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40),
    st.sampled_from(["width", "mass"]),
)
def test_calibration_error_properties(answers, by):
    confidence, right = [p for p, _ in answers], [float(hit) for _, hit in answers]
    found = calibration_error(confidence, right, by=by, bins=5, resamples=50)
    error = found.error
    assert 0 <= error.low <= error.value <= error.high <= 1
    assert sum(row["n"] for row in found.bins) == len(answers)
    assert error.value == pytest.approx(
        sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in found.bins) / len(answers)
    )
    assert error.value >= abs(np.mean(right) - np.mean(confidence)) - 1e-9  # bins cannot hide the whole
    again = calibration_error(confidence[::-1], right[::-1], by=by, bins=5, resamples=50)
    assert (again.error.value, again.error.low) == pytest.approx((error.value, error.low))


def test_calibration_intervals_hold_the_error():
    random = np.random.Generator(np.random.Philox(key=5))
    for over, least in ((0.0, 0.92), (0.2, 0.82)):
        hits, chance = [], []
        for _ in range(80):
            p = random.uniform(0.25, 1, 200)
            found = calibration_error(p, random.random(200) < p - over, resamples=200)
            hits.append(found.error.low <= over <= found.error.high)
            chance.append(found.by_chance)
        assert np.mean(hits) >= least
        assert np.mean(chance) > 0.04  # what 200 answers show of a perfectly calibrated model
