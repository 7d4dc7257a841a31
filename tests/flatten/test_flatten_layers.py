"""Convolutions as matrices: rows times weight are the real outputs, whatever the geometry."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from galenic.flatten import collect, shift
from galenic.flatten.apply import output_changes, propose
from galenic.flatten.layers import input_rows, output_rows, select_layers
from galenic.flatten.statistics import run_batch, watching
from galenic.runtime import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
PADDING = ["zeros", "circular", "reflect", "replicate"]


def inputs_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(layer, x):
    """(N, K): rows times the layer's matrices, without the bias."""
    rows = torch.cat(list(input_rows(layer, x)), 1)
    weight = layer.weight.detach().reshape(len(rows), -1, rows.shape[2])
    return (rows @ weight.mT).permute(1, 0, 2).reshape(rows.shape[1], -1)


convolutions = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 3),
        "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.one_of(
            st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])
        ),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "padding_mode": st.sampled_from(PADDING),
    }
)


@settings(deadline=None, max_examples=60)
@given(convolutions, st.integers(1, 2), st.integers(1, 2), st.booleans(), st.sampled_from([1, 2]))
def test_rows_times_weight_are_the_outputs_of_a_convolution(options, into, out, batched, dimensions):
    assume(options["padding"] != "same" or options["stride"] == (1, 1))
    options = {
        key: value[0] if dimensions == 1 and isinstance(value, tuple) else value
        for key, value in options.items()
    }
    torch.manual_seed(0)
    kind = nn.Conv1d if dimensions == 1 else nn.Conv2d
    layer = kind(into * options["groups"], out * options["groups"], bias=False, **options).double()
    shape = (6,) if dimensions == 1 else (6, 7)
    x = inputs_of(*([3] if batched else []), layer.in_channels, *shape)
    expected = output_rows(layer, layer(x).detach())
    torch.testing.assert_close(product(layer, x), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    convolutions,
    st.integers(1, 3),
    st.sampled_from(["gram", "qr"]),
    st.sampled_from([0.0, 0.03]),
    st.integers(0, 10**6),
)
def test_shifts_of_convolutions_do_what_they_predict(options, images, method, budget, seed):
    assume(options["padding"] != "same" or options["stride"] == (1, 1))
    torch.manual_seed(seed)
    layer = nn.Conv2d(4 * options["groups"], 2 * options["groups"], **options).double()
    model = nn.Sequential(layer)
    x = inputs_of(images, layer.in_channels, 6, 6, seed=seed)
    statistics = collect(model, [x], method=method)
    proposal = propose(model, statistics, budget)["0"]
    assert proposal.dimension == layer.weight[0].numel() * layer.groups >= proposal.rank
    measured = output_changes(model, [(x, None)], {"0": proposal})["0"]
    assert measured == pytest.approx(
        proposal.output_change, rel=1e-6, abs=1e-6 if method == "gram" else 1e-12
    )
    if budget:
        assert measured == pytest.approx(budget, rel=1e-6)
    before, norm = layer(x).detach(), float(layer.weight.detach().norm())
    shift(model, statistics, output_budget=budget)
    moved = (layer(x).detach() - before).norm() / (before - layer.bias.detach()[:, None, None]).norm()
    assert float(moved) == pytest.approx(measured, rel=1e-6, abs=1e-12)
    assert float(layer.weight.detach().norm()) <= norm * (1 + 1e-12)


def test_a_grouped_convolution_is_its_groups_shifted_alone():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 4, 3, groups=2, bias=False).double()
    x = inputs_of(1, 8, 5, 5)
    whole = propose(nn.Sequential(layer), collect(nn.Sequential(layer), [x], method="qr"))["0"]
    for group in range(2):
        single = nn.Conv2d(4, 2, 3, bias=False).double()
        single.weight.data = layer.weight.data[2 * group : 2 * group + 2].clone()
        model = nn.Sequential(single)
        alone = propose(model, collect(model, [x[:, 4 * group : 4 * group + 4]], method="qr"))["0"]
        assert not alone.noop and alone.rank == 9
        torch.testing.assert_close(whole.weight[2 * group : 2 * group + 2], alone.weight)


