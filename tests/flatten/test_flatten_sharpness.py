import math

import pytest
import torch
from curvature_problems import Problem, matrix_of, source
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from galenic.flatten.lanczos import extreme_eigenvalues
from galenic.flatten.products import hessian
from galenic.flatten.sharpness import adaptive, adaptive_sharpness, loss_at_scale, matching_scale, mean_loss
from galenic.flatten.traces import hutchinson
from galenic.runtime import UserError


def rescale(problem, factor):
    """Multiplies each hidden unit's inputs and divides its outputs: a ReLU network's function stays."""
    first, last = problem.model[0], problem.model[2]
    factors = factor * torch.linspace(0.5, 2, len(first.weight), dtype=first.weight.dtype)
    with torch.no_grad():
        first.weight *= factors[:, None]
        first.bias *= factors
        last.weight /= factors


def operator_of(problem):
    return hessian(problem.loss_fn, problem.parameters, problem.batches)


def test_adaptive_curvature_is_the_hessian_in_units_of_the_weights():
    problem = Problem(0)
    size = problem.flat.abs()
    found = matrix_of(adaptive(operator_of(problem), problem.parameters))
    torch.testing.assert_close(found, size[:, None] * problem.dense_hessian() * size, rtol=1e-10, atol=1e-12)


def test_rescaling_changes_the_trace_and_not_the_adaptive_one():
    problem = Problem(1, nn.ReLU)
    traces = {"plain": [], "adaptive": [], "estimate": [], "top": []}
    for _ in range(2):
        plain = operator_of(problem)
        free = adaptive(plain, problem.parameters)
        traces["plain"].append(float(matrix_of(plain).trace()))
        traces["adaptive"].append(float(matrix_of(free).trace()))
        traces["estimate"].append(hutchinson(free, products=8, generator=source()).mean)
        traces["top"].append(float(extreme_eigenvalues(free, 1, generator=source()).largest))
        rescale(problem, 5.0)
    assert abs(traces["plain"][1] / traces["plain"][0] - 1) > 0.5
    for name in ("adaptive", "estimate", "top"):
        assert traces[name][1] == pytest.approx(traces[name][0], rel=1e-9)


def test_adaptive_sharpness_is_free_of_scale_and_restores_every_bit():
    problem = Problem(2, nn.ReLU)
    before = problem.flat
    values = [adaptive_sharpness(problem.loss_fn, problem.parameters, problem.batches, rho=0.3)]
    assert torch.equal(problem.flat, before) and all(p.grad is None for p in problem.parameters)
    rescale(problem, 7.0)
    values.append(adaptive_sharpness(problem.loss_fn, problem.parameters, problem.batches, rho=0.3))
    assert values[0] > 0 and values[1] == pytest.approx(values[0], rel=1e-9)


def test_adaptive_sharpness_is_asams_step():
    problem = Problem(3)
    flat = problem.flat.requires_grad_()

    def loss(flat):
        return nn.functional.cross_entropy(problem.logits_of(flat), problem.y)

    (slope,) = torch.autograd.grad(loss(flat), flat)
    scaled = flat.abs() * slope
    step = 0.2 * flat.abs() * scaled / scaled.norm()
    assert float((step / flat).detach().norm()) == pytest.approx(0.2)
    found = adaptive_sharpness(problem.loss_fn, problem.parameters, problem.batches, rho=0.2)
    assert found == pytest.approx(float((loss(flat + step) - loss(flat)).detach()), rel=1e-9)


def test_weights_come_back_after_an_error_and_a_flat_place_has_no_sharpness():
    problem, calls = Problem(4), []
    before = problem.flat

    def failing(batch):
        calls.append(batch)
        if len(calls) > 3:
            raise RuntimeError("power cut")
        return problem.loss_fn(batch)

    with pytest.raises(RuntimeError, match="power cut"):
        adaptive_sharpness(failing, problem.parameters, problem.batches, rho=1.0)
    assert torch.equal(problem.flat, before)
    x = torch.zeros(3, requires_grad=True)
    assert adaptive_sharpness(lambda _: ((x**2).sum(), 1), [x], [None], rho=1.0) == 0


def test_refusals_of_sharpness():
    problem = Problem(5)
    with pytest.raises(UserError, match="rho: 0"):
        adaptive_sharpness(problem.loss_fn, problem.parameters, problem.batches, rho=0)
    with pytest.raises(UserError, match="loss is nan"):
        adaptive_sharpness(lambda _: (problem.x.sum() * math.nan, 1), problem.parameters, [None], rho=1)
    with pytest.raises(UserError, match="30 weights for a matrix of 57 rows"):
        adaptive(operator_of(problem), problem.parameters[:1])
    with pytest.raises(UserError, match="no batches"):
        mean_loss(problem.loss_fn, [])


