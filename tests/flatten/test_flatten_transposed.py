"""Layers that store their weight as (inputs, outputs): transformers' Conv1D, of GPT-2 and its like."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from galenic.flatten import TrainingShift, collect, plan_shifts, select_shift, shift
from galenic.flatten.apply import output_changes, propose
from galenic.flatten.layers import select_layers


def pair():
    """A network of such layers, and the same of linear ones."""
    torch.manual_seed(0)
    own = nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7)).double().eval()
    for layer in (own[0], own[2]):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    linear = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double().eval()
    linear.load_state_dict({n: p.T.clone() if p.ndim == 2 else p for n, p in own.state_dict().items()})
    return own, linear


@pytest.mark.parametrize(
    "kind",
    [
        {"output_budget": 0.0},
        {"output_budget": 0.1},
        {"rank": 2, "free_bias": True},
        {"energy": 0.9},
    ],
)
def test_shifts_are_those_of_linear_layers(kind):
    own, linear = pair()
    x = torch.randn(4, 5, dtype=torch.float64)
    statistics = collect(own, [x])
    proposals = propose(own, statistics, **kind)
    measured = output_changes(own, [(x, None)], proposals)
    for name, proposal in proposals.items():
        assert measured[name] == pytest.approx(proposal.rounded_change, rel=1e-6, abs=1e-7) or kind.get(
            "free_bias"
        )
    of_own, of_linear = shift(own, statistics, **kind), shift(linear, collect(linear, [x]), **kind)
    for name in ("0", "2"):
        torch.testing.assert_close(own.get_submodule(name).weight.T, linear.get_submodule(name).weight)
        torch.testing.assert_close(own.get_submodule(name).bias, linear.get_submodule(name).bias)
        assert of_own[name].norm_after == pytest.approx(of_linear[name].norm_after)
    assert own[0].weight.is_contiguous()


def test_anchors_and_choices_are_in_the_layers_own_form():
    own, linear = pair()
    x = torch.randn(3, 5, dtype=torch.float64)
    base = {name: torch.randn(7, 5) if name == "0" else torch.randn(3, 7) for name in ("0", "2")}
    shift(own, collect(own, [x]), output_budget=0.0, base=base)
    shift(linear, collect(linear, [x]), output_budget=0.0, base=base)
    torch.testing.assert_close(own[0].weight.T, linear[0].weight)
    kept = copy.deepcopy(own.state_dict())
    choice = select_shift(own, collect(own, [x]), [{"rank": 1}], lambda: torch.arange(3.0))
    assert choice.chosen is None and all(torch.equal(kept[n], p) for n, p in own.state_dict().items())


def test_momentum_goes_along():
    own, linear = pair()
    x = torch.randn(3, 5, dtype=torch.float64)
    for model in (own, linear):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        TrainingShift(model, accuracy=None, rank=2).shift([x], optimizer)
        optimizer.zero_grad()
        (model(x).sum() * 0).backward()
        optimizer.step()
    torch.testing.assert_close(own[0].weight.T, linear[0].weight)
    torch.testing.assert_close(own[2].weight.T, linear[2].weight)


def test_gpt2_is_shifted_whole():
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=True
    )
    model = GPT2LMHeadModel(config).eval()
    names = select_layers(model, ["*"])
    assert len(names) == 8 and not any("lm_head" in name for name in names)
    ids = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0))
    statistics = collect(model, [{"input_ids": ids, "use_cache": False}])
    assert statistics.count("transformer.h.0.attn.c_attn") == 64
    plans = {plan.name: plan for plan in plan_shifts(model, statistics, output_budget=0.05)}
    assert (
        plans["transformer.h.1.mlp.c_proj"].dimension == 32
        and plans["transformer.h.0.attn.c_attn"].kind == "Conv1D"
    )
    assert all(plan.action == "shift" and plan.norm_after < plan.norm_before for plan in plans.values())
