import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.merge import gram, merge_state_dicts, metagpt_coefficients
from galenic.merge.blocks import CHUNK, layer_of
from galenic.merge.config import MethodParameters
from galenic.merge.io import StateDict
from galenic.merge.kernels import BLOCK
from galenic.merge.magnitudes import model_thresholds
from galenic.merge.methods import keep_mask, largest_below, round_once, ties
from galenic.merge.statistics import total
from galenic.runtime import UserError


def doubles(base, experts):
    """All tensors flattened into one float64 vector per model."""
    return [torch.cat([s[n].double().flatten() for n in base]) for s in [base, *experts]]


def flat(state):
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


# ---------------------------------------------------------------------------- weighted sums


def test_metagpt_is_a_convex_soup(states):
    base, experts = states()
    theta = doubles(base, experts)
    coefficients = metagpt_coefficients(gram(base, experts))
    merged = flat(merge_state_dicts(base, experts))
    soup = sum(c * t for c, t in zip(coefficients, theta[1:], strict=True))
    with_base = theta[0] + sum(c * (t - theta[0]) for c, t in zip(coefficients, theta[1:], strict=True))
    torch.testing.assert_close(merged, soup, rtol=1e-7, atol=0)
    torch.testing.assert_close(merged, with_base, rtol=1e-6, atol=1e-9)


def test_metagpt_of_correlated_experts_minimises_the_paper_objective(states):
    base, experts = states(norms=[1, 3, 0.5])
    origin, *theta = doubles(base, experts)
    taus = torch.stack([t - origin for t in theta])
    weight = taus.square().sum(1)
    merged = flat(merge_state_dicts({k: v.double() for k, v in base.items()}, experts)) - origin

    def objective(tau):
        return float((weight * (tau - taus).square().sum(1)).sum())

    best = objective(merged)
    for step in torch.eye(3, dtype=torch.float64) * 1e-3:
        assert objective(merged + step @ taus) > best
        assert objective(merged - step @ taus) > best


def test_linear_averages_and_normalises_weights(states):
    base, experts = states()
    merged = merge_state_dicts(base, experts, "linear")
    torch.testing.assert_close(
        merged["lm_head.weight"], torch.stack([e["lm_head.weight"] for e in experts]).mean(0)
    )
    one = merge_state_dicts(base, experts, "linear", weights=[0.0, 7.0, 0.0])
    assert all(torch.equal(one[name], experts[1][name]) for name in base)


def test_task_arithmetic_of_zero_and_one(states):
    base, experts = states()
    same = merge_state_dicts(base, experts, "task_arithmetic", weights=[0.0, 0.0, 0.0])
    assert all(torch.equal(same[name], base[name]) for name in base)
    one = merge_state_dicts(base, experts, "task_arithmetic", weights=[0.0, 1.0, 0.0])
    assert all(torch.equal(one[name], experts[1][name]) for name in base)
    origin, *theta = doubles(base, experts)
    default = flat(merge_state_dicts(base, experts, "task_arithmetic"))
    torch.testing.assert_close(default, origin + 0.3 * sum(t - origin for t in theta), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["metagpt", "linear", "task_arithmetic", "ties", "dare_linear"])
def test_the_experts_and_the_base_are_left_alone(states, method):
    base, experts = states()
    merged = merge_state_dicts(base, experts, method)
    again, same = states()
    assert all(torch.equal(again[n], base[n]) and torch.equal(same[1][n], experts[1][n]) for n in base)
    merged["lm_head.weight"].zero_()
    assert experts[0]["lm_head.weight"].any() and base["lm_head.weight"].any()


# ---------------------------------------------------------------------------- TIES


def reference_ties(base, experts, density):
    """The paper's Algorithm 1 on whole vectors in float64, written independently."""
    origin, *theta = [v.numpy() for v in doubles(base, experts)]
    trimmed = []
    for vector in theta:
        tau = vector - origin
        key = np.abs(tau.astype(np.float32))
        keep = max(1, round(density * len(tau)))
        threshold = np.sort(key)[::-1][keep - 1]
        trimmed.append(np.where(key >= threshold, tau, 0.0))
    stack = np.stack(trimmed)
    sign = np.sign(stack.sum(0))
    agree = (np.sign(stack) == sign) & (sign != 0)
    count = agree.sum(0)
    mean = np.divide((stack * agree).sum(0), count, out=np.zeros(len(origin)), where=count > 0)
    return torch.from_numpy(origin + mean)


