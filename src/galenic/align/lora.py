"""LoRA (arXiv 2106.09685) through PEFT, an optional dependency: an adapter is trained, the model stays as it is."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from galenic.align.config import LoraConfig
from galenic.runtime import UserError, atomic_path, folder_name, read_json, write_json


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("lora: adapters are trained with a package: pip install 'galenic[lora]'") from None
    return peft


def add_adapter(model: Any, config: LoraConfig, seed: int) -> Any:
    """Puts an adapter that changes nothing yet on a model and freezes the rest.

    Raises:
        UserError: PEFT is not installed, or a target is no layer of the model.
    """
    import torch

    from galenic.model.foreign import kind_of

    peft = _peft()
    classifies = kind_of(type(model).__name__) == "text classifier"  # its head is trained whole, and saved
    torch.manual_seed(seed)  # of the first factor; the second starts at zero
    settings = peft.LoraConfig(
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets or "all-linear",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            warnings.filterwarnings(
                "ignore", message="fan_in_fan_out"
            )  # it sees how GPT-2's layers lie, and says so
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets: {' '.join(str(error).split())[:300]}") from None


def load_adapter(model: Any, folder: str | Path) -> Any:
    """Returns a model with an adapter's updates in its weights.

    Raises:
        UserError: PEFT is not installed, or the folder is no adapter of this model.
    """
    from safetensors import SafetensorError, safe_open

    peft, folder = _peft(), Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # PEFT would ask the Hub, or unpickle a file of the older kind
            raise UserError(f"{folder}: no LoRA adapter there ({name})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
            wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
            with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
                differ = sorted(wanted ^ set(file.keys()))
            if differ:  # PEFT takes what fits and leaves the rest
                raise ValueError(f"{len(differ)} tensors of one but not of the other, such as {differ[0]}")
            return adapted.merge_and_unload().eval()
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder}: no adapter of this model ({' '.join(str(error).split())[:300]})"
        ) from None


def save_adapter(
    model: Any,
    folder: str | Path,
    *,
    base: str,
    provenance: dict[str, Any],
    parents: Iterable[str],
    weights: Iterable[tuple[str, Any]] | None = None,
) -> None:
    """Writes a PEFT adapter folder: all of it, or nothing. The same inputs give the same bytes.

    Args:
        model: with the adapter.
        folder: where.
        base: folder of the model under it.
        provenance: how it was made.
        parents: models it was made from.
        weights: names and whole tensors of what was trained, of a model that holds parts of them only.
    """
    from galenic.model.foreign import write_card

    with atomic_path(folder) as temporary:
        temporary.mkdir()
        state = None if weights is None else dict(weights)
        model.save_pretrained(temporary, save_embedding_layers=False, state_dict=state)
        # PEFT keeps the names of layers in a set, whose order changes from run to run, and the base's place.
        settings = read_json(temporary / "adapter_config.json")
        if isinstance(settings["target_modules"], list):
            settings["target_modules"] = sorted(settings["target_modules"])
        settings["base_model_name_or_path"] = folder_name(base)
        write_json(temporary / "adapter_config.json", settings)
        write_json(temporary / "galenic.json", provenance)
        write_card(temporary, provenance, parents, "a LoRA adapter of PEFT's, for that base alone")
