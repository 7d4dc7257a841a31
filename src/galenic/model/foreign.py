"""Models of other architectures: any that transformers knows of a few kinds, loaded and saved as ours are.

`load_any` opens a folder of ours or another's, `save_any` writes one. Code that lies in a folder is never run.
"""

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from galenic.model.folder import (
    Network,
    _quiet,
    _refuse_other_tokenizer,
    as_scorer,
    load,
    load_classifier,
    save,
)
from galenic.model.modeling_baichuan_m1 import BaichuanM1ForCausalLM, BaichuanM1ForSequenceClassification
from galenic.report.model_card import Card, fenced, render
from galenic.runtime import UserError, atomic_path, read_json, write_json

Kind = Literal["causal language model", "masked language model", "text classifier", "image classifier"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HEADS: dict[str, tuple[Kind, Any]] = {
    "ForCausalLM": ("causal language model", AutoModelForCausalLM),
    "LMHeadModel": ("causal language model", AutoModelForCausalLM),
    "ForMaskedLM": ("masked language model", AutoModelForMaskedLM),
    "ForSequenceClassification": ("text classifier", AutoModelForSequenceClassification),
    "ForImageClassification": ("image classifier", AutoModelForImageClassification),
}
"""What an architecture's name holds -> the kind of the model and the class that opens it."""

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "*.jinja",
    "generation_config.json",
    "LICEN*",
    "NOTICE*",
)
"""Files of a base that its fine-tuned children keep."""


def kind_of(architecture: str) -> Kind | None:
    """Returns the kind of model an architecture (the name of its class) is; None for one without a head known here."""
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # some have names of their own
        return "causal language model"
    return next((kind for head, (kind, _) in HEADS.items() if head in architecture), None)


def folder_kind(folder: str | Path, kinds: Sequence[Kind] = KINDS) -> Kind:
    """Returns the kind of model that a folder's config.json describes.

    Args:
        folder: of a model.
        kinds: the kinds that are allowed.

    Raises:
        UserError: no config, or it names no architecture, or one that is not allowed.
    """
    file = Path(folder) / "config.json"
    settings = read_json(file)
    settings = settings if isinstance(settings, dict) else {}
    model_type = settings.get("model_type")
    names = settings.get("architectures") or [""]
    if model_type == "baichuan_m1" and names != [BaichuanM1ForSequenceClassification.__name__]:
        names = [BaichuanM1ForCausalLM.__name__]  # also where none is named
    if settings.get("auto_map") and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{folder}: cannot be loaded: it needs code that lies in the folder (auto_map), which is never run; models "
            "that transformers knows need none"
        )
    heads = ", ".join(f"...{head}" for head, (kind, _) in HEADS.items() if kind in kinds)
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise UserError(f"{file}: architectures is not a list of names")
    if names == [""]:
        only_causal = model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if only_causal and (
            model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING
        ):
            return "causal language model"
        raise UserError(
            f"{file}: no 'architectures' in it, so the head is not known; add the class, one of {heads}"
        )
    kind = kind_of(names[0])
    if kind is None:
        raise UserError(
            f"{file}: {names[0]} has no head whose loss is known here; save the model with one: {heads}"
        )
    if kind not in kinds:
        raise UserError(
            f"{file}: {names[0]} is of kind {kind}; here only {', '.join(kinds)} will do ({heads})"
        )
    return kind


def plain(model: Any) -> Any:
    """Returns the language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_any(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    kinds: Sequence[Kind] = ("causal language model",),
) -> Any:
    """Loads a model folder of our architecture or of any that transformers knows, offline.

    Args:
        folder: holds config.json and safetensors weights.
        dtype: what the weights are converted to.
        attn_implementation: "sdpa", or "eager" where derivatives of higher order are needed.
        kinds: the kinds of models that are allowed.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        UserError: the folder, its config or a tensor is missing or damaged, the model is of another kind, transformers
            does not know the architecture, or the weights are quantised.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf":
        raise UserError(f"{folder}: is a GGUF file; `galenic convert` makes a model folder of it")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is a LoRA adapter; merge it into its base first")
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type is None:
        return load(folder, dtype, attn_implementation)  # which says what is wrong
    kind = folder_kind(folder, kinds)
    if model_type == "baichuan_m1":
        opened = load if kind == "causal language model" else load_classifier
        return opened(folder, dtype, attn_implementation)
    model, found = _open(kind, folder, dtype, attn_implementation)
    _refuse_incomplete(folder, model, found, optional=kind == "masked language model")
    return model.eval()


