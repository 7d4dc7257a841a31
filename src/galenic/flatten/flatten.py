"""The verb: `galenic flatten --config flatten.yaml --out DIR`.

One pass over training text collects statistics, one proves the predictions; then layers are shifted one after
another, each on probation, and losses and curvature are measured again. A killed run starts over: it takes a minute.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from galenic.align.sft import keeps_apart
from galenic.flatten.apply import output_changes, propose, weight_of
from galenic.flatten.config import FlattenConfig
from galenic.flatten.curvature import TraceEstimate, hessian_trace, standard_error
from galenic.flatten.shifts import Shift
from galenic.flatten.statistics import Statistics, check_called, run_batch, select_layers, watching
from galenic.flatten.text import (
    Batch,
    first_rows,
    mean_loss,
    per_token,
    read_rows,
    source_tokens,
    summed_loss,
)
from galenic.model import BaichuanM1ForCausalLM, load_tokenizer
from galenic.model.foreign import load_any, save_any
from galenic.runtime import (
    Plan,
    UserError,
    folder_name,
    human,
    progress,
    read_json,
    torch_setup,
    write_json,
)

PROBATION_ROWS = 8
"""Rows of training text on which every layer's own change of the loss is measured."""


def plan(config: FlattenConfig) -> Plan:
    """Tells what flattening would read, write and need.

    Raises:
        UserError: the model folder or the text is missing, or a source is unknown.
    """
    from galenic.merge.io import Checkpoint

    with Checkpoint(config.model, config.model) as weights:
        parameters = sum(info.numel for info in weights.tensors.values())
        widths = [i.shape[1] for n, i in weights.tensors.items() if len(i.shape) == 2 and "embed" not in n]
        files = [str(file) for file in weights.files]
    settings = read_json(Path(config.model) / "config.json")
    train, heldout = config.train_tokens, config.heldout_tokens
    for file in [*config.conversations, *config.heldout]:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file")
    if config.tokens:
        train = sum(source_tokens(config, "train", train).values())
        heldout = sum(source_tokens(config, "heldout", heldout).values())
    facts = {
        "mode": config.mode + (f", outputs move by {config.budget:g} of their norm" if config.budget else ""),
        "parameters": human(parameters),
        "layers": ", ".join(config.layers),
        "training text": f"{human(train)} tokens",
        "held-out text": f"{human(heldout)} tokens",
        "memory": human(parameters * 4 * 4 + sum(width**2 * 8 for width in widths)) + "B besides activations",
    }
    if settings.get("norm_head"):
        facts["head"] = "NormHead: " + (
            "becomes a plain head" if config.head == "materialise" else "left alone"
        )
    if train < max(widths):
        facts["warning"] = "less training text than inputs of the widest layer: shifts may harm other text"
    return Plan(
        reads=[
            *files,
            *([f"{config.tokens}/tokens/"] if config.tokens else config.conversations + config.heldout),
        ],
        writes=[f"{config.out}/model/", f"{config.out}/flatten.json"],
        facts=facts,
    )


