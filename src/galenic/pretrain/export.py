"""A phase's end as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from galenic.pretrain.parallel import Parallel


def export_model(
    model: Any, parallel: Parallel, folder: Path, tokenizer: str, provenance: dict[str, Any]
) -> None:
    """Writes the model folder, from all ranks."""
    from galenic.model import save

    save(model, folder, tokenizer=tokenizer, provenance=provenance)
