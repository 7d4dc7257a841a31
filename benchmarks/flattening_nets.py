"""Small networks for small images, and how they are trained."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from galenic.flatten import choose_rows
from galenic.flatten.training import TrainingShift

TERMINAL = 0.99
"""Training accuracy at which the terminal phase begins."""


def shown(width: int) -> int:
    """Returns how many images the stochastic shift keeps: 100, half the features if these are fewer than 200."""
    return min(100, width // 2)


class Net(nn.Module):
    """A body that makes features of images, and a linear head."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def mlp(inputs: int, widths: list[int], norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in zip([inputs, *widths], widths, strict=False):
        layers += [nn.Linear(before, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


def convolution(inputs: int, width: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class Pooled(nn.Module):
    """Means over all places."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


def vgg() -> nn.Sequential:
    """Convolutions and pooling: 16, 32, 64, 128 channels."""
    layers: list[nn.Module] = [convolution(1, 16, stride=2)]
    for before, width in ((16, 32), (32, 64)):
        layers += [convolution(before, width), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, convolution(64, 128), Pooled())


class Residual(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            convolution(inputs, width, stride),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.path(maps) + self.skip(maps))


def resnet() -> nn.Sequential:
    """Three residual blocks: 16, 32, 128 channels."""
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 128, 2)]
    return nn.Sequential(convolution(1, 16, stride=2), *blocks, Pooled())


class Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.path = convolution(inputs, growth)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([maps, self.path(maps)], 1)


def densenet() -> nn.Sequential:
    """Two dense blocks of three layers, growth 12, with a transition between: 64 channels at the end."""
    first = [Dense(16 + 12 * index, 12) for index in range(3)]
    second = [Dense(28 + 12 * index, 12) for index in range(3)]
    transition = [nn.Conv2d(52, 28, 1, bias=False), nn.AvgPool2d(2)]
    return nn.Sequential(
        convolution(1, 16, stride=2), *first, *transition, *second, nn.BatchNorm2d(64), nn.ReLU(), Pooled()
    )


class Attention(nn.Module):
    """A pre-norm transformer block, its attention written out so that it has second derivatives."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        parts = self.mixed(self.norms[0](tokens)).view(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + self.out((shares @ v).transpose(1, 2).reshape(batch, length, width))
        return tokens + self.feed(self.norms[1](tokens))


class Patches(nn.Module):
    def __init__(self, width: int, patch: int, count: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(count, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.patch(images).flatten(2).mT + self.places


class Averaged(nn.Module):
    """Means over all tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def vit(width: int = 64) -> nn.Sequential:
    """16 patches of 7 x 7, three blocks of four heads, the mean of the tokens."""
    blocks = [Attention(width, 4) for _ in range(3)]
    return nn.Sequential(Patches(width, 7, 16), *blocks, nn.LayerNorm(width), Averaged())


NETS: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "mlp": lambda side: (mlp(side * side, [512, 512]), 512),
    "narrow": lambda side: (mlp(side * side, [256, 256]), 256),
    "wide": lambda side: (mlp(side * side, [256, 512], norm=False), 512),
    "vgg": lambda side: (vgg(), 128),
    "resnet": lambda side: (resnet(), 128),
    "densenet": lambda side: (densenet(), 64),
    "vit": lambda side: (vit(), 64),
}
"""Name -> pixels on a side -> body and number of features."""
RATES = {"sgd": 0.05, "adamw": 1e-3}


# ---------------------------------------------------------------------------- training


def train(
    net: Net,
    data: tuple[Tensor, Tensor],
    *,
    optimiser: str,
    decay: float,
    trick: str,
    epochs: int,
    seed: int,
    batch: int = 100,
    watch: Callable[[Net], float],
) -> tuple[Net, dict[str, Any], dict[str, Tensor]]:
    """Trains a network: cosine schedule, two epochs of warm-up.

    Args:
        net: what to train.
        data: images and labels.
        optimiser: `sgd` (Nesterov momentum 0.9) or `adamw`.
        decay: weight decay.
        trick: none, sam (radius 0.05), mixup (alpha 1), swa (the last 40% of epochs at half the rate, averaged),
            smoothing (0.1) or shift (stochastic shift of the head after each epoch of the terminal phase).
        epochs: passes over the data.
        seed: of the order.
        batch: images in a step.
        watch: called after each epoch for the validation error.

    Returns:
        The network (the average with `swa`), what happened, and the weights of the epoch with the least validation
        error, the earliest of equals.
    """
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    groups = list(net.parameters())
    optimizer: torch.optim.Optimizer
    if optimiser == "sgd":
        optimizer = torch.optim.SGD(
            groups, RATES["sgd"], momentum=0.9, nesterov=True, weight_decay=decay, fused=True
        )
    else:
        optimizer = torch.optim.AdamW(groups, RATES["adamw"], weight_decay=decay, fused=True)
    steps = math.ceil(len(labels) / batch)
    averaging = round(0.6 * epochs) if trick == "swa" else epochs
    average = AveragedModel(net)
    shifting = TrainingShift(net, ["head"], accuracy=TERMINAL, method="qr", output_budget=0.0)
    terminal, shifts, best, kept = None, 0, math.inf, net.state_dict()
    for epoch in range(epochs):
        net.train()
        right = 0
        for index, chosen in enumerate(torch.randperm(len(labels), generator=generator).split(batch)):
            done = epoch + index / steps
            wave = 0.5 if epoch >= averaging else 0.5 * (1 + math.cos(math.pi * done / epochs))
            for group in optimizer.param_groups:
                group["lr"] = RATES[optimiser] * min(1.0, (done + 1 / steps) / 2) * wave
            right += step(net, optimizer, images[chosen], labels[chosen], trick, generator)
        accuracy = right / len(labels)
        if accuracy >= TERMINAL and terminal is None:
            terminal = epoch + 1
        if trick == "shift" and shifting.due(epoch, accuracy):
            count = shown(net.head.in_features)
            rows = choose_rows(len(labels), count, labels=labels, generator=generator)
            shifting.shift([images[rows]], optimizer)
            shifts += 1
        if epoch >= averaging:
            average.update_parameters(net)
        if (error := watch(net)) < best:
            best, kept = error, copy.deepcopy(net.state_dict())
    if trick == "swa":
        update_bn(images.split(batch), average)
        net = average.module
    return net.eval(), {"epochs": epochs, "terminal": terminal, "shifts": shifts}, kept


def step(
    net: Net,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    trick: str,
    generator: torch.Generator,
) -> int:
    """Makes one step and returns how many labels the network had right before it (the heavier ones, with Mixup)."""
    smoothing = 0.1 if trick == "smoothing" else 0.0
    share, others = 1.0, torch.arange(len(labels))
    if trick == "mixup":  # share ~ Beta(1, 1)
        share = float(torch.rand(1, generator=generator))
        others = torch.randperm(len(labels), generator=generator)
        images = share * images + (1 - share) * images[others]

    def loss_and_logits() -> tuple[Tensor, Tensor]:
        logits = net(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if share < 1:
            loss = share * loss + (1 - share) * F.cross_entropy(logits, labels[others])
        return loss, logits

    optimizer.zero_grad()
    loss, logits = loss_and_logits()
    loss.backward()
    if trick == "sam":
        ascend(net, optimizer, lambda: loss_and_logits()[0])
    optimizer.step()
    heavier = labels if share >= 0.5 else labels[others]
    return int((logits.argmax(1) == heavier).sum())


def ascend(
    net: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[[], Tensor], radius: float = 0.05
) -> None:
    """Replaces the gradient by that at the worst neighbour, w + radius g / |g|; BatchNorm does not count that pass."""
    tensors = [p for p in net.parameters() if p.grad is not None]
    gradients = [p.grad for p in tensors if p.grad is not None]
    length = torch.stack([g.norm() for g in gradients]).norm() + 1e-12
    kept = [p.detach().clone() for p in tensors]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor += radius / length * gradient
    for norm in norms:
        norm.momentum = 0.0
    optimizer.zero_grad()
    loss_fn().backward()
    for norm in norms:
        norm.momentum = 0.1
    with torch.no_grad():
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)
