"""Breadcrumbs, DELLA, SCE, Model Stock and SLERP against references written from their papers, dense and in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.merge import merge_state_dicts
from galenic.merge.blocks import CHUNK
from galenic.merge.config import MethodParameters
from galenic.merge.io import StateDict
from galenic.merge.kernels import BLOCK
from galenic.merge.magnitudes import tensor_thresholds
from galenic.merge.methods import (
    keep_mask,
    keep_probabilities,
    model_stock_ratio,
    slerp_coefficients,
)

BIG = {"a.0.weight": (700, 900), "a.1.bias": (CHUNK + 5,), "scale": (), "narrow": (5, 1)}
"""Several blocks and parts, rows that do not divide them, and the smallest tensors."""


def doubles(base, experts, name):
    origin = base[name].double()
    return origin, [expert[name].double() - origin for expert in experts]


def close(merged, expected):
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------- Breadcrumbs


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.1, 0.0), (0.9, 0.3), (1.0, 0.0)])
def test_breadcrumbs_keeps_the_middle_of_every_tensor(states, density, gamma):
    base, experts = states(2, shapes=BIG)
    numbers = MethodParameters(density=density, gamma=gamma)
    merged = merge_state_dicts(base, experts, "breadcrumbs", weights=[0.5, 2.0], parameters=numbers)
    for name in BIG:
        origin, deltas = doubles(base, experts, name)
        expected = origin.clone()
        for weight, delta in zip([0.5, 2.0], deltas, strict=True):
            order = delta.float().abs().flatten().argsort(descending=True)
            dropped = min(int(gamma * delta.numel()), delta.numel() - 1)
            kept = torch.zeros(delta.numel(), dtype=torch.bool)
            kept[order[dropped : dropped + max(1, int(density * delta.numel()))]] = True
            expected += weight * delta * kept.view(delta.shape)
        # Entries of equal magnitude at a limit are all kept here, so a few more may be than in the reference.
        different = (merged[name].double() - expected).abs() > 1e-9 + 1e-6 * expected.abs()
        assert different.sum() <= 1e-4 * expected.numel()


def test_breadcrumbs_keeps_what_ties_with_a_limit():
    base, expert = {"w": torch.zeros(10)}, {"w": torch.tensor([9.0, 4, 4, 4, 4, -4, -4, 4, 1, 1])}
    numbers = MethodParameters(density=0.2, gamma=0.1)
    merged = merge_state_dicts(base, [expert], "breadcrumbs", weights=[1.0], parameters=numbers)
    assert merged["w"].tolist() == [0, 4, 4, 4, 4, -4, -4, 4, 0, 0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60), st.data())
def test_tensor_thresholds_are_exact_for_any_ranks(values, data):
    delta = torch.tensor(values)
    ranks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=4))
    base, expert = StateDict({"w": torch.zeros_like(delta)}, "base"), StateDict({"w": delta}, "expert")
    found = tensor_thresholds(base, [expert, expert], lambda numel: [ranks, ranks[:1]])["w"]
    magnitudes = delta.abs().sort(descending=True).values
    assert found == [[magnitudes[rank - 1].item() for rank in ranks], [magnitudes[ranks[0] - 1].item()]]


# ---------------------------------------------------------------------------- DELLA


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 9), st.floats(0.1, 0.9), st.integers(0, 99))
def test_della_probabilities_rise_with_the_rank_and_average_to_the_density(rows, row, density, seed):
    delta = torch.randn(rows * row, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    epsilon = min(density, 1 - density) / 2
    chance = keep_probabilities(delta, row, density, epsilon).view(rows, row)
    for line, expected in zip(delta.abs().view(rows, row), chance, strict=True):
        ranks = [sum(other < value for other in line.tolist()) for value in line.tolist()]
        by_hand = [
            density - epsilon + 2 * epsilon * rank / (row - 1) if row > 1 else density for rank in ranks
        ]
        assert expected.tolist() == pytest.approx(by_hand, abs=1e-12)
    assert float(chance.mean()) == pytest.approx(density, abs=1e-12)


def test_della_ranks_equal_magnitudes_by_place():
    assert keep_probabilities(torch.ones(3), 3, 0.5, 0.25).tolist() == [0.25, 0.5, 0.75]


def test_della_elects_among_what_was_kept(states):
    base, experts = states(3, shapes=BIG)
    numbers = MethodParameters(density=0.6, epsilon=0.3)
    merged = merge_state_dicts(base, experts, "della", weights=[1, 2, 1], parameters=numbers, seed=7)
    for name, shape in BIG.items():
        origin, deltas = doubles(base, experts, name)
        row = shape[-1] if shape else 1
        thinned = []
        for label, delta in enumerate(deltas):
            chance = keep_probabilities(delta.flatten(), row, 0.6, 0.3)
            kept = keep_mask(7, str(label), name, 0, delta.numel(), chance)
            thinned.append((delta.flatten() * kept / chance).view(shape))
        stacked = torch.stack(thinned) * torch.tensor([1.0, 2, 1]).view(3, *[1] * len(shape))
        agrees = torch.stack(thinned).sign() == stacked.sum(0).sign()
        weight = (agrees * torch.tensor([1.0, 2, 1]).view(3, *[1] * len(shape))).sum(0)
        expected = origin + (stacked * agrees).sum(0) / weight.clamp_min(1)
        close(merged[name], expected)


def test_della_keeps_the_expectation_of_every_entry():
    base, expert = {"w": torch.zeros(400, 500)}, {"w": torch.rand(400, 500) + 0.5}
    numbers = MethodParameters(density=0.5, epsilon=0.2, normalize=False)
    total = merge_state_dicts(base, [expert], "della", weights=[1.0], parameters=numbers)["w"].double().sum()
    # Variance of v / p with probability p: v^2 (1 - p) / p, p at least 0.3.
    error = math.sqrt(float((expert["w"].double() ** 2 * (0.7 / 0.3)).sum()))
    assert abs(total - expert["w"].double().sum()) < 4 * error


def test_chances_of_single_elements_agree_with_one_chance_for_all():
    one = keep_mask(3, "a", "w", 5, 5000, 0.37)
    assert torch.equal(one, keep_mask(3, "a", "w", 5, 5000, torch.full((4995,), 0.37, dtype=torch.float64)))
    assert keep_mask(3, "a", "w", 0, 5000, torch.ones(5000, dtype=torch.float64)).all()


# ---------------------------------------------------------------------------- SCE


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_sce_selects_calculates_and_erases(states, share):
    base, experts = states(3, shapes=BIG)
    numbers = MethodParameters(select_topk=share)
    merged = merge_state_dicts(base, experts, "sce", parameters=numbers)
    for name in BIG:
        origin, deltas = doubles(base, experts, name)
        stacked = torch.stack([delta.float() for delta in deltas]).double()
        variance = stacked.var(dim=0, unbiased=False).float()
        least = variance.flatten().sort(descending=True).values[max(1, round(share * variance.numel())) - 1]
        stacked = torch.stack(deltas) * (variance >= least)
        squares = torch.stack([delta.square().mean() for delta in stacked])
        weights = (squares / squares.sum()).view(-1, *[1] * origin.ndim)
        agrees = stacked.sign() == stacked.sum(0).sign()
        expected = origin + (weights * stacked * agrees).sum(0) / (weights * agrees).sum(0).clamp_min(1e-300)
        different = (merged[name].double() - expected).abs() > 1e-9 + 1e-5 * expected.abs()
        assert different.sum() <= 1e-5 * expected.numel()


def test_sce_weighs_small_task_vectors_too():
    base = {"w": torch.zeros(2)}
    experts = [{"w": torch.tensor([3e-5, 0.0])}, {"w": torch.tensor([1e-5, 0.0])}]
    merged = merge_state_dicts(base, experts, "sce")["w"]
    assert merged.tolist() == pytest.approx(
        [(0.9 * 3e-5 + 0.1 * 1e-5), 0.0]
    )  # a fallback to 1/2 would give 2e-5


# ---------------------------------------------------------------------------- Model Stock


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_is_the_foot_of_the_perpendicular(count):
    """Task vectors of equal length and angle: the merged point is the nearest to the base in their affine hull."""
    generator = torch.Generator().manual_seed(count)
    basis = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64)).Q
    vectors = [2 * basis[:, t] + 1.5 * basis[:, -1] for t in range(count)]
    base = torch.randn(50, generator=generator, dtype=torch.float64)
    experts = [{"w": base + vector} for vector in vectors]
    merged = merge_state_dicts({"w": base}, experts, "model_stock")["w"]
    stacked, mean = torch.stack(vectors), sum(vectors) / count
    ratio = model_stock_ratio(stacked @ stacked.T)
    torch.testing.assert_close(merged, base + ratio * mean)
    cosine = 1.5**2 / (4 + 1.5**2)
    assert ratio == pytest.approx(count * cosine / (1 + (count - 1) * cosine))


def test_model_stock_of_opposed_experts_is_the_base():
    base = {"w": torch.ones(3)}
    experts = [{"w": torch.tensor([2.0, 1, 1])}, {"w": torch.tensor([0.0, 1, 1])}, {"w": torch.ones(3)}]
    assert torch.equal(merge_state_dicts(base, experts, "model_stock")["w"], base["w"])


def test_model_stock_of_equal_experts_is_the_expert(states):
    base, [expert] = states(1)
    merged = merge_state_dicts(base, [expert, expert], "model_stock")
    for name in base:
        close(merged[name], expert[name].double())


# ---------------------------------------------------------------------------- SLERP


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_stays_on_the_arc(t):
    generator = torch.Generator().manual_seed(1)
    first, second = torch.nn.functional.normalize(
        torch.randn(2, 100, generator=generator, dtype=torch.float64)
    )
    merged = merge_state_dicts({"w": first}, [{"w": second}], "slerp", parameters=MethodParameters(t=t))["w"]
    whole = math.acos(float(first @ second))
    assert float(merged.norm()) == pytest.approx(1)
    assert float(first @ merged) == pytest.approx(math.cos(t * whole), abs=1e-12)
    assert float(second @ merged) == pytest.approx(math.cos((1 - t) * whole), abs=1e-12)


def test_slerp_takes_the_angle_of_each_tensor_and_ends_at_the_models(states):
    base, [expert] = states(1, norms=[30])
    for t, end in ((0.0, base), (1.0, expert)):
        merged = merge_state_dicts(base, [expert], "slerp", parameters=MethodParameters(t=t))
        assert all(torch.equal(merged[name], end[name]) for name in base)
    merged = merge_state_dicts(base, [expert], "slerp")
    for name in base:
        first, second = base[name].double().flatten(), expert[name].double().flatten()
        cosine = float(first @ second / first.norm() / second.norm())
        if abs(cosine) > 0.9995:
            expected = (first + second) / 2
        else:
            expected = (first + second) * math.sin(math.acos(cosine) / 2) / math.sin(math.acos(cosine))
        close(merged[name].flatten(), expected)


def test_slerp_goes_straight_between_parallel_and_from_zero():
    assert slerp_coefficients(torch.ones(2, 2), 0.25) == (0.75, 0.25)
    assert slerp_coefficients(torch.tensor([[1.0, -1], [-1, 1]]), 0.25) == (0.75, 0.25)
    assert slerp_coefficients(torch.tensor([[0.0, 0], [0, 1]]), 0.25) == (0.75, 0.25)


# ---------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("method", ["breadcrumbs", "della", "sce", "model_stock", "slerp"])
def test_number_of_threads_and_other_tensors_do_not_change_a_bit(states, method, monkeypatch):
    base, experts = states(1 if method == "slerp" else 3, shapes=BIG, dtype=torch.bfloat16)
    numbers = MethodParameters(select_topk=0.4) if method == "sce" else None
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(merge_state_dicts(base, experts, method, parameters=numbers))
    alone = merge_state_dicts(
        {"a.0.weight": base["a.0.weight"]},
        [{"a.0.weight": expert["a.0.weight"]} for expert in experts],
        method,
        parameters=numbers,
    )
    assert all(torch.equal(results[0][name], results[1][name]) for name in BIG)
    assert torch.equal(alone["a.0.weight"], results[0]["a.0.weight"])
    assert base["a.0.weight"].numel() > BLOCK


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_normalize_divides_by_the_weights(method, normalize):
    base = {"w": torch.ones(2)}
    experts = [{"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([3.0, 3.0])}]
    numbers = MethodParameters(normalize=normalize, density=1.0 if method == "ties" else None)
    merged = merge_state_dicts(base, experts, method, weights=[1, 3], parameters=numbers)["w"].tolist()
    expected = {
        ("linear", True): 11 / 4,
        ("linear", False): 11,
        ("task_arithmetic", True): 1 + 7 / 4,
        ("task_arithmetic", False): 8,
        ("ties", True): 1 + 7 / 4,
        ("ties", False): 8,
    }
    assert merged == [expected[method, normalize]] * 2


@pytest.mark.parametrize("method", ["breadcrumbs", "della", "sce", "model_stock"])
def test_experts_that_equal_the_base_give_the_base(states, method):
    base, _ = states()
    merged = merge_state_dicts(base, [base, base], method)
    assert all(torch.equal(merged[name], base[name]) for name in base)