# ---------------------------------------------------------------------------- equal loss


def logits(seed, confidence, wrong=0):
    """Logits of 40 samples, the first `wrong` of them on the wrong side, in batches of 30 and 10."""
    noise = torch.randn(40, 5, dtype=torch.float64, generator=source(seed))
    y = noise.argmax(1)
    y[:wrong] = (y[:wrong] + 1) % 5
    return list(zip((confidence * noise).split([30, 10]), y.split([30, 10]), strict=True))


def test_loss_and_slope_are_cross_entropys():
    batches = logits(0, 2.0, wrong=5)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    z, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(scale * z, y)
    (slope,) = torch.autograd.grad(loss, scale)
    assert loss_at_scale(batches, 1.3) == pytest.approx((loss.item(), slope.item()), rel=1e-12)
    y[:7] = -100
    ignoring = nn.functional.cross_entropy(1.3 * z, y).item()
    assert loss_at_scale([(z, y)], 1.3)[0] == pytest.approx(ignoring, rel=1e-12)


@given(seed=st.integers(0, 50), share=st.floats(1e-9, 0.999))
@settings(max_examples=60, deadline=None)
def test_any_loss_below_chance_is_matched_when_all_is_right(seed, share):
    batches = logits(seed, 1.0)
    wanted = share * math.log(5)
    scale = matching_scale(batches, wanted)
    assert loss_at_scale(batches, scale)[0] == pytest.approx(wanted, rel=1e-11)


@given(seed=st.integers(0, 50), confidence=st.sampled_from([0.2, 1.0, 8.0]), share=st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_with_mistakes_the_match_stays_on_the_networks_side_of_the_minimum(seed, confidence, share):
    batches = logits(seed, confidence, wrong=8)
    value, slope = loss_at_scale(batches, 1.0)
    grid = [loss_at_scale(batches, c / confidence) for c in torch.linspace(0, 4, 400).tolist()]
    least = min(v for v, _ in grid)
    top = math.log(5) if slope < 0 else 2 * value
    wanted = least + 1e-4 + share * (top - least - 1e-4)
    scale = matching_scale(batches, wanted)
    found = loss_at_scale(batches, scale)
    assert found[0] == pytest.approx(wanted, rel=1e-10) and (found[1] > 0) == (slope > 0)


def test_the_networks_own_loss_is_at_scale_one():
    for confidence in (0.2, 8.0):
        batches = logits(1, confidence, wrong=8)
        assert matching_scale(batches, loss_at_scale(batches, 1.0)[0]) == 1.0


def test_unreachable_losses_are_refused_with_the_nearest():
    batches = logits(2, 1.0, wrong=8)
    least = min(loss_at_scale(batches, c)[0] for c in torch.linspace(0, 4, 4000).tolist())
    with pytest.raises(UserError, match=rf"no scale of the logits gives 0\.01; the nearest is {least:.5f}"):
        matching_scale(batches, 0.01)
    with pytest.raises(UserError, match=r"gives 3; the nearest is 1\.609"):  # log 5 at scale 0
        matching_scale(batches, 3.0)
    with pytest.raises(UserError, match=r"gives 0; the nearest"):
        matching_scale(logits(2, 1.0), 0.0)
    with pytest.raises(UserError, match="the loss is nan"):
        matching_scale([(torch.full((2, 3), math.nan), torch.tensor([0, 1]))], 1.0)
    with pytest.raises(UserError, match="no batches"):
        matching_scale([], 1.0)


def test_traces_at_equal_loss_of_networks_that_differ_in_confidence_only():
    """The confound the comparison is for: logits doubled, the trace at equal loss is the same."""
    problem = Problem(6)
    optimizer = torch.optim.SGD(problem.parameters, lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(problem.model(problem.x), problem.y).backward()
        optimizer.step()
    wanted = 0.9 * float(loss_at_scale([(problem.outputs_fn(b), b[1]) for b in problem.batches], 1.0)[0])
    body = problem.parameters[:2]  # the layer before the head
    plain, matched = [], []
    for _ in range(2):
        pairs = [(problem.outputs_fn(batch), batch[1]) for batch in problem.batches]
        scale = matching_scale(pairs, wanted)

        def at_scale(batch, scale=scale):
            return problem.loss_of_outputs(scale * problem.outputs_fn(batch), batch)

        plain.append(float(matrix_of(hessian(problem.loss_fn, body, problem.batches)).trace()))
        matched.append(float(matrix_of(hessian(at_scale, body, problem.batches)).trace()))
        with torch.no_grad():
            for parameter in problem.model[2].parameters():
                parameter *= 2
    assert abs(plain[1] / plain[0] - 1) > 0.1
    assert matched[1] == pytest.approx(matched[0], rel=1e-9)
