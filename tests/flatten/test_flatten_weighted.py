"""Curvature-weighted shifts against true Gauss-Newton matrices of small networks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

from galenic.flatten import (
    collect,
    curvature_weighted,
    feature_curvature,
    least_trace,
    minimum_norm,
    plan_shifts,
    shift,
)
from galenic.flatten.spectra import row_spectrum, spectrum
from galenic.flatten.weighted import checked_curvature_weighted, damped, feature_tangents, null_space
from galenic.runtime import UserError

# The first forward-mode derivative makes torch compile its own rules, which it warns itself about.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def network(seed=0, width=12, classes=4, samples=6):
    """A body of ReLUs with more features than samples, a head, and inputs."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, width), nn.ReLU()).double()
    head = nn.Linear(width, classes).double()
    return body, head, torch.randn(samples, 5, dtype=torch.float64)


def jacobians(body, x):
    """(N, d, P) derivative of the features by all parameters of the body."""
    state = {name: p.detach() for name, p in body.named_parameters()}
    parts = jacrev(lambda s: functional_call(body, s, (x,)))(state)
    return torch.cat([part.flatten(2) for part in parts.values()], 2)


def trace(body, head, x, weight=None):
    """Trace of the Gauss-Newton matrix of the mean cross-entropy by the body's parameters, dense."""
    weight = head.weight.detach() if weight is None else weight
    p = (body(x) @ head.weight.T + head.bias).softmax(-1).detach()
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    logits = weight @ jacobians(body, x)  # (N, K, P)
    return float(torch.einsum("nkp,nkl,nlp->", logits, hessians, logits)) / len(x)


def features(body, x):
    return body(x).detach()


