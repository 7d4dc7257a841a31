"""The verb: `galenic flatten --config flatten.yaml --out DIR`.

One pass over the training data collects statistics, one proves the predictions; then layers are shifted one after
another, each on probation, and losses and curvature are measured again. A killed run starts over: it takes minutes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from galenic.flatten import proof, words
from galenic.flatten.apply import Kind, install, output_changes
from galenic.flatten.config import FlattenConfig
from galenic.flatten.curvature import standard_error
from galenic.flatten.data import Batch, describe, first_rows
from galenic.flatten.packed import source_tokens
from galenic.flatten.plans import LayerPlan, plan_shifts, table
from galenic.flatten.prepare import Job, prepare
from galenic.flatten.selection import Selection, compare_shifts, settings
from galenic.flatten.shifts import choose_rows
from galenic.flatten.statistics import Statistics, check_called, leave_out, run_batch, watching
from galenic.flatten.weighted import feature_curvature
from galenic.model.foreign import folder_kind, save_any
from galenic.runtime import Plan, UserError, folder_name, human, progress, read_json, write_json

PROBATION, METRIC, TRACE = (512, 8), (512, 8), (128, 4)
"""How many samples of a classifier, or rows of text, each layer's own change of the loss, the metric of
curvature-weighted shifts and curvature are measured on."""
METRIC_PROBES = 48
"""Random directions of either estimate of the metric of curvature-weighted shifts."""
SPECTRUM_POINTS = 64
"""Eigenvalues of each layer's inputs that the report keeps."""


def plan(config: FlattenConfig) -> Plan:
    """Tells what flattening would read, write and need, from headers alone.

    Raises:
        UserError: the model folder or the data is missing, or a source is unknown.
    """
    from galenic.merge.io import Checkpoint

    with Checkpoint(config.model, config.model) as weights:
        parameters = sum(info.numel for info in weights.tensors.values())
        widths = [i.shape[1] for n, i in weights.tensors.items() if len(i.shape) == 2 and "embed" not in n]
        files = [str(file) for file in weights.files]
    model_settings = read_json(Path(config.model) / "config.json")
    train = config.train_tokens
    if config.tokens:
        train = sum(source_tokens(config, "train", train).values())
    facts = {
        "mode": config.mode + (f", outputs move by {config.budget:g} of their norm" if config.budget else ""),
        "parameters": human(parameters),
        "layers": ", ".join(config.layers),
        "training data": describe(config, "train"),
        "held-out data": describe(config, "heldout"),
        "memory": human(parameters * 4 * 4 + sum(width**2 * 8 for width in widths)) + "B besides activations",
    }
    if config.select:
        facts["select"] = f"of {len(config.kinds())} candidates, on half of the held-out data"
    if config.base:
        folder_kind(config.base)  # refuses what is no model folder
        facts["base"] = f"{folder_name(config.base)}: layers are shifted towards its weights"
    if model_settings.get("norm_head"):
        facts["head"] = "NormHead: " + (
            "becomes a plain head" if config.head == "materialise" else "left alone"
        )
    if "language model" in folder_kind(config.model) and train < max(widths, default=0):
        facts["warning"] = "less training data than inputs of the widest layer: shifts may harm other data"
    return Plan(
        reads=[*files, *([f"{config.tokens}/tokens/"] if config.tokens else config.reads()[1:])],
        writes=[f"{config.out}/{name}" for name in ("model/", "flatten-report.html", "flatten.json")],
        facts=facts,
    )


def preview(config: FlattenConfig) -> list[str]:
    """Computes what would happen to each layer, as a table: one pass over the training data, nothing is changed.

    With `select`, of the first candidate.
    """
    job = prepare(config)
    statistics, _ = _collect(job, config)
    kind = Kind(**config.kinds()[0], **_tensors(job, config))
    return table(plan_shifts(job.model, statistics, softmax_head=job.head, **kind))


