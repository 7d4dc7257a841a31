"""Models in GGUF files: dequantised once into a folder of safetensors, then merged as any other.

Unlike the merge itself, the conversion (`galenic.model.convert`) holds a whole model in memory, in float32. Its result
lies beside the remembered statistics and may be removed at any time.
"""

import hashlib
import json
from pathlib import Path

from galenic.merge.cache import cache_folder
from galenic.model.convert import convert_gguf
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
