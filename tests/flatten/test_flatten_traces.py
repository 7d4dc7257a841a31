import pytest
import torch
from curvature_problems import Problem, matrix_of, operator_of, source
from torch import nn

from galenic.flatten.curvature import hessian_trace, student_quantile
from galenic.flatten.products import Operator, gauss_newton, hessian, probe_matrix, probe_seeds
from galenic.flatten.traces import hutchinson, hutchpp, last_layer_trace, softmax_trace, xtrace
from galenic.runtime import UserError

ESTIMATORS = [hutchinson, hutchpp, xtrace]
nets = pytest.fixture(scope="module")(lambda: [Problem(seed).dense_hessian() for seed in range(20)])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("products", [12, 24, 36])
def test_estimates_lie_within_their_stated_error_on_20_random_nets(nets, estimator, products):
    """20 nets times 25 draws: 95% within the 95% margin, give or take what 500 cases can tell."""
    cases = []
    for matrix in nets:
        exact = float(matrix.trace())
        for seed in range(25):
            found = estimator(operator_of(matrix), products=products, generator=source(seed))
            cases.append((abs(found.mean - exact), found.standard_error, found.margin))
    distance, error, margin = torch.tensor(cases, dtype=torch.float64).T
    assert (distance <= margin).double().mean() >= 0.93
    if products >= 24:
        assert (distance <= 3 * error).double().mean() >= 0.95
    # An error stated far too large is no error either.
    assert distance.square().mean().sqrt() >= 0.5 * error.square().mean().sqrt()


def test_the_papers_error_of_xtrace_would_be_too_small(nets):
    """Why the jackknife: the leave-one-out estimates are not independent."""
    missed = papers = ours = 0.0
    for matrix in nets:
        for seed in range(25):
            found = xtrace(operator_of(matrix), products=24, generator=source(seed))
            missed += (found.mean - float(matrix.trace())) ** 2
            papers += naive_xtrace(matrix, 12, seed).std() ** 2 / 12
            ours += found.standard_error**2
    assert papers < 0.8 * missed < 0.8 * ours


def naive_xtrace(matrix, width, seed):
    """The estimates tr_i by their definition, one basis for each."""
    probes = probe_matrix(probe_seeds(width, source(seed)), operator_of(matrix))
    values = []
    for i in range(width):
        others = [j for j in range(width) if j != i]
        basis = torch.linalg.qr(matrix @ probes[:, others]).Q
        rest = probes[:, i] - basis @ (basis.T @ probes[:, i])
        values.append((basis.T @ matrix @ basis).trace() + rest @ matrix @ rest)
    return torch.stack(values)


def test_xtrace_and_its_jackknife_are_their_definitions(nets):
    found = xtrace(operator_of(nets[3]), products=16, generator=source(4))
    probes = probe_matrix(probe_seeds(8, source(4)), operator_of(nets[3]))
    torch.testing.assert_close(found.mean, float(naive_xtrace(nets[3], 8, 4).mean()), rtol=1e-9, atol=0)
    without = []
    for j in range(8):
        kept = [i for i in range(8) if i != j]
        values = []
        for i in kept:
            others = [o for o in kept if o != i]
            basis = torch.linalg.qr(nets[3] @ probes[:, others]).Q
            rest = probes[:, i] - basis @ (basis.T @ probes[:, i])
            values.append((basis.T @ nets[3] @ basis).trace() + rest @ nets[3] @ rest)
        without.append(torch.stack(values).mean())
    jackknife = torch.stack(without)
    expected = (7 / 8 * (jackknife - jackknife.mean()).square().sum()).sqrt()
    torch.testing.assert_close(found.standard_error, float(expected), rtol=1e-8, atol=0)


