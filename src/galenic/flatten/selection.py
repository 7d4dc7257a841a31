"""Choosing how far to shift by what validation data say, with the original as the choice when in doubt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from galenic.flatten.apply import Kind, install, propose
from galenic.flatten.products import restored
from galenic.flatten.shifts import Shift
from galenic.flatten.statistics import Statistics
from galenic.runtime import Bar, UserError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One kind of shift and what it does on validation data."""

    kind: Kind
    error: float
    """Mean error of the shifted model."""
    difference: float
    """Its mean error less the original's, over the same samples."""
    standard_error: float
    """Of the difference, over samples."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen among candidates, and why."""

    original: float
    """Mean error of the model as it was."""
    candidates: list[Candidate]
    chosen: int | None
    """Index of the best candidate; None: the model as it was is as good."""
    shifts: dict[str, Shift]
    """What the choice does to each layer; empty for none."""


def select_shift(
    model: nn.Module,
    statistics: Statistics,
    candidates: Sequence[Kind],
    errors: Callable[[], Tensor],
    *,
    caution: float = 2.0,
    bar: Bar | None = None,
) -> Selection:
    """Shifts a model in place in the way that errs least on validation data, or not at all; see `compare_shifts`."""
    selection = compare_shifts(model, statistics, candidates, errors, caution=caution, bar=bar)
    for name, proposal in selection.shifts.items():
        install(model, name, proposal)
    return selection


@torch.no_grad()
def compare_shifts(
    model: nn.Module,
    statistics: Statistics,
    candidates: Sequence[Kind],
    errors: Callable[[], Tensor],
    *,
    caution: float = 2.0,
    bar: Bar | None = None,
) -> Selection:
    """Tries kinds of shifts and chooses the one that errs least on validation data, or none.

    The best one is taken if its errors fall by more than `caution` standard errors of the paired difference; else the
    model should stay as it is. Validation data should be of the training data's kind but not part of it, and the final
    test must be of other data again: what is chosen looks better on the data that chose it.

    Args:
        model: as it was afterwards.
        statistics: of `collect`.
        candidates: kinds of shifts; `[{"rank": 10}, {"output_budget": 0.1}]`.
        errors: gives the validation errors of the model as it stands, (n,) for n samples in a fixed order: 0 or 1 for
            wrong answers, or losses. Called once more than there are candidates.
        caution: standard errors that an improvement must exceed. With 2, no kind of clean data that we tried lost more
            than 0.1 points of accuracy on average; with 1, as in the one-standard-error rule, one of 14 did, and more
            of what helps under label noise is taken (`benchmarks/flattening.py`).
        bar: advanced by one for each candidate.

    Raises:
        UserError: no candidates, fewer than two samples, negative caution, errors that are not numbers for the
            original.
    """
    if not candidates:
        raise UserError("candidates: give at least one kind of shift to choose from")
    if not caution >= 0:
        raise UserError(f"caution: {caution} is negative")
    before = errors().double().flatten()
    if len(before) < 2 or not torch.isfinite(before).all():
        raise UserError(f"errors: {len(before)} finite validation errors are needed, at least 2")
    shifted = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] in statistics.owner}
    tried, best, best_shifts = [], None, {}
    for index, kind in enumerate(candidates):
        shifts = propose(model, statistics, **kind)
        with restored(shifted):
            for name, proposal in shifts.items():
                install(model, name, proposal)
            difference = errors().double().flatten() - before
        candidate = Candidate(
            kind=kind,
            error=float((before + difference).mean()),
            difference=float(difference.mean()),
            standard_error=float(difference.std() / len(difference) ** 0.5),
        )
        tried.append(candidate)
        if candidate.difference < -caution * candidate.standard_error and (
            best is None or candidate.difference < tried[best].difference
        ):
            best, best_shifts = index, shifts
        if bar:
            bar.update()
    return Selection(original=float(before.mean()), candidates=tried, chosen=best, shifts=best_shifts)


def settings(kind: Kind) -> dict[str, Any]:
    """Returns what a kind sets, without tensors, for reports."""
    plain = {name: value for name, value in kind.items() if name not in ("base", "metrics", "checks")}
    return {name: value for name, value in plain.items() if value is not None and value is not False}
