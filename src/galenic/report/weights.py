"""What the page says about merging and flattening: what was done to the weights.

Every function takes the run and returns a dictionary for the template, or None when the step was not run.
"""

from typing import Any

from . import charts, svg
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
        "heat": svg.heat(
            f"Cosines between task vectors: {'; '.join(pairs)}.",
            reference["experts"],
            reference["cosines"],
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
    return {
        **data,
        "noops": sum(layer["noop"] for layer in data["layers"]),
        "rolled_back": sum(layer.get("rolled_back", False) for layer in data["layers"]),
        "norm": (
            sum(layer["norm_before"] ** 2 for layer in data["layers"]) ** 0.5,
            sum(layer["norm_after"] ** 2 for layer in data["layers"]) ** 0.5,
        ),
        "chart": charts.before_after(
            "trace",
            "Trace of the Hessian with its standard error: "
            + ", ".join(
                f"{name} {trace[name]['mean']:.4g} \u00b1 {trace[name]['standard_error']:.2g}"
                for name in ("before", "after")
            ),
            [
                (name, trace[name]["mean"], 1.96 * trace[name]["standard_error"])
                for name in ("before", "after")
            ],
            x_title="trace of the loss's Hessian (whiskers: 95% interval)",
        )
        if trace
        else None,
        "verdict": verdict(data),
    }


# 97.5% quantiles of Student's t by degrees of freedom: a standard error from few probes is itself uncertain.
_STUDENT = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    9: 2.26,
    12: 2.18,
    20: 2.09,
    40: 2.02,
    120: 1.98,
}


def half_width(estimate: dict[str, Any]) -> float:
    """Returns half the width of an estimate's 95% interval, not a number where one probe tells nothing of the error."""
    freedom = estimate["probes"] - 1
    if freedom < 1:
        return float("nan")
    return _STUDENT[max(known for known in _STUDENT if known <= freedom)] * estimate["standard_error"]


def verdict(data: dict[str, Any]) -> str:
    """Says in one sentence what the flattening did, and claims no more than the standard errors allow."""
    old, new = data["loss"]["heldout"]
    loss = new - old
    if abs(loss) < 0.0005:
        held = f"held-out loss stayed at {new:.3f} nats per token"
    else:
        held = f"held-out loss went {'up' if loss > 0 else 'down'} by {abs(loss):.4f} to {new:.3f} nats per token"
    return f"The shift {_curvature(data['trace'])}; {held}."


def _curvature(trace: dict[str, Any] | None) -> str:
    if trace is None:
        return "left the curvature unmeasured"
    before, after = trace["before"], trace["after"]
    change = after["mean"] - before["mean"]
    half = (half_width(before) ** 2 + half_width(after) ** 2) ** 0.5
    if "difference" in trace:  # the same probes before and after
        change, half = trace["difference"]["mean"], half_width(trace["difference"])
    if not abs(change) > half:
        return "changed the trace of the Hessian by no more than its sampling error"
    share = f"by {100 * abs(change / before['mean']):.1f}%" if before["mean"] else f"by {abs(change):.3g}"
    return f"{'lowered' if change < 0 else 'raised'} the trace of the Hessian {share}"
