"""What the page says about alignment: each stage's health over its steps, and what the models say before and after.

Every function takes the run and returns what the template shows, or None when nothing was run.
"""

import math
from collections.abc import Sequence
from typing import Any

from . import charts
from .inputs import Run, Step
from .scores import headline
from .sections import spell

METHODS = {
    "sft": "fine-tuning",
    "elo": "ELO",
    "tdpo": "TDPO",
    "reward": "reward model",
    "ppo": "PPO",
}
"""Verb -> what the page calls it."""
MEASURES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "kl": "KL, nats a token",
    "entropy": "entropy, nats a token",
    "length": "length, tokens",
    "ended": "ended, share",
    "unreadable": "unreadable, share",
    "clipped": "clipped, share",
    "loss": "loss",
}
"""Column of the metrics -> its name and unit, in the order they are drawn."""
COLUMNS = {"reward": "reward", "accuracy": "accuracy", "kl": "KL", "entropy": "entropy", "length": "length"}
"""Those that the table tells -> what it calls them."""
QUESTIONS = 5
"""Shown with what the models say."""


def alignment(run: Run) -> dict[str, Any] | None:
    """Every stage in its order."""
    stages = [_stage(name, step) for name, step in run.alignment.items()]
    if not any(stage["steps"] for stage in stages):
        return None
    return {
        "stages": stages,
        "chain": " \u2192 ".join(stage["name"] for stage in stages),
        "measures": {
            measure: title
            for measure, title in COLUMNS.items()
            if any(measure in stage["ends"] for stage in stages)
        },
    }


def _stage(name: str, step: Step) -> dict[str, Any]:
    """One stage: its curves, the ends of them, and what was measured on held-out data."""
    rows = step.get("metrics.jsonl") or []
    train = [row for row in rows if row["kind"] == "train"]
    lines = {measure: line for measure in MEASURES if (line := _line(train, measure))}
    method = METHODS.get((step.get("model/galenic.json") or {}).get("verb", ""), "")
    seconds = sum(row["seconds"] for row in train)
    chart = None
    if lines:
        ends = ", ".join(f"{measure} {values[-1]:.3g}" for measure, (_, values) in lines.items())
        chart = charts.measures(
            f"align-{name}",
            f"Health of {name} over {len(train)} steps; at the last one {ends}.",
            {MEASURES[measure]: line for measure, line in lines.items()},
        )
    return {
        "name": name,
        "state": step.state,
        "method": method,
        "note": f"{method + ', ' if method else ''}{len(train)} steps, {spell(seconds)}"
        + ("" if step.state == "done" else "; not over"),
        "steps": len(train),
        "ends": {measure: _ends(values) for measure, (_, values) in lines.items()},
        "heldout": _heldout([row for row in rows if row["kind"] == "heldout"]),
        "stopped": next((row for row in rows if row["kind"] == "stopped"), None),
        "chart": chart,
    }


def _line(rows: list[dict[str, Any]], measure: str) -> charts.Line | None:
    """(steps, values) of the rows that have a measure; numbers that are none are left out."""
    found = [row for row in rows if math.isfinite(row.get(measure, math.nan))]
    return ([row["step"] for row in found], [row[measure] for row in found]) if found else None


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of some values, one of them at least."""
    share = max(1, len(values) // 10)
    return sum(values[:share]) / share, sum(values[-share:]) / share


def _heldout(rows: list[dict[str, Any]]) -> list[tuple[str, float | None, float]]:
    """(measure, before, after) of the held-out data; nested ones by their own names."""
    told = [_flat(row) for row in rows]
    return [(name, told[0].get(name), value) for name, value in told[-1].items()] if told else []


def _flat(row: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name} {part}".removesuffix(".heldout"): number for part, number in value.items()}
        elif name not in ("kind", "step") and isinstance(value, int | float):
            found[name.replace("_", " ")] = value
    return found


def said(run: Run) -> list[dict[str, Any]]:
    """The first questions that the models answered in their own words, from the model before the stages to the last.

    Without a model of any stage among them, all models that wrote something.
    """
    results = run.evaluate.get("results.json")
    written = [] if results is None else [row for row in results["shown"] if row.get("said")][:QUESTIONS]
    if results is None or not written:
        return []
    models = results["models"]
    stages = [
        name
        for step in run.alignment.values()
        for name, model in models.items()
        if any(part.startswith(f"{step.name}/") for part in str(model["path"]).split("+"))
    ]
    names = list(dict.fromkeys([headline(results)[1], *stages])) if stages else list(models)
    found = []
    for row in written:
        right = row["options"][row["answer"]]
        answers = [
            (name, models[name]["group"], text, right.lower() in text.lower())
            for name in names
            if (text := row["said"].get(name)) is not None
        ]
        found.append({**row, "right": right, "answers": answers})
    return found
