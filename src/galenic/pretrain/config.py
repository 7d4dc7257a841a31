"""Configuration of pre-training; torch-free. Fine-tuning shares `OptimConfig`."""

from dataclasses import dataclass, field

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """Shape of the network; names as in the official config."""

    hidden_size: int = 256
    """Width."""
    intermediate_size: int = 704
    """Inner width of the gated MLP."""
    num_hidden_layers: int = 6
    """Layers; odd ones attend in a sliding window."""
    num_attention_heads: int = 2
    """Query heads of global layers (the report doubles the head dimension there)."""
    num_key_value_heads: int = 1
    """Key/value heads of global layers."""
    num_swa_attention_heads: int = 4
    """Query heads of sliding-window layers."""
    num_swa_key_value_heads: int = 2
    """Key/value heads of sliding-window layers."""
    sliding_window: int = 128
    """Tokens a sliding-window layer attends to, itself included."""
    conv_window: int = 2
    """Taps of the short convolution on keys and values; 1 switches it off."""
    initializer_range: float = 0.02
    """Standard deviation of the weights at the start."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with the report's settings (section 4.2)."""

    lr: float = 4e-4
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up to the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of its first and second moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the layers' matrices; norms, convolution taps, embedding and head are spared."""
    clip: float = 1.0
    """Largest global gradient norm."""

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "eps"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name}: {getattr(self, name)} is not above 0")
        if self.warmup_steps < 0:
            raise UserError(f"optim.warmup_steps: {self.warmup_steps} is negative")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The report's gradient guard (Algorithm 1)."""

    history: int = 100
    """Accepted norms it looks back on."""
    factor: float = 1.2
    """A step is suspicious above factor * mean + offset."""
    offset: float = 0.1
    """See `factor`."""
    max_skips: int = 1
    """Steps discarded in a row at most; 0 switches the guard off."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of the curriculum."""

    name: str
    """Name of its model folder: `phase-1-general`."""
    tokens: int
    """Training tokens."""
    mixture: dict[str, float]
    """Source -> share of the phase's tokens; shares are normalised."""
    context: int = 512
    """Tokens in a row."""
    rows: int = 8
    """Rows in a batch."""
    rope_theta: float = 1e5
    """Base of the rotary positions in this phase."""
    final_lr: float | None = None
    """Learning rate at the phase's end, reached by a cosine; not given: constant."""

    def __post_init__(self) -> None:
        if (
            not self.mixture
            or any(share < 0 for share in self.mixture.values())
            or not sum(self.mixture.values())
        ):
            raise UserError(f"phases: mixture of '{self.name}' needs shares above 0")
        if self.tokens < self.context * self.rows:
            raise UserError(
                f"phases: '{self.name}' has {self.tokens} tokens, fewer than one batch of {self.rows} x {self.context}"
            )
        if "/" in self.name or self.name.startswith("."):
            raise UserError(f"phases: name '{self.name}' is not a folder name")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a model from scratch through the curriculum's phases."""

    out: str
    """Output folder: a model folder per phase and `metrics.jsonl`."""
    tokenizer: str
    """Folder of the tokenizer step, with its token shards."""
    phases: list[PhaseConfig]
    """The curriculum, in order; one optimizer state goes through all of it."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Shape of the network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Gradient guard."""
    heldout_tokens: int = 8000
    """Held-out tokens per source scored at each phase's end."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    seed: int = 0
    """Seed of the weights and of the data order."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("phases: the curriculum needs at least one phase")
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise UserError(f"phases: names must differ, got {', '.join(names)}")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.tokenizer]
