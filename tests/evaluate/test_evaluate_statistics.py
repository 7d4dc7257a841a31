import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.evaluate.statistics import Z95, normalised_average, wilson


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