def run(config: FlattenConfig) -> None:
    """Flattens: writes `model/`, then `flatten-report.html`, then `flatten.json`.

    Raises:
        UserError: missing inputs, an unknown layer pattern, NaN or infinity in activations.
    """
    from galenic.report.flatten_page import write_flatten_page

    job = prepare(config)

    # ------------------------------------------------------------------------ measure, as it is
    statistics, train = _collect(job, config)
    heldout = proof.score(job.model, job.heldout)
    rows = _first(job, TRACE, config.trace_rows)
    before = proof.curvature(job.model, rows, config, "before")

    # ------------------------------------------------------------------------ choose, and shift
    tensors = _tensors(job, config)
    kinds = [Kind(**kind, **tensors) for kind in config.kinds()]
    selection = _select(job, statistics, kinds) if config.select else None
    chosen = 0 if selection is None else selection.chosen
    kind = None if chosen is None else kinds[chosen]
    plans = [] if kind is None else plan_shifts(job.model, statistics, softmax_head=job.head, **kind)
    measured = _measure(job, plans)
    budget = math.inf if config.select else config.loss_budget  # what validation chose, it chose as a whole
    layers, originals = _shift_on_probation(job, plans, measured, statistics, budget)

    # ------------------------------------------------------------------------ measure again
    after = proof.curvature(job.model, rows, config, "after")
    result: dict[str, Any] = {
        "model": folder_name(config.model),
        "task": job.task,
        "mode": config.mode,
        "settings": {} if kind is None else settings(kind),
        "anchored_to": folder_name(config.base) if config.base else None,
        "output_budget": config.budget,
        "rows": sum(batch.tokens for batch in job.train),
        "layers": layers,
        **_scores(job, train, heldout),
        **_curvatures(job, rows, before, after, config, originals),
        "selection": _selection(selection),
    }
    result["notes"] = job.notes + words.notes(config, result)
    result["verdict"] = words.verdict(result)
    provenance = {
        "title": "Flattened model",
        "description": "Layers shifted on training data (Optimum Shifting, arXiv 2405.14111).",
        "verb": "flatten",
        **{key: result[key] for key in ("mode", "settings", "loss", "notes")},
    }
    parents = [folder_name(path) for path in (config.model, config.base) if path]
    save_any(job.model, Path(config.out) / "model", base=config.model, provenance=provenance, parents=parents)
    write_flatten_page(Path(config.out) / "flatten-report.html", result, _recipe(config))
    write_json(Path(config.out) / "flatten.json", result)


# ---------------------------------------------------------------------------- steps


def _first(job: Job, count: tuple[int, int], wanted: int | None = None) -> list[Batch]:
    """Returns the first training data: as many as wanted, else so many samples of a classifier or rows of text."""
    samples, rows = count
    return first_rows(job.train, wanted or (samples if job.task == "class" else rows))


def _collect(job: Job, config: FlattenConfig) -> tuple[Statistics, proof.Score]:
    """Collects statistics of the layers' inputs, and loss and accuracy of the training data.

    In one pass; in mode stochastic the statistics are of a few samples, and no large matrix is made of them.
    """
    if config.mode == "stochastic":
        statistics = _collect_samples(job, config)
        score = proof.score(job.model, job.train)
    else:
        with (
            torch.no_grad(),
            watching(job.model, job.names, Statistics(config.method)) as statistics,
            progress(len(job.train), "layer inputs", "batches") as bar,
        ):

            def forward(batch: Batch) -> Tensor:
                bar.update()
                return run_batch(job.model, batch.inputs, statistics, batch.mask).logits

            score = proof.score(job.model, job.train, forward)
    if not config.min_rows:
        check_called(statistics, job.names)
        return statistics, score
    leave_out(statistics, job.names, config.min_rows)
    if sparse := statistics.sparse:
        job.notes.append(
            f"{words.count(len(sparse), 'layer')} saw fewer than {config.min_rows} rows and stayed: "
            + ", ".join(f"{name} ({rows})" for name, rows in sparse.items())
            + "."
        )
    return statistics, score


@torch.no_grad()
def _collect_samples(job: Job, config: FlattenConfig) -> Statistics:
    """Collects statistics of a few samples, of every class equally many, or of a few rows of text."""
    total = sum(len(batch.labels) for batch in job.train)
    chosen = choose_rows(
        total,
        min(config.samples or 100, total),
        labels=torch.cat([batch.labels for batch in job.train]) if job.task == "class" else None,
        generator=torch.Generator().manual_seed(config.seed),
    )
    start = 0
    with watching(job.model, job.names, Statistics("qr")) as statistics:
        for batch in job.train:
            end = start + len(batch.labels)
            here = chosen[(chosen >= start) & (chosen < end)] - start
            if len(here):
                part = batch.take(here)
                run_batch(job.model, part.inputs, statistics, part.mask)
            start = end
    return statistics


