"""What a flattening did, in sentences that claim no more than the numbers show."""

import math
from typing import Any

from galenic.flatten.config import FlattenConfig
from galenic.flatten.curvature import student_quantile


def count(number: int, noun: str) -> str:
    """Returns `1 layer` or `3 layers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def notes(config: FlattenConfig, result: dict[str, Any]) -> list[str]:
    """Says in sentences what the numbers of `flatten.json` show, whichever way they point."""
    rows, said = result["layers"], []
    if (selection := result["selection"]) is not None:
        said.append(_selection(selection))
    idle = [row for row in rows if row["noop"]]
    if idle:
        spanned = all("span all" in row["reason"] for row in idle)
        why = (
            "their inputs span every direction, so there is nothing to take away"
            if spanned
            else idle[0]["reason"]
        )
        said.append(f"{len(idle)} of {count(len(rows), 'layer')} did not move: {why}.")
    over = [row["name"] for row in rows if row["action"] == "over budget"]
    if over:
        said.append(f"{count(len(over), 'layer')} could not be shifted within the budget: {', '.join(over)}.")
    back = [row["name"] for row in rows if row["rolled_back"]]
    if back:
        said.append(
            f"{count(len(back), 'layer')} went back, having moved the loss by more than {config.loss_budget:g}: "
            f"{', '.join(back)}."
        )
    unit = "nats per token" if result["task"] != "class" else "nats per sample"
    for split, text in (("train", "training"), ("heldout", "held-out")):
        old, new = result["loss"][split]
        line = f"Loss on {text} data went from {old:.4f} to {new:.4f} {unit} ({new - old:+.4f})"
        if result["accuracy"]:
            before, after = result["accuracy"][split]
            line += f"; accuracy from {100 * before:.2f}% to {100 * after:.2f}%"
        said.append(line + ".")
    squares = [sum(row[key] ** 2 for row in rows) for key in ("norm_before", "norm_after")]
    if squares[0]:
        what = "distance to the base" if config.base else "norm"
        said.append(
            f"The squared {what} of these layers changed by {100 * (squares[1] / squares[0] - 1):+.2f}%."
        )
    if (trace := result["trace"]) is not None:
        said += _trace(trace)
    if result["eigenvalue"]:
        before, after = result["eigenvalue"]["before"], result["eigenvalue"]["after"]
        said.append(f"The largest eigenvalue went from {before:.4g} to {after:.4g}.")
    return said


def _selection(selection: dict[str, Any]) -> str:
    tried, chosen = selection["candidates"], selection["chosen"]
    if chosen is None:
        return (
            f"None of {count(len(tried), 'candidate')} was better on validation data than the model as it is by more "
            "than two standard errors: nothing was changed."
        )
    best = tried[chosen]
    words = ", ".join(f"{name} {value:g}" for name, value in best["settings"].items() if value)
    return (
        f"Of {count(len(tried), 'candidate')}, validation chose {words}: error {best['difference']:+.4f} with "
        f"standard error {best['standard_error']:.2g} against the model as it was."
    )


def _trace(trace: dict[str, Any]) -> list[str]:
    before, after, change = trace["before"], trace["after"], trace["difference"]
    said = [
        f"The {trace['kind']} trace {_direction(change)}: {before['mean']:.4g} before, {after['mean']:.4g} after, "
        f"difference {change['mean']:+.3g} with standard error {change['standard_error']:.2g} over "
        f"{change['probes']} paired probes on the first rows of training data."
    ]
    if (matched := trace["matched_difference"]) is not None:
        whose = "the original's" if trace["scaled"] == "before" else "the shifted model's"
        said.append(
            f"At equal loss ({whose} logits times {trace['scale']:.4g}) it {_direction(matched)}: "
            f"difference {matched['mean']:+.3g} with standard error {matched['standard_error']:.2g}."
        )
    else:
        said.append("No scale of the logits makes the losses equal; the trace moves with the loss.")
    return said


def _direction(change: dict[str, Any]) -> str:
    """Returns fell, rose, or that nothing can be told, by Student's 95% interval of the paired difference."""
    if not abs(change["mean"]) > student_quantile(0.95, change["probes"] - 1) * change["standard_error"]:
        return "did not change beyond its error"
    return "fell" if change["mean"] < 0 else "rose"


def verdict(result: dict[str, Any]) -> str:
    """Says in one sentence what came of it."""
    if all(row["action"] != "shift" for row in result["layers"]):
        held = "Nothing was changed"
        if result["selection"] is not None and result["selection"]["chosen"] is None:
            return f"{held}: no candidate was better on validation data beyond its error."
        reasons = [row["reason"] for row in result["layers"] if row["reason"]]
        return f"{held}: {reasons[0] if reasons else 'every layer went back'}."
    old, new = result["loss"]["heldout"]
    moved = "stayed" if abs(new - old) < 5e-5 else "fell" if new < old else "rose"
    said = [f"held-out loss {moved}" + (f" by {abs(new - old):.4f}" if moved != "stayed" else "")]
    if result["accuracy"]:
        before, after = result["accuracy"]["heldout"]
        said.append(f"held-out accuracy moved by {100 * (after - before):+.2f} points")
    squares = [sum(row[key] ** 2 for row in result["layers"]) for key in ("norm_before", "norm_after")]
    if squares[0]:
        what = "distance to the base" if result["anchored_to"] else "norm"
        said.append(f"the layers' squared {what} changed by {100 * (squares[1] / squares[0] - 1):+.1f}%")
    trace = result["trace"]
    if trace is not None:
        change = trace["matched_difference"] or trace["difference"]
        equal = "at equal loss " if trace["matched_difference"] else ""
        said.append(f"the {trace['kind']} trace {equal}{_direction(change)}")
    sentence = ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]
    return sentence[0].upper() + sentence[1:] + "."


def finite(value: float) -> float | None:
    """Returns a number, or None for what JSON cannot hold."""
    return value if math.isfinite(value) else None
