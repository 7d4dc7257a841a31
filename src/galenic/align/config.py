"""Configuration of supervised fine-tuning; torch-free."""

from dataclasses import dataclass, field

from galenic.pretrain.config import GuardConfig, OptimConfig
from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter (PEFT) instead of the whole model."""

    rank: int = 8
    """Columns of the thin factors."""
    alpha: float = 16
    """The update is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Ends of the names of the layers that are adapted. Default: all linear layers but the head."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"lora: rank {self.rank} and alpha {self.alpha:g} must be above 0")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Fine-tune an expert on conversations, loss on answers only."""

    out: str
    """Output folder: `model/` (with `lora`: an adapter of the model) and `metrics.jsonl`."""
    model: str
    """Model folder to start from: ours, or of any causal language model that transformers knows."""
    conversations: str
    """JSON lines of {"messages": [{"role", "content"}, ...]} to train on."""
    heldout: str | None = None
    """JSON lines of conversations whose answers are scored before and after."""
    tokens: int = 300_000
    """Training tokens, questions and answers together; the conversations are repeated as needed."""
    context: int = 512
    """Tokens in a row; longer conversations are left out and counted."""
    rows: int = 8
    """Rows in a batch."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5, warmup_steps=10))
    """Optimizer; the report starts from the learning rate at which annealing ended, 2e-5."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    lora: LoraConfig | None = None
    """Train an adapter; needs PEFT (`pip install 'galenic[lora]'`). Default: the whole model is trained."""
    guard: GuardConfig = field(default_factory=lambda: GuardConfig(max_skips=0))
    """Gradient guard; the report uses it in early pre-training only, so it is off here."""
    heldout_conversations: int = 200
    """Held-out conversations scored at most."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    seed: int = 0
    """Seed of the data order."""

    def __post_init__(self) -> None:
        if self.tokens < self.context * self.rows:
            raise UserError(f"tokens: {self.tokens} is fewer than one batch of {self.rows} x {self.context}")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.model, self.conversations, *([self.heldout] if self.heldout else [])]
