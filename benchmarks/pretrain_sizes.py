"""The sizes and contenders of `pretrain.py`; torch-free."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A network and its batch."""

    shape: dict[str, int]
    rows: int
    context: int
    steps: int
    """Steps of one turn."""
    device: str = "cpu"


STARTER = {
    **{"vocab_size": 6144, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
    **{"num_swa_attention_heads": 4, "num_swa_key_value_heads": 2, "sliding_window": 128},
}
MIDDLE = {
    **{"vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8},
    **{"num_attention_heads": 6, "num_key_value_heads": 2},
    **{"num_swa_attention_heads": 12, "num_swa_key_value_heads": 4, "sliding_window": 128},
}
LARGE = {
    **{"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 7552, "num_hidden_layers": 24},
    **{"num_attention_heads": 8, "num_key_value_heads": 2},
    **{"num_swa_attention_heads": 16, "num_swa_key_value_heads": 4, "sliding_window": 2048},
}
TINY = STARTER | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES = {
    "tiny": Size(TINY, rows=2, context=64, steps=1),
    "starter": Size(STARTER, rows=3, context=384, steps=6),
    "starter-768": Size(STARTER, rows=2, context=768, steps=4),
    "100m": Size(MIDDLE, rows=2, context=512, steps=1),
    "1.5b": Size(LARGE, rows=1, context=8192, steps=2, device="cuda"),
    "1.5b-32k": Size(LARGE, rows=1, context=32768, steps=1, device="cuda"),
}

OURS, OURS_MKL, HF, HF_SKIP, PLAIN = (
    "Galenic",
    "Galenic, MKL",
    "HF Trainer",
    "HF Trainer, skip_logits",
    "plain Llama",
)
CONTENDERS: dict[str, dict[str, Any]] = {
    OURS: {"loop": "galenic", "compiled": False, "onednn": True},
    OURS_MKL: {"loop": "galenic", "compiled": False, "onednn": False},
    HF: {"loop": "trainer", "compiled": False, "skip_logits": False},
    HF_SKIP: {"loop": "trainer", "compiled": False, "skip_logits": True},
    PLAIN: {"loop": "plain", "compiled": False},
}
COMPILED = {f"{name}, compiled": {**how, "compiled": True} for name, how in CONTENDERS.items()}
CONTENDERS |= COMPILED