def test_the_dense_trace_is_that_of_the_true_hessian_of_a_relu_network():
    body, head, x = network()
    y = torch.arange(len(x)) % 4
    state = {name: p.detach() for name, p in body.named_parameters()}
    sizes = [p.numel() for p in state.values()]

    def loss(flat):
        parts = {name: v.view_as(p) for (name, p), v in zip(state.items(), flat.split(sizes), strict=True)}
        return F.cross_entropy(head(functional_call(body, parts, (x,))), y)

    flat = torch.cat([p.flatten() for p in state.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    assert float(hessian.trace()) == pytest.approx(trace(body, head, x), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 8),
    st.integers(2, 12),
    st.floats(1e-3, 10),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_the_weighted_norm_is_least_and_outputs_stay(rows, width, damping, seed, thin, anchored):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, w, root = random(rows, width), random(3, width), random(width, 4)
    base = w + 0.1 * random(3, width) if anchored else None
    zero = base if base is not None else 0
    inputs = row_spectrum(a) if thin else spectrum(a.T @ a)
    done = curvature_weighted(w, inputs, root @ root.T, damping=damping, base=base)
    torch.testing.assert_close(a @ done.weight.T, a @ w.T, rtol=1e-6, atol=1e-6)
    metric = damped(root @ root.T, width, damping)

    def objective(value):
        return float(((value - zero) @ metric * (value - zero)).sum())

    least = objective(done.weight)
    assert least <= objective(w) * (1 + 1e-12)
    assert least <= objective(minimum_norm(w, a.T @ a, base)) * (1 + 1e-9)
    null = null_space(inputs)
    for _ in range(5):
        assert objective(done.weight + random(3, null.shape[1]) @ null.T) >= least * (1 - 1e-9)


def test_the_identity_as_metric_gives_the_minimum_norm():
    a, w = torch.randn(4, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    c = a.T @ a
    for metric in (torch.eye(9), torch.zeros(9, 9)):
        done = curvature_weighted(w, spectrum(c), metric)
        torch.testing.assert_close(done.weight, minimum_norm(w, c), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_least_trace_never_raises_the_true_trace_and_no_other_weight_has_less(seed):
    body, head, x = network(seed)
    a = features(body, x)
    jacobian = jacobians(body, x)
    tangents = jacobian.permute(2, 0, 1) * jacobian.shape[2] ** 0.5  # (1/R) sum_r s s^T = J J^T
    p = head(a).softmax(-1).detach()
    done = least_trace(head.weight, row_spectrum(a), p, tangents)
    torch.testing.assert_close(a @ done.weight.T, a @ head.weight.detach().T, rtol=1e-10, atol=1e-10)
    before, after = trace(body, head, x), trace(body, head, x, done.weight)
    assert after <= before * (1 + 1e-12)
    plain = trace(body, head, x, minimum_norm(head.weight, a.T @ a))
    kronecker = torch.einsum("n,ndp,nep->de", 1 - p.square().sum(-1), jacobian, jacobian) / len(x)
    weighted = curvature_weighted(head.weight, row_spectrum(a), kronecker).weight
    assert after <= min(plain, trace(body, head, x, weighted)) * (1 + 1e-9)
    null = null_space(row_spectrum(a))
    for _ in range(3):
        other = done.weight + 0.1 * torch.randn(4, null.shape[1], dtype=torch.float64) @ null.T
        assert trace(body, head, x, other) >= after * (1 - 1e-9)


def test_the_closed_form_lowers_the_true_trace_where_the_minimum_norm_may_raise_it():
    raised = {"norm": 0, "curvature": 0}
    for seed in range(60):
        body, head, x = network(seed, samples=9, classes=2)
        a, jacobian = features(body, x), jacobians(body, x)
        p = head(a).softmax(-1).detach()
        metric = torch.einsum("n,ndp,nep->de", 1 - p.square().sum(-1), jacobian, jacobian) / len(x)
        before = trace(body, head, x)
        raised["norm"] += trace(body, head, x, minimum_norm(head.weight, a.T @ a)) > before * (1 + 1e-9)
        weighted = curvature_weighted(head.weight, spectrum(a.T @ a), metric).weight
        raised["curvature"] += trace(body, head, x, weighted) > before * (1 + 1e-9)
    # The average over samples is an approximation: it may raise the trace, but seldom; the norm often does.
    assert raised["curvature"] <= 1 < raised["norm"]


# ---------------------------------------------------------------------------- the metric


def test_tangents_are_the_jacobian_times_signs():
    body, _, x = network()
    generator = torch.Generator().manual_seed(3)
    ((a, s),) = feature_tangents(body.train(), x, probes=1, generator=generator)
    assert body.training and all(m.training for m in body.modules())
    generator = torch.Generator().manual_seed(3)
    signs = torch.cat([torch.randint(0, 2, (p.numel(),), generator=generator) for p in body.parameters()])
    torch.testing.assert_close(a, features(body, x))
    torch.testing.assert_close(s, jacobians(body, x) @ (2.0 * signs - 1).double(), rtol=1e-10, atol=1e-12)


def test_the_estimated_metric_is_the_dense_one_within_its_error():
    body, head, x = network()
    jacobian, p = jacobians(body, x), head(features(body, x)).softmax(-1).detach()
    dense = torch.einsum("n,ndp,nep->de", 1 - p.square().sum(-1), jacobian, jacobian) / len(x)
    generator = torch.Generator().manual_seed(0)
    estimate = feature_curvature(body, head, [x[:4], x[4:]], probes=4000, generator=generator)
    assert float((estimate - dense).norm() / dense.norm()) < 0.1
    assert torch.equal(estimate, estimate.T)


def test_padding_and_keywords_in_the_metric():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4).double()

        def forward(self, x, attention_mask=None):
            return self.inner(x)

    torch.manual_seed(0)
    body, head = Body(), nn.Linear(4, 2).double()
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])

    def metric(batch):
        return feature_curvature(body, head, [batch], probes=3, generator=torch.Generator().manual_seed(0))

    masked = metric({"x": x, "attention_mask": mask})
    torch.testing.assert_close(masked, metric((x[mask.bool()], None)))


def test_a_model_is_shifted_by_its_metric_at_equal_loss():
    body, head, x = network(2)
    model, y = nn.Sequential(body, head), torch.arange(6) % 4
    metric = feature_curvature(body, head, [x], probes=200, generator=torch.Generator().manual_seed(0))
    before, loss = trace(body, head, x), float(F.cross_entropy(model(x), y).detach())
    done = shift(model, collect(model, [x], ["1"], method="qr"), metrics={"1": metric}, free_bias=True)
    assert not done["1"].noop and done["1"].output_change < 1e-12
    assert abs(float(F.cross_entropy(model(x), y).detach()) - loss) <= 1e-12
    assert trace(body, head, x) < before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, s: curvature_weighted(w, s, torch.eye(4)), "3 x 3 finite numbers"),
        (lambda w, s: curvature_weighted(w, s, torch.eye(3) / 0), "finite"),
        (lambda w, s: curvature_weighted(w, s, torch.eye(3), damping=0), "not positive"),
        (
            lambda w, s: curvature_weighted(
                torch.ones(2, 3), spectrum(torch.eye(3).expand(2, 3, 3)), torch.eye(3)
            ),
            "several groups",
        ),
        (
            lambda w, s: feature_curvature(nn.Linear(3, 3), nn.Linear(3, 2), [], generator=torch.Generator()),
            "no batches",
        ),
        (
            lambda w, s: feature_curvature(
                nn.Linear(3, 3), nn.Linear(3, 2), [torch.ones(1, 3)], probes=0, generator=torch.Generator()
            ),
            "at least 1",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.ones(2, 3), spectrum(torch.diag(torch.tensor([1.0, 0, 0]))))


