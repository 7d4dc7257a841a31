"""The classification benchmark's own arithmetic: files, noise, calibration, intervals, claims."""

import gzip
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fashion_mnist
import flattening_claims as claims
import flattening_data as data
import flattening_methods as methods
import flattening_nets as nets
import flattening_table as table


def test_idx_files_are_read_as_they_were_written(tmp_path):
    values = torch.randint(0, 256, (3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = bytes([0, 0, 8, values.ndim]) + sizes + bytes(values.flatten().tolist())
    (tmp_path / "images.gz").write_bytes(gzip.compress(content))
    assert torch.equal(torch.from_numpy(fashion_mnist.idx(tmp_path / "images.gz")), values)
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"\0\0\x0d\1\0\0\0\0"))
    with pytest.raises(SystemExit, match="not an IDX file"):
        fashion_mnist.idx(tmp_path / "other.gz")


def test_noise_is_in_training_and_validation_and_never_in_the_test(monkeypatch):
    labels = torch.arange(4000) % 10
    images = labels.to(torch.uint8)[:, None, None].expand(-1, 28, 28).contiguous()
    monkeypatch.setattr(data, "everything", lambda name: ((images, labels), None))
    parts = data.splits("fashion", (2000, 1000), 0.2, seed=3)
    shades = data.scaled("fashion", images[:10])[:, 0, 0, 0]  # an image's shade is its true class
    wrong = [
        float(((x[:, 0, 0, 0, None] - shades).abs().argmin(1) != given).double().mean()) for x, given in parts
    ]
    assert [len(given) for _, given in parts] == [2000, 1000, 1000]
    assert 0.15 < wrong[0] < 0.25 and 0.15 < wrong[1] < 0.25 and wrong[2] == 0
    again = data.splits("fashion", (2000, 1000), 0.2, seed=3)
    assert all(
        torch.equal(a, b)
        for one, two in zip(parts, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_calibration_error_is_its_definition():
    sure = torch.tensor([0.95, 0.95, 0.55, 0.52, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, True])
    # Bins of 1/15: (0.933, 1] holds three, (0.533, 0.6] one, (0.467, 0.533] one.
    expected = (abs(2 - 2.9) + abs(1 - 0.55) + abs(1 - 0.52)) / 5
    assert methods.calibration_error(sure, right) == pytest.approx(expected, abs=1e-12)


def test_the_best_scale_is_where_the_loss_is_flat():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, 5, generator=generator)
    labels = (logits / 3).softmax(1).multinomial(1, generator=generator)[:, 0]
    scale = torch.tensor(methods.best_scale(logits, labels), dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(scale * logits.double(), labels).backward()
    assert abs(float(scale.grad)) < 1e-6


def test_the_plain_bodys_curvature_is_that_of_its_jacobians():
    torch.manual_seed(0)
    net = nets.Net(nets.mlp(9, [5, 6], norm=False), 6, 3).eval()
    images = torch.randn(4, 1, 3, 3)
    expected = torch.zeros(6, 6)
    for image in images:
        features = net.body(image[None])[0]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(f, net.body.parameters(), retain_graph=True)])
            for f in features
        ]
        jacobian = torch.stack(rows)
        expected += (1 - net.head(features).softmax(0).square().sum()).detach() * jacobian @ jacobian.T / 4
    torch.testing.assert_close(methods.plain_metric(net, images).float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(nets.NETS))
def test_every_network_trains_a_little(name):
    torch.manual_seed(0)
    body, width = nets.NETS[name](28)
    net = nets.Net(body, width, 10)
    images, labels = torch.randn(20, 1, 28, 28), torch.arange(20) % 10
    net, told, _ = nets.train(
        net,
        (images, labels),
        optimiser="sgd",
        decay=0.0,
        trick="sam",
        epochs=1,
        seed=0,
        watch=lambda net: 1.0,
    )
    assert net(images).shape == (20, 10) and told["epochs"] == 1 and not net.training


def test_sam_takes_its_gradient_at_the_worst_neighbour_and_goes_back():
    weight = torch.nn.Linear(2, 1, bias=False)
    before = weight.weight.detach().clone()
    optimizer = torch.optim.SGD(weight.parameters(), 0.1)
    loss = lambda: weight(torch.tensor([[3.0, 4.0]])).square().sum()  # noqa: E731
    loss().backward()
    direction = weight.weight.grad / weight.weight.grad.norm()
    nets.ascend(weight, optimizer, loss, radius=0.5)
    x = torch.tensor([[3.0, 4.0]])
    expected = 2 * ((before + 0.5 * direction) @ x.T) * x
    torch.testing.assert_close(weight.weight.grad, expected)
    assert torch.equal(weight.weight.detach(), before)


def test_intervals_are_students_and_pooled_by_seed():
    found = table.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.margin == pytest.approx(2.7764 * math.sqrt(2.5) / math.sqrt(5), rel=1e-4)
    runs = [{"run": {"seed": seed}, "x": value} for seed, value in ((0, 1.0), (0, 3.0), (1, 6.0))]
    assert table.over_seeds(runs, lambda run: run["x"]).mean == 4.0
    assert math.isinf(table.interval([1.0]).margin)


def test_the_sign_test_is_exact():
    assert table.sign_test([1, 2, 3, 4, 5]) == (5, 5, 2 / 32)
    assert table.sign_test([0.0, -1.0, 1.0]) == (1, 2, 1.0)
    assert table.sign_test([]) == (0, 0, 1.0)


def fake_run(seed, gain, noise):
    score = {"loss": 0.1, "accuracy": 80.0, "ece": 5.0}
    original = {"train": score, "validation": score, "test": score, "norm": 1.0}
    original |= {"curvature": {"body": 2.0, "head": 1.0}, "equal": None}
    rows = {"original": original}
    for name in ("exact", *table.SHOWN):
        rows[name] = original | {"test": score | {"accuracy": 80.0 + gain}, "noop": True, "matched": None}
    rows["selected"] |= {"candidates": [90.0, 80.0 + gain], "tried": [(-0.1, 0.2), (-0.03, 0.01)]}
    run = {"part": "noise", "data": "fashion", "net": "mlp", "seed": seed, "optimiser": "sgd"}
    return {"run": run | {"decay": 5e-4, "noise": noise, "trick": "none"}, "rows": rows}


@pytest.mark.parametrize(("gain", "noise", "met"), [(2.0, 0.2, True), (1.0, 0.2, False), (-0.2, 0.0, False)])
def test_the_report_says_whether_selection_met_its_target(gain, noise, met):
    runs = [fake_run(seed, gain + 0.01 * seed, noise) for seed in range(5)]
    text = claims.report(runs)
    assert ("**not met**" not in text) == met
    assert "| 80.00 |" in text and f"{gain + 0.02:+.2f} ± 0.02" in text
