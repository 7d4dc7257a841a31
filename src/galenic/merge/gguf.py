"""Models in GGUF files: dequantised once into a folder of safetensors, then merged as any other.

transformers knows the files' layouts and the `gguf` package (`pip install 'galenic[gguf]'`) their codes. Unlike the
merge itself, the conversion holds a whole model in memory, in float32. Its result lies beside the remembered
statistics and may be removed at any time.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from galenic.merge.cache import cache_folder
from galenic.runtime import UserError, atomic_path


def gguf_file(model: Path) -> Path | None:
    """Returns the GGUF file a path means: itself, or the only one in a folder without safetensors; else none."""
    if model.suffix == ".gguf":
        return model
    if not model.is_dir() or any(model.glob("*.safetensors")):
        return None
    files = sorted(model.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{model}: holds {len(files)} GGUF files; name one of them")
    return files[0] if files else None


def dequantised(file: Path, convert: bool = True) -> Path:
    """Returns the folder of a GGUF file's model: config, tokenizer and float32 weights.

    Args:
        file: of one model, not split.
        convert: whether to make the folder if it is not there yet.

    Raises:
        UserError: no such file, no `gguf` package, or a model that transformers cannot read from GGUF.
    """
    if not file.is_file():
        raise UserError(f"{file}: {'not a file' if file.exists() else 'no such GGUF file'}")
    status = file.stat()
    key = json.dumps([str(file.resolve()), status.st_size, status.st_mtime_ns])
    out = cache_folder() / f"gguf-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if out.exists():
        return out
    if not convert:
        raise UserError(
            f"{file}: is planned from safetensors, which are not made of it yet; the merge makes them"
        )
    with atomic_path(out) as folder:
        folder.mkdir(parents=True)
        convert_gguf(file, folder)
    return out


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes a GGUF file's model into a folder.

    Raises:
        UserError: no `gguf` package, or a model that transformers cannot read from GGUF.
    """
    try:
        import gguf  # noqa: F401  # transformers needs it and asks for it in many words
    except ImportError:
        raise UserError(f"{file}: GGUF files are read with a package: pip install 'galenic[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        stored = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except Exception as error:  # gguf and transformers raise whatever they meet
        raise UserError(f"{file}: cannot be read as GGUF ({' '.join(str(error).split())[:300]})") from None
    # A model of the same config that does not think it is quantised, so that it can be saved.
    values = {key: value for key, value in stored.config.to_dict().items() if key != "quantization_config"}
    model = type(stored)(type(stored.config).from_dict(values)).to(torch.float32)
    model.load_state_dict(stored.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for card in sorted(file.parent.glob("LICEN*")):
        shutil.copyfile(card, folder / card.name)
