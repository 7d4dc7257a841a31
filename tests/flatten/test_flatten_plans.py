"""Plans tell beforehand what shifts do, and why some do nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from galenic.flatten import apply_plans, collect, plan_shifts
from galenic.flatten.plans import cost, loss_bound, table


def network(width=12, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()


def inputs(rows, width=5, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 30),
    st.integers(0, 10**6),
    st.sampled_from([{"output_budget": 0.05}, {"rank": 3}, {"energy": 0.9}, {}]),
    st.booleans(),
)
def test_the_head_moves_the_loss_by_no_more_than_its_bound(rows, seed, how, free_bias):
    model, x = network(seed=seed), inputs(rows, seed=seed)
    y = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(seed))
    statistics = collect(model, [x], ["2"])
    (plan,) = plan_shifts(model, statistics, softmax_head="2", free_bias=free_bias, **how)
    before = model(x).detach()
    apply_plans(model, [plan])
    after = model(x).detach()
    change = float(F.cross_entropy(after, y) - F.cross_entropy(before, y))
    assert abs(change) <= plan.loss_bound * (1 + 1e-9) + 1e-12
    assert plan.loss_bound == pytest.approx(math.sqrt(2 / rows) * float((after - before).norm()), abs=1e-7)


def test_the_bound_is_tight_to_a_factor():
    """Two classes, the gradient at its longest: one logit up, the other down, from certain and wrong."""
    logits = torch.tensor([[30.0, -30.0]], dtype=torch.float64)
    step = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([1])
    change = float(F.cross_entropy(logits, y) - F.cross_entropy(logits + step, y))
    assert change == pytest.approx(loss_bound(float(step.norm()), 1), rel=1e-9)


def test_a_plan_has_every_number_and_leaves_the_model_alone():
    model, x = network(), inputs(8)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    statistics = collect(model, [x])
    first, head = plan_shifts(model, statistics, softmax_head="2")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert (first.kind, first.rows, first.dimension, first.rank) == ("Linear", 8, 5, 5)
    assert first.action == "no-op" and first.reason.startswith("its inputs span all 5 directions")
    assert (head.rank, head.dimension, head.action, head.reason) == (8, 12, "shift", "")
    assert head.norm_after < head.norm_before and head.output_change < 1e-7
    assert first.loss_bound is None and head.loss_bound < 1e-6
    assert head.memory == 8 * (4 * 144 + 3 * 36) and head.seconds < 1e-5
    apply_plans(model, [first, head])
    assert torch.equal(model[0].weight, weights["0.weight"])
    assert float(model[2].weight.detach().norm()) == pytest.approx(head.norm_after)


def test_weights_in_the_span_of_their_inputs_are_a_noop_as_after_weight_decay():
    model, x = network(), inputs(8)
    y = torch.arange(8) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.05)
    for _ in range(3000):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    head = plan_shifts(model, collect(model, [x]))[1]
    assert head.rank < head.dimension and head.action == "no-op"
    assert head.reason == "its weight has no component outside its inputs' span, as weight decay leaves it"
    assert not head.shift.noop  # in bits it would move: by nothing worth moving


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shifts_below_one_step_of_a_low_precision_weight_are_noops(dtype):
    model, x = network(), inputs(100)
    model[2].to(dtype)
    model.insert(2, Cast(dtype))
    name = "3"
    (plan,) = plan_shifts(model, collect(model, [x], [name]), output_budget=1e-7)
    assert plan.action == "no-op" and plan.shift.noop and plan.rounded_change == 0
    assert plan.reason == f"the shift is below one step of {str(dtype).removeprefix('torch.')} everywhere"


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def test_a_budget_that_rounding_alone_breaks_cannot_be_met_and_is_not_tried():
    model, x = network(), inputs(6)
    model[2].bfloat16()
    model.insert(2, Cast(torch.bfloat16))
    statistics = collect(model, [x], ["3"])
    (plan,) = plan_shifts(model, statistics, output_budget=1e-5)
    assert plan.action == "over budget" and plan.output_change == pytest.approx(1e-5) and not plan.shift.noop
    assert plan.rounded_change > 1e-4 and "keep the weight in float32 or give a larger budget" in plan.reason
    weight = model[3].weight.detach().clone()
    apply_plans(model, [plan])
    assert torch.equal(model[3].weight, weight)
    (exact,) = plan_shifts(model, statistics)
    assert exact.action == "shift" and exact.reason == "exact but for the rounding to bfloat16"
    a = model[:3](x).detach().double()
    measured = a @ (exact.shift.weight.double() - weight.double()).T
    assert exact.rounded_change == pytest.approx(
        float(measured.norm() / (a @ weight.double().T).norm()), rel=1e-6
    )


def test_cost_grows_with_the_cube_of_the_width():
    small, large = cost(nn.Linear(1024, 8).weight), cost(nn.Linear(4096, 8).weight)
    assert large[1] == pytest.approx(64 * small[1]) and 10 < large[1] < 15
    assert 16 * 0.99 < large[0] / small[0] < 16
    grouped, plain = cost(nn.Conv2d(64, 8, 3, groups=4).weight, 4), cost(nn.Conv2d(64, 8, 3).weight)
    assert grouped[1] == pytest.approx(plain[1] / 16)


def test_the_table_has_a_line_for_each_layer():
    model, x = network(), inputs(8)
    lines = table(plan_shifts(model, collect(model, [x]), softmax_head="2"))
    assert len(lines) == 3 and lines[0].startswith("layer") and "rank" in lines[0]
    assert "5/5" in lines[1] and "no-op: its inputs span all 5 directions" in lines[1]
    assert "8/12" in lines[2] and "<= " in lines[2] and lines[2].endswith("shift")
