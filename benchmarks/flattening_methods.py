"""What is done to a trained network, and what is measured of it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from flattening_nets import Net, shown
from torch import Tensor, nn

from galenic.flatten import choose_rows, collect, feature_curvature, select_shift, shift
from galenic.flatten.lanczos import extreme_eigenvalues
from galenic.flatten.products import hessian
from galenic.flatten.sharpness import matching_scale
from galenic.flatten.traces import last_layer_trace, softmax_trace
from galenic.runtime import UserError

BUDGETS = (0.05, 0.1, 0.2, 0.3)
CURVED = 256
"""Training images that curvature is measured on."""
PROBES = 4
"""Random vectors of a trace, each with new signs in every batch of 32 images."""
STEPS = 10
"""Lanczos steps of the top eigenvalue, on half of these images."""
PLAIN = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
"""The body whose features' curvature is known in closed form."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the head fitted anew, relative to the features' largest eigenvalue."""
CURVED_METHODS = ("original", "exact", "exact, all layers", "SOS", "truncated to K", "ridge 0.1")
CURVED_METHODS += ("curvature-weighted", "curvature-weighted, exact", "selected")
"""The methods whose curvature is measured."""
EQUAL_LOSS = 0.05
"""The loss at which networks of different training are compared."""

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Data:
    """A run's images and labels, in order: training and validation (both as noisy), test (clean)."""

    train: Split
    validation: Split
    test: Split
    classes: int
    seed: int

    @property
    def parts(self) -> list[Split]:
        return [self.train, self.validation, self.test]


def candidates(classes: int) -> list[dict[str, Any]]:
    """Returns what selection by validation may choose from, for the head."""
    ranks: list[dict[str, Any]] = [{"rank": rank} for rank in (classes, 2 * classes, 5 * classes)]
    free = [{"rank": classes - 1, "free_bias": True}]
    return free + ranks + [{"output_budget": budget} for budget in (*BUDGETS, 0.4)]


# ---------------------------------------------------------------------------- what is done


@torch.no_grad()
def features(net: Net, images: Tensor) -> Tensor:
    return torch.cat([net.body(part) for part in images.split(500)])


def methods(net: Net, best: dict[str, Tensor], data: Data) -> Iterator[tuple[str, Net, bool, dict[str, Any]]]:
    """Yields (name, network, whether only its head is another, notes), the original first.

    Args:
        net: a trained network, in eval mode; every method gets a copy.
        best: weights of the epoch with the least validation error.
        data: of the run. No method sees the test split.
    """
    images, labels = data.train
    batches = images.split(500)
    generator = torch.Generator().manual_seed(data.seed)
    yield "original", net, True, {}

    def shifted(statistics: Any, **how: Any) -> tuple[Net, dict[str, Any]]:
        other = copy.deepcopy(net)
        shifts = shift(other, statistics, **how)
        moved = max(found.moved**2 for found in shifts.values())
        return other, {"moved": moved, "noop": moved < 1e-9}

    head = collect(net, batches, ["head"], method="qr")
    other, notes = shifted(head, output_budget=0.0)
    yield "exact", other, True, notes | {"rank": head.spectrum("head").rank}
    other, notes = shifted(collect(net, batches, ["*"]), output_budget=0.0)
    yield "exact, all layers", other, False, notes
    few = choose_rows(len(labels), shown(net.head.in_features), labels=labels, generator=generator)
    other, notes = shifted(collect(net, [images[few]], ["head"], method="qr"), output_budget=0.0)
    yield "SOS", other, True, notes
    for rank in (data.classes, data.classes - 1):
        other, notes = shifted(head, rank=rank)
        yield f"truncated to K{rank - data.classes or ''}", other, True, notes
    for budget in BUDGETS:
        other, notes = shifted(head, output_budget=budget)
        yield f"ridge {budget}", other, True, notes
    spectrum = head.spectrum("head")
    if spectrum.rank < spectrum.dimension:
        metric = feature_curvature(net.body, net.head, batches, probes=48, generator=generator)
        other, notes = shifted(head, metrics={"head": metric})
        yield "curvature-weighted", other, True, notes
        if isinstance(net.body, nn.Sequential) and [type(layer) for layer in net.body] == PLAIN:
            other, notes = shifted(head, metrics={"head": plain_metric(net, images)})
            yield "curvature-weighted, exact", other, True, notes
    yield from selected(net, best, head, data)


