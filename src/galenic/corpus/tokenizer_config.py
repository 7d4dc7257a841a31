"""Configuration of the tokenizer verb; torch-free."""

from dataclasses import dataclass

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train a byte-fallback BPE tokenizer on the corpus and turn every document into token shards."""

    out: str
    """Folder for the tokenizer and its `tokens/` shards."""
    corpus: str
    """Folder of the corpus step (`documents.parquet`, `sources.json`)."""
    vocab_size: int = 8192
    """Entries: special tokens, 256 bytes, characters and merges."""
    character_coverage: float = 0.9999
    """Share of the training text's characters that get an entry of their own (report, section 4.1)."""
    max_characters: int = 2500
    """At most this many single-character entries; rarer characters are spelled in bytes."""
    train_characters: int = 6_000_000
    """Characters of training text the merges are learned from, drawn evenly from all sources."""
    system_prompt: str = "You are a helpful assistant."
    """Default system message of the chat template."""

    def __post_init__(self) -> None:
        if not 0 < self.character_coverage <= 1:
            raise UserError(f"character_coverage: {self.character_coverage} is not in (0, 1]")
        if self.vocab_size < 512:
            raise UserError(f"vocab_size: {self.vocab_size} is below 512 (bytes and special tokens need 266)")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.corpus]
