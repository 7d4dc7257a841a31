"""Hessian and Gauss-Newton products, and what trace estimators miss by, against curvlinops."""

import numpy as np
import pytest
import torch
from parity_helpers import drive
from torch import nn

from galenic.flatten.products import gauss_newton, hessian
from galenic.flatten.traces import hutchpp, xtrace

pytestmark = pytest.mark.parity

LAYERS = [
    ("Conv2d", (1, 3, 3)),
    ("Tanh", ()),
    ("Flatten", ()),
    ("Linear", (48, 6)),
    ("ReLU", ()),
    ("Linear", (6, 4)),
]
BATCHES = [13, 10, 2]
PRODUCTS, DRAWS = 24, 40


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    model = nn.Sequential(*(getattr(nn, kind)(*sizes) for kind, sizes in LAYERS)).double()
    x, y = torch.randn(25, 1, 6, 6, dtype=torch.float64), torch.randint(0, 4, (25,))
    batches = list(zip(x.split(BATCHES), y.split(BATCHES), strict=True))
    parameters = list(model.parameters())

    def loss_of_outputs(outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])

    return model, x, y, {
        "hessian": hessian(lambda batch: loss_of_outputs(model(batch[0]), batch), parameters, batches),
        "gauss_newton": gauss_newton(lambda batch: model(batch[0]), loss_of_outputs, parameters, batches),
    }  # fmt: skip


@pytest.fixture(scope="module")
def theirs(network, tmp_path_factory):
    model, x, y, _ = network
    workspace = tmp_path_factory.mktemp("curvlinops")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(workspace / "arrays.npz", x=x.numpy(), y=y.numpy(), **state)
    return drive(
        "curvlinops",
        "with_curvlinops",
        workspace,
        arrays=workspace / "arrays.npz",
        layers=LAYERS,
        batches=BATCHES,
        products=PRODUCTS,
        draws=DRAWS,
    )


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_matrices_are_curvlinops_over_unequal_batches(network, theirs, name):
    operator = network[3][name]
    ours = operator.product(torch.eye(operator.size, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(ours, theirs[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(("estimator", "their_name"), [(hutchpp, "hutchpp_trace"), (xtrace, "xtrace")])
def test_estimators_miss_by_as_little_as_curvlinops(network, theirs, name, estimator, their_name):
    """Other probes, so the root mean square of the error over 40 draws is compared."""
    exact = np.trace(theirs[name])
    ours = [
        estimator(network[3][name], products=PRODUCTS, generator=torch.Generator().manual_seed(seed)).mean
        for seed in range(DRAWS)
    ]
    misses = [
        np.sqrt(np.mean((np.array(draws) - exact) ** 2)) for draws in (ours, theirs[f"{name}_{their_name}"])
    ]
    print(f"{name} {their_name}: ours {misses[0]:.3g}, theirs {misses[1]:.3g} of {exact:.4g}")
    assert misses[0] <= 1.5 * misses[1]
