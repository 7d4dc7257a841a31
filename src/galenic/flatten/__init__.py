"""Flattening: move each linear layer to a smaller norm while its outputs on training text (nearly) stay.

    model + training text --> statistics: Gram matrix C = A^T A of each layer's inputs, one forward pass
                                   |
                                   v
                              shifts: W -> W P (exact) or W C (C + mu I)^-1 (ridge, outputs move by a budget)
                                   |
                                   v
    model/ + flatten.json <-- proof: outputs, losses and Hessian trace before and after; what breaks a budget goes back

Comes in: a model folder (a causal language model, an encoder with its masked-token head, a classifier of texts or of
pictures) and data it was trained on: token shards of the tokenizer step, conversations, documents or pictures. Goes
out: `model/` and `flatten.json`.

Source: "Improving Generalization of Deep Neural Networks by Optimum Shifting", arXiv 2405.14111. What to expect, since
the mathematics says so: with more training tokens than input dimensions the exact shift has nothing to move (the
inputs span everything), and the ridge shift, its truncated relative, trades a bounded change of outputs for norm. It
is a denoiser; whether curvature falls is measured, not promised.

In Python: `collect(model, loader, layers)`, `plan_shifts(model, statistics, ...)` to see and `shift(model, statistics,
...)` to do, for linear layers and convolutions; on tensors `minimum_norm(weight, gram)`, `ridge`, `truncated`,
`stochastic`, `centre_gauge`, `curvature_weighted`; `hessian_trace(loss_fn, parameters, batches, ...)`. While training:
`TrainingShift`, and `ShiftCallback` for the Trainer of transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galenic.flatten.apply import shift
    from galenic.flatten.callback import ShiftCallback
    from galenic.flatten.curvature import hessian_trace
    from galenic.flatten.plans import apply_plans, plan_shifts
    from galenic.flatten.selection import select_shift
    from galenic.flatten.shifts import centre_gauge, choose_rows, minimum_norm, ridge, stochastic, truncated
    from galenic.flatten.statistics import collect
    from galenic.flatten.training import TrainingShift
    from galenic.flatten.weighted import curvature_weighted, feature_curvature, least_trace

__all__ = [
    "ShiftCallback",
    "TrainingShift",
    "apply_plans",
    "centre_gauge",
    "choose_rows",
    "collect",
    "curvature_weighted",
    "feature_curvature",
    "hessian_trace",
    "least_trace",
    "minimum_norm",
    "plan_shifts",
    "ridge",
    "select_shift",
    "shift",
    "stochastic",
    "truncated",
]

_HOMES = {
    "ShiftCallback": "callback",
    "TrainingShift": "training",
    "collect": "statistics",
    "hessian_trace": "curvature",
    "select_shift": "selection",
    "shift": "apply",
    **dict.fromkeys(["apply_plans", "plan_shifts"], "plans"),
    **dict.fromkeys(
        ["centre_gauge", "choose_rows", "minimum_norm", "ridge", "stochastic", "truncated"], "shifts"
    ),
    **dict.fromkeys(["curvature_weighted", "feature_curvature", "least_trace"], "weighted"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'galenic.flatten' has no attribute '{name}'")
    return getattr(importlib.import_module(f"galenic.flatten.{_HOMES[name]}"), name)