@pytest.mark.parametrize("density", [0.05, 0.55, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_equals_an_independent_reference(states, density, dtype):
    base, experts = states(dtype=dtype, shapes={"a": (50, 31), "b": (400,), "c": (3, 3)})
    merged = merge_state_dicts(base, experts, "ties", density=density, dtype="float32")
    torch.testing.assert_close(flat(merged), reference_ties(base, experts, density), rtol=1e-7, atol=1e-10)


def test_ties_trims_over_the_whole_model_not_per_tensor():
    base = {"small": torch.zeros(10), "large": torch.zeros(10)}
    expert = {"small": torch.full((10,), 0.01), "large": torch.full((10,), 1.0)}
    merged = merge_state_dicts(base, [expert], "ties", density=0.5)
    assert not merged["small"].any() and merged["large"].eq(1).all()


def test_ties_elects_by_mass_and_averages_those_who_agree():
    base = {"w": torch.zeros(4)}
    experts = [
        {"w": torch.tensor([3.0, 1, 1, 2])},
        {"w": torch.tensor([-1.0, 1, -1, 0])},
        {"w": torch.tensor([-1.0, 4, 0, 0])},
    ]
    merged = merge_state_dicts(base, experts, "ties", density=1.0)
    assert merged["w"].tolist() == [3.0, 2.0, 0.0, 2.0]  # third entry: votes cancel exactly, the base stays


def test_ties_weights_scale_votes_and_means_but_not_the_whole():
    base = {"w": torch.zeros(2)}
    experts = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-2.0, 4.0])}]
    assert merge_state_dicts(base, experts, "ties", weights=[3, 1], density=1.0)["w"].tolist() == [1.0, 2.5]
    assert merge_state_dicts(base, experts, "ties", weights=[6, 2], density=1.0)["w"].tolist() == [1.0, 2.5]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(1, 3))
def test_threshold_is_the_exact_kth_magnitude(values, density, tensors):
    delta = torch.tensor(values)
    parts = [part for part in torch.tensor_split(delta, tensors) if part.numel()]
    base = StateDict({str(i): torch.zeros_like(p) for i, p in enumerate(parts)}, "base")
    expert = StateDict({str(i): p for i, p in enumerate(parts)}, "expert")
    keep = max(1, round(density * len(values)))
    [[(threshold, kept)]] = model_thresholds(base, [expert], [[keep]], chunk=7)
    magnitudes = delta.abs().sort(descending=True).values
    assert threshold == magnitudes[keep - 1]
    assert kept == int((delta.abs() >= threshold).sum()) >= keep


def test_trim_keeps_ties_and_negative_values():
    base, expert = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, -1.0, 0.5])}
    assert merge_state_dicts(base, [expert], "ties", density=0.4)["w"].tolist() == [1, -1, 0]
    zero = ties(torch.ones(2), [torch.zeros(2)], [1.0])
    assert zero.tolist() == [1, 1]


# ---------------------------------------------------------------------------- DARE


def test_dare_keeps_the_expectation():
    base = {"w": torch.zeros(200_000)}
    expert = {"w": torch.ones(200_000)}
    merged = merge_state_dicts(base, [expert], "dare_linear", weights=[1.0], density=0.4)["w"]
    assert set(merged.unique().tolist()) == {0.0, 2.5}
    standard_error = 2.5 * math.sqrt(0.4 * 0.6 / len(merged))
    assert abs(merged.double().mean() - 1) < 4 * standard_error


def test_dare_at_density_one_is_task_arithmetic(states):
    base, experts = states()
    dare = merge_state_dicts(base, experts, "dare_linear", density=1.0)
    plain = merge_state_dicts(base, experts, "task_arithmetic")
    assert all(torch.equal(dare[name], plain[name]) for name in base)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**63), st.integers(1, 500), st.integers(0, 500), st.floats(0.01, 1))
def test_mask_depends_on_nothing_but_its_key(seed, numel, cut, density):
    cut = min(cut, numel)
    whole = keep_mask(seed, "m", "t", 0, numel, density)
    parts = [keep_mask(seed, "m", "t", 0, cut, density), keep_mask(seed, "m", "t", cut, numel, density)]
    assert torch.equal(whole, torch.cat(parts))