@torch.no_grad()
def plain_metric(net: Net, images: Tensor) -> Tensor:
    """Returns mean_i (1 - |p_i|^2) J_i J_i^T without probes, for a body of two linear layers with ReLU.

        J_i J_i^T = D_2 [(|h_i|^2 + 1) I + (|x_i|^2 + 1) W_2 D_1 W_2^T] D_2,    h = relu(W_1 x + b_1)

    with D the 0/1 diagonals of the units that fire for image i.
    """
    body: Any = net.body
    first, second = body[1], body[3]
    inputs = images.flatten(1)
    hidden = first(inputs)
    fires = second(hidden.relu()) > 0
    weights = 1 - net(images).softmax(1).square().sum(1)
    total = torch.zeros(second.out_features, second.out_features)
    for x, h, fired, weight in zip(inputs, hidden, fires, weights, strict=True):
        active = second.weight[:, h > 0] * fired[:, None]
        own = (h.relu().square().sum() + 1) * fired
        total += weight * ((x.square().sum() + 1) * active @ active.T + own.diag())
    return total.double() / len(inputs)


def selected(
    net: Net, best: dict[str, Tensor], head: Any, data: Data
) -> Iterator[tuple[str, Net, bool, dict[str, Any]]]:
    """Yields what the validation images choose: a shift, and other people's ways to deal with noise."""
    held, wanted = features(net, data.validation[0]), data.validation[1]
    other = copy.deepcopy(net)
    choice = select_shift(
        other,
        head,
        candidates(data.classes),
        lambda: (other.head(held).argmax(1) != wanted).double(),
        caution=1.0,  # the tables tell what 2 would have chosen of the same
    )
    tried = [(found.difference, found.standard_error) for found in choice.candidates]
    yield "selected", other, True, {"chosen": choice.chosen, "tried": tried}

    early = copy.deepcopy(net)
    early.load_state_dict(best)
    yield "early stopping", early.eval(), False, {}

    inputs = features(net, data.train[0])
    targets = F.one_hot(data.train[1], data.classes).double()
    fits = [refitted(net, inputs, targets, damping) for damping in RIDGES]
    errors = [float((fit.head(held).argmax(1) != wanted).double().mean()) for fit in fits]
    fit = fits[errors.index(min(errors))]
    rescaled(fit, best_scale(fit.head(held), wanted))
    yield "head fitted anew by ridge", fit, True, {"damping": RIDGES[errors.index(min(errors))]}

    warm = copy.deepcopy(net)
    scale = best_scale(warm.head(held), wanted)
    rescaled(warm, scale)
    yield "temperature", warm, True, {"scale": scale}


@torch.no_grad()
def refitted(net: Net, inputs: Tensor, targets: Tensor, damping: float) -> Net:
    """Returns the network with a head that is the ridge regression of one-hot targets on the centred features."""
    wide = inputs.double()
    centred, mean = wide - wide.mean(0), targets.mean(0)
    gram = centred.T @ centred
    gram += damping * torch.linalg.matrix_norm(gram, 2) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (targets - mean)).T
    other = copy.deepcopy(net)
    other.head.weight.copy_(weight)
    other.head.bias.copy_(mean - weight @ wide.mean(0))
    return other


@torch.no_grad()
def best_scale(logits: Tensor, labels: Tensor) -> float:
    """Returns the scale of the logits with the least cross-entropy, by golden section on its logarithm."""
    low, high = -6.0, 6.0
    ratio = (5**0.5 - 1) / 2

    def loss(power: float) -> float:
        return float(F.cross_entropy(logits.double() * 2.0**power, labels))

    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return 2.0**low


@torch.no_grad()
def rescaled(net: Net, scale: float) -> None:
    """Multiplies the logits."""
    net.head.weight *= scale
    net.head.bias *= scale


