"""What an exact shift leaves alone, by dense automatic differentiation in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from galenic.flatten import collect, minimum_norm, shift
from galenic.flatten.shifts import shift_weight
from galenic.flatten.spectra import spectrum


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double(), (
        12,
    )


def relu_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double(), (12,)


def convolutional():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(4, 4, 2, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double(), (4, 3, 3)


def one_dimensional():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv1d(6, 5, 3, dilation=2), nn.GELU(), nn.Flatten(), nn.Linear(10, 3)
    ).double(), (6, 6)


CASES = [
    (network, layer)
    for network, layers in (
        (mlp, "024"),
        (relu_network, "02"),
        (convolutional, "25"),
        (one_dimensional, "03"),
    )
    for layer in layers
]


@pytest.mark.parametrize(("network", "layer"), CASES)
@pytest.mark.parametrize("free_bias", [False, True])
def test_exact_shifts_keep_loss_gradients_and_hessian_of_their_layer_and_later_ones(
    network, layer, free_bias
):
    model, shape = network()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 if len(shape) > 1 else 4, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (len(x),), generator=generator)
    names = [name for name, _ in model.named_parameters() if int(name.split(".")[0]) >= int(layer)]

    def derivatives():
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        sizes = [state[name].numel() for name in names]
        flat = torch.cat([state[name].flatten() for name in names])

        def loss(values):
            parts = {name: v.view_as(state[name]) for name, v in zip(names, values.split(sizes), strict=True)}
            return F.cross_entropy(functional_call(model, state | parts, (x,)), y)

        gradient = torch.func.grad(loss)(flat)
        return loss(flat), gradient, torch.func.jacrev(torch.func.grad(loss))(flat)

    old_loss, old_gradient, old_hessian = derivatives()
    (done,) = shift(
        model, collect(model, [x], [layer], method="qr"), output_budget=0.0, free_bias=free_bias
    ).values()
    assert not done.noop and done.norm_after < 0.999 * done.norm_before
    loss, gradient, hessian = derivatives()
    assert abs(float(loss - old_loss)) <= 1e-12
    assert float((gradient - old_gradient).abs().max()) <= 1e-10
    assert float((hessian - old_hessian).abs().max()) <= 1e-10
    assert float(old_hessian.abs().max()) > 1e-3


@pytest.mark.parametrize("network", [mlp, relu_network, convolutional, one_dimensional])
@pytest.mark.parametrize("method", ["gram", "qr"])
def test_exact_shifts_of_all_layers_at_once_keep_every_output(network, method):
    model, shape = network()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model(x).detach()
    loss = F.cross_entropy(before, torch.tensor([0, 1]))
    done = shift(model, collect(model, [x], method=method), output_budget=0.0)
    assert sum(not s.noop for s in done.values()) >= 2
    assert abs(float(F.cross_entropy(model(x).detach(), torch.tensor([0, 1])) - loss)) <= 1e-12


# ---------------------------------------------------------------------------- merging


def regmean(grams, weights):
    """RegMean's closed form (arXiv 2212.09849): argmin sum_i ||A_i (W - W_i)^T||^2."""
    return torch.linalg.solve(sum(grams), sum(c @ w.T for c, w in zip(grams, weights, strict=True))).T


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(3, 12), st.booleans())
def test_regmean_does_not_see_exact_shifts(seed, rows, anchored):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = random(4, 10)
    inputs = [random(rows, 10) for _ in range(5)]
    weights = [base + 0.1 * random(4, 10) for _ in inputs]
    grams = [a.T @ a for a in inputs]
    shifted = [minimum_norm(w, c, base if anchored else None) for w, c in zip(weights, grams, strict=True)]
    if rows < 10:
        assert all(not torch.equal(w, s) for w, s in zip(weights, shifted, strict=True))
    merged = regmean(grams, weights)
    torch.testing.assert_close(regmean(grams, shifted), merged, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.sampled_from([{}, {"output_budget": 0.1}, {"rank": 2}, {"energy": 0.7}]),
)
def test_anchored_shifts_of_every_kind_never_lengthen_a_task_vector(rows, seed, how):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    base = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    weight = base + 0.1 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
    done = shift_weight(weight, spectrum(a.T @ a), base=base, **how)
    assert (done.weight - base).norm() <= (weight - base).norm() * (1 + 1e-12)
