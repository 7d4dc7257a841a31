"""Choosing a kind of shift on validation data."""

import copy

import pytest
import torch
from torch import nn

from galenic.flatten import collect, select_shift, shift
from galenic.flatten.selection import settings
from galenic.runtime import UserError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()


@pytest.fixture
def data():
    return torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_best_candidate_is_left_in_the_model(model, data):
    statistics = collect(model, [data], ["2"])
    original = copy.deepcopy(model)
    truncated = copy.deepcopy(model)
    shift(truncated, statistics, rank=2)
    wanted = truncated(data).detach()

    selection = select_shift(
        model,
        statistics,
        [{"rank": 3}, {"rank": 2}, {"rank": 1}, {"output_budget": 0.01}],
        lambda: (model(data) - wanted).square().sum(1),
    )
    assert selection.chosen == 1 and list(selection.shifts) == ["2"]
    assert torch.equal(model[2].weight, truncated[2].weight) and torch.equal(
        model[0].weight, original[0].weight
    )
    errors = (original(data) - wanted).detach().square().sum(1)
    assert selection.original == pytest.approx(float(errors.mean()))
    best = selection.candidates[1]
    assert best.error == pytest.approx(0, abs=1e-20)
    assert best.difference == pytest.approx(-float(errors.mean()))
    assert best.standard_error == pytest.approx(float(errors.std() / 40**0.5))


def test_the_original_stays_when_candidates_are_worse_or_not_surely_better(model, data):
    statistics = collect(model, [data])
    state = copy.deepcopy(model.state_dict())
    wanted = model(data).detach()
    worse = select_shift(
        model,
        statistics,
        [{"rank": 1}, {"output_budget": 0.3}],
        lambda: (model(data) - wanted).square().sum(1),
    )
    assert worse.chosen is None and not worse.shifts
    assert all(candidate.difference > 0 for candidate in worse.candidates)

    # Better on 11 of 20 samples, worse on 9: a fifth of a standard error or so.
    calls = iter([torch.zeros(20), torch.tensor([-1.0] * 11 + [1.0] * 9)])
    unsure = select_shift(model, statistics, [{"rank": 2}], lambda: next(calls))
    assert unsure.chosen is None and unsure.candidates[0].difference == pytest.approx(-0.1)
    calls = iter([torch.zeros(20), torch.tensor([-1.0] * 11 + [1.0] * 9)])
    assert select_shift(model, statistics, [{"rank": 2}], lambda: next(calls), caution=0.1).chosen == 0
    assert not all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_biases_come_back_too(model, data):
    state = copy.deepcopy(model.state_dict())
    select_shift(
        model,
        collect(model, [data]),
        [{"rank": 2, "free_bias": True}],
        lambda: model(data).detach().square().sum(1),
        caution=1e9,
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_candidate_of_nan_is_not_chosen(model, data):
    calls = iter([torch.ones(5), torch.full((5,), torch.nan)])
    assert select_shift(model, collect(model, [data]), [{"rank": 1}], lambda: next(calls)).chosen is None


def test_mistakes_are_refused(model, data):
    statistics = collect(model, [data])
    with pytest.raises(UserError, match="candidates: give at least one"):
        select_shift(model, statistics, [], lambda: torch.ones(3))
    with pytest.raises(UserError, match="caution: -1 is negative"):
        select_shift(model, statistics, [{"rank": 1}], lambda: torch.ones(3), caution=-1)
    for wrong in (torch.ones(1), torch.tensor([1.0, torch.inf])):
        with pytest.raises(UserError, match="finite validation errors are needed"):
            select_shift(model, statistics, [{"rank": 1}], lambda wrong=wrong: wrong)


def test_settings_of_a_kind_are_plain():
    kind = {"rank": 3, "energy": None, "free_bias": False, "base": {"x": torch.ones(1)}}
    assert settings(kind) == {"rank": 3} and settings({"output_budget": 0.0}) == {"output_budget": 0.0}