def _tensors(job: Job, config: FlattenConfig) -> Kind:
    """Returns the parts of a kind of shift that are tensors: the base's weights, the metric of the curvature."""
    kind = Kind(base=job.base)
    if config.mode == "curvature":
        name = str(job.head)
        head = job.model.get_submodule(name)
        batches = _first(job, METRIC, config.trace_rows)
        with progress(2, "curvature of the features", "estimates") as bar:

            def estimate(seed: int) -> dict[str, Tensor]:
                metric = feature_curvature(
                    _Features(job.model, head),
                    head,
                    [batch.inputs for batch in batches],
                    probes=METRIC_PROBES,
                    generator=torch.Generator().manual_seed(seed),
                )
                bar.update()
                return {name: metric}

            kind["metrics"], kind["checks"] = estimate(2 * config.seed), estimate(2 * config.seed + 1)
    return kind


class _Features(nn.Module):
    """A model as what it feeds to one of its layers."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.model, self._layer = model, [layer]  # in a list: its parameters are the model's

    def forward(self, **inputs: Any) -> Tensor:
        seen: list[Tensor] = []
        handle = self._layer[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            self.model(**inputs)
        finally:
            handle.remove()
        return seen[-1]


def _select(job: Job, statistics: Statistics, kinds: Sequence[Kind]) -> Selection:
    with progress(len(kinds), "validation", "candidates") as bar:
        return compare_shifts(
            job.model, statistics, kinds, lambda: proof.sample_errors(job.model, job.validation), bar=bar
        )


def _measure(job: Job, plans: Sequence[LayerPlan]) -> dict[str, float]:
    """Measures how far outputs would really move, in one pass over the training data."""
    if not plans:
        return {}
    with progress(len(job.train), "output changes", "batches") as bar:

        def watched() -> Any:
            for batch in job.train:
                yield batch.inputs, batch.mask
                bar.update()

        return output_changes(job.model, watched(), {plan.name: plan.shift for plan in plans}, job.base)


@torch.no_grad()
def _shift_on_probation(
    job: Job,
    plans: Sequence[LayerPlan],
    measured: dict[str, float],
    statistics: Statistics,
    budget: float,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Shifts layer after layer; one that moves the loss by more than the budget goes back.

    Returns:
        The report rows, and the parameters that moved as they were.
    """
    rows, originals = [], {}
    batches = _first(job, PROBATION)
    loss = proof.score(job.model, batches).loss
    with progress(len(plans), "shifting", "layers") as bar:
        for plan in plans:
            change, back = 0.0, False
            if plan.action == "shift":
                module = job.model.get_submodule(plan.name)
                kept = {f"{plan.name}.{name}": p.clone() for name, p in module.named_parameters()}
                install(job.model, plan.name, plan.shift)
                change = _loss(job, batches) - loss
                back = not abs(change) <= budget  # NaN goes back too
                if back:
                    for name, value in kept.items():
                        job.model.get_parameter(name).copy_(value)
                else:
                    loss += change
                    originals |= kept
            moved = plan.action == "shift" and not back
            rows.append(
                {
                    "name": plan.name,
                    "kind": plan.kind,
                    "rows": plan.rows,
                    "rank": plan.rank,
                    "dimension": plan.dimension,
                    "action": "rolled back" if back else plan.action,
                    "reason": plan.reason,
                    "noop": plan.action == "no-op",
                    "relative_output_change_predicted": plan.output_change,
                    "relative_output_change_measured": measured[plan.name],
                    "loss_bound": plan.loss_bound,
                    "norm_before": plan.norm_before,
                    "norm_after": plan.norm_after if moved else plan.norm_before,
                    "loss_change": words.finite(change),
                    "rolled_back": back,
                    "spectrum": _spectrum(statistics, plan.name),
                }
            )
            bar.update(note=f"loss {loss:.4f}")
    return rows, originals


def _loss(job: Job, batches: Sequence[Batch]) -> float:
    """Returns the loss, NaN where the model gives none."""
    try:
        return proof.score(job.model, batches).loss
    except UserError:
        return float("nan")


def _spectrum(statistics: Statistics, name: str) -> list[float]:
    """Returns eigenvalues of a layer's inputs relative to the largest, descending, at even shares of their number."""
    values = statistics.spectrum(name).values.flatten().sort(descending=True).values
    largest = float(values[0]) if len(values) else 0.0
    places = torch.linspace(0, len(values) - 1, min(SPECTRUM_POINTS, len(values))).round().long()
    return [float(value) / largest if largest else 0.0 for value in values[places]]