def run(config: FlattenConfig) -> None:
    """Flattens: writes `model/`, then `flatten.json`.

    Raises:
        UserError: missing inputs, an unknown layer pattern, NaN or infinity in activations.
    """
    torch_setup(config.seed)
    model = load_any(config.model, attn_implementation="eager")  # the other kernels have no second derivative
    notes = _prepare_head(model, config)
    alone = _must_be_alone(model, config)
    train = read_rows(config, "train", config.train_tokens, alone)
    heldout = read_rows(config, "heldout", config.heldout_tokens, alone)
    names = select_layers(model, config.layers)

    # ------------------------------------------------------------------------ measure, as it is
    statistics, loss_train = _collect(model, train, names)
    loss_heldout = mean_loss(model, heldout)
    trace_batches = first_rows(train, config.trace_rows)
    trace_before = _trace(model, trace_batches, config, "curvature before")

    # ------------------------------------------------------------------------ shift
    shifts = propose(model, statistics, output_budget=config.budget)
    measured = _measure(model, train, shifts)
    rows = _shift_on_probation(model, shifts, measured, first_rows(train, PROBATION_ROWS), config.loss_budget)

    # ------------------------------------------------------------------------ measure again
    losses = {
        "train": [loss_train, mean_loss(model, train)],
        "heldout": [loss_heldout, mean_loss(model, heldout)],
    }
    trace_after = _trace(model, trace_batches, config, "curvature after")
    result = {
        "mode": config.mode,
        "output_budget": config.budget,
        "rows": sum(batch.tokens for batch in train),
        "layers": rows,
        "loss": losses,
        "trace": _trace_summary(trace_before, trace_after),
        "notes": notes + _notes(config, rows, losses, trace_before, trace_after),
    }
    provenance = {
        "title": "Flattened model",
        "description": "Linear layers shifted to smaller norm on training text (Optimum Shifting, arXiv 2405.14111).",
        "verb": "flatten",
        "mode": config.mode,
        "output_budget": config.budget,
        "loss": losses,
        "notes": result["notes"],
    }
    save_any(
        model,
        Path(config.out) / "model",
        base=config.model,
        provenance=provenance,
        parents=[folder_name(config.model)],
    )
    write_json(Path(config.out) / "flatten.json", result)


def _must_be_alone(model: nn.Module, config: FlattenConfig) -> bool:
    """Whether a model of another architecture mixes packed samples, so that each needs a row of its own.

    Raises:
        UserError: the token shards are of another tokenizer than the model's.
    """
    if isinstance(model, BaichuanM1ForCausalLM):
        return False
    if (
        config.tokens
        and load_tokenizer(config.tokens).get_vocab() != load_tokenizer(config.model).get_vocab()
    ):
        raise UserError(
            f"tokens: {config.tokens} has another tokenizer than {config.model}; give conversations instead"
        )
    ids = np.arange(4, 20)
    mixes = not keeps_apart(model, (ids, ids))
    if mixes and config.tokens:
        raise UserError(f"{config.model}: mixes packed documents; give conversations instead of tokens")
    return mixes


def _prepare_head(model: nn.Module, config: FlattenConfig) -> list[str]:
    """Turns a NormHead into a plain head of the same outputs if asked to; returns what to note."""
    if not isinstance(model, BaichuanM1ForCausalLM) or not model.config.norm_head:
        return []
    if config.head == "skip":
        return [
            "The NormHead was left alone: its rows are scaled to unit length, so their norm means nothing."
        ]
    model.materialize_norm_head()
    return [
        "The NormHead was turned into a plain linear head of the same outputs first; the trace before and after is "
        "that of the plain head's parameters."
    ]