def test_students_quantiles():
    """Against printed tables."""
    for degrees, value in ((1, 12.706), (2, 4.303), (7, 2.365), (30, 2.042), (1000, 1.962)):
        assert student_quantile(0.95, degrees) == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_are_unbiased(nets, estimator):
    """The mean of 2000 estimates is within 3.5 of its own standard errors of the trace."""
    operator, exact = operator_of(nets[0]), float(nets[0].trace())
    means = torch.tensor(
        [estimator(operator, products=12, generator=source(s)).mean for s in range(2000)], dtype=torch.float64
    )
    assert abs(means.mean() - exact) <= 3.5 * means.std() / len(means) ** 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_real_products_give_what_the_dense_matrix_gives(estimator):
    problem = Problem(0)
    found = hessian(problem.loss_fn, problem.parameters, problem.batches)
    arguments = {"products": 24, "generator": source()}
    dense = estimator(operator_of(problem.dense_hessian()), products=24, generator=source())
    torch.testing.assert_close(estimator(found, **arguments).values, dense.values, rtol=1e-9, atol=1e-12)


def test_hutchinson_is_hessian_trace_probe_for_probe():
    problem = Problem(1)
    data = problem.loss_fn, problem.parameters, problem.batches
    torch.testing.assert_close(
        hutchinson(hessian(*data), products=8, generator=source(3)).values,
        hessian_trace(*data, probes=8, generator=source(3)).values,
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_generators_give_equal_probes_and_the_products_asked_for(estimator):
    spent, matrix = [], torch.eye(40, dtype=torch.float64)

    def product(vectors):
        spent.append(vectors.shape[1])
        return matrix @ vectors

    operator = Operator(size=40, device=matrix.device, epsilon=2e-16, product=product)
    estimator(operator, products=12, generator=source(1))
    assert sum(spent) == 12 and len(spent) <= 2
    other = operator_of(torch.diag(torch.rand(40, dtype=torch.float64)) + torch.ones(40, 40))
    draws = [estimator(other, products=12, generator=source(seed)).values for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("estimator", [hutchpp, xtrace])
@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_low_rank_matrices_are_exact(estimator, rank):
    """A Gauss-Newton matrix of few samples, or of none that matter."""
    factor = torch.randn(50, rank, dtype=torch.float64, generator=source(rank))
    found = estimator(operator_of(factor @ factor.T), products=24, generator=source(5))
    exact = float(factor.square().sum())
    torch.testing.assert_close(found.mean, exact, rtol=1e-9, atol=1e-12)
    assert found.standard_error <= 1e-9 * max(exact, 1)


@pytest.mark.parametrize("estimator", [hutchpp, xtrace])
def test_more_products_than_rows_are_exact(estimator):
    matrix = torch.randn(7, 7, dtype=torch.float64, generator=source())
    matrix = matrix + matrix.T
    found = estimator(operator_of(matrix), products=60, generator=source(1))
    torch.testing.assert_close(found.mean, float(matrix.trace()), rtol=1e-9, atol=1e-9)
    assert found.standard_error <= 1e-9


@pytest.mark.parametrize("rank", [10, 11, 12])
def test_xtrace_at_the_edge_of_its_sketch(rank):
    """Twelve probes and a rank beside it: finite, and exact where the eleven others catch everything."""
    factor = torch.randn(50, rank, dtype=torch.float64, generator=source(rank))
    found = xtrace(operator_of(factor @ factor.T), products=24, generator=source(5))
    exact = float(factor.square().sum())
    assert abs(found.mean - exact) <= (1e-9 if rank < 12 else 0.1) * exact
    assert abs(found.mean - exact) <= found.margin + 1e-9 * exact and found.standard_error < 0.2 * exact


def test_the_large_eigenvalues_are_caught():
    """With a steep spectrum the sketching estimators beat Hutchinson's by far at equal cost."""
    basis = torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64, generator=source())).Q
    matrix = (basis * 0.7 ** torch.arange(80.0)) @ basis.T
    errors = {
        estimator: torch.tensor(
            [
                estimator(operator_of(matrix), products=24, generator=source(s)).mean - matrix.trace()
                for s in range(50)
            ]
        ).norm()
        for estimator in ESTIMATORS
    }
    assert 5 * errors[hutchpp] < errors[hutchinson] and 5 * errors[xtrace] < errors[hutchinson]
    assert errors[xtrace] < errors[hutchpp]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_too_few_products_are_refused(estimator):
    with pytest.raises(UserError, match="products: 1 gives no standard error; at least"):
        estimator(operator_of(torch.eye(3)), products=1, generator=source())


# ---------------------------------------------------------------------------- probes of its own for each batch


