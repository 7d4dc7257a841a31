"""What flattening needs to know."""

import math
from dataclasses import dataclass, field
from typing import Literal

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class FlattenConfig:
    """Shifts the linear layers of a model on training text."""

    out: str
    """Output folder: receives `model/` and `flatten.json`."""
    model: str
    """Model folder: ours, or of any causal language model that transformers knows."""
    tokens: str | None = None
    """Output folder of the tokenizer step; its shards are the training text."""
    conversations: list[str] = field(default_factory=list)
    """Instead of `tokens`: JSON-lines files of conversations, encoded by the model's own tokenizer and chat template.
    Each gives an equal share; the loss is that of the answers."""
    heldout: list[str] = field(default_factory=list)
    """With `conversations`: files of conversations the loss is proved on."""
    sources: list[str] | dict[str, float] = field(default_factory=list)
    """Which sources of training text to use: names (shares by their size), or name -> share. Default: all of them."""
    train_tokens: int = 32768
    """Tokens of training text the statistics are taken on."""
    heldout_tokens: int = 16384
    """Tokens of held-out text the loss is proved on."""
    row_length: int = 256
    """Tokens in a row; each row starts at the start of a document."""
    batch_rows: int = 16
    """Rows in a forward pass."""
    mode: Literal["exact", "ridge"] = "ridge"
    """`exact` keeps every output on the training text; `ridge` lets each layer's outputs move by `output_budget`."""
    output_budget: float | None = None
    """Ridge only: how far a layer's outputs may move, relative to their norm. Default: 0.01."""
    loss_budget: float = 0.005
    """Largest change of the loss (nats per token, on the first rows of the training text) that one layer may cause;
    a layer beyond it goes back to what it was."""
    layers: list[str] = field(default_factory=lambda: ["*"])
    """Names of linear layers, with `*` for any text. `*` takes every layer that can be shifted."""
    head: Literal["materialise", "skip"] = "materialise"
    """A NormHead's rows are scaled to unit length, so it cannot be shifted: `materialise` first turns it into a plain
    linear head of the same outputs, `skip` leaves it alone."""
    probes: int = 16
    """Random vectors of the Hessian trace estimate; 0 leaves the trace out."""
    trace_rows: int = 4
    """Rows of training text the Hessian trace is taken on."""
    seed: int = 0
    """Seed of the choice of rows and of the trace's random vectors."""

    def __post_init__(self) -> None:
        """Refuses contradictions before any work.

        Raises:
            UserError: no text or two kinds of it, a number out of range, a budget for the exact mode, shares that are
                not positive, no layers.
        """
        if (self.tokens is None) == (not self.conversations):
            raise UserError("tokens: give a tokenizer step's folder, or conversations; one of the two")
        if bool(self.conversations) != bool(self.heldout):
            raise UserError("heldout: conversations to train on and to prove the loss on go together")
        if self.conversations and self.sources:
            raise UserError("sources: are of tokens; conversations are files of their own")
        for name in ("train_tokens", "heldout_tokens", "batch_rows", "trace_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is less than 1")
        if self.row_length < 2:
            raise UserError(f"row_length: {self.row_length} leaves nothing to predict; at least 2")
        for name in ("train_tokens", "heldout_tokens"):
            if getattr(self, name) < self.row_length:
                raise UserError(
                    f"{name}: {getattr(self, name)} is less than one row (row_length: {self.row_length})"
                )
        if self.probes < 0 or self.probes == 1:
            raise UserError(f"probes: {self.probes} gives no standard error; at least 2, or 0 for no trace")
        if self.trace_rows > self.train_tokens // self.row_length:
            raise UserError(
                f"trace_rows: {self.trace_rows} is more than train_tokens / row_length = "
                f"{self.train_tokens // self.row_length} rows"
            )
        if self.mode == "exact" and self.output_budget is not None:
            raise UserError("output_budget: mode: exact does not move outputs; remove it or use mode: ridge")
        if self.output_budget is not None and not 0 < self.output_budget < 1:
            raise UserError(f"output_budget: {self.output_budget} is not between 0 and 1")
        if not self.loss_budget > 0:
            raise UserError(f"loss_budget: {self.loss_budget} is not positive")
        if not self.layers:
            raise UserError("layers: name at least one; '*' takes all")
        if isinstance(self.sources, dict):
            for name, share in self.sources.items():
                if not (share > 0 and math.isfinite(share)):
                    raise UserError(f"sources.{name}: {share} is not a positive share")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.model, *([self.tokens] if self.tokens else []), *self.conversations, *self.heldout]

    @property
    def budget(self) -> float:
        """The relative output budget in effect: 0 in exact mode."""
        if self.mode == "exact":
            return 0.0
        return 0.01 if self.output_budget is None else self.output_budget
