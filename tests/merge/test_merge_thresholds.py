"""Selection by rank: against sorting, for magnitudes that are all different, mostly equal, and badly sampled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.merge import statistics
from galenic.merge.io import StateDict
from galenic.merge.statistics import tensor_thresholds, trim_thresholds


def check(base, experts, keep):
    found, reached = trim_thresholds(
        StateDict(base, "base"),
        [StateDict(expert, "expert") for expert in experts],
        keep,
        chunk=4096,
        workers=1,
    )
    for expert, rank, threshold, count in zip(experts, keep, found, reached, strict=True):
        deltas = torch.cat([(expert[name].float() - base[name].float()).abs().flatten() for name in base])
        assert threshold == deltas.sort(descending=True).values[rank - 1].item()
        assert count == int((deltas >= threshold).sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 20_000),
    kind=st.sampled_from(["different", "rounded", "equal", "zero", "wide"]),
    share=st.floats(0, 1),
    sample=st.sampled_from([1, 64, 4096, 1 << 20]),
    bins=st.sampled_from([2, 16, 1 << 20]),
)
def test_thresholds_are_those_of_sorting(seed, size, kind, share, sample, bins):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator)
    values = {
        "different": values,
        "rounded": values.mul(4).round(),
        "equal": torch.ones(size),
        "zero": torch.zeros(size),
        "wide": values * torch.logspace(-30, 30, size),
    }[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "SAMPLE", sample)
        patch.setattr(statistics, "BINS", bins)
        rank = max(1, round(share * size))
        check({"w": torch.zeros(size)}, [{"w": values}, {"w": -values * 3}], [rank, max(1, size - rank)])


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9])
def test_a_sample_that_misleads_costs_passes_but_no_exactness(monkeypatch, share):
    monkeypatch.setattr(statistics, "SAMPLE", 4096)
    generator = torch.Generator().manual_seed(0)
    size = 40 * 4096
    values = torch.randn(size, generator=generator)
    values[: 4096 * 10] *= 1000
    values[:4096] = 0  # the only part that is sampled
    check({"w": torch.zeros(size)}, [{"w": values}], [round(share * size)])


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
