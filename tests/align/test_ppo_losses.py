"""PPO's mathematics: tables worked by hand, and expectations over all answers of a toy language."""

import math
from itertools import product

import pytest
import torch
from ppo_helpers import make_answer

from galenic.align.config import PpoConfig, SamplingConfig
from galenic.align.ppo import ppo_loss
from galenic.align.rollouts.advantages import adapted_kl, gae, whiten
from galenic.align.rollouts.experience import COLUMNS, TOLD, collate_answers, experience
from galenic.runtime import UserError


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def make_config(**changes):
    values = {"out": "o", "model": "m", "tasks": "t", "whiten_rewards": False}
    return PpoConfig(**{**values, **changes})


# gamma 0.9, lambda 0.5; an answer of three tokens and one of two.
#   errors      0 + 0.9 x 0.4 - 0.5 = -0.14     0 + 0.9 x 0.6 - 0.4 = 0.14      1 - 0.6 = 0.4
#   advantages  -0.14 + 0.45 x 0.32 = 0.004     0.14 + 0.45 x 0.4 = 0.32        0.4
#   errors      -0.1 + 0.9 x 1 - 0.2 = 0.6      2 - 1 = 1
#   advantages  0.6 + 0.45 = 1.05               1
REWARDS, VALUES = [[0, 0, 1.0], [-0.1, 2, 0]], [[0.5, 0.4, 0.6], [0.2, 1, 7]]
ADVANTAGES = [[0.004, 0.32, 0.4], [1.05, 1, 0]]
ANSWERS = torch.tensor([[True, True, True], [True, True, False]])


def test_advantages_equal_a_table_worked_by_hand():
    found = gae(exact(REWARDS), exact(VALUES), ANSWERS, discount=0.9, lam=0.5)
    torch.testing.assert_close(found, exact(ADVANTAGES))


def test_advantages_do_not_depend_on_where_an_answer_stands():
    moved = [torch.nn.functional.pad(x, (2, 3), value=0) for x in (exact(REWARDS), exact(VALUES), ANSWERS)]
    moved[1][:, :2] = 9  # of a prompt
    found = gae(*moved, discount=0.9, lam=0.5)
    torch.testing.assert_close(found[:, 2:5], exact(ADVANTAGES))
    assert not found[:, :2].any() and not found[:, 5:].any()


#   rho   A     loss of the policy              clipped
#   1.5   1     -min(1.5, 1.2)      = -1.2      yes
#   1.5  -1     -min(-1.5, -1.2)    =  1.5      no: what got likelier and is bad is pushed back
#   0.5   1     -min(0.5, 0.8)      = -0.5      no
#   0.5  -1     -min(-0.5, -0.8)    =  0.8      yes
#   1     2     -2                              no
RATIOS, SIGNS = [1.5, 1.5, 0.5, 0.5, 1.0], [1.0, -1.0, 1.0, -1.0, 2.0]
POLICY_LOSSES, CLIPPED = [-1.2, 1.5, -0.5, 0.8, -2.0], [True, False, False, True, False]
#   V_old  V    R      near (v 0.2)   loss of the values
#   0      1    2      0.2            max(1, 3.24) / 2     = 1.62
#   0      1    0.5    0.2            max(0.25, 0.09) / 2  = 0.125
#   1      1.1  2      1.1            0.81 / 2             = 0.405
#   1      0   -1      0.8            max(1, 3.24) / 2     = 1.62
#   0      0    0      0              0
OLD_VALUES, NEW_VALUES, RETURNS = [0, 0, 1, 1, 0.0], [1, 1, 1.1, 0, 0.0], [2, 0.5, 2, -1, 0.0]
VALUE_LOSSES = [1.62, 0.125, 0.405, 1.62, 0]


def losses_of(ratios, signs, values):
    old = exact([-1.0, -2, -3, -0.5, -4])
    return ppo_loss(
        old + exact(ratios).log() if isinstance(ratios, list) else old + ratios,
        old,
        exact(signs),
        values,
        exact(OLD_VALUES),
        exact(RETURNS),
        clip=0.2,
        value_clip=0.2,
    )


def test_losses_equal_a_table_worked_by_hand():
    policy, value, clipped = losses_of(RATIOS, SIGNS, exact(NEW_VALUES))
    torch.testing.assert_close(policy, exact(POLICY_LOSSES))
    torch.testing.assert_close(value, exact(VALUE_LOSSES))
    assert clipped.tolist() == CLIPPED


