"""Flattening: move each linear layer to a smaller norm while its outputs on training text (nearly) stay.

    model + training text --> statistics: Gram matrix C = A^T A of each layer's inputs, one forward pass
                                   |
                                   v
                              shifts: W -> W P (exact) or W C (C + mu I)^-1 (ridge, outputs move by a budget)
                                   |
                                   v
    model/ + flatten.json <-- proof: outputs, losses and Hessian trace before and after; what breaks a budget goes back

Comes in: a model folder and the token shards of the tokenizer step, or conversations. Goes out: `model/` and
`flatten.json`.

Source: "Improving Generalization of Deep Neural Networks by Optimum Shifting", arXiv 2405.14111. What to expect, since
the mathematics says so: with more training tokens than input dimensions the exact shift has nothing to move (the
inputs span everything), and the ridge shift, its truncated relative, trades a bounded change of outputs for norm. It
is a denoiser; whether curvature falls is measured, not promised.

In Python: `collect(model, loader, layers)`, `shift(model, statistics, ...)`, `minimum_norm(weight, gram)`,
`hessian_trace(loss_fn, parameters, batches, ...)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galenic.flatten.apply import shift
    from galenic.flatten.curvature import hessian_trace
    from galenic.flatten.shifts import minimum_norm
    from galenic.flatten.statistics import collect

__all__ = ["collect", "hessian_trace", "minimum_norm", "shift"]

_HOMES = {"collect": "statistics", "hessian_trace": "curvature", "minimum_norm": "shifts", "shift": "apply"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'galenic.flatten' has no attribute '{name}'")
    return getattr(importlib.import_module(f"galenic.flatten.{_HOMES[name]}"), name)
