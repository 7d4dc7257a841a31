"""What a run cost: time by part, memory at its height, and an estimate of energy that says what it assumes."""

from typing import Any

from .inputs import Run, Step
from .sections import spell


def parts(run: Run) -> dict[str, list[Step]]:
    """Part of the pipeline -> its steps that left something."""
    found = {
        "corpus": [run.corpus],
        "tokenizer": [run.tokenizer],
        "pre-training": [run.pretrain],
        "experts": list(run.experts.values()),
        "merging": list(run.merges.values()),
        "alignment": list(run.alignment.values()),
        "flattening": [run.flatten],
        "evaluation": [run.evaluate],
        "other steps": run.others,
    }
    return {
        name: kept for name, steps in found.items() if (kept := [s for s in steps if s.state != "not run"])
    }


def cost(run: Run, watts: float) -> dict[str, Any] | None:
    """Time, memory and energy of each part and of all; None if no step is finished.

    Energy is an estimate: seconds times a power that someone stated.

    Args:
        run: its steps tell their seconds and peak memory.
        watts: what the machine draws while it works.
    """
    rows = []
    for name, steps in parts(run).items():
        seconds = sum(step.done.get("seconds", 0.0) for step in steps)
        if seconds:
            memory = max(step.done.get("peak_rss_bytes", 0) for step in steps)
            rows.append(_row(name, len(steps), seconds, memory, watts))
    if not rows:
        return None
    total = sum(row["seconds"] for row in rows)
    memory = max(row["memory"] for row in rows)
    return {
        "rows": rows,
        "total": _row("all", sum(row["steps"] for row in rows), total, memory, watts),
        "watts": watts,
        "bars": [(row["name"], row["seconds"], row["spelled"], "other") for row in rows],
    }


def _row(name: str, steps: int, seconds: float, memory: int, watts: float) -> dict[str, Any]:
    hours = watts * seconds / 3600 / 1000
    return {
        "name": name,
        "steps": steps,
        "seconds": seconds,
        "spelled": spell(seconds),
        "memory": memory,
        "energy": f"{hours:.3g} kWh" if hours >= 1 else f"{1000 * hours:.3g} Wh",
    }
