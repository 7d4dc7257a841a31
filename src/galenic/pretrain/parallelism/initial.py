"""The seeded start: every module's weights follow from the seed and the module's name, on any number of processes."""

from typing import Any

import torch

from galenic.pretrain.data.drawing import stable_hash


def draw_weights(model: Any, part: torch.nn.Module, name: str, seed: int) -> None:
    """Draws the weights of a part of a model that was made on the meta device; weights that are there stay.

    Part after part, so that whoever shards each one next never holds the whole model. They are drawn on the CPU: the
    same on every device.

    Args:
        model: which knows how its modules are initialised (transformers' `_init_weights`).
        part: of it.
        name: of the part in the model; "" for the model itself.
        seed: of the run.
    """
    for inner, module in part.named_modules(prefix=name):
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stable_hash(f"{seed}/{inner}"))
                model._init_weights(module)