# ---------------------------------------------------------------------------- what is told


def _scores(job: Job, train: proof.Score, heldout: proof.Score) -> dict[str, Any]:
    """Returns losses and accuracies before and after."""
    pairs = {"train": (train, proof.score(job.model, job.train))}
    pairs["heldout"] = (heldout, proof.score(job.model, job.heldout))
    known = train.accuracy is not None
    return {
        "loss": {split: [old.loss, new.loss] for split, (old, new) in pairs.items()},
        "accuracy": {s: [old.accuracy, new.accuracy] for s, (old, new) in pairs.items()} if known else None,
    }


def _curvatures(
    job: Job,
    rows: Sequence[Batch],
    before: proof.Curvature | None,
    after: proof.Curvature | None,
    config: FlattenConfig,
    originals: dict[str, Tensor],
) -> dict[str, Any]:
    """Returns curvature before and after, and both at the larger one of their losses."""
    told: dict[str, Any] = dict.fromkeys(("trace", "eigenvalue", "adaptive_sharpness", "landscape"))
    if before is None or after is None:
        return told
    scaled = "before" if before.loss < after.loss else "after"
    with proof.replaced(job.model, originals if scaled == "before" else {}):
        measured = config.probes or config.eigenvalue_steps
        scale = proof.scale_to(job.model, rows, max(before.loss, after.loss)) if measured else None
        trace = proof.trace(job.model, rows, config, "curvature at equal loss", scale) if scale else None
        value = (
            proof.eigenvalue(job.model, rows, config, "eigenvalue at equal loss", scale) if scale else None
        )
    if before.trace and after.trace:
        old, new, matched = before.trace.values, after.trace.values, trace.values if trace else None
        change = None if matched is None else new - matched if scaled == "before" else matched - old
        told["trace"] = {
            "kind": "Hessian" if config.curvature == "hessian" else "Gauss-Newton",
            "before": _estimate(old),
            "after": _estimate(new),
            # The same probes before and after: the difference is known better than either.
            "difference": _estimate(new - old),
            "matched": None if matched is None else _estimate(matched),
            "matched_difference": None if change is None else _estimate(change),
            "scaled": scaled,
            "scale": scale,
        }
    if before.eigenvalue is not None and after.eigenvalue is not None:
        moved = None
        if value is not None:
            moved = after.eigenvalue - value if scaled == "before" else value - before.eigenvalue
        told["eigenvalue"] = {
            "before": before.eigenvalue,
            "after": after.eigenvalue,
            "matched": value,
            "matched_difference": moved,
        }
    told["adaptive_sharpness"] = {"rho": proof.RHO, "before": before.adaptive, "after": after.adaptive}
    if before.line and after.line:
        where = proof.places(config)
        told["landscape"] = {
            "places": where,
            "line": {"before": _finite(before.line), "after": _finite(after.line)},
            "plane": {
                "places": where,
                "before": [_finite(row) for row in before.plane],
                "after": [_finite(row) for row in after.plane],
            }
            if before.plane and after.plane
            else None,
        }
    return told


def _estimate(values: Tensor) -> dict[str, Any]:
    return {"mean": float(values.mean()), "standard_error": standard_error(values), "probes": len(values)}


def _finite(values: Sequence[float]) -> list[float | None]:
    return [words.finite(value) for value in values]


def _selection(selection: Selection | None) -> dict[str, Any] | None:
    if selection is None:
        return None
    return {
        "candidates": [
            {
                "settings": settings(candidate.kind),
                "errors": words.finite(candidate.error),
                "difference": words.finite(candidate.difference),
                "standard_error": words.finite(candidate.standard_error),
            }
            for candidate in selection.candidates
        ],
        "chosen": selection.chosen,
    }


def _recipe(config: FlattenConfig) -> str:
    """Writes the configuration back as YAML, without what is at its default and where folders lie."""
    default = {name: field.default for name, field in FlattenConfig.__dataclass_fields__.items()}
    values = {name: value for name, value in asdict(config).items() if value != default[name] and value != []}
    values.pop("out")
    for name in ("model", "base", "tokens"):
        if values.get(name):
            values[name] = folder_name(values[name])
    for name, value in values.items():
        if isinstance(value, list) and name not in ("layers", "sources", "candidates"):
            values[name] = ["/".join(Path(path).parts[-2:]) for path in value]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
