"""What the page says about training: curves, phases, held-out bits per byte, experts.

Every function takes the run and returns a dictionary for the template, or None when the step was not run.
"""

from collections.abc import Sequence
from typing import Any

from . import charts
from .data import Chart
from .inputs import Run
from .sections import by_group, groups

# ---------------------------------------------------------------------------- pre-training


def training(run: Run) -> dict[str, Any] | None:
    """Curves, phases and held-out bits per byte of the pre-training."""
    rows = run.pretrain.get("metrics.jsonl") or []
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        return None
    names = list(dict.fromkeys(row["phase"] for row in train))
    phases = [[row for row in train if row["phase"] == name] for name in names]
    x = [row["tokens"] for row in train]
    starts = [0, *(part[-1]["tokens"] for part in phases)]
    marks = [(name, starts[i], starts[i + 1]) for i, name in enumerate(names)]
    skipped = [row for row in train if row["skipped"]]
    phase_words = "; ".join(f"phase {i + 1} is {name}" for i, name in enumerate(names))
    return {
        "tokens": train[-1]["tokens"],
        "seconds": sum(row["seconds"] for row in train),
        "skipped": [
            (row["step"], row["phase"], row["loss"], row["grad_norm"], row.get("documents", []))
            for row in skipped
        ],
        "stopped": next((row for row in rows if row["kind"] == "stopped"), None),
        "left": train[-1].get("eta_seconds") if run.pretrain.state != "done" else None,
        "phase_words": phase_words,
        "phases": [
            {
                "name": name,
                "steps": len(part),
                "tokens": part[-1]["tokens"] - starts[i],
                "first": _mean([row["loss"] for row in part[:10]]),
                "last": _mean([row["loss"] for row in part[-10:]]),
                "lr": (part[0]["lr"], max(row["lr"] for row in part), part[-1]["lr"]),
                "skipped": sum(row["skipped"] for row in part),
                "speed": _middle([row["tokens_per_second"] for row in part]),
                "mfu": _middle([row["mfu"] for row in part if "mfu" in row]),
                "memory": max((row["memory_gb"] for row in part if "memory_gb" in row), default=None),
                "seconds": sum(row["seconds"] for row in part),
            }
            for i, (name, part) in enumerate(zip(names, phases, strict=True))
        ],
        "loss": charts.curves(
            "loss",
            f"Training loss falls from {_mean([r['loss'] for r in train[:10]]):.2f} to "
            f"{_mean([r['loss'] for r in train[-10:]]):.2f} nats per token; {phase_words}.",
            {"loss": (x, [row["loss"] for row in train])},
            y_title="loss, nats per token",
            phases=marks,
        ),
        "rate": charts.curves(
            "rate",
            f"Learning rate over training, at most {max(row['lr'] for row in train):.2g}; {phase_words}.",
            {"learning rate": (x, [row["lr"] for row in train])},
            y_title="learning rate",
            phases=marks,
            smoothed=False,
        ),
        "norm": charts.curves(
            "norm",
            f"Gradient norm over training, {len(skipped)} steps skipped by the gradient guard.",
            {"gradient norm": (x, [row["grad_norm"] for row in train])},
            y_title="gradient norm (log scale)",
            phases=marks,
            smoothed=False,
            crosses=[(row["tokens"], row["grad_norm"]) for row in skipped],
            log=True,
        ),
        "domains": _domains(run, train, marks),
        "heldout": _heldout(run, rows, names),
        "curves": _heldout_curves(run, rows, marks),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _middle(values: Sequence[float]) -> float | None:
    """The upper median; None of nothing."""
    return sorted(values)[len(values) // 2] if values else None


MOST_PANELS = 24
"""Sources that have a small chart each; beyond, those that stand in most rows."""

Marks = list[tuple[str, float, float]]
"""(phase, first token, last token)."""


def _panels(
    run: Run, key: str, what: str, lines: dict[str, charts.Line], marks: Marks, *, smoothed: bool
) -> dict[str, Any] | None:
    """A small chart for each source, by group, and what is to be said beside them."""
    if not lines:
        return None
    known = groups(run)
    most = sorted(lines, key=lambda source: (-len(lines[source][0]), source))[:MOST_PANELS]
    shown = {source: (known.get(source) or "other", lines[source]) for source in by_group(most, known)}
    ends = ", ".join(f"{source} {values[-1]:.2f}" for source, (_, (_, values)) in shown.items())
    label = f"{what} of each source over training, last: {ends}."
    drawn = charts.panels(key, label, shown, smoothed=smoothed, phases=marks)
    return {"chart": drawn, "more": len(lines) - len(shown), "first": len(shown)}


def _domains(run: Run, train: list[dict[str, Any]], marks: Marks) -> dict[str, Any] | None:
    """Training loss of each source's tokens."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in train:
        for source, loss in row.get("domains", {}).items():
            tokens, losses = lines.setdefault(source, ([], []))
            tokens.append(row["tokens"])
            losses.append(loss)
    return _panels(run, "domains", "Training loss", dict(lines), marks, smoothed=True)


def _heldout_curves(run: Run, rows: list[dict[str, Any]], marks: Marks) -> dict[str, Any] | None:
    """Held-out bits per byte over tokens, where they were measured inside phases too."""
    scored = [row for row in rows if row["kind"] == "heldout"]
    if len(scored) <= len({row["phase"] for row in scored}):
        return None
    tokens = {row["step"]: row["tokens"] for row in rows if row["kind"] == "train"}
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in scored:
        for source, bits in row["bits_per_byte"].items():
            line = lines.setdefault(source, ([], []))
            line[0].append(tokens[row["step"]])
            line[1].append(bits)
    return _panels(run, "bits", "Held-out bits per byte", dict(lines), marks, smoothed=False)


def _heldout(run: Run, rows: list[dict[str, Any]], phases: list[str]) -> dict[str, Any] | None:
    """Held-out bits per byte at each phase's end; marks the group that each phase introduces.

    Of a phase that is not over, the last score there is.
    """
    found = {row["phase"]: row["bits_per_byte"] for row in rows if row["kind"] == "heldout"}
    ends = [name for name in phases if name in found]
    if not ends:
        return None
    known = groups(run)
    sources = by_group({source for name in ends for source in found[name]}, known)
    repeats = next((row["repeats"] for row in reversed(rows) if "repeats" in row), {})
    open_phase = phases[-1] if run.pretrain.state != "done" else ""
    table = []
    for source in sources:
        group = known.get(source, "")
        cells = [
            {"value": found[name].get(source), "new": bool(group) and name.endswith(group)} for name in ends
        ]
        table.append({"source": source, "group": group, "cells": cells, "repeats": repeats.get(source, 0)})
    return {
        "phases": [f"{name}, so far" if name == open_phase else name for name in ends],
        "repeated": bool(repeats),
        "table": table,
        "chart": charts.dots(
            "heldout",
            "Held-out bits per byte of each source at the end of each phase; the table beside it has the numbers.",
            sources,
            {
                f"{'in' if name == open_phase else 'after'} phase {phases.index(name) + 1}": [
                    found[name].get(source) for source in sources
                ]
                for name in ends
            },
            x_title="held-out bits per byte (lower is better)",
        ),
        "gains": _gains(table, ends),
    }


def _gains(table: list[dict[str, Any]], ends: list[str]) -> list[dict[str, Any]]:
    """For each phase but the first: mean bits per byte of the group it introduces, before and after it."""
    gains = []
    for index in range(1, len(ends)):
        pairs = [
            (row["cells"][index - 1]["value"], row["cells"][index]["value"])
            for row in table
            if row["cells"][index]["new"]
            and None not in (row["cells"][index - 1]["value"], row["cells"][index]["value"])
        ]
        if pairs:
            before, after = _mean([a for a, _ in pairs]), _mean([b for _, b in pairs])
            group = next(row["group"] for row in table if row["cells"][index]["new"])
            gains.append({"phase": index + 1, "group": group, "before": before, "after": after})
    return gains


# ---------------------------------------------------------------------------- experts


def experts(run: Run) -> dict[str, Any] | None:
    """How each expert's fine-tuning went."""
    table, lines = [], {}
    for name, step in run.experts.items():
        rows = step.get("metrics.jsonl") or []
        train = [row for row in rows if row["kind"] == "train"]
        if not train:
            table.append({"name": name, "state": step.state})
            continue
        lines[name] = ([row["tokens"] for row in train], [row["loss"] for row in train])
        heldout = [row["answers"] for row in rows if row["kind"] == "heldout"]
        table.append(
            {
                "name": name,
                "state": step.state,
                "steps": len(train),
                "tokens": train[-1]["tokens"],
                "first": _mean([row["loss"] for row in train[:5]]),
                "last": _mean([row["loss"] for row in train[-5:]]),
                "skipped": sum(row["skipped"] for row in train),
                "seconds": sum(row["seconds"] for row in train),
                "heldout": [
                    (label.removesuffix(".heldout"), heldout[0].get(label), value)
                    for label, value in sorted(heldout[-1].items())
                ]
                if heldout
                else [],
            }
        )
    if not lines:
        return None
    ends = ", ".join(f"{name} {values[-1]:.2f}" for name, (_, values) in lines.items())
    chart = charts.curves(
        "experts",
        f"Fine-tuning loss on answers; last step: {ends}.",
        lines,
        y_title="loss on answers, nats per token",
    )
    return {"table": table, "chart": chart, "heldout": _answers(table)}


def _answers(table: list[dict[str, Any]]) -> Chart | None:
    rows = [
        (row["name"], *values) for row in table for values in row.get("heldout", []) if None not in values
    ]
    if not rows:
        return None
    words = "; ".join(
        f"{name} on {label} from {before:.3f} to {after:.3f}" for name, label, before, after in rows
    )
    return charts.dots(
        "answers",
        f"Loss on held-out answers: {words}.",
        [f"{name}: {label}" for name, label, *_ in rows],
        {"before": [before for *_, before, _ in rows], "after": [after for *_, after in rows]},
        x_title="nats per answer token (lower is better)",
    )
