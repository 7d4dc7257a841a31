"""What a flattening did, in words that claim no more than its numbers do; for the report and the model's own page."""

from typing import Any

Estimate = dict[str, Any]
"""`mean`, `standard_error` and the number of `probes`."""

MODES = {
    "exact": "each layer's weight became the smallest one that keeps all its outputs on the training data",
    "ridge": "each layer's weight became the smallest one that moves its outputs on the training data by no more than "
    "the budget",
    "truncate": "each layer's weight keeps only what acts on the leading directions of its inputs",
    "stochastic": "each layer's weight became the smallest one that keeps its outputs on a small batch",
    "curvature": "each layer's weight moved, among those that keep its outputs on the training data, to where the "
    "curvature of earlier layers is estimated to be least; its norm may rise",
    "gauge": "the mean over classes was taken out of the last layer's weight, which no probability depends on",
    "nothing": "the model was left as it was",
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


def half_width(estimate: Estimate) -> float:
    """Returns half the width of an estimate's 95% interval, not a number where one probe tells nothing of the error."""
    freedom = estimate["probes"] - 1
    if freedom < 1:
        return float("nan")
    return _STUDENT[max(known for known in _STUDENT if known <= freedom)] * estimate["standard_error"]


def trace_name(trace: dict[str, Any]) -> str:
    """Returns what a trace is of."""
    return f"trace of the {trace.get('kind', 'Hessian')}" + " matrix" * (trace.get("kind") == "Gauss-Newton")


def verdict(data: dict[str, Any]) -> str:
    """Returns the flattening's own sentence, or says in one what it did, within what the standard errors allow."""
    if data.get("verdict"):
        return data["verdict"]
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
    before, after, name = trace["before"], trace["after"], trace_name(trace)
    change = after["mean"] - before["mean"]
    half = (half_width(before) ** 2 + half_width(after) ** 2) ** 0.5
    if "difference" in trace:  # the same probes before and after
        change, half = trace["difference"]["mean"], half_width(trace["difference"])
    return moved(change, half, before["mean"], name)


def moved(change: float, half: float, before: float, name: str) -> str:
    """Says which way a number moved, if its change is beyond half the width of its interval."""
    if not abs(change) > half:
        return f"changed the {name} by no more than its sampling error"
    share = f"by {100 * abs(change / before):.1f}%" if before else f"by {abs(change):.3g}"
    return f"{'lowered' if change < 0 else 'raised'} the {name} {share}"