# ---------------------------------------------------------------------------- what is measured


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns loss, accuracy (%) and expected calibration error (%)."""
    wide = logits.double()
    sure, guess = wide.softmax(1).max(1)
    right = guess == labels
    return {
        "loss": float(F.cross_entropy(wide, labels)),
        "accuracy": 100 * float(right.double().mean()),
        "ece": 100 * calibration_error(sure, right),
    }


def calibration_error(sure: Tensor, right: Tensor, bins: int = 15) -> float:
    """Returns sum_b n_b / N |accuracy of bin b - its mean confidence|, bins of equal width.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    place = (sure * bins).ceil().clamp(1, bins).long() - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right.double() - sure.double())
    return float(gap.abs().sum() / len(sure))


def curvature(net: Net, split: Split, scale: float = 1.0, *, top: bool) -> dict[str, float]:
    """Returns Gauss-Newton traces of body and head, and the Hessian's top eigenvalue, with the logits times a scale.

    The same images and random vectors for all networks of one shape, so that differences are theirs.
    """
    images, labels = split[0][:CURVED], split[1][:CURVED]
    generator = torch.Generator().manual_seed(0)
    body = softmax_trace(
        lambda batch: scale * net(batch),
        net.body.parameters(),
        images.split(32),
        probes=PROBES,
        generator=generator,
    )
    with torch.no_grad():
        inputs = net.body(images)
        head = scale**2 * float(last_layer_trace(inputs, scale * net.head(inputs)).mean())

    found = {"body": body.mean, "head": head}
    if not top:
        return found

    def loss(batch: Split) -> tuple[Tensor, int]:
        return F.cross_entropy(scale * net(batch[0]), batch[1], reduction="sum"), len(batch[1])

    operator = hessian(loss, net.parameters(), [(images[: CURVED // 2], labels[: CURVED // 2])])
    values = extreme_eigenvalues(operator, 1, generator=generator, steps=STEPS, tolerance=0.01)
    return found | {"top": float(values.largest[0])}


def measure(net: Net, best: dict[str, Tensor], data: Data, *, top: bool) -> dict[str, dict[str, Any]]:
    """Applies every method to a trained network and measures it.

    `matched` is the curvature of the original with its logits scaled until its training loss is the method's:
    the fair comparison, since the trace falls with the loss. `equal` is the network's own at the loss EQUAL_LOSS.
    """
    own = [features(net, images) for images, _ in data.parts]
    rows: dict[str, dict[str, Any]] = {}
    for name, other, head_only, notes in methods(net, best, data):
        if notes.get("noop"):
            rows[name] = rows["original"] | notes
            continue
        inputs = own if head_only else [features(other, images) for images, _ in data.parts]
        with torch.no_grad():
            logits = [other.head(part) for part in inputs]
        splits = zip(("train", "validation", "test"), logits, data.parts, strict=True)
        row: dict[str, Any] = {part: scores(found, labels) for part, found, (_, labels) in splits}
        row |= notes | {"norm": float(other.head.weight.detach().norm())}
        if name in CURVED_METHODS:
            row["curvature"] = curvature(other, data.train, top=top)
            if name == "original":
                row["matched"] = row["curvature"]
                row["equal"] = at_loss(net, own[0], data.train, EQUAL_LOSS, top=top)
            else:
                row["matched"] = at_loss(net, own[0], data.train, row["train"]["loss"], top=top)
        rows[name] = row
    rows["selected"]["candidates"] = tested(net, data, own[2])
    return rows


@torch.no_grad()
def tested(net: Net, data: Data, inputs: Tensor) -> list[float]:
    """Returns the test accuracy of every candidate of the selection, to judge it by afterwards."""
    head = collect(net, data.train[0].split(500), ["head"], method="qr")
    found = []
    for kind in candidates(data.classes):
        other = copy.deepcopy(net)
        shift(other, head, **kind)
        found.append(scores(other.head(inputs), data.test[1])["accuracy"])
    return found


def at_loss(net: Net, inputs: Tensor, split: Split, loss: float, *, top: bool) -> dict[str, float] | None:
    """Returns a network's curvature with its logits scaled to a training loss, None if no scale gives that loss."""
    with torch.no_grad():
        logits = net.head(inputs)
    try:
        scale = matching_scale([(logits, split[1])], loss, tolerance=1e-9)
    except UserError:
        return None
    return curvature(net, split, scale, top=top) | {"scale": scale}
