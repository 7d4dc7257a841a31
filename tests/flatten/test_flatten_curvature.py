import itertools
import math

import pytest
import torch
from curvature_problems import Problem, source
from torch import nn

from galenic.flatten import hessian_trace
from galenic.flatten.products import probe_seeds, signs
from galenic.runtime import UserError


def problem(seed):
    """A small net, unequal batches and the exact trace of the mean loss over all samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(17, 5, dtype=torch.float64), torch.randint(0, 3, (17,))
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    parameters = list(model.parameters())

    def loss_fn(batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    loss = nn.functional.cross_entropy(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    exact = 0.0
    for i in range(len(gradient)):
        row = torch.autograd.grad(
            gradient[i], parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        exact += float(torch.cat([r.flatten() for r in row])[i])
    return loss_fn, parameters, batches, exact


def estimate(loss_fn, parameters, batches, probes=64, seed=0):
    return hessian_trace(
        loss_fn, parameters, batches, probes=probes, generator=torch.Generator().manual_seed(seed)
    )


def test_estimates_agree_with_dense_hessians_within_their_error():
    inside = 0
    for seed in range(20):
        *arguments, exact = problem(seed)
        found = estimate(*arguments, seed=seed)
        inside += abs(found.mean - exact) <= 2 * found.standard_error
        assert abs(found.mean - exact) <= 5 * found.standard_error
    assert inside >= 17  # 95% expected; 16 or fewer of 20 has a chance below 2%


def test_a_diagonal_hessian_is_exact_with_any_probe():
    x = torch.arange(1.0, 5.0, dtype=torch.float64, requires_grad=True)
    found = estimate(lambda scale: (scale * (x**4).sum(), 2), [x], [1.0, 3.0], probes=3)
    expected = float((12 * x.detach() ** 2).sum())  # (1 + 3) / (2 + 2)
    assert found.values.tolist() == pytest.approx([expected] * 3) and found.standard_error == pytest.approx(
        0, abs=1e-9
    )


def test_batches_count_by_their_size():
    loss_fn, parameters, batches, _ = problem(0)
    whole = [(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))]
    torch.testing.assert_close(
        estimate(loss_fn, parameters, batches).values,
        estimate(loss_fn, parameters, whole).values,
        rtol=1e-10,
        atol=1e-12,
    )


def test_equal_generators_give_paired_probes():
    arguments = problem(0)[:3]
    assert torch.equal(estimate(*arguments).values, estimate(*arguments).values)
    assert not torch.equal(estimate(*arguments).values, estimate(*arguments, seed=1).values)


def test_unused_and_linear_parameters_have_no_curvature():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert estimate(lambda _: (2 * x.sum(), 1), [x, unused], [None], probes=2).values.tolist() == [0, 0]
    found = estimate(lambda _: ((x**2).sum(), 1), [x, unused], [None], probes=2)
    assert found.values.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("blocks", "edges"), [(2, [0, 36, 57]), (4, [0, 30, 36, 54, 57]), (9, [0, 30, 36, 54, 57])]
)
def test_blocks_leave_out_what_lies_beside_the_diagonal_blocks(blocks, edges):
    """The same probes as without blocks, the dense matrix with zeros outside the blocks."""
    case = Problem(0)
    dense, kept = case.dense_hessian(), torch.zeros(57, 57, dtype=torch.float64)
    for begin, end in itertools.pairwise(edges):
        kept[begin:end, begin:end] = dense[begin:end, begin:end]
    found = hessian_trace(
        case.loss_fn, case.parameters, case.batches, probes=6, generator=source(3), blocks=blocks
    )
    probes = torch.stack([signs(seed, 57) for seed in probe_seeds(6, source(3))]).double()
    torch.testing.assert_close(found.values, ((probes @ kept) * probes).sum(1), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found.values, ((probes @ dense) * probes).sum(1))


def test_blocks_of_layers_err_less_and_agree_with_the_trace():
    case = Problem(1, hidden=20)
    exact = float(case.dense_hessian().trace())
    whole, layers = (
        hessian_trace(
            case.loss_fn, case.parameters, case.batches, probes=200, generator=source(), fresh=True, blocks=n
        )
        for n in (1, 2)
    )
    assert layers.standard_error < 0.8 * whole.standard_error
    assert abs(layers.mean - exact) <= 3 * layers.standard_error


def test_refusals():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(UserError, match="probes: 1"):
        estimate(lambda _: (x.sum(), 1), [x], [None], probes=1)
    with pytest.raises(UserError, match="blocks: 0"):
        hessian_trace(lambda _: (x.sum(), 1), [x], [None], probes=2, generator=source(), blocks=0)
    with pytest.raises(UserError, match="no batches"):
        estimate(lambda _: (x.sum(), 1), [x], [])
    with pytest.raises(UserError, match="the loss is nan"):
        estimate(lambda _: (x.sum() * math.nan, 1), [x], [None])