def load_scorer(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a model that gives a text one number: a classifier of one label as it is, or a language model under one.

    The number is read off the last token that is not `config.pad_token_id`. Of a language model it is 0 at first.

    Args:
        folder: of a classifier or a causal language model, ours or another's.
        dtype: what the weights are converted to.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        UserError: see `load_any`; a classifier of several labels, or an architecture that has no classifier.
    """
    folder = Path(folder)
    kinds: tuple[Kind, ...] = ("text classifier", "causal language model")
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not settings or folder_kind(folder, kinds) == "text classifier":
        model = load_any(folder, dtype, kinds=("text classifier",))
        if model.config.num_labels != 1:
            raise UserError(
                f"{folder}: a classifier of {model.config.num_labels} labels; a reward model has one"
            )
        return model
    if settings["model_type"] == "baichuan_m1":
        return as_scorer(load(folder, dtype))
    model, found = _open("text classifier", folder, dtype, "sdpa", num_labels=1)
    missing = set(found["missing_keys"])
    if "score.weight" not in missing:
        raise UserError(
            f"{folder}: a {type(model).__name__} has no linear `score` of a token's state; start from another "
            "architecture, or from a classifier of one label"
        )
    # What is left over is the language model's head.
    _refuse_incomplete(
        folder, model, found | {"missing_keys": missing - {"score.weight"}, "unexpected_keys": ()}
    )
    torch.nn.init.zeros_(model.score.weight)
    model.config.use_cache = False  # it never goes on with a text
    return model.eval()


def _open(
    kind: Kind, folder: Path, dtype: torch.dtype, attn_implementation: str, **changes: Any
) -> tuple[Any, dict[str, Any]]:
    """Opens another's model with transformers; returns it and which tensors were missing or left over."""
    if read_json(folder / "config.json").get("quantization_config"):
        raise UserError(f"{folder / 'config.json'}: the weights are quantised; dequantise them first")
    opener = next(opener for own, opener in HEADS.values() if own == kind)
    try:
        with _quiet():
            return opener.from_pretrained(
                folder,
                dtype=dtype,
                # A few networks (Gemma 2) have no "sdpa"; left alone, transformers takes it wherever there is one.
                attn_implementation=None if attn_implementation == "sdpa" else attn_implementation,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **changes,
            )
    except Exception as error:  # transformers raises whatever it meets
        raise UserError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None


def _refuse_incomplete(folder: Path, model: Any, found: dict[str, Any], *, optional: bool = False) -> None:
    """Refuses weights that lack a tensor of a model or, unless they are `optional`, have others."""
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, found.get(key) or ())):
            words = f"{len(names)} {key.replace('_keys', '')} tensors in the weights, such as {names[0]}"
            if key == "unexpected_keys" and optional:
                # An encoder is often kept with the heads of all its pre-training tasks.
                print(f"  {folder}: {words}: not part of a {type(model).__name__}, left out", file=sys.stderr)
                continue
            raise UserError(f"{folder}: {words}")
    if hasattr(model.config, "vocab_size"):
        _refuse_other_tokenizer(folder, model.config)


def save_any(
    model: Any,
    folder: str | Path,
    *,
    base: str | Path,
    provenance: dict[str, Any],
    parents: Iterable[str],
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Writes a model folder as `save` does, whichever architecture it has.

    Args:
        model: what to save.
        folder: where.
        base: folder that lends tokenizer and licence.
        provenance: how the model was made.
        parents: models it was made from.
        weights: names and whole tensors of a model that holds parts of them only; of another architecture than ours
            they are held all at once.
    """
    if isinstance(model, Network):
        save(model, folder, tokenizer=base, provenance=provenance, parents=parents, weights=weights)
        return
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        with _quiet():
            state = None if weights is None else dict(weights)
            model.save_pretrained(temporary, state_dict=state, max_shard_size="5GB")
        copy_companions(Path(base), temporary)
        write_json(temporary / "galenic.json", provenance)
        write_card(temporary, provenance, parents, "a model folder of Hugging Face's")


def copy_companions(base: Path, folder: Path) -> None:
    """Copies tokenizer, template and licence of a model into another's folder."""
    for pattern in COMPANIONS:
        for file in sorted(base.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def write_card(folder: Path, provenance: dict[str, Any], parents: Iterable[str], what: str) -> None:
    """Writes the model card of a network that is not ours."""
    parents = list(parents)
    card = Card(
        title=provenance.get("title", "A fine-tuned language model"),
        description=f"Made with Galenic from {', '.join(parents)}: {what}. The base's licence holds for it.",
        parents=parents,
        sections=[("How it was made", fenced(provenance))],
    )
    (folder / "README.md").write_text(render(card), encoding="utf-8")
