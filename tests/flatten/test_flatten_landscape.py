import math

import pytest
import torch
from curvature_problems import source
from torch import nn

from galenic.flatten.landscape import filter_normalised, loss_line, loss_plane
from galenic.flatten.sharpness import mean_loss
from galenic.runtime import UserError


class Net(nn.Module):
    """A convolution, a normalisation with buffers, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture
def net():
    model = Net().eval()
    x, y = torch.randn(9, 2, 6, 6, generator=source()), torch.arange(9) % 4
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]

    def loss_fn(batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    return loss_fn, model, batches


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_every_filter_moves_by_its_own_norm_and_biases_and_norms_stay(net):
    model = net[1]
    direction = filter_normalised(model, source())
    assert set(direction) == {"conv.weight", "head.weight"}
    for name, part in direction.items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(part.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
        assert part.shape == weight.shape and part.dtype == weight.dtype
    assert all(torch.equal(direction[n], p) for n, p in filter_normalised(model, source()).items())
    assert not torch.equal(direction["conv.weight"], filter_normalised(model, source(1))["conv.weight"])


def test_directions_follow_a_rescaling_of_filters(net):
    """What filter normalisation is for: scaled filters get equally scaled directions."""
    model = net[1]
    plain = filter_normalised(model, source())["conv.weight"]
    with torch.no_grad():
        model.conv.weight *= torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    scaled = filter_normalised(model, source())["conv.weight"]
    torch.testing.assert_close(scaled, plain * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1))


def test_the_centre_is_the_loss_and_places_are_where_they_say(net):
    loss_fn, model, batches = net
    before = bits(model)
    directions = filter_normalised(model, source(1)), filter_normalised(model, source(2))
    plane = loss_plane(loss_fn, model, batches, directions, (-1, 0, 0.5), (0, 2))
    line = loss_line(loss_fn, model, batches, directions[0], (-1, 0, 0.5))
    assert plane.shape == (3, 2) and plane.dtype == torch.float64 and same(bits(model), before)
    assert float(plane[1, 0]) == float(line[1]) == mean_loss(loss_fn, batches)
    assert torch.equal(plane[:, 0], line)
    with torch.no_grad():
        for name in directions[0]:
            model.get_parameter(name).add_(0.5 * directions[0][name]).add_(2 * directions[1][name])
    torch.testing.assert_close(float(plane[2, 1]), mean_loss(loss_fn, batches), rtol=1e-6, atol=0)


def test_batches_count_by_their_size(net):
    loss_fn, model, batches = net
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    direction = filter_normalised(model, source())
    lines = [loss_line(loss_fn, model, data, direction, (-0.3, 0.0, 0.3)) for data in (batches, whole)]
    torch.testing.assert_close(lines[0], lines[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_weights_and_buffers_come_back_bit_for_bit_also_after_an_error(net, training):
    loss_fn, model, batches = net
    model.train(training)
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = -0.0
    before, calls = bits(model), []

    def failing(batch):
        calls.append(batch)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss_fn(batch)

    with pytest.raises(KeyboardInterrupt):
        loss_line(failing, model, batches, filter_normalised(model, source()), range(9))
    assert same(bits(model), before) and math.copysign(1, model.conv.weight[0, 0, 0, 0].item()) == -1
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_tied_weights_move_once():
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    direction = filter_normalised(model, source())
    assert list(direction) == ["0.weight"]
    loss = loss_line(lambda _: (head.weight.sum(), 1), model, [None], direction, (0.0, 1.0))
    expected = direction["0.weight"].sum().item()
    assert float(loss[1] - loss[0]) == pytest.approx(expected, rel=1e-5)


def test_losses_that_explode_are_numbers_too(net):
    _, model, batches = net
    direction = filter_normalised(model, source())
    line = loss_line(
        lambda batch: (model.head.weight.sum() * math.nan, 1), model, batches, direction, (0.0, 1.0)
    )
    assert line.isnan().all()


def test_refusals(net):
    loss_fn, model, batches = net
    with pytest.raises(UserError, match=r"'head\.wieght' matches none .*did you mean 'head\.weight'"):
        filter_normalised(model, source(), patterns=["head.wieght"])
    with pytest.raises(UserError, match="biases and norms stay"):
        filter_normalised(model, source(), patterns=["norm.*"])
    assert list(filter_normalised(model, source(), patterns=["head.*"])) == ["head.weight"]
    with pytest.raises(UserError, match=r"no parameter 'tail\.weight'"):
        loss_line(loss_fn, model, batches, {"tail.weight": torch.ones(1)}, (0.0,))
    with pytest.raises(UserError, match="no batches"):
        loss_line(loss_fn, model, [], filter_normalised(model, source()), (0.0,))
