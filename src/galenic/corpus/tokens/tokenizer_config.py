"""Configuration of the tokenizer verb; torch-free."""

from dataclasses import dataclass, field
from pathlib import Path

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
    """At most this many single-character entries of each BPE; rarer characters are spelled in bytes."""
    train_characters: int = 6_000_000
    """Characters of training text the merges are learned from, drawn evenly from all sources."""
    additional: list[str] = field(default_factory=list)
    """Groups and sources (`medical-basic`, `hsk`) that a second BPE learns from; it is merged with one that learns from
    all others, as in the report. Empty: one BPE learns from all."""
    additional_share: float = 0.5
    """Share of the merges that the second BPE brings, in (0, 1)."""
    tokenizer: str = ""
    """Use this tokenizer, a Hugging Face folder, and learn none: shards for a model that has one already."""
    system_prompt: str = "You are a helpful assistant."
    """Default system message of the chat template."""
    workers: int = 1
    """Processes that encode; a single one uses all cores."""
    address: str = ""
    """Of a Ray cluster, such as `ray://host:10001` or `auto`; this machine if empty."""

    def __post_init__(self) -> None:
        if not 0 < self.character_coverage <= 1:
            raise UserError(f"character_coverage: {self.character_coverage} is not in (0, 1]")
        if self.vocab_size < 512:
            raise UserError(f"vocab_size: {self.vocab_size} is below 512 (bytes and special tokens need 266)")
        if not 0 < self.additional_share < 1:
            raise UserError(
                f"additional_share: {self.additional_share} is not in (0, 1); for one BPE leave `additional` empty"
            )
        if self.tokenizer and self.additional:
            raise UserError(
                "tokenizer, additional: an existing tokenizer is taken as it is; name one of the two, not both"
            )
        if self.workers < 1:
            raise UserError(f"workers: {self.workers} is below 1")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan: of a tokenizer its own files, not weights beside them."""
        folder = Path(self.tokenizer)
        names = ("tokenizer.json", "tokenizer_config.json") if self.tokenizer else ()
        files = [folder / name for name in names]
        return [self.corpus, *(str(file) for file in files if file.exists() or file.name == "tokenizer.json")]