def _collect(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> tuple[Statistics, float]:
    """Collects Gram matrices and the loss in one pass."""
    total, count = 0.0, 0
    with (
        torch.no_grad(),
        watching(model, names) as statistics,
        progress(len(batches), "layer inputs", "batches") as bar,
    ):
        for batch in batches:
            loss, tokens = summed_loss(run_batch(model, batch.inputs, statistics, batch.mask).logits, batch)
            total, count = total + float(loss), count + tokens
            bar.update()
    check_called(statistics, names)
    return statistics, per_token(total, count)


def _measure(model: nn.Module, batches: Sequence[Batch], shifts: dict[str, Shift]) -> dict[str, float]:
    with progress(len(batches), "output changes", "batches") as bar:

        def watched() -> Any:
            for batch in batches:
                yield batch.inputs, batch.mask
                bar.update()

        return output_changes(model, watched(), shifts)


@torch.no_grad()
def _shift_on_probation(
    model: nn.Module,
    shifts: dict[str, Shift],
    measured: dict[str, float],
    batches: list[Batch],
    budget: float,
) -> list[dict[str, Any]]:
    """Shifts layer after layer; one that moves the loss by more than the budget goes back. Returns the report rows."""
    rows = []
    loss = mean_loss(model, batches)
    with progress(len(shifts), "shifting", "layers") as bar:
        for name, proposal in shifts.items():
            weight = weight_of(model, name)
            original = weight.clone()
            weight.copy_(proposal.weight)
            change = 0.0 if proposal.noop else mean_loss(model, batches) - loss
            back = not abs(change) <= budget  # NaN goes back too
            if back:
                weight.copy_(original)
            else:
                loss += change
            rows.append(
                {
                    "name": name,
                    "rank": proposal.rank,
                    "dimension": proposal.dimension,
                    "noop": proposal.noop,
                    "relative_output_change_predicted": proposal.output_change,
                    "relative_output_change_measured": measured[name],
                    "norm_before": proposal.norm_before,
                    "norm_after": proposal.norm_before if back else proposal.norm_after,
                    "loss_change": change,
                    "rolled_back": back,
                }
            )
            bar.update(note=f"loss {loss:.4f}")
    return rows


# ---------------------------------------------------------------------------- curvature


def _trace(
    model: nn.Module, batches: Sequence[Batch], config: FlattenConfig, label: str
) -> TraceEstimate | None:
    """Estimates the Hessian trace with probes that depend on the seed alone, so that two calls are paired."""
    if not config.probes:
        return None
    with progress(config.probes * len(batches), label, "products") as bar:
        return hessian_trace(
            lambda batch: summed_loss(model(**batch.inputs).logits, batch),
            model.parameters(),
            batches,
            probes=config.probes,
            generator=torch.Generator().manual_seed(config.seed),
            bar=bar,
        )


def _trace_summary(before: TraceEstimate | None, after: TraceEstimate | None) -> dict[str, Any] | None:
    if before is None or after is None:
        return None
    return {
        "before": _estimate(before.values),
        "after": _estimate(after.values),
        # The same probes before and after: the difference is known better than either.
        "difference": _estimate(after.values - before.values),
    }


def _estimate(values: torch.Tensor) -> dict[str, Any]:
    return {"mean": float(values.mean()), "standard_error": standard_error(values), "probes": len(values)}


# ---------------------------------------------------------------------------- honest words


def _notes(
    config: FlattenConfig,
    rows: list[dict[str, Any]],
    losses: dict[str, list[float]],
    before: TraceEstimate | None,
    after: TraceEstimate | None,
) -> list[str]:
    """Says in sentences what the numbers show, whichever way they point."""
    notes = []
    noop = [row["name"] for row in rows if row["noop"]]
    if noop:
        why = (
            "their inputs span every direction, so"
            if config.mode == "exact"
            else "the shift is below rounding:"
        )
        notes.append(f"{len(noop)} of {len(rows)} layers did not move: {why} there is nothing to take away.")
    back = [row["name"] for row in rows if row["rolled_back"]]
    if back:
        notes.append(
            f"{len(back)} layer{'s' if len(back) > 1 else ''} went back, "
            f"having moved the loss by more than {config.loss_budget:g}: "
            f"{', '.join(back)}."
        )
    for split, text in (("train", "training"), ("heldout", "held-out")):
        old, new = losses[split]
        notes.append(
            f"Loss on {text} text went from {old:.4f} to {new:.4f} nats per token ({new - old:+.4f})."
        )
    squares = [sum(row[key] ** 2 for row in rows) for key in ("norm_before", "norm_after")]
    share = 100 * (squares[1] / squares[0] - 1) if squares[0] else 0.0
    notes.append(f"The squared norm of the shifted layers changed by {share:+.2f}%.")
    if before is not None and after is not None:
        change = after.values - before.values
        mean, error = float(change.mean()), standard_error(change)
        if abs(mean) <= 2 * error:
            verdict = "did not change beyond its error"
        else:
            verdict = "fell" if mean < 0 else "rose"
        notes.append(
            f"The Hessian trace {verdict}: {before.mean:.4g} before, {after.mean:.4g} after, difference "
            f"{mean:+.3g} with standard error {error:.2g} over {len(change)} paired probes on "
            "the first rows of training text. "
            "The losses differ too, and the trace moves with the loss."
        )
    return notes
