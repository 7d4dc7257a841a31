import math

import pytest
import torch
from curvature_problems import Problem, matrix_of, source
from torch import nn

from galenic.flatten.products import gauss_newton, hessian, parameter_groups, scaled
from galenic.flatten.traces import softmax_trace
from galenic.runtime import UserError


def hessian_of(problem, **changes):
    given = {"parameters": problem.parameters, "batches": problem.batches} | changes
    return hessian(problem.loss_fn, **given)


def gauss_newton_of(problem, **changes):
    given = {"parameters": problem.parameters, "batches": problem.batches} | changes
    return gauss_newton(problem.outputs_fn, problem.loss_of_outputs, **given)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("seed", range(3))
def test_products_equal_the_dense_matrices_over_unequal_batches(seed):
    problem = Problem(seed)
    close(matrix_of(hessian_of(problem)), problem.dense_hessian())
    close(matrix_of(gauss_newton_of(problem)), problem.dense_gauss_newton())


def test_matrices_are_symmetric_and_gauss_newton_has_no_negative_eigenvalue():
    problem = Problem(3)
    for operator in (hessian_of(problem), gauss_newton_of(problem)):
        matrix = matrix_of(operator)
        close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    assert torch.linalg.eigvalsh(problem.dense_hessian()).min() < -1e-4  # so that the two are told apart


def test_batches_count_by_their_size_in_any_cut():
    problem = Problem(4)
    cuts = [[17], [1, 16], [5, 5, 5, 2]]
    whole = problem.dense_hessian(), problem.dense_gauss_newton()
    for cut in cuts:
        batches = list(zip(problem.x.split(cut), problem.y.split(cut), strict=True))
        close(matrix_of(hessian_of(problem, batches=batches)), whole[0])
        close(matrix_of(gauss_newton_of(problem, batches=batches)), whole[1])


def test_a_group_gives_its_block():
    problem = Problem(5)
    groups = parameter_groups(problem.model, ["0.*", "2.*"])
    dense = problem.dense_hessian()
    start = 0
    for members in groups.values():
        end = start + sum(p.numel() for p in members)
        close(matrix_of(hessian_of(problem, parameters=members)), dense[start:end, start:end])
        close(
            matrix_of(gauss_newton_of(problem, parameters=members)),
            problem.dense_gauss_newton()[start:end, start:end],
        )
        start = end
    assert start == len(dense)


def test_groups_take_each_parameter_once_and_refuse_what_takes_none():
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    model["two"].weight = model["one"].weight
    model["head"].bias.requires_grad_(False)
    groups = parameter_groups(model, ["one.*", "*.weight", "*"])
    assert [len(members) for members in groups.values()] == [2, 1, 1]
    assert groups["*.weight"][0] is model["head"].weight and groups["*"][0] is model["two"].bias
    with pytest.raises(UserError, match=r"'one.wieght' takes no parameter .*did you mean 'one.weight'"):
        parameter_groups(model, ["one.wieght"])
    with pytest.raises(UserError, match="earlier patterns took"):
        parameter_groups(model, ["*", "one.*"])


def test_tied_parameters_count_once_and_frozen_ones_not():
    problem = Problem(6)
    doubled = hessian_of(problem, parameters=[*problem.parameters, problem.parameters[0]])
    assert doubled.size == len(problem.flat)
    problem.parameters[0].requires_grad_(False)
    left = hessian_of(problem)
    assert left.size == len(problem.flat) - problem.parameters[0].numel()
    close(matrix_of(left), problem.dense_hessian()[30:, 30:])


def test_a_tied_weight_has_the_curvature_of_both_its_uses():
    torch.manual_seed(0)
    first, second = (nn.Linear(3, 3, bias=False).double() for _ in range(2))
    second.weight = first.weight
    x = torch.randn(4, 3, dtype=torch.float64)

    def total(weight):
        return (torch.tanh(x @ weight.T) @ weight.T).square().sum()

    found = hessian(
        lambda batch: (second(torch.tanh(first(batch))).square().sum(), 1),
        [first.weight, second.weight],
        [x],
    )
    dense = torch.autograd.functional.hessian(total, first.weight.detach()).reshape(9, 9)
    close(matrix_of(found), dense)