def test_what_is_clipped_has_no_gradient_and_the_rest_has_its_own():
    log_ratios, values = exact(RATIOS).log().requires_grad_(), exact(NEW_VALUES).requires_grad_()
    policy, value, _ = losses_of(log_ratios, SIGNS, values)
    (policy.sum() + value.sum()).backward()
    # d/d log p of -rho A is -rho A
    torch.testing.assert_close(log_ratios.grad, exact([0, 1.5, -0.5, 0, -2]))
    # Of the larger of the two: constant where V was clipped, V - R else. Both are the same at rows 3 and 5.
    torch.testing.assert_close(values.grad, exact([0, 0.5, -0.9, 0, 0]))


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    log_probs = exact([-1.0, -2.0]).requires_grad_()
    advantages, none = exact([0.7, -0.3]), torch.zeros(2, dtype=torch.float64)
    ppo_loss(log_probs, log_probs.detach(), advantages, none, none, none, clip=0.2, value_clip=0.2)[
        0
    ].sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)


def test_whitening():
    values = exact([1, 2, 3, 6])
    white = whiten(values)
    torch.testing.assert_close(white, exact([-2, -1, 0, 3]) / math.sqrt(3.5))
    torch.testing.assert_close(whiten(values, shift=False), values / math.sqrt(3.5))


def test_the_penalty_follows_its_target_in_small_steps():
    assert adapted_kl(0.1, 6.0, 6.0) == 0.1
    assert adapted_kl(0.1, 6.6, 6.0) == pytest.approx(0.1 * 1.01)
    assert adapted_kl(0.1, 600, 6.0) == pytest.approx(0.1 * 1.02)
    assert adapted_kl(0.1, -6.0, 6.0) == pytest.approx(0.1 * 0.98)


# ---------------------------------------------------------------------------- experience

END = 2


def sequences(most):
    """All answers of up to `most` tokens in a language of two words and an end."""
    for length in range(1, most + 1):
        for words in product((0, 1), repeat=length - 1):
            yield (*words, END)
    for words in product((0, 1), repeat=most):
        yield words