def test_metrics_are_for_known_layers_and_exact_shifts():
    body, head, x = network()
    model = nn.Sequential(body, head)
    statistics = collect(model, [x], ["1"])
    with pytest.raises(UserError, match="no statistics of layer 'head'"):
        shift(model, statistics, metrics={"head": torch.eye(12)})
    with pytest.raises(UserError, match="are exact"):
        shift(model, statistics, output_budget=0.1, metrics={"1": torch.eye(12)})


def test_a_shift_fitted_to_noise_is_not_made():
    """Of a metric from few directions and one from others, the second decides; no damping that it dislikes is taken."""
    generator = torch.Generator().manual_seed(3)
    width, rows = 24, 8
    features = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    inputs = spectrum(features.T @ features)
    weight = minimum_norm(
        torch.randn(5, width, dtype=torch.float64, generator=generator), features.T @ features
    )
    weight += 0.1 * torch.randn(weight.shape, dtype=torch.float64, generator=generator)

    def metric(probes):
        directions = torch.randn(probes, width, dtype=torch.float64, generator=generator)
        return directions.T @ directions / probes  # its mean is the identity: the minimum norm is best

    judge = metric(100_000)
    before = float(((weight @ judge) * weight).sum())
    raised = 0
    for _ in range(20):
        fitted = metric(4)
        bold = curvature_weighted(weight, inputs, fitted, damping=0.01).weight
        raised += float(((bold @ judge) * bold).sum()) > before
        found, damping = checked_curvature_weighted(weight, inputs, fitted, judge)
        after = float(((found.weight @ judge) * found.weight).sum())
        assert after < before and damping is not None
        torch.testing.assert_close(features @ found.weight.T, features @ weight.T)
        for other in (0.1, 100.0):
            value = curvature_weighted(weight, inputs, fitted, damping=other).weight
            assert after <= float(((value @ judge) * value).sum())
    assert raised > 10  # so unchecked shifts would have harmed


def test_nothing_moves_where_no_damping_is_confirmed():
    weight = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    inputs = spectrum(torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)))
    fitted = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.9], [0.9, 0.9, 1.0]], dtype=torch.float64)
    found, damping = checked_curvature_weighted(weight, inputs, fitted, torch.zeros(3, 3))
    assert damping is None and found.noop and torch.equal(found.weight, weight)
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    kept = model[0].weight.detach().clone()
    statistics = collect(model, [torch.eye(3, dtype=torch.float64)[:1]])
    kind = {"metrics": {"0": fitted}, "checks": {"0": torch.zeros(3, 3)}}
    (plan,) = plan_shifts(model, statistics, **kind)
    assert plan.action == "no-op" and "no shift lowers the trace along random directions" in plan.reason
    shift(model, statistics, **kind)
    assert torch.equal(model[0].weight, kept)
