"""Selection by rank: against sorting, for magnitudes that are all different, mostly equal, and of any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.merge.io import StateDict
from galenic.merge.magnitudes import model_thresholds, tensor_thresholds


def check(base, experts, ranks, workers=1):
    found = model_thresholds(
        StateDict(base, "base"),
        [StateDict(expert, "expert") for expert in experts],
        ranks,
        chunk=4096,
        workers=workers,
    )
    for expert, own, pairs in zip(experts, ranks, found, strict=True):
        deltas = torch.cat([(expert[name].float() - base[name].float()).abs().flatten() for name in base])
        ordered = deltas.sort(descending=True).values
        for rank, (threshold, count) in zip(own, pairs, strict=True):
            assert threshold == ordered[rank - 1].item()
            assert count == int((deltas >= threshold).sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 20_000),
    kind=st.sampled_from(["different", "rounded", "equal", "zero", "wide"]),
    share=st.floats(0, 1),
    workers=st.integers(1, 3),
)
def test_thresholds_are_those_of_sorting(seed, size, kind, share, workers):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator)
    values = {
        "different": values,
        "rounded": values.mul(4).round(),
        "equal": torch.ones(size),
        "zero": torch.zeros(size),
        "wide": values * torch.logspace(-30, 30, size),
    }[kind]
    rank = max(1, round(share * size))
    ranks = [[rank, 1, size], [max(1, size - rank)]]
    check({"w": torch.zeros(size)}, [{"w": values}, {"w": -values * 3}], ranks, workers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_of_other_types(dtype):
    generator = torch.Generator().manual_seed(2)
    base = {"w": torch.randn(9_000, generator=generator).to(dtype)}
    expert = {"w": (base["w"].float() + 0.01 * torch.randn(9_000, generator=generator)).to(dtype)}
    check(base, [expert], [[1, 4000, 8999, 9000]], workers=2)


def test_thresholds_per_tensor():
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.zeros(n) for name, n in (("a", 1), ("b", 7000), ("c", 0))}
    expert = {name: torch.randn(tensor.numel(), generator=generator) for name, tensor in base.items()}
    found = tensor_thresholds(
        StateDict(base, "base"), [StateDict(expert, "e")], lambda n: [[1, max(1, n // 2)]]
    )
    assert found["c"] == []
    for name in ("a", "b"):
        ordered = expert[name].abs().sort(descending=True).values
        assert found[name] == [[ordered[0].item(), ordered[max(1, len(ordered) // 2) - 1].item()]]
