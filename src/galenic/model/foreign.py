"""Models of other architectures: any causal language model that transformers knows, loaded and saved as ours are.

`load_any` opens a folder of either kind, `save_any` writes one. Code that lies in a folder is never run.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from galenic.model.folder import _quiet, _refuse_other_tokenizer, load, save
from galenic.model.modeling_baichuan_m1 import BaichuanM1ForCausalLM
from galenic.runtime import UserError, atomic_path, read_json, write_json

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "generation_config.json",
    "LICEN*",
    "NOTICE*",
)
"""Files of a base that its fine-tuned children keep."""


def load_any(
    folder: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> Any:
    """Loads a model folder of our architecture or of any that transformers knows, offline.

    Args:
        folder: holds config.json and safetensors weights.
        dtype: what the weights are converted to.
        attn_implementation: "sdpa", or "eager" where derivatives of higher order are needed.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        UserError: the folder, its config or a tensor is missing or damaged, transformers does not know the
            architecture, or the weights are quantised.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf":
        raise UserError(f"{folder}: is a GGUF file; `galenic convert` makes a model folder of it")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is a LoRA adapter; merge it into its base first")
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind is None or kind == "baichuan_m1":
        return load(folder, dtype, attn_implementation)
    if settings.get("quantization_config"):
        raise UserError(f"{folder / 'config.json'}: the weights are quantised; dequantise them first")
    try:
        with _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises whatever it meets
        raise UserError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, found.get(key) or ())):
            words = key.replace("_keys", "")
            raise UserError(f"{folder}: {len(names)} {words} tensors in the weights, such as {names[0]}")
    if hasattr(model.config, "vocab_size"):
        _refuse_other_tokenizer(folder, model.config)
    return model.eval()


def save_any(
    model: Any, folder: str | Path, *, base: str | Path, provenance: dict[str, Any], parents: Iterable[str]
) -> None:
    """Writes a model folder as `save` does, whichever architecture it has; `base` lends tokenizer and licence."""
    if isinstance(model, BaichuanM1ForCausalLM):
        save(model, folder, tokenizer=base, provenance=provenance, parents=parents)
        return
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        with _quiet():
            model.save_pretrained(temporary, max_shard_size="5GB")
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
    """Writes a short model card."""
    parents = list(parents)
    recipe = json.dumps(provenance, ensure_ascii=False, indent=2)
    (folder / "README.md").write_text(
        f"---\nbase_model: {json.dumps(parents, ensure_ascii=False)}\ntags: [galenic]\n---\n\n"
        f"# {provenance.get('title', 'A fine-tuned language model')}\n\n"
        f"Made with Galenic from {', '.join(parents)}: {what}. The base's licence holds for it.\n\n"
        f"```json\n{recipe}\n```\n\nNot a medical device; nothing it writes is medical advice.\n",
        encoding="utf-8",
    )
