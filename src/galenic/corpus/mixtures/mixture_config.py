"""Configuration of the verb `mixture`; torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from galenic.pretrain.config import ArchitectureConfig, OptimConfig
from galenic.runtime import UserError


def _tiny() -> ArchitectureConfig:
    return ArchitectureConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=64,
        initializer_range=0.12,  # about 1 / sqrt(width)
    )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Fit a mixture of sources from many small runs, and check it with more of them."""

    out: str
    """Output folder: `mixture.json`, `fit.json`, `runs.jsonl`, `mixture.md`."""
    tokenizer: str
    """Folder of the tokenizer step, with its token shards."""
    sources: list[str] = field(default_factory=list)
    """Sources to mix; all that have training documents by default."""
    parts: Literal["source", "group"] = "source"
    """What the fit moves: every source, or every group with its sources at the prior's proportions. A fit of d parts
    wants a few times d runs."""
    prior: dict[str, float] = field(default_factory=dict)
    """Source -> share of the mixture to start from and to beat; by default each source's share of all tokens."""
    targets: dict[str, float] = field(default_factory=dict)
    """Source -> weight of its held-out bits per byte in what is made small; all alike by default."""
    runs: int = 24
    """Small runs, each on a mixture of its own (at least 8); the first is the prior."""
    tokens: int = 100_000
    """Training tokens of a run."""
    context: int = 256
    """Tokens in a row."""
    rows: int = 4
    """Rows in a batch."""
    heldout_tokens: int = 4000
    """Held-out tokens of a source that are scored after each run."""
    architecture: ArchitectureConfig = field(default_factory=_tiny)
    """Shape of the small networks."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-3, warmup_steps=10))
    """Optimizer of the small networks; the learning rate ends at a twentieth of its peak (report, section 4.2)."""
    concentration: float = 1.0
    """Mixtures are drawn from a Dirichlet distribution of mean prior (flattened) and this many pseudo-counts a part:
    small values give extreme mixtures, large ones stay near the mean."""
    flatten: float = 0.5
    """Power of the prior's shares in that mean: 1 is the prior, 0 all parts alike, so that small parts are seen too."""
    final_tokens: int = 0
    """Tokens of the training the mixture is for: it reads no source more than `most_repeats` times. 0: no cap."""
    most_repeats: float = 10.0
    """See `final_tokens` (report, section 2.1.2)."""
    keep: float = 0.1
    """Least part of its share in the prior that a part keeps, in [0, 1]: laws know least where a share is near 0."""
    bootstraps: int = 200
    """Refits on redrawn losses; the mixture is the mean of their best ones, the intervals are their spread."""
    verify_seeds: int = 5
    """Pairs of runs, fitted mixture against prior, on seeds the fit never saw: at least 2, or 0 for no check."""
    workers: int = 1
    """Runs at once, one thread each; the results do not depend on it."""
    seed: int = 0
    """Of the mixtures, of the small networks' weights and of their data order."""

    def __post_init__(self) -> None:
        for name, least in (("runs", 8), ("bootstraps", 20), ("workers", 1), ("heldout_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} is below {least}")
        if self.verify_seeds == 1 or self.verify_seeds < 0:
            raise UserError(
                f"verify_seeds: {self.verify_seeds} is neither 0 nor at least 2 (an interval needs two)"
            )
        if self.tokens < self.context * self.rows:
            raise UserError(f"tokens: {self.tokens} are fewer than one batch of {self.rows} x {self.context}")
        for name in ("concentration", "most_repeats"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")
        for name in ("flatten", "keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        if self.final_tokens < 0:
            raise UserError(f"final_tokens: {self.final_tokens} is negative")
        for name in ("prior", "targets"):
            shares = getattr(self, name)
            if shares and (min(shares.values()) < 0 or not sum(shares.values())):
                raise UserError(f"{name}: shares must not be negative, and one must be above 0")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.tokenizer]
