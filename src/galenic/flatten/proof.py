"""What a model's losses and curvature are, taken before a shift and after it in the same way.

The same rows, probes and directions serve both times, so that differences are known better than either side. Curvature
of softmax cross-entropy shrinks with the loss itself; so the model with the smaller loss is measured a second time,
with its logits scaled to the loss of the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from galenic.flatten.config import FlattenConfig
from galenic.flatten.curvature import TraceEstimate, hessian_trace
from galenic.flatten.data import Batch, correct, flat_logits, summed_loss
from galenic.flatten.lanczos import extreme_eigenvalues
from galenic.flatten.landscape import filter_normalised, loss_line, loss_plane
from galenic.flatten.products import gauss_newton, hessian, restored
from galenic.flatten.sharpness import adaptive_sharpness, matching_scale
from galenic.flatten.traces import softmax_trace
from galenic.runtime import Bar, UserError, progress

RHO = 0.5
"""Size of the adaptive sharpness' step: ASAM's own for CIFAR-10 (arXiv 2102.11600, section 5.1)."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a model does on some data."""

    loss: float
    """Nats per predicted token or sample."""
    accuracy: float | None
    """Share of right classes; None for language models."""


@torch.no_grad()
def score(
    model: nn.Module, batches: Sequence[Batch], forward: Callable[[Batch], Tensor] | None = None
) -> Score:
    """Measures a model on all batches.

    Args:
        model: in eval mode.
        batches: the data.
        forward: batch -> logits. Default: the model's.

    Raises:
        UserError: nothing is predicted, or the loss is not a number.
    """
    run = forward or (lambda batch: logits_of(model, batch))
    total, count, right, seen = 0.0, 0, 0, 0
    for batch in batches:
        logits = run(batch)
        loss, number = summed_loss(logits, batch)
        total, count = total + float(loss), count + number
        if (hits := correct(logits, batch)) is not None:
            right, seen = right + int(hits.sum()), seen + len(hits)
    if not count:
        raise UserError("the data has nothing to predict: every document is a single token")
    if total != total or total == float("inf"):
        raise UserError("the model's loss is not a number; the model or its data is broken")
    return Score(loss=total / count, accuracy=right / seen if seen else None)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Runs a model on a batch."""
    return model(**batch.inputs).logits


@torch.no_grad()
def sample_errors(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Returns the errors that validation compares: 1 for each wrong class, or the mean loss of each row of text."""
    errors: list[Tensor] = []
    for batch in batches:
        logits = logits_of(model, batch)
        if (hits := correct(logits, batch)) is not None:
            errors.append(1 - hits.double())
            continue
        for i in range(len(batch.labels)):
            row = batch.take(torch.arange(i, i + 1))
            loss, count = summed_loss(logits[i : i + 1], row)
            if count:
                errors.append(loss.double()[None] / count)
    return torch.cat(errors) if errors else torch.zeros(0)


# ---------------------------------------------------------------------------- curvature


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """How curved the mean loss over a few rows is; None for what was not asked for."""

    loss: float
    trace: TraceEstimate | None
    eigenvalue: float | None
    """The largest."""
    adaptive: float
    """See `adaptive_sharpness`."""
    line: list[float] | None
    plane: list[list[float]] | None


def curvature(
    model: nn.Module, batches: Sequence[Batch], config: FlattenConfig, label: str
) -> Curvature | None:
    """Measures what the config asks for on a few rows; None if it asks for nothing."""
    if not (config.probes or config.eigenvalue_steps or config.landscape):
        return None
    loss_fn = scaled_loss(model, 1.0)
    line, plane = _landscape(model, batches, config)
    return Curvature(
        loss=score(model, batches).loss,
        trace=trace(model, batches, config, f"curvature {label}"),
        eigenvalue=eigenvalue(model, batches, config, f"eigenvalue {label}"),
        adaptive=adaptive_sharpness(loss_fn, model.parameters(), batches, rho=RHO),
        line=line,
        plane=plane,
    )


