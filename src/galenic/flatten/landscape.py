"""The loss around a network's weights, along filter-normalised random directions: numbers, no pictures."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from galenic.flatten.products import restored
from galenic.flatten.sharpness import mean_loss
from galenic.runtime import Bar, UserError, nearest

Direction = Mapping[str, Tensor]
"""Parameter name -> direction of its shape; parameters that are absent stay where they are."""


@torch.no_grad()
def filter_normalised(
    model: nn.Module, generator: torch.Generator, *, patterns: Sequence[str] = ("*",)
) -> dict[str, Tensor]:
    """Draws a random direction in which every filter moves in proportion to its own norm.

        d_ij = g_ij |theta_ij| / |g_ij|,    g Gaussian,    filter j of layer i = row j along the first axis

    A filter is a row of a matrix or one output channel of a convolution. Parameters of one axis or none (biases,
    gains and biases of normalisations) stay, as in the paper. Two such directions are all but orthogonal.

    Args:
        model: whose weights give the norms; a tied parameter gets one direction.
        generator: source; the same state gives the same Gaussian, so that two models can be compared.
        patterns: names, or patterns with `*`, of the parameters to move.

    Raises:
        UserError: a pattern that matches no parameter of two or more axes.

    Source: Li et al. 2018, arXiv 1712.09913, section 4.
    """
    filters = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in filters):
            raise UserError(
                f"parameters: '{pattern}' matches none of two or more axes; biases and norms stay"
                + nearest(pattern, filters)
            )
    chosen = {n: p for n, p in filters.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    return {name: _like_filters(p, generator) for name, p in chosen.items()}


def _like_filters(weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    axes = tuple(range(1, weight.ndim))
    norms = torch.linalg.vector_norm(weight.double(), dim=axes, keepdim=True).cpu()
    return (noise * norms / torch.linalg.vector_norm(noise, dim=axes, keepdim=True)).to(weight)


def loss_line(
    loss_fn: Callable[[Any], tuple[Tensor, int]],
    model: nn.Module,
    batches: Sequence[Any],
    direction: Direction,
    places: Sequence[float],
    *,
    bar: Bar | None = None,
) -> Tensor:
    """Returns the mean loss at theta + a d for each a of `places`, (n,) float64; see `loss_plane`."""
    return loss_plane(loss_fn, model, batches, (direction, {}), places, (0.0,), bar=bar)[:, 0]


@torch.no_grad()
def loss_plane(
    loss_fn: Callable[[Any], tuple[Tensor, int]],
    model: nn.Module,
    batches: Sequence[Any],
    directions: tuple[Direction, Direction],
    rows: Sequence[float],
    columns: Sequence[float],
    *,
    bar: Bar | None = None,
) -> Tensor:
    """Returns the mean loss at theta + a d + b e for each a of `rows` and b of `columns`.

    The mode of the model is left as it is: evaluation mode unless you mean otherwise, or every place has its own
    dropout and batch statistics. Weights and buffers come back bit for bit, also after errors.

    Args:
        loss_fn: batch -> (summed loss, number of samples or tokens), computed by `model`.
        model: whose weights move.
        batches: the data, gone through once for every place.
        directions: d and e, as from `filter_normalised`.
        rows: coefficients of d.
        columns: coefficients of e.
        bar: advanced by one for each place.

    Returns:
        (rows, columns) float64; NaN or infinite where the loss is.

    Raises:
        UserError: a direction names no parameter of the model, or there are no batches.
    """
    first, second = directions
    parameters = dict(model.named_parameters())
    for name in {**first, **second}:
        if name not in parameters:
            raise UserError(
                f"direction: the model has no parameter '{name}'; take directions of this very model"
                + nearest(name, parameters)
            )
    losses = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    with restored({**parameters, **dict(model.named_buffers())}) as origin:
        for i, a in enumerate(rows):
            for j, b in enumerate(columns):
                for name in {**first, **second}:
                    moved = origin[name]
                    for coefficient, direction in ((a, first), (b, second)):
                        if coefficient and name in direction:
                            moved = moved + coefficient * direction[name]
                    parameters[name].copy_(moved)
                losses[i, j] = mean_loss(loss_fn, batches)
                if bar:
                    bar.update()
    return losses
