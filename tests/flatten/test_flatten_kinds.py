"""Truncation, the stochastic shift, free bias, softmax gauge, and solvers that fail."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from galenic.flatten import centre_gauge, choose_rows, collect, minimum_norm, ridge, stochastic, truncated
from galenic.flatten.shifts import shift_weight
from galenic.flatten.spectra import centred_spectrum, row_spectrum, spectrum
from galenic.runtime import UserError


def data(rows, width, outputs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=generator, dtype=torch.float64),
        torch.randn(outputs, width, generator=generator, dtype=torch.float64),
    )


# ---------------------------------------------------------------------------- truncation


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(2, 10), st.integers(1, 12), st.integers(0, 10**6))
def test_truncation_to_a_rank_is_that_of_the_inputs(rows, width, rank, seed):
    a, w = data(rows, width, seed=seed)
    done = shift_weight(w, spectrum(a.T @ a), rank=rank)
    _, _, right = torch.linalg.svd(a, full_matrices=False)
    kept = right[: min(rank, rows, width)]
    torch.testing.assert_close(done.weight, w @ kept.T @ kept, rtol=1e-6, atol=1e-7)
    measured = float((a @ (done.weight - w).T).norm() / (a @ w.T).norm())
    assert measured == pytest.approx(done.output_change, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(2, 10), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_truncation_by_energy_keeps_the_fewest_directions_that_hold_it(rows, width, energy, seed):
    a, w = data(rows, width, seed=seed)
    c = a.T @ a
    done = shift_weight(w, spectrum(c), energy=energy)
    assert done.output_change**2 <= 1 - energy + 1e-9
    ranks = [shift_weight(w, spectrum(c), rank=r) for r in range(1, width + 1)]
    fits = [r for r in ranks if r.output_change**2 <= 1 - energy + 1e-9]
    torch.testing.assert_close(done.weight, fits[0].weight, rtol=1e-6, atol=1e-7)


def test_ridge_saves_more_norm_than_truncation_at_the_same_price():
    a, w = data(50, 10)
    c = a.T @ a
    cut = shift_weight(w, spectrum(c), rank=6)
    assert ridge(w, c, cut.output_change).norm() < truncated(w, c, rank=6).norm()


def test_every_kind_of_shift_excludes_the_others_and_checks_its_number():
    a, w = data(20, 5)
    inputs = spectrum(a.T @ a)
    for wrong, message in (
        ({"rank": 2, "energy": 0.5}, "one of output_budget, rank and energy"),
        ({"rank": 2, "output_budget": 0.5}, "one of output_budget, rank and energy"),
        ({"rank": 0}, "rank: 0 keeps nothing"),
        ({"energy": 0.0}, "not in"),
        ({"energy": 1.5}, "not in"),
    ):
        with pytest.raises(UserError, match=message):
            shift_weight(w, inputs, **wrong)


# ---------------------------------------------------------------------------- stochastic


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(2, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_stochastic_shift_keeps_its_rows_even_when_they_depend_on_each_other(rank, width, rows, seed):
    a, w = data(rank, width, seed=seed)
    mixed = data(rows, rank, seed=seed + 1)[0] @ a  # rows of lower rank than their number, often
    shifted = stochastic(w, mixed)
    torch.testing.assert_close(mixed @ shifted.T, mixed @ w.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted, w @ torch.linalg.pinv(mixed) @ mixed, rtol=1e-7, atol=1e-7)


def test_qr_tells_ranks_that_a_gram_matrix_cannot():
    """Singular values from 1 to 1e-12: the Gram matrix loses those below 1.5e-8."""
    a, _ = data(40, 12)
    left, _, right = torch.linalg.svd(a, full_matrices=False)
    a = left[:, :10] * torch.logspace(0, -12, 10, dtype=torch.float64) @ right[:10]
    assert row_spectrum(a).rank == 10 and spectrum(a.T @ a).rank < 10
    model = nn.Sequential(nn.Linear(12, 3)).double()
    by_qr = collect(model, a.split(7), method="qr")
    assert by_qr.spectrum("0").rank == 10 and collect(model, a.split(7)).spectrum("0").rank < 10
    torch.testing.assert_close(by_qr.gram("0"), a.T @ a, rtol=1e-12, atol=1e-14)


def test_rows_are_chosen_of_every_class_alike():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    generator = torch.Generator().manual_seed(0)
    chosen = choose_rows(83, 15, labels=labels, generator=generator)
    assert len(set(chosen.tolist())) == 15 and chosen.tolist() == sorted(chosen.tolist())
    assert labels[chosen].bincount().tolist() == [6, 6, 3]
    assert choose_rows(83, 83, labels=labels, generator=generator).tolist() == list(range(83))
    assert not torch.equal(choose_rows(83, 15, labels=labels, generator=generator), chosen)
    assert len(set(choose_rows(83, 20, generator=generator).tolist())) == 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda g: choose_rows(9, 2, labels=torch.arange(9) % 3, generator=g),
            "2 rows cannot show 3 classes",
        ),
        (lambda g: choose_rows(9, 10, generator=g), "10 rows of 9"),
        (lambda g: choose_rows(9, 0, generator=g), "0 rows of 9"),
        (lambda g: choose_rows(9, 4, labels=torch.ones(5), generator=g), "5 labels for 9 samples"),
        (lambda g: stochastic(torch.ones(2, 3), torch.ones(0, 3)), "give rows of inputs"),
        (lambda g: stochastic(torch.ones(2, 3), torch.full((2, 3), math.nan)), "NaN"),
        (lambda g: stochastic(torch.ones(2, 3), torch.ones(2, 4)), "does not take 4 inputs"),
    ],
)
def test_stochastic_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.Generator())


# ---------------------------------------------------------------------------- bias


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 12),
    st.integers(1, 10),
    st.integers(0, 10**6),
    st.sampled_from([{}, {"output_budget": 0.05}, {"rank": 1}]),
    st.booleans(),
)
def test_a_free_bias_keeps_outputs_at_a_smaller_norm(rows, width, seed, how, by_qr):
    a, w = data(rows, width, seed=seed)
    a = a + 2  # inputs with a mean
    bias = data(4, 1, seed=seed + 1)[0].flatten()
    if by_qr:
        layer = nn.Sequential(nn.Linear(width, 4)).double()
        inputs = collect(layer, [a], method="qr").spectrum("0", centred=True)
    else:
        inputs = centred_spectrum(a.T @ a, a.sum(0), rows)
    done = shift_weight(w, inputs, bias=bias, **how)
    moved = a @ (done.weight - w).T + (done.bias - bias)
    measured = float(moved.norm() / (a @ w.T).norm())
    assert measured == pytest.approx(done.output_change, rel=1e-6, abs=1e-6)
    assert measured == pytest.approx(done.rounded_change, rel=1e-6, abs=1e-6)
    if not how:
        assert done.weight.norm() <= minimum_norm(w, a.T @ a).norm() * (1 + 1e-9)
        assert inputs.rank == min(rows - 1, width)


def test_centred_inputs_without_a_bias_are_refused():
    a, w = data(5, 3)
    with pytest.raises(UserError, match="need a bias"):
        shift_weight(w, centred_spectrum(a.T @ a, a.sum(0), 5))


# ---------------------------------------------------------------------------- gauge


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_the_gauge_leaves_probabilities_alone_on_any_input(classes, width, seed):
    _, w = data(1, width, classes, seed)
    bias = data(classes, 1, seed=seed + 1)[0].flatten()
    weight, moved = centre_gauge(w, bias)
    x = 10 * data(20, width, seed=seed + 2)[0]
    old, new = (x @ w.T + bias).softmax(-1), (x @ weight.T + moved).softmax(-1)
    torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-12)
    assert weight.norm() <= w.norm() * (1 + 1e-12) and float(weight.sum(0).abs().max()) < 1e-12 * (
        1 + classes
    )
    assert centre_gauge(w)[1] is None
    assert centre_gauge(w.half())[0].dtype == torch.float16


def test_gauge_and_exact_shift_commute():
    a, w = data(4, 9)
    c = a.T @ a
    torch.testing.assert_close(
        centre_gauge(minimum_norm(w, c))[0], minimum_norm(centre_gauge(w)[0], c), rtol=1e-12, atol=1e-12
    )


# ---------------------------------------------------------------------------- solvers that fail


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_failing_eigensolver_is_followed_by_another(monkeypatch, failures, how):
    a, w = data(6, 9)
    expected = minimum_norm(w, a.T @ a)
    true, calls = torch.linalg.eigh, []

    def broken(matrix):
        calls.append(matrix.device)
        if len(calls) > failures:
            return true(matrix)
        if how == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        values, vectors = true(matrix)
        return values * math.nan, vectors

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    torch.testing.assert_close(minimum_norm(w, a.T @ a), expected, rtol=1e-9, atol=1e-10)
    assert len(calls) == 2  # then the singular value decomposition


def test_when_every_solver_fails_the_layer_and_a_way_out_are_named(monkeypatch):
    def broken(*_, **__):
        raise torch.linalg.LinAlgError("failed to converge")

    model = nn.Sequential(nn.Linear(5, 2)).double()
    statistics = collect(model, [data(3, 5)[0]])
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    monkeypatch.setattr(torch.linalg, "svd", broken)
    with pytest.raises(UserError, match=r"layer '0': its 5 inputs .*failed to converge.*leave it out"):
        statistics.spectrum("0")


def test_out_of_memory_names_the_layer_and_a_mode_that_fits(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    model = nn.Sequential(nn.Linear(5, 2)).double()
    statistics = collect(model, [data(3, 5)[0]])
    for solver in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, solver, full)
    with pytest.raises(UserError, match=r"layer '0'.*20 GiB.*method: qr"):
        statistics.spectrum("0")


def test_a_decomposition_serves_all_that_share_it(monkeypatch):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.gate(x) * self.up(x)

    statistics = collect(Gated().double(), [data(3, 5)[0]])
    true, calls = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (calls.append(1), true(m))[1])
    assert statistics.spectrum("gate") is statistics.spectrum("up") and len(calls) == 1


def test_a_large_mean_does_not_pass_for_a_direction():
    a, _ = data(30, 3)
    a = torch.cat([a, a @ data(3, 3, seed=1)[0]], 1) + 1e4  # rank 3 but for the mean
    model = nn.Sequential(nn.Linear(6, 2)).double()
    for method in ("gram", "qr"):
        assert collect(model, a.split(8), method=method).spectrum("0", centred=True).rank == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_of_inputs_in_float32_are_exact_too(dtype):
    """Small whole numbers: their products are exact in either type, and there is more than one stripe of the matrix."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        torch.randint(-4, 5, shape, generator=generator).to(dtype) for shape in ((500, 131), (131, 300))
    ]
    a = factors[0] @ factors[1]
    model = nn.Sequential(nn.Linear(300, 2, bias=False, dtype=dtype))
    statistics = collect(model, a.split(90))
    assert torch.equal(statistics.gram("0"), a.double().T @ a.double())
    assert statistics.spectrum("0").rank == torch.linalg.matrix_rank(a.double()) == 131


@pytest.mark.parametrize(("method", "least", "most"), [("gram", 21, 24), ("qr", 32, 32)])
def test_directions_of_float32_inputs_are_told_from_rounding_as_far_as_documented(method, least, most):
    """Rows 2^-k times rows of a Hadamard matrix: singular values fall by halves, and nothing is rounded but sums."""
    signs = torch.ones(1, 1)
    for _ in range(8):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    scales = 2.0 ** -torch.arange(32)
    rows = (scales[:, None] * signs[5:37])[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    model = nn.Sequential(nn.Linear(256, 2, bias=False))
    inputs = collect(model, rows.split(10), method=method).spectrum("0")
    # The documented floor, 1.5e-8 sqrt(256) of the largest, lies between 2^-22 and 2^-21.
    assert least <= inputs.rank <= most
    kept = inputs.vectors[0][:, inputs.spanned[0]]
    for row in signs[5 : 5 + least].double() / 16:
        assert float((row - kept @ (kept.T @ row)).norm()) < 0.02