class Toy:
    """A language whose every prefix has a distribution of its own; float64, and everything can be enumerated."""

    def __init__(self, most=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.all = list(sequences(most))
        prefixes = sorted({answer[:place] for answer in self.all for place in range(len(answer))})
        self.place = {prefix: number for number, prefix in enumerate(prefixes)}
        shape = len(prefixes), 3
        self.policy = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        self.reference = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.guesses = torch.randn(len(prefixes), generator=generator, dtype=torch.float64)
        self.scores = torch.randn(len(self.all), generator=generator, dtype=torch.float64)

    def log_probs(self, table, answer):
        rows = table.log_softmax(-1)
        return torch.stack([rows[self.place[answer[:t]], token] for t, token in enumerate(answer)])

    def objective(self, weight):
        """E[s] - b KL(p || q) over all answers."""
        total = exact(0.0)
        for answer, score in zip(self.all, self.scores, strict=True):
            log_p, log_q = (self.log_probs(table, answer) for table in (self.policy, self.reference))
            total = total + log_p.sum().exp() * (score - weight * (log_p - log_q).sum())
        return total

    def true_value(self, prefix, weight):
        """What is to come after a prefix, on average."""
        total = exact(0.0)
        for answer, score in zip(self.all, self.scores, strict=True):
            if answer[: len(prefix)] == prefix and len(answer) > len(prefix):
                log_p, log_q = (
                    self.log_probs(table, answer)[len(prefix) :] for table in (self.policy, self.reference)
                )
                total = total + log_p.sum().exp() * (score - weight * (log_p - log_q).sum())
        return float(total.detach())

    def gradient(self, config, values):
        """The expected policy gradient of `experience`'s advantages before they are whitened."""
        answers = [
            make_answer(
                prompt=(7,),
                length=0,
                ids=[7, *answer],
                reward=float(score),
                log_probs=self.log_probs(self.policy, answer).tolist(),
                log_ratios=(
                    self.log_probs(self.policy, answer) - self.log_probs(self.reference, answer)
                ).tolist(),
                values=[float(values[self.place[answer[:t]]]) for t in range(len(answer))],
            )
            for answer, score in zip(self.all, self.scores, strict=True)
        ]
        found = experience(answers, config, config.kl)
        surrogate = exact(0.0)
        for row, answer in enumerate(self.all):
            log_p = self.log_probs(self.policy, answer)
            advantages = (found.returns - found.values)[row, : len(answer)]
            surrogate = surrogate + log_p.sum().exp().detach() * (advantages * log_p).sum()
        return torch.autograd.grad(surrogate, self.policy)[0]


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_expected_gradient_is_exact_for_any_values_if_lambda_is_1(kl):
    toy = Toy()
    wanted = torch.autograd.grad(toy.objective(kl), toy.policy)[0]
    found = toy.gradient(make_config(kl=kl, lam=1.0), toy.guesses)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


def test_the_expected_gradient_is_exact_for_any_lambda_if_values_are_true():
    toy = Toy(seed=1)
    wanted = torch.autograd.grad(toy.objective(0.3), toy.policy)[0]
    true = [toy.true_value(prefix, 0.3) for prefix in toy.place]
    config = make_config(kl=0.3, lam=0.2)
    torch.testing.assert_close(toy.gradient(config, true), wanted, atol=1e-12, rtol=1e-10)
    assert not torch.allclose(toy.gradient(config, toy.guesses), wanted, atol=1e-3)  # values matter then


def test_a_reward_stands_on_the_last_token_and_the_penalty_on_each():
    answers = [
        make_answer(length=3, reward=2.0, log_ratios=[0.1, 0.2, -0.4]),
        make_answer(length=1, reward=-1.0, log_ratios=[1.0], ended=False),
    ]
    found = experience(answers, make_config(lam=1.0), 0.5)
    # V = 0 and lambda = 1: returns are what is still to come
    torch.testing.assert_close(found.returns, exact([[2.05, 2.1, 2.2], [-1.5, 0, 0]]))
    flat = found.advantages[torch.tensor([[True, True, True], [True, False, False]])]
    assert flat.mean().abs() < 1e-12 and flat.std(correction=0) == pytest.approx(1)
    told = {
        "reward": 0.5,
        "reward_deviation": 1.5,
        "kl": 0.9 / 4,
        "kl_weight": 0.5,
        "length": 2,
        "ended": 0.5,
    }
    assert found.told == {
        **{name: pytest.approx(number) for name, number in told.items()},
        "stale": found.told["stale"],
        "unreadable": found.told["unreadable"],
    }
    assert math.isnan(found.told["stale"]) and math.isnan(found.told["unreadable"])
    assert set(found.told) == set(TOLD)


def test_rewards_are_scaled_before_the_penalty():
    answers = [make_answer(reward=reward, log_ratios=[0.0, 1.0]) for reward in (10.0, 30.0)]
    found = experience(answers, make_config(lam=1.0, whiten_rewards=True), 0.5)
    torch.testing.assert_close(found.returns, exact([[0.5, 0.5], [2.5, 2.5]]))
    assert found.told["reward"] == 20


@pytest.mark.parametrize("reward", [0.0, 0.1, -3.0])
def test_where_all_answers_are_worth_the_same_small_penalties_stay_small(reward):
    answers = [make_answer(reward=reward, log_ratios=[0.0, x]) for x in (1e-7, -1e-7, 2e-7)]
    found = experience(answers, make_config(lam=1.0, whiten_rewards=True), 0.5)
    assert found.advantages.abs().max() < 1e-6 and found.advantages.mean().abs() < 1e-12
    assert found.told["reward_deviation"] == 0
    assert found.returns[0].tolist() == pytest.approx([reward] * 2, abs=1e-6)


def test_answers_are_laid_where_they_stand_in_their_sequences():
    answers = [
        make_answer(prompt=(5, 6), length=2, log_probs=[-1.0, -2.0], values=[0.25, 0.5]),
        make_answer(
            prompt=(5, 6, 7, 8), length=1, log_probs=[-3.0], values=[0.75], log_ratios=[0.0], reward=3.0
        ),
    ]
    found = experience(answers, make_config(), 0.0)
    part = collate_answers(found, [1, 0])
    assert part["input_ids"].tolist() == [[5, 6, 7, 8, 10], [5, 6, 10, 11, 3]]
    assert part["answers"].int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 0]]
    assert part["log_probs"].tolist() == [[0, 0, 0, 0, -3], [0, 0, -1, -2, 0]]
    assert part["values"].tolist() == [[0, 0, 0, 0, 0.75], [0, 0, 0.25, 0.5, 0]]
    for name in COLUMNS:
        assert not part[name][~part["answers"]].any()
        flat = [
            number for row in (1, 0) for number in getattr(found, name)[row, : answers[row].length].tolist()
        ]
        assert part[name][part["answers"]].tolist() == pytest.approx(flat, rel=1e-6)


def test_answers_without_a_token_are_refused():
    with pytest.raises(UserError, match="every answer is empty"):
        experience([make_answer(length=0), make_answer(length=0)], make_config(), 0.1)
    found = experience([make_answer(length=0), make_answer(length=2)], make_config(), 0.1)
    assert collate_answers(found, [0, 1])["answers"].sum() == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": 6, "minibatches": 4}, "do not divide into 4 minibatches"),
        ({"kl_target": -1.0}, "must be above 0"),
        ({"kl_target": 6.0, "kl": 0.0}, "kl 0.0, which is adapted to it, must be above 0"),
        ({"sampling": SamplingConfig(max_new_tokens=64), "context": 64}, "leave no room for a prompt"),
        ({"lam": 1.1}, "lam: 1.1 is not in"),
        ({"clip": 0.0}, "clip: 0.0 is not above 0"),
    ],
)
def test_contradictions_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        make_config(**changes)