def test_softmax_trace_lies_within_its_stated_error_and_is_unbiased():
    cases = []
    for net in range(20):
        problem = Problem(net)
        exact = float(problem.dense_gauss_newton().trace())
        for seed in range(10):
            found = softmax_trace(
                problem.outputs_fn, problem.parameters, problem.batches, probes=16, generator=source(seed)
            )
            cases.append(
                ((found.mean - exact) / found.standard_error, abs(found.mean - exact) <= found.margin)
            )
    deviations, inside = torch.tensor(cases).T
    assert inside.mean() >= 0.93 and abs(deviations.mean()) < 3.5 / 200**0.5


def test_softmax_trace_of_a_piecewise_linear_net_is_the_hessians_over_unequal_batches():
    problem = Problem(0, nn.ReLU)
    exact = float(problem.dense_hessian().trace())
    for cut in ([17], [12, 5], [1] * 17):
        batches = list(zip(problem.x.split(cut), problem.y.split(cut), strict=True))
        found = softmax_trace(
            problem.outputs_fn, problem.parameters, batches, probes=1000, generator=source(1)
        )
        assert abs(found.mean - exact) <= 3 * found.standard_error < 0.1 * exact


def test_smaller_batches_give_smaller_errors():
    problem = Problem(1, nn.ReLU)
    batches = [list(zip(problem.x.split(n), problem.y.split(n), strict=True)) for n in (17, 1)]
    errors = [
        softmax_trace(
            problem.outputs_fn, problem.parameters, data, probes=400, generator=source()
        ).standard_error
        for data in batches
    ]
    assert errors[1] < 0.7 * errors[0]


def test_fresh_probes_are_unbiased_and_average_out_over_batches():
    """Eight copies of the data as batches: the squared error is an eighth."""
    problem = Problem(2)
    exact = float(problem.dense_hessian().trace())
    data = [(problem.x, problem.y)] * 8
    shared, fresh = (
        hessian_trace(problem.loss_fn, problem.parameters, data, probes=200, generator=source(), fresh=fresh)
        for fresh in (False, True)
    )
    assert abs(fresh.mean - exact) <= 3 * fresh.standard_error
    assert 0.25 < fresh.standard_error / shared.standard_error < 0.47  # 0.354 expected


def test_softmax_trace_refuses_what_it_cannot_measure():
    problem = Problem(3)
    arguments = problem.outputs_fn, problem.parameters
    with pytest.raises(UserError, match="probes: 1 gives no standard error"):
        softmax_trace(*arguments, problem.batches, probes=1, generator=source())
    with pytest.raises(UserError, match="no batches"):
        softmax_trace(*arguments, [], probes=2, generator=source())
    with torch.no_grad():
        problem.parameters[0][0, 0] = torch.nan
    with pytest.raises(UserError, match="the logits hold NaN or infinity"):
        softmax_trace(*arguments, problem.batches, probes=2, generator=source())


# ---------------------------------------------------------------------------- the last layer


@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_the_last_layers_trace(bias):
    problem = Problem(2)
    head = problem.model[2]
    features = problem.model[:2](problem.x)
    taken = [head.weight, head.bias] if bias else [head.weight]
    rows = last_layer_trace(features, head(features), bias=bias)
    operator = hessian(problem.loss_fn, taken, problem.batches)
    torch.testing.assert_close(rows.mean(), matrix_of(operator).trace(), rtol=1e-12, atol=1e-14)
    same = gauss_newton(problem.outputs_fn, problem.loss_of_outputs, taken, problem.batches)
    torch.testing.assert_close(rows.mean(), matrix_of(same).trace(), rtol=1e-12, atol=1e-14)


def test_the_closed_form_does_not_cancel_at_high_confidence():
    logits = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    small = torch.exp(torch.tensor(-40.0, dtype=torch.float64))
    rows = last_layer_trace(torch.ones(1, 1), logits, bias=False)
    torch.testing.assert_close(rows[0], 4 * small, rtol=1e-12, atol=0)  # 1 - |p|^2 = 4 e + O(e^2)
    plain = 1 - nn.functional.softmax(logits, 1).square().sum()
    assert plain == 0  # what one would have written first
