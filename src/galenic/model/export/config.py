"""What the verb `export` can be told. Torch-free."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from galenic.runtime import UserError

NO_GGUF = (
    "format: nothing reads this architecture from GGUF: llama.cpp knows Baichuan 1 and 2 only, whose graph has neither "
    "the convolution on keys and values nor layers of two head geometries; chatllm.cpp runs Baichuan-M1 from a format "
    "of its own, by its own convert.py on the folder that `format: safetensors` writes"
)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a model as others want it, and uploads it if asked to."""

    out: str
    """Output folder: receives `model/` and `export.json`."""
    model: str
    """Model folder, or `base+adapter` for a LoRA adapter, which is merged in."""
    format: Literal["safetensors", "gguf"] = "safetensors"
    """Of the weights. `gguf` is refused as long as no runtime can read this network from it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights, or of what is not quantised; none: as they are."""
    plain_head: bool = False
    """Scale the rows of the output head (NormHead) to unit length once and for all, for software that multiplies by
    `lm_head.weight` itself; the logits stay the same up to rounding. Quantising always does this."""
    quantize: Literal["int8", "int4"] | None = None
    """Store the linear layers' weights in 8 bits (a scale a row) or 4 (a scale a group; the head in 8); activations
    stay in `dtype`."""
    heldout: str | None = None
    """Text to measure the cost of quantising on: a JSON-lines file with `text`, or a tokenizer step folder with
    held-out shards; none: a small text of ours."""
    heldout_tokens: int = 20_000
    """At most about so many tokens of it (whole documents)."""
    push_to_hub: str | None = None
    """Upload the folder to this Hub repository, `USER/NAME`, with your own login (`hf auth login`)."""
    private: bool = False
    """Only you can see the repository."""

    incidental: ClassVar[tuple[str, ...]] = ("push_to_hub", "private")
    """Change nothing in the folder: a finished export is uploaded without being made again."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        from galenic.evaluate.config import model_parts

        return [*model_parts(self.model), *([self.heldout] if self.heldout and self.quantize else [])]

    def __post_init__(self) -> None:
        if self.format == "gguf":
            raise UserError(NO_GGUF)
        if self.heldout is not None and self.quantize is None:
            raise UserError("heldout measures what quantising costs; give quantize, or leave heldout out")
        if self.heldout_tokens < 1:
            raise UserError(f"heldout_tokens is {self.heldout_tokens}; it must be at least 1")
        if self.push_to_hub is not None and not REPOSITORY.fullmatch(self.push_to_hub):
            raise UserError(f"push_to_hub: '{self.push_to_hub}' is no repository; write it as USER/NAME")
        if self.private and self.push_to_hub is None:
            raise UserError("private is about the Hub repository; name one with push_to_hub")
