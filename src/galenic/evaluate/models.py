"""Opens what a recipe calls a model: a folder, or a base and a LoRA adapter of it, written `base+adapter`."""

from pathlib import Path
from typing import Any

import torch

from galenic.model.foreign import load_any
from galenic.runtime import UserError

from .config import model_parts
from .inputs import folder


def weight_files(name: str, model: str) -> list[Path]:
    """Returns a model's weight files.

    Raises:
        UserError: no folder, no weights in it, or an adapter without its base.
    """
    found: list[Path] = []
    base, *adapters = model_parts(model)
    for path, settings in ((base, "config.json"), *((path, "adapter_config.json") for path in adapters)):
        place = folder(path, f"models.{name}")
        files = sorted(place.glob("*.safetensors"))
        if settings == "config.json" and (place / "adapter_config.json").is_file():
            if not (place / settings).is_file():
                raise UserError(
                    f"models.{name}: {path} is a LoRA adapter; write its base before it: base+adapter"
                )
        if not (place / settings).is_file() or not files:
            kind = "model folder" if settings == "config.json" else "LoRA adapter"
            raise UserError(f"models.{name}: {path} is not a {kind} ({settings} and *.safetensors expected)")
        found += files
    return found


def open_model(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a model, with its adapter's updates in the weights if it has one, rounded once.

    Raises:
        UserError: see `weight_files` and `load_any`; also an adapter that does not fit the base.
    """
    base, *adapters = model_parts(model)
    loaded = load_any(base, dtype)
    for adapter in adapters:
        _add(loaded, Path(base), Path(adapter))
    return loaded


@torch.no_grad()
def _add(model: torch.nn.Module, base: Path, adapter: Path) -> None:
    from galenic.merge.adapters import Adapter
    from galenic.merge.io import Checkpoint

    weights = model.state_dict()
    with Checkpoint(base, str(base)) as origin, Adapter(adapter, origin, str(adapter)) as view:
        replaced = set(view.replaced)
        for name, info in view.tensors.items():
            if name in replaced or view.factors(name):
                weights[name].copy_(view.read(name, 0, info.numel).view(info.shape))
