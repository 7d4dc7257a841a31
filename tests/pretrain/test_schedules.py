import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.pretrain.config import OptimConfig, PhaseConfig, PretrainConfig
from galenic.pretrain.schedules import (
    DECAYS,
    constant,
    cosine_decay,
    linear_decay,
    one_minus_sqrt_decay,
    rate,
    warmup,
    wsd,
)


def make(phases, schedule="wsd", lr=1.0, warmup_steps=0):
    found = [
        PhaseConfig(name=f"p{number}", tokens=8192, mixture={"a": 1.0}, **phase)
        for number, phase in enumerate(phases)
    ]
    optim = OptimConfig(lr=lr, warmup_steps=warmup_steps)
    return PretrainConfig(out="o", tokenizer="t", phases=found, schedule=schedule, optim=optim)


def rates(config, steps):
    return [[rate(config, steps, phase, step) for step in range(n)] for phase, n in enumerate(steps)]


def test_warmup_rises_in_a_line_to_the_peak():
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0) == 1.0


def test_the_ways_down_by_hand():
    report = {"start": 4e-4, "end": 2e-5}
    for decay in DECAYS.values():
        assert decay(0.0, **report) == pytest.approx(4e-4, rel=1e-15)
        assert decay(1.0, **report) == pytest.approx(2e-5, rel=1e-12)
    # A quarter of the way: cos(pi/4) = 0.7071..., sqrt(1/4) = 1/2, and 3/4 of the line are left.
    assert cosine_decay(0.25, start=1.0, end=0.0) == pytest.approx(0.8535533905932737, rel=1e-15)
    assert one_minus_sqrt_decay(0.25, start=1.0, end=0.0) == 0.5
    assert linear_decay(0.25, start=1.0, end=0.0) == 0.75
    assert cosine_decay(0.5, **report) == pytest.approx(2.1e-4)
    assert constant(0.7, **report) == 4e-4


@given(st.sampled_from(sorted(DECAYS)), st.floats(0, 1), st.floats(0, 1))
def test_a_decay_never_rises_and_stays_between_its_ends(name, one, other):
    low, high = sorted((one, other))
    values = [DECAYS[name](p, start=4e-4, end=2e-5) for p in (low, high)]
    assert values[0] >= values[1] - 1e-18
    assert all(2e-5 - 1e-18 <= value <= 4e-4 + 1e-18 for value in values)


def test_one_phase_decays_after_the_warmup_to_exactly_its_end():
    found = [wsd(step, 6, warm=2, start=1.0, end=0.2, decay="linear") for step in range(6)]
    assert found == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert found[-1] == 0.2
    assert wsd(5, 6, warm=2, start=1.0, end=None, decay="linear") == 1.0
    assert wsd(1, 2, warm=2, start=1.0, end=0.2, decay="cosine") == 1.0  # warm-up all along


def test_the_report_s_three_phases():
    config = make([{}, {}, {"final_lr": 2e-5}], lr=4e-4, warmup_steps=4)
    one, two, three = rates(config, [6, 3, 4])
    assert one == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])
    assert two == [4e-4] * 3
    half = math.sqrt(0.5)
    expected = [2e-5 + 3.8e-4 * 0.5 * (1 + c) for c in (half, 0.0, -half, -1.0)]
    assert three == pytest.approx(expected, rel=1e-12)
    assert three[-1] == 2e-5


def test_phases_have_rates_and_decays_of_their_own():
    config = make(
        [
            {"lr": 0.5},
            {"lr": 0.5, "final_lr": 0.1, "decay": "1-sqrt"},
            {"lr": 0.1, "final_lr": 0.05, "decay": "linear"},
            {},
        ],
        warmup_steps=2,
    )
    one, two, three, four = rates(config, [3, 4, 2, 2])
    assert one == [0.25, 0.5, 0.5]
    expected = [0.1 + 0.4 * (1 - math.sqrt(k / 4)) for k in (1, 2, 3, 4)]
    assert two == pytest.approx(expected)
    assert three == pytest.approx([0.075, 0.05])
    assert four == [1.0, 1.0]  # not given: optim.lr


def test_a_decay_waits_for_the_warmup_that_reaches_into_it():
    config = make([{}, {"final_lr": 0.5, "decay": "linear"}], warmup_steps=4)
    assert rates(config, [2, 6]) == [
        pytest.approx([0.25, 0.5]),
        pytest.approx([0.75, 1.0, 0.875, 0.75, 0.625, 0.5]),
    ]


def test_one_cosine_over_the_whole_run():
    config = make([{"lr": 9.0}, {"lr": 9.0, "final_lr": 0.1}], "cosine", warmup_steps=2)
    found = [value for phase in rates(config, [3, 3]) for value in phase]
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    assert found == pytest.approx([0.5, 1.0, *expected])
    assert found[-1] == 0.1


def test_constant_is_the_peak_throughout():
    config = make([{"lr": 9.0}, {"final_lr": 0.1}], "constant", warmup_steps=2)
    assert rates(config, [3, 2]) == [[0.5, 1.0, 1.0], [1.0, 1.0]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 60),
    st.sampled_from(["wsd", "cosine", "constant"]),
    st.sampled_from(["cosine", "linear"]),
)
def test_no_step_changes_the_rate_by_much(steps, warm, schedule, decay):
    """Phases that go on where the one before ended make one curve without jumps, if the first outlasts the warm-up."""
    warm %= steps[0]
    phases = [{"final_lr": 1.0 - 0.9 * (k + 1) / len(steps), "decay": decay} for k in range(len(steps))]
    for before, phase in pairwise(phases):
        phase["lr"] = before["final_lr"]
    config = make(phases, schedule, warmup_steps=warm)
    found = [value for phase in rates(config, steps) for value in phase]
    assert all(0 < value <= 1 for value in found)
    # The steepest of all: half a cosine falls by pi / 2 of its height over its length; a warm-up step by 1 / warm.
    firsts = [sum(steps[:k]) for k in range(len(steps))]
    lengths = [min(n, max(first + n - warm, 1)) for n, first in zip(steps, firsts, strict=True)]
    most = math.pi / 2 * 0.9 / (len(steps) * min(lengths)) if schedule == "wsd" else 0
    most = max(most, math.pi / 2 * 0.9 / max(sum(steps) - warm, 1), 1 / warm if warm else 0)
    jumps = [abs(b - a) for a, b in pairwise(found)]
    assert max(jumps, default=0) <= most + 1e-12