def test_piecewise_linear_nets_have_equal_traces_and_linear_ones_equal_matrices():
    relu = Problem(7, nn.ReLU)
    traces = [matrix_of(of(relu)).trace() for of in (hessian_of, gauss_newton_of)]
    close(traces[0], traces[1])
    head = parameter_groups(relu.model, ["2.*"])["2.*"]  # the logits are linear in the last layer
    close(matrix_of(hessian_of(relu, parameters=head)), matrix_of(gauss_newton_of(relu, parameters=head)))


def test_unused_and_linear_parameters_have_no_curvature():
    x, unused = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert not matrix_of(hessian(lambda _: (2 * x.sum(), 1), [x, unused], [None])).any()
    found = matrix_of(hessian(lambda _: ((x**2).sum(), 1), [x, unused], [None]))
    assert found.diagonal().tolist() == [2, 2, 2, 0, 0] and found.sum() == 6
    for outputs, loss in ((lambda _: x, lambda z, _: (z.sum(), 1)), (lambda _: torch.ones(3), nothing)):
        assert not matrix_of(gauss_newton(outputs, loss, [x, unused], [None])).any()


def nothing(outputs, _):
    return (outputs**2).sum(), 1


def test_scaling_both_sides():
    problem = Problem(8)
    scale = torch.rand(len(problem.flat), dtype=torch.float64)
    close(matrix_of(scaled(hessian_of(problem), scale)), scale[:, None] * problem.dense_hessian() * scale)


def test_products_leave_no_gradients_and_keep_their_own_type():
    problem = Problem(9, dtype=torch.float32)
    found = hessian_of(problem)
    assert matrix_of(found).dtype == torch.float64 and found.epsilon == torch.finfo(torch.float32).eps
    assert all(p.grad is None for p in problem.parameters)


def test_graphs_are_freed_before_the_next_batch():
    """Counts live activations: one batch's graph must be gone when the next batch begins."""
    import gc
    import weakref

    problem = Problem(10)
    seen, alive = [], []

    def loss_fn(batch):
        gc.collect()
        alive.append(sum(reference() is not None for reference in seen))
        logits = problem.model(batch[0])
        seen.append(weakref.ref(logits))
        return nn.functional.cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])

    batches = problem.batches * 3
    hessian(loss_fn, problem.parameters, batches).product(torch.ones(57, 2, dtype=torch.float64))
    assert alive == [0] * 6


def test_refusals():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    one = torch.ones(3, 1, dtype=torch.float64)
    with pytest.raises(UserError, match="no parameter needs a gradient"):
        hessian(lambda _: (x.sum(), 1), [torch.ones(2)], [None])
    with pytest.raises(UserError, match="no batches"):
        hessian(lambda _: (x.sum(), 1), [x], []).product(one)
    with pytest.raises(UserError, match=r"loss is nan.*look for"):
        hessian(lambda _: (x.sum() * math.nan, 1), [x], [None]).product(one)
    with pytest.raises(UserError, match=r"second derivative is not.*float32 or float64"):
        hessian(lambda _: (x.abs().pow(1.5).sum(), 1), [x], [None]).product(one)
    with pytest.raises(UserError, match="loss is inf"):
        gauss_newton(lambda _: x, lambda z, _: ((1 / z).sum(), 1), [x], [None]).product(one)


def test_attention_without_a_second_derivative_is_refused_with_the_way_out():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.randn(1, 2, 5, 8, requires_grad=True)

    def outputs(_):
        return nn.functional.scaled_dot_product_attention(x, x, x)

    def loss(outputs, _):
        return outputs.square().sum(), 1

    ones = torch.ones(80, 1, dtype=torch.float64)
    operators = hessian(lambda b: loss(outputs(b), b), [x], [0]), gauss_newton(outputs, loss, [x], [0])
    for operator in operators:
        with pytest.raises(UserError, match=r"attention.* has no second derivative.*eager"):
            operator.product(ones)
        with sdpa_kernel(SDPBackend.MATH):
            assert operator.product(ones).isfinite().all()
    trace = softmax_trace(lambda _: outputs(0)[0, 0], [x], [0], probes=2, generator=source())
    assert trace.mean > 0  # first derivatives are enough for this one