def scaled_loss(model: nn.Module, scale: float) -> Callable[[Batch], tuple[Tensor, int]]:
    """Returns the summed loss of a batch as a function, of logits times a scale."""
    return lambda batch: summed_loss(scale * logits_of(model, batch), batch)


def trace(
    model: nn.Module, batches: Sequence[Batch], config: FlattenConfig, label: str, scale: float = 1.0
) -> TraceEstimate | None:
    """Estimates the trace with probes that depend on the seed alone, so that two calls are paired."""
    if not config.probes:
        return None
    with progress(config.probes * len(batches), label, "products") as bar:
        shared: dict[str, Any] = {
            "probes": config.probes,
            "generator": torch.Generator().manual_seed(config.seed),
            "bar": bar,
        }
        parameters = list(model.parameters())
        if config.curvature == "hessian":
            return hessian_trace(scaled_loss(model, scale), parameters, batches, **shared)
        return softmax_trace(
            lambda batch: scale * flat_logits(logits_of(model, batch), batch)[0],
            parameters,
            batches,
            **shared,
        )


def eigenvalue(
    model: nn.Module, batches: Sequence[Batch], config: FlattenConfig, label: str, scale: float = 1.0
) -> float | None:
    """Finds the largest eigenvalue, by Lanczos from a start that depends on the seed alone."""
    if not config.eigenvalue_steps:
        return None
    with progress(config.eigenvalue_steps * len(batches), label, "products") as bar:
        operator = _operator(model, batches, config, scale, bar)
        found = extreme_eigenvalues(
            operator,
            1,
            generator=torch.Generator().manual_seed(config.seed),
            steps=config.eigenvalue_steps,
            tolerance=1e-3,
        )
    return float(found.largest[0])


def _operator(
    model: nn.Module, batches: Sequence[Batch], config: FlattenConfig, scale: float, bar: Bar
) -> Any:
    if config.curvature == "hessian":
        return hessian(scaled_loss(model, scale), model.parameters(), batches, bar=bar)
    return gauss_newton(
        lambda batch: scale * logits_of(model, batch), summed_loss, model.parameters(), batches, bar=bar
    )


@contextmanager
def replaced(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts other values into a model's parameters for the block, by name."""
    with restored({name: model.get_parameter(name) for name in parameters}):
        with torch.no_grad():
            for name, value in parameters.items():
                model.get_parameter(name).copy_(value)
        yield


def scale_to(model: nn.Module, batches: Sequence[Batch], loss: float) -> float | None:
    """Returns by what to multiply a model's logits to give it that mean loss; None if no factor does."""
    with torch.no_grad():
        pairs = [flat_logits(logits_of(model, batch), batch) for batch in batches]
    try:
        return matching_scale(pairs, loss)
    except UserError:
        return None


def _landscape(
    model: nn.Module, batches: Sequence[Batch], config: FlattenConfig
) -> tuple[list[float] | None, list[list[float]] | None]:
    """Takes the loss along one filter-normalised direction, and along two."""
    if not config.landscape:
        return None, None
    generator = torch.Generator().manual_seed(config.seed)
    directions = filter_normalised(model, generator), filter_normalised(model, generator)
    where = places(config)
    total = len(where) * (len(where) + 1 if config.plane else 1)
    with progress(total, "landscape", "places") as bar:
        loss_fn = scaled_loss(model, 1.0)
        line = loss_line(loss_fn, model, batches, directions[0], where, bar=bar).tolist()
        if not config.plane:
            return line, None
        return line, loss_plane(loss_fn, model, batches, directions, where, where, bar=bar).tolist()


def places(config: FlattenConfig) -> list[float]:
    """Returns where along a direction the loss is taken: from -1 to 1, the model itself in the middle."""
    half = config.landscape // 2
    return [i / half for i in range(-half, half + 1)]
