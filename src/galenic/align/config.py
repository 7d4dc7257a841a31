"""Configuration of supervised fine-tuning; torch-free."""

import math
from dataclasses import dataclass, field
from typing import Literal

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
class ShiftConfig:
    """Optimum shifting (arXiv 2405.14111) in the course of training; see `galenic.flatten`."""

    layers: list[str] = field(default_factory=lambda: ["*"])
    """Names of linear layers, with `*` for any text. `*` takes every layer that can be shifted."""
    every: int = 100
    """Steps from one shift to the next."""
    start: float = 0.5
    """Share of the steps that are done before the first one."""
    batches: int = 8
    """Last training batches whose inputs decide a shift."""
    method: Literal["gram", "qr"] = "gram"
    """How inputs are summed up: `gram`, or `qr` where the rank must be exact."""
    output_budget: float | None = None
    """How far a layer's outputs may move on these batches, relative to their norm; 0 is the exact shift. Default: 0.01,
    without a rank."""
    rank: int | None = None
    """Instead, truncation to so many directions of the inputs."""
    anchored: bool = False
    """Towards the model that fine-tuning starts from instead of zero: an expert's task vector gets shorter, never
    longer."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("shift.layers: name at least one; '*' takes all")
        for name in ("every", "batches"):
            if getattr(self, name) < 1:
                raise UserError(f"shift.{name}: {getattr(self, name)} is less than 1")
        if not 0 <= self.start <= 1:
            raise UserError(f"shift.start: {self.start} is not in [0, 1]")
        if self.output_budget is not None and not 0 <= self.output_budget < 1:
            raise UserError(f"shift.output_budget: {self.output_budget} is not in [0, 1)")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"shift.rank: {self.rank} keeps nothing; at least 1")
        if self.rank is not None and self.output_budget:
            raise UserError("shift: give output_budget or rank; each decides the whole shift")

    def steps(self, total: int) -> range:
        """The steps of a run of `total` after which layers are shifted."""
        return range(max(1, math.ceil(self.start * total)), total + 1, self.every)


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
    shift: ShiftConfig | None = None
    """Shift linear layers to smaller norm while training. Default: none is shifted."""
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
        if self.lora and self.shift:
            raise UserError("shift: an adapter's layers are not the model's; leave out shift or lora")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.model, self.conversations, *([self.heldout] if self.heldout else [])]
