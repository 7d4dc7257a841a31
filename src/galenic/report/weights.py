"""What the page says about merging and flattening: what was done to the weights.

Every function takes the run and returns a dictionary for the template, or None when the step was not run.
"""

from typing import Any

from . import charts, svg
from .data import Chart
from .flattening import MODES, half_width, trace_name, verdict
from .inputs import Run

# ---------------------------------------------------------------------------- merging


def merging(run: Run) -> dict[str, Any] | None:
    """Task vectors, coefficients and warnings of every merge."""
    found = {name: data for name, step in run.merges.items() if (data := step.get("merge.json"))}
    if not found:
        return None
    names = next((n for n, data in found.items() if data["method"] == "metagpt"), next(iter(found)))
    reference = found[names]
    pairs = [
        f"{a} and {b} {reference['cosines'][i][j]:.3f}"
        for i, a in enumerate(reference["experts"])
        for j, b in enumerate(reference["experts"])
        if i < j
    ]
    return {
        "experts": reference["experts"],
        "norms": reference["norms"],
        "heat": Chart(
            svg=svg.heat(
                f"Cosines between task vectors: {'; '.join(pairs)}.",
                reference["experts"],
                reference["cosines"],
            ),
            columns=("cosine", *reference["experts"]),
            rows=[(name, *row) for name, row in zip(reference["experts"], reference["cosines"], strict=True)],
        ),
        "table": [
            {
                "name": name,
                "method": data["method"],
                "coefficients": [data["coefficients"].get(expert) for expert in reference["experts"]],
                "sum": sum(data["coefficients"].values()),
                "effective": data["effective_models"],
                "warnings": data["warnings"],
            }
            for name, data in found.items()
        ],
    }


# ---------------------------------------------------------------------------- flattening


def flattening(run: Run) -> dict[str, Any] | None:
    """What optimum shifting changed, and whether the curvature followed."""
    data = run.flatten.get("flatten.json")
    if data is None:
        return None
    trace = data["trace"]
    estimates = (
        {"before": trace["before"], "after": trace["after"]}
        | ({f"{trace['scaled']}, at equal loss": trace["matched"]} if trace.get("matched") else {})
        if trace
        else {}
    )
    return {
        **data,
        "what": MODES[data["mode"]],
        "rolled_back": sum(layer.get("rolled_back", False) for layer in data["layers"]),
        "noops": sum(layer["noop"] for layer in data["layers"]),
        "unit": "sample" if data.get("task") == "class" else "token",
        "norm": (
            sum(layer["norm_before"] ** 2 for layer in data["layers"]) ** 0.5,
            sum(layer["norm_after"] ** 2 for layer in data["layers"]) ** 0.5,
        ),
        "estimates": estimates,
        "trace_name": trace_name(trace) if trace else "",
        "chart": charts.before_after(
            "trace",
            f"The {trace_name(trace)} with its standard error: "
            + ", ".join(
                f"{name} {estimate['mean']:.4g} \u00b1 {estimate['standard_error']:.2g}"
                for name, estimate in estimates.items()
            ),
            [(name, estimate["mean"], half_width(estimate)) for name, estimate in estimates.items()],
            x_title=f"{trace_name(trace)} (95% intervals)",
        )
        if trace
        else None,
        "verdict": verdict(data),
    }