def test_blocks_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(2), nn.Linear(9, 4)).double()
    x = inputs_of(5, 2, 4, 4)
    whole = {method: collect(model, [x], method=method) for method in ("gram", "qr")}
    monkeypatch.setattr("galenic.flatten.layers.CHUNK", 30)
    for method, statistics in whole.items():
        small = collect(model, [x], method=method)
        for name in ("0", "2"):
            torch.testing.assert_close(small.gram(name), statistics.gram(name), rtol=1e-12, atol=1e-12)
            assert small.count(name) == statistics.count(name)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 2, 3, stride=2, dilation=2, groups=2), nn.Conv1d(3, 2, 5), nn.Linear(7, 2)]
)
def test_blocks_are_small_even_of_a_single_large_image(layer, monkeypatch):
    x = {nn.Conv2d: inputs_of(2, 4, 23, 17), nn.Conv1d: inputs_of(2, 3, 40), nn.Linear: inputs_of(300, 7)}[
        type(layer)
    ]
    (whole,) = input_rows(layer.double(), x)
    monkeypatch.setattr("galenic.flatten.layers.CHUNK", 300)
    blocks = list(input_rows(layer, x))
    assert len(blocks) > 3 and max(block.numel() for block in blocks) <= 300
    assert torch.equal(torch.cat(blocks, 1), whole)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 2), (30, 6)),
        (nn.Conv1d(4, 2, 3, padding=1, groups=2), (3, 4, 12)),
        (nn.Conv2d(4, 2, (3, 2), stride=2, dilation=(1, 2), padding=1, groups=2), (3, 4, 9, 9)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_chosen_rows_are_those_of_all_that_count(layer, shape, masked, monkeypatch):
    monkeypatch.setattr("galenic.flatten.layers.CHUNK", 100)
    layer, x = layer.double(), inputs_of(*shape)
    whole = torch.cat(list(input_rows(layer, x)), 1)
    keep = torch.arange(whole.shape[1]) % 3 > 0 if masked else torch.ones(whole.shape[1], dtype=torch.bool)
    index = torch.tensor([0, 7, 8, 15])
    blocks = list(input_rows(layer, x, keep if masked else None, chosen=lambda count: index[index < count]))
    assert torch.equal(torch.cat(blocks, 1), whole[:, keep][:, index])


@pytest.mark.parametrize("method", ["gram", "qr"])
def test_one_row_of_every_run_is_taken_and_none_twice(method):
    model = nn.Sequential(nn.Linear(40, 2, bias=False)).double()
    rows = torch.eye(40, dtype=torch.float64)
    statistics = collect(model, [rows[:20], rows[20:]], method=method, every=5)
    taken = statistics.gram("0").diagonal().round()
    assert statistics.count("0") == 8 and taken.unflatten(0, (8, 5)).sum(1).eq(1).all()
    assert len(taken.nonzero().flatten().remainder(5).unique()) > 1, "the same place of every run"
    again = collect(model, [rows[:20], rows[20:]], method=method, every=5)
    assert torch.equal(again.gram("0"), statistics.gram("0"))
    single = collect(model, [rows[:3]], method=method, every=100)
    assert single.count("0") == 1 and float(single.gram("0").trace()) == pytest.approx(1)
    with pytest.raises(UserError, match="every: 0; 1 takes every row"):
        collect(model, [rows], every=0)


@pytest.mark.parametrize(("every", "least", "most"), [(8, 0.08, 0.20), (32, 0.01, 0.06)])
def test_a_sample_predicts_what_a_shift_does_to_all_rows_but_for_d_over_n(every, least, most):
    """8 d rows of 64 d, and 32 d of 1,024 d: outputs of all rows move by some 1 / 8 and 1 / 32 more than predicted."""
    width = 48
    rows = inputs_of(width * (64 if every == 8 else 1024), width)
    model = nn.Sequential(nn.Linear(width, 32, bias=False)).double()
    sampled = collect(model, list(rows.split(512)), every=every)
    assert sampled.count("0") == len(rows) // every
    proposal = propose(model, sampled, 0.02)
    moved = output_changes(model, [(rows, None)], proposal)["0"]
    assert least <= moved / proposal["0"].output_change - 1 <= most


def test_rows_that_wait_are_not_changed_with_the_model_s_inputs():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(40, 40, bias=False)

        def forward(self, x):
            hidden = x.clone()
            return hidden.add_(self.linear(hidden))

    model, x = InPlace().double(), inputs_of(50, 40)
    with watching(model, ["linear"]) as statistics:
        for batch in x.split(7):  # fewer than 40 / 2 rows: they wait
            run_batch(model, batch, statistics)
            seen = x[: statistics.count("linear")]
            torch.testing.assert_close(statistics.gram("linear"), seen.T @ seen, rtol=1e-12, atol=1e-12)
    unread = collect(model, x.split(7))
    torch.testing.assert_close(unread.gram("linear"), x.T @ x, rtol=1e-12, atol=1e-12)


def test_convolutions_share_an_input_only_if_their_windows_are_alike():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 3, 3), nn.Conv1d(2, 5, 3)
            self.c = nn.Conv1d(2, 3, 3, stride=2)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x)

    statistics = collect(Branches().double(), [inputs_of(2, 2, 9)])
    assert statistics.owner == {"a": "a", "b": "a", "c": "c"} and statistics.rows == {"a": 14, "c": 8}


def test_padding_of_text_is_left_out_of_a_one_dimensional_convolution():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.taps = nn.Conv1d(3, 2, 3, padding=1)

        def forward(self, x, attention_mask):
            return self.taps(x)

    model, x = Text().double(), inputs_of(2, 3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    rows = torch.cat(list(input_rows(model.taps, x)), 1)[0][mask.bool().flatten()]
    statistics = collect(model, [{"x": x, "attention_mask": mask}])
    torch.testing.assert_close(statistics.gram("taps"), rows.T @ rows)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose2d(2, 2, 3), "ConvTranspose2d's windows are not gathered here"),
        (nn.Conv3d(2, 2, 3), "Conv3d's windows"),
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), "not a linear layer|parametrised"),
    ],
)
def test_other_convolutions_are_refused_by_name_and_passed_over_by_pattern(layer, message):
    model = nn.Sequential(layer, nn.Conv2d(8, 8, 1))
    with pytest.raises(UserError, match=message):
        select_layers(model, ["0"])
    assert select_layers(model, ["*"]) == ["1"]