def test_mask_changes_with_seed_model_and_tensor_and_looks_independent():
    n = 100_000
    reference = keep_mask(0, "m", "t", 0, n, 0.5)
    for key in ((1, "m", "t"), (0, "n", "t"), (0, "m", "u")):
        agreement = (keep_mask(*key, 0, n, 0.5) == reference).double().mean()
        assert abs(agreement - 0.5) < 4 * 0.5 / math.sqrt(n)
    neighbours = (reference[1:] == reference[:-1]).double().mean()
    assert abs(neighbours - 0.5) < 4 * 0.5 / math.sqrt(n)


def test_mask_is_splitmix64():
    # The published generator, seeded with the key, one number for two elements.
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"5\0m\0t").digest()[:8], "little")
    for index in (0, 1, 77, 1000):
        z = (key + (index // 2 + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        half = z >> 32 if index % 2 else z % 2**32
        uniform = ((half + 2**31) % 2**32) / 2**32
        assert keep_mask(5, "m", "t", index, index + 1, uniform + 1e-9).item()
        assert not keep_mask(5, "m", "t", index, index + 1, uniform - 1e-9).item()


def test_dare_of_one_model_does_not_depend_on_the_others(states):
    base, experts = states()
    named = dict(zip("abc", experts, strict=True))
    alone = merge_state_dicts(base, {"b": named["b"]}, "dare_linear", weights=[1.0])
    together = merge_state_dicts(base, named, "dare_linear", weights=[0.0, 1.0, 0.0])
    assert all(torch.equal(alone[name], together[name]) for name in base)
    other_seed = merge_state_dicts(base, {"b": named["b"]}, "dare_linear", weights=[1.0], seed=1)
    assert not torch.equal(alone["lm_head.weight"], other_seed["lm_head.weight"])


# ---------------------------------------------------------------------------- rounding


def correctly_rounded(values, dtype):
    """Rounds float64 to bfloat16 or float16 with integer arithmetic on exact fractions."""
    digits, smallest = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    mantissa, exponent = torch.frexp(values)
    del mantissa
    ulp = torch.ldexp(torch.ones_like(values), (exponent - digits).clamp_min(smallest - digits + 1))
    return (
        torch.round(values / ulp) * ulp
    )  # division by a power of two is exact; torch.round takes ties to even


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_element_is_rounded_twice(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, generator=generator, dtype=torch.float64) * 0.05
    # Values just beside midpoints of two neighbours, where rounding by way of float32 goes wrong.
    grid = values[:50_000].to(dtype).double()
    step = torch.ldexp(torch.ones_like(grid), torch.frexp(grid)[1] - (8 if dtype == torch.bfloat16 else 11))
    near = grid + step / 2 + torch.randn(50_000, generator=generator, dtype=torch.float64) * 1e-12
    values = torch.cat([values, near, torch.tensor([0.0, -0.0, 1e-7, -3e-8, 1.0, 2.5e4])])
    expected = correctly_rounded(values, dtype)
    assert (round_once(values, dtype).double() != expected).sum() == 0
    assert (values.to(dtype).double() != expected).sum() > 100  # the plain cast does round twice here


@pytest.mark.parametrize("method", ["metagpt", "task_arithmetic"])
def test_merged_bfloat16_is_the_correctly_rounded_float64_merge(states, method):
    base, experts = states(dtype=torch.bfloat16, shapes={"a": (30 * BLOCK + 11,)})
    merged = merge_state_dicts(base, experts, method)["a"]
    assert merged.dtype == torch.bfloat16
    origin, *theta = doubles(base, experts)
    if method == "metagpt":
        coefficients = metagpt_coefficients(total(gram(base, experts))).tolist()
        exact = coefficients[0] * theta[0] + coefficients[1] * theta[1] + coefficients[2] * theta[2]
    else:
        exact = origin + (0.3 * (theta[0] - origin) + 0.3 * (theta[1] - origin) + 0.3 * (theta[2] - origin))
    assert (merged.double() != correctly_rounded(exact, torch.bfloat16)).sum() == 0


def test_overflow_of_the_output_dtype_is_refused(states):
    base, experts = states(experts=1)
    experts[0]["lm_head.weight"][0, 0] = 1e5
    with pytest.raises(UserError, match=r"'lm_head.weight': merged values do not fit torch.float16"):
        merge_state_dicts(base, experts, "linear", dtype="float16")


def test_round_once_passes_infinity_on():
    for dtype in (torch.bfloat16, torch.float16):
        assert not torch.isfinite(
            round_once(torch.tensor([1e300, -1e300, math.inf, math.nan]).double(), dtype)
        ).any()


@pytest.mark.parametrize("method", ["metagpt", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_number_of_threads_does_not_change_a_bit(states, method, monkeypatch):
    base, experts = states(dtype=torch.bfloat16, shapes={"a": (3 * CHUNK + 11,), "b": (1000, 3), "c": ()})
    merged, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        merged.append(merge_state_dicts(base, experts, method))
    monkeypatch.undo()
    assert torch.get_num_threads() == threads
    for other in merged[1:]:
        assert all(torch.equal(merged[0][name], other[name]) for name in base)


# ---------------------------------------------------------------------------- MetaGPT's options


def taus_of(base, experts):
    return [{n: e[n].double() - base[n].double() for n in base} for e in experts]


def merged_tau(base, experts, **numbers):
    merged = merge_state_dicts(
        {n: t.double() for n, t in base.items()}, experts, parameters=MethodParameters(**numbers)
    )
    return {n: merged[n] - base[n].double() for n in base}


def assert_same(got, expected, rtol=1e-5):
    for name in expected:
        torch.testing.assert_close(got[name], expected[name].double(), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize("power", [2.0, 1.0, 0.0, -1.0])
def test_scope_and_norm_power_against_their_definition(states, scope, power):
    base, experts = states(norms=[1, 3, 0.5])
    taus = taus_of(base, experts)
    unit = {"global": lambda n: 0, "tensor": lambda n: n, "layer": layer_of}[scope]
    expected = {}
    for name in base:
        same = [n for n in base if unit(n) == unit(name)]
        c = [sum(tau[n].square().sum() for n in same) ** (power / 2) for tau in taus]
        expected[name] = sum(ct / sum(c) * tau[name] for ct, tau in zip(c, taus, strict=True))
    assert_same(merged_tau(base, experts, scope=scope, norm_power=power), expected)


def test_scale_multiplies_the_merged_task_vector(states):
    base, experts = states()
    plain = merged_tau(base, experts)
    assert_same(merged_tau(base, experts, scale=0.5), {n: 0.5 * t for n, t in plain.items()})


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from([2.0, 0.0, 1.0, -1.0]),
)
def test_capped_coefficients_sum_to_one_and_keep_the_ratios_below_the_cap(norms, share, power):
    limit = 1 / len(norms) + share * (1 - 1 / len(norms))
    squares = torch.tensor(norms, dtype=torch.float64).square()
    free = metagpt_coefficients(torch.diag(squares), norm_power=power)
    capped = metagpt_coefficients(torch.diag(squares), norm_power=power, max_coefficient=limit)
    assert float(capped.sum()) == pytest.approx(1) and capped.max() <= limit + 1e-12
    # A subnormal number has too few digits left for a ratio.
    below = (capped < limit - 1e-9) & (free >= torch.finfo(torch.float64).tiny)
    ratios = capped[below] / free[below]
    assert ratios.numel() == 0 or ratios.max() == pytest.approx(float(ratios.min()), rel=1e-6)
    assert (capped >= free - 1e-12)[below].all()


def test_coefficients_by_hand():
    matrix = torch.diag(torch.tensor([16.0, 4.0, 1.0], dtype=torch.float64))
    assert metagpt_coefficients(matrix, norm_power=1).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert metagpt_coefficients(matrix, norm_power=-1).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert metagpt_coefficients(matrix, norm_power=0).tolist() == [1 / 3] * 3
    assert metagpt_coefficients(matrix, max_coefficient=0.5).tolist() == pytest.approx([0.5, 0.4, 0.1])
    zero = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    assert metagpt_coefficients(zero, norm_power=-1).tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert metagpt_coefficients(zero, norm_power=-400)[2] == 1  # powers of large ratios do not overflow
    with pytest.raises(UserError, match="less than 1/3"):
        metagpt_coefficients(matrix, max_coefficient=0.2)


@pytest.mark.parametrize("norms", ["before_trim", "after_trim"])
def test_metagpt_with_ties(states, norms):
    base, experts = states(norms=[1, 3, 0.5])
    taus = torch.stack([flat(tau) for tau in taus_of(base, experts)])
    kept = round(0.3 * taus.shape[1])
    thin = torch.stack([t.where(t.abs() >= t.abs().sort().values[-kept], 0.0) for t in taus])
    weights = (thin if norms == "after_trim" else taus).square().sum(1)
    weights = (weights / weights.sum())[:, None]
    sign = torch.sign((weights * thin).sum(0))
    agree = (torch.sign(thin) == sign) & (sign != 0)
    expected = (weights * thin * agree).sum(0) / (weights * agree).sum(0).clamp_min(1e-300)
    got = flat(merged_tau(base, experts, trim="ties", density=0.3, norms=norms))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("norms", ["before_trim", "after_trim"])
def test_metagpt_with_dare(states, norms):
    base, experts = states(norms=[1, 3, 0.5])
    taus = taus_of(base, experts)
    thin = [
        {n: t.flatten() * keep_mask(0, str(i), n, 0, t.numel(), 0.3) / 0.3 for n, t in tau.items()}
        for i, tau in enumerate(taus)
    ]
    weights = [
        sum(t.square().sum() for t in tau.values()) for tau in (thin if norms == "after_trim" else taus)
    ]
    expected = {
        n: sum(w * t[n] for w, t in zip(weights, thin, strict=True)).view(base[n].shape) / sum(weights)
        for n in base
    }
    assert_same(merged_tau(base, experts, trim="dare", density=0.3, norms=norms), expected)


def test_dare_ties_elects_among_what_was_not_dropped(states):
    base, experts = states()
    doubles_ = {n: t.double() for n, t in base.items()}
    got = flat(merge_state_dicts(doubles_, experts, "dare_ties", density=0.4)) - flat(base)
    taus = taus_of(base, experts)
    thin = torch.stack(
        [
            torch.cat(
                [t.flatten() * keep_mask(0, str(i), n, 0, t.numel(), 0.4) / 0.4 for n, t in tau.items()]
            )
            for i, tau in enumerate(taus)
        ]
    )
    sign = torch.sign(thin.sum(0))
    agree = (torch.sign(thin) == sign) & (sign != 0)
    torch.testing.assert_close(got, (thin * agree).sum(0) / agree.sum(0).clamp_min(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("threshold", [0.0, 1.1754944e-38, 0.1, 1.0, 3.0])
def test_trim_is_decided_by_the_float32_magnitude(threshold):
    edge = torch.tensor(threshold, dtype=torch.float32)
    around = [edge.double()]
    for _ in range(3):
        around.append(torch.nextafter(around[-1], torch.tensor(-1.0).double()))
    below = (edge.double() + torch.nextafter(edge, torch.tensor(-1.0)).double()) / 2
    for towards in (-1.0, 9.0):
        around += [below, torch.nextafter(below, torch.tensor(towards).double())]
    values = torch.stack(around + [-a for a in around])
    expected = values.where(values.float().abs() >= float(edge), 0.0)
    assert torch.equal(values.where(values.abs() > largest_below(float(edge)), 0.0), expected)


@pytest.mark.parametrize("method", ["metagpt", "ties", "dare_linear", "della", "tsv"])
def test_running_statistics_are_averaged_and_have_no_part_in_norms(states, method):
    base, experts = states(2)
    plain = merge_state_dicts(base, experts, method)
    for i, state in enumerate([base, *experts]):
        state["bn.running_mean"] = torch.full((3,), 10.0 * i)
        state["bn.running_var"] = torch.full((3,), 100.0 * i)
        state["bn.num_batches_tracked"] = torch.tensor(i)
    merged = merge_state_dicts(base, experts, method)
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert merged["bn.running_mean"].tolist() == [15.0] * 3
    assert merged["bn.running_var"].tolist() == [150.0] * 3
    assert merged["bn.num_batches_tracked"] == 0
    assert set(gram(base, experts)) == set(plain)


def test_units_name_layers_and_their_coefficients():
    assert [
        layer_of(n) for n in ("model.layers.10.mlp.weight", "lm_head.weight", "h.3", "0.weight", "a.b2.c")
    ] == [
        "model.layers.10",
        "lm_head.weight",
        "h.3",
        "0",
        "a.b2.c",
    ]
