"""When a run has gone astray it stops, and says what to do."""

import math

import pytest

from galenic.align.config import LimitsConfig
from galenic.align.health import watchdog
from galenic.runtime import UserError


def feed(check, name, values):
    for step, value in enumerate(values, start=1):
        check({"kind": "train", "step": step, name: value})


def test_without_limits_nothing_but_a_reward_that_is_no_number_stops():
    check = watchdog(LimitsConfig())
    feed(check, "kl", [1e9] * 30)
    feed(check, "reward_deviation", [0.0] * 30)
    feed(check, "reward", [0.0] * 30)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"step 7: the mean reward is (nan|inf).*last checkpoint is kept"):
            check({"kind": "train", "step": 7, "reward": bad})


@pytest.mark.parametrize(("runaway", "step"), [(0.8, 3), (math.nan, 1)])
def test_a_divergence_is_judged_by_its_mean_over_steps(runaway, step):
    check = watchdog(LimitsConfig(kl=0.5, steps=4))
    feed(check, "kl", [1.2, 0.1, 0.1, 0.1, 0.1, 0.1])  # one high step is no runaway
    with pytest.raises(
        UserError, match=rf"step {step}: .*limits.kl 0.5: lower optim.lr.*last checkpoint is kept"
    ):
        feed(check, "kl", [runaway] * 3)


def test_answers_that_no_longer_end_stop_the_run():
    check = watchdog(LimitsConfig(length=0.8, steps=2), longest=100)
    feed(check, "length", [70.0, 90.0, 70.0])
    with pytest.raises(
        UserError, match=r"95% of the most tokens .* limits.length 0.8: answers no longer end"
    ):
        feed(check, "length", [90.0, 100.0])
    feed(watchdog(LimitsConfig(length=0.8, steps=2)), "length", [1e6] * 5)  # nothing is sampled


def test_constant_rewards_stop_the_run_only_in_a_row():
    check = watchdog(LimitsConfig(constant=3))
    feed(check, "reward_deviation", [0.0, 0.0, 0.1, 0.0, 0.0])
    with pytest.raises(
        UserError, match=r"all rewards of 3 steps in a row are the same.*too easy or too hard"
    ):
        feed(check, "reward_deviation", [0.0])


def test_one_watchdog_knows_nothing_of_another():
    for _ in range(2):
        feed(watchdog(LimitsConfig(kl=0.5, steps=3)), "kl", [2.0, 2.0])


def test_limits_that_mean_nothing_are_refused():
    for wrong in ({"kl": 0.0}, {"length": -1.0}, {"steps": 0}, {"constant": -1}):
        with pytest.raises(UserError, match=f"limits.{next(iter(wrong))}"):
            LimitsConfig(**wrong)
