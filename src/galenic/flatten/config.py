"""What flattening needs to know."""

import math
import os
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from galenic.runtime import UserError

BUDGETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
"""Output budgets that `select: validation` tries by itself."""
TRUNCATIONS = (0.999, 0.99, 0.97, 0.95, 0.9, 0.8)
"""Energies that it tries."""
DOCUMENT_SUFFIXES = (".parquet", ".jsonl", ".txt")


@dataclass(frozen=True, kw_only=True)
class FlattenConfig:
    """Shifts the linear layers of a model on training data."""

    out: str
    """Output folder: receives `model/` and `flatten.json`."""
    model: str
    """Model folder: ours, or of any causal language model, masked language model (encoder), text classifier or image
    classifier that transformers knows."""
    tokens: str | None = None
    """Output folder of the tokenizer step; its shards are the training text."""
    conversations: list[str] = field(default_factory=list)
    """Instead of `tokens`: JSON-lines files of conversations, encoded by the model's own tokenizer and chat template.
    Each gives an equal share; the loss is that of the answers."""
    documents: list[str] = field(default_factory=list)
    """Instead of `tokens`: Parquet files, JSON lines (`.jsonl`) or texts (`.txt`, one document each), encoded by the
    model's own tokenizer. Documents are drawn from all of them at random."""
    images: list[str] = field(default_factory=list)
    """Instead of `tokens`, for image classifiers: folders with a folder of pictures for every class, or Parquet files
    with a column of pictures."""
    heldout: list[str] = field(default_factory=list)
    """With `conversations`, `documents` or `images`: more of the same kind, which the loss is proved on."""
    text_column: str = "text"
    """With `documents`: the column that holds the text."""
    image_column: str = "image"
    """With `images` in Parquet files: the column that holds the pictures."""
    label_column: str = "label"
    """For classifiers: the column that holds the class, by its name in the model's config or by its number."""
    sources: list[str] | dict[str, float] = field(default_factory=list)
    """Which sources of training text to use: names (shares by their size), or name -> share. Default: all of them."""
    train_tokens: int = 32768
    """Tokens of training text the statistics are taken on."""
    heldout_tokens: int = 16384
    """Tokens of held-out text the loss is proved on."""
    train_samples: int = 2000
    """For classifiers, instead of `train_tokens`: documents or pictures the statistics are taken on. A picture of 224 x
    224 takes 0.6 MB of memory."""
    heldout_samples: int = 1000
    """For classifiers, instead of `heldout_tokens`: documents or pictures the loss is proved on."""
    row_length: int = 256
    """Tokens in a row; each row starts at the start of a document. Encoders and classifiers read a document a row, cut
    at so many tokens."""
    batch_rows: int = 16
    """Rows in a forward pass."""
    mode: Literal["exact", "ridge", "truncate", "stochastic", "curvature"] = "ridge"
    """`exact` keeps every output on the training data; `ridge` lets each layer's outputs move by `output_budget`;
    `truncate` keeps the strongest directions of the inputs, by `rank` or `energy`; `stochastic` keeps the outputs of
    `samples` samples, the paper's SOS; `curvature` keeps every output and moves the last layer to the smallest
    Gauss-Newton trace of the layers before it, as far as random directions that it is not fitted to confirm it."""
    output_budget: float | None = None
    """Ridge: how far a layer's outputs may move, relative to their norm; with `base`, relative to what the difference
    from the base adds to them. Default: 0.01."""
    rank: int | None = None
    """Truncate: how many directions of its inputs each layer keeps. For a denoised classifier, its number of
    classes."""
    energy: float | None = None
    """Truncate: instead, which share of its outputs' squared norm each layer keeps."""
    samples: int | None = None
    """Stochastic: on how many samples (classifiers, as many of each class) or rows of text. Default: 100."""
    free_bias: bool = False
    """Layers that have a bias let it take over what their weight does along the inputs' mean."""
    gauge: bool = False
    """First takes the mean over classes off the last layer, which no softmax sees. Refused where the last layer's
    outputs are not the logits."""
    base: str | None = None
    """Model folder to shift towards instead of towards zero: for an expert of that base before merging. Its task
    vector gets shorter, never longer."""
    select: Literal["validation"] | None = None
    """`validation`: tries the `candidates` on the first half of the held-out data and takes the best, if it is better
    than the model as it is by more than two standard errors; else nothing is changed. The proof is then on the second
    half."""
    candidates: list[float] = field(default_factory=list)
    """With `select`: output budgets (mode ridge), or ranks (mode truncate; below 1, energies) to try. Default: a few
    of each."""
    method: Literal["gram", "qr"] = "gram"
    """How the inputs' span is found: from their Gram matrix, or by QR, slower, where their rank must be exact."""
    min_rows: int = 0
    """Layers (experts of a mixture) that fewer rows were sent to are left alone. 0: a layer without rows is an
    error."""
    loss_budget: float = 0.005
    """Largest change of the loss (nats per token, on the first rows of the training text) that one layer may cause;
    a layer beyond it goes back to what it was. Not with `select`: validation judges all layers together."""
    layers: list[str] = field(default_factory=lambda: ["*"])
    """Names of linear layers, with `*` for any text. `*` takes every layer that can be shifted."""
    head: Literal["materialise", "skip"] = "materialise"
    """A NormHead's rows are scaled to unit length, so it cannot be shifted: `materialise` first turns it into a plain
    linear head of the same outputs, `skip` leaves it alone."""
    probes: int = 16
    """Random vectors of the Hessian trace estimate; 0 leaves the trace out."""
    curvature: Literal["hessian", "gauss-newton"] = "hessian"
    """Which matrix the trace and the eigenvalue are of. Gauss-Newton's trace costs a quarter."""
    trace_rows: int | None = None
    """Rows of training text, or samples of a classifier, that curvature is measured on. Default: 4 or 128."""
    eigenvalue_steps: int = 0
    """Most products to spend on the largest eigenvalue, which is measured on the same rows; 0 leaves it out."""
    landscape: int = 0
    """Places at which the loss is taken along a random direction through the model, an odd number; 0 for no
    picture."""
    plane: bool = False
    """Also along two directions at once, at the square of so many places."""
    seed: int = 0
    """Seed of the choice of rows and of the trace's random vectors."""

    def __post_init__(self) -> None:
        """Refuses contradictions before any work.

        Raises:
            UserError: no data or two kinds of it, a held-out file that is trained on, a number out of range, a budget
                for the exact mode, shares that are not positive, no layers.
        """
        self._check_data()
        for name in ("train_tokens", "heldout_tokens", "train_samples", "heldout_samples", "batch_rows"):
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
        if self.trace_rows is not None and self.trace_rows < 1:
            raise UserError(f"trace_rows: {self.trace_rows} is less than 1")
        if self.images and (self.trace_rows or 0) > self.train_samples:
            raise UserError(f"trace_rows: {self.trace_rows} is more than train_samples: {self.train_samples}")
        packed = self.tokens or self.conversations
        if packed and (self.trace_rows or 0) > self.train_tokens // self.row_length:
            raise UserError(
                f"trace_rows: {self.trace_rows} is more than train_tokens / row_length = "
                f"{self.train_tokens // self.row_length} rows"
            )
        self._check_curvature()
        self._check_mode()
        if not self.loss_budget > 0:
            raise UserError(f"loss_budget: {self.loss_budget} is not positive")
        if not self.layers:
            raise UserError("layers: name at least one; '*' takes all")
        if isinstance(self.sources, dict):
            for name, share in self.sources.items():
                if not (share > 0 and math.isfinite(share)):
                    raise UserError(f"sources.{name}: {share} is not a positive share")

    def _check_data(self) -> None:
        """Refuses no data, two kinds of it, and data that proves nothing."""
        kinds = [name for name in ("tokens", "conversations", "documents", "images") if getattr(self, name)]
        if len(kinds) != 1:
            given = " and ".join(kinds) or "none of them"
            raise UserError(
                "tokens: give a tokenizer step's folder, or conversations, or documents, or images: exactly one of the "
                f"four, not {given}"
            )
        kind = kinds[0]
        if kind == "tokens" and self.heldout:
            raise UserError("heldout: a tokenizer step has held-out text of its own; leave it out")
        if kind != "tokens" and not self.heldout:
            raise UserError(f"heldout: {kind} to train on and to prove the loss on go together; give some")
        if kind != "tokens" and self.sources:
            raise UserError(f"sources: are of tokens; {kind} are files of their own")
        for file in [*self.documents, *(self.heldout if self.documents else [])]:
            if PurePath(file).suffix.lower() not in DOCUMENT_SUFFIXES:
                raise UserError(f"documents: {file} is none of {', '.join(DOCUMENT_SUFFIXES)}")
        train = {os.path.realpath(file) for file in (*self.conversations, *self.documents, *self.images)}
        for file in self.heldout:
            if os.path.realpath(file) in train:
                raise UserError(f"heldout: {file} is also trained on and would prove nothing; give another")

    def _check_curvature(self) -> None:
        if self.eigenvalue_steps < 0 or self.eigenvalue_steps == 1:
            raise UserError(
                f"eigenvalue_steps: {self.eigenvalue_steps} is not enough; at least 2, or 0 for none"
            )
        if self.landscape < 0 or self.landscape == 1 or (self.landscape and self.landscape % 2 == 0):
            raise UserError(
                f"landscape: {self.landscape}; an odd number of places from 3 on, or 0 for no picture"
            )
        if self.plane and not self.landscape:
            raise UserError("plane: needs landscape, the number of places along each direction")

    def _check_mode(self) -> None:
        """Refuses settings that the mode has no use for, and numbers out of range."""
        belong = {
            "output_budget": "ridge",
            "rank": "truncate",
            "energy": "truncate",
            "samples": "stochastic",
        }
        for name, mode in belong.items():
            if getattr(self, name) is not None and self.mode != mode:
                why = {"exact": "does not move outputs", "curvature": "does not move outputs"}.get(
                    self.mode, "decides that itself"
                )
                raise UserError(f"{name}: mode: {self.mode} {why}; remove it or use mode: {mode}")
        if self.output_budget is not None and not 0 < self.output_budget < 1:
            raise UserError(f"output_budget: {self.output_budget} is not between 0 and 1")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank: {self.rank} keeps nothing; at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy: {self.energy} is not above 0 and at most 1")
        if self.samples is not None and self.samples < 1:
            raise UserError(f"samples: {self.samples} is less than 1")
        if self.min_rows < 0:
            raise UserError(f"min_rows: {self.min_rows} is negative")
        if self.mode == "truncate" and not self.select and (self.rank is None) == (self.energy is None):
            raise UserError(
                "mode: truncate needs a rank or an energy, one of the two (or select: validation)"
            )
        if self.mode == "curvature" and self.layers != ["*"]:
            raise UserError("layers: mode: curvature shifts the last layer, and no other; leave layers out")
        if self.gauge and self.base:
            raise UserError("gauge: moves the last layer away from the base; use one of the two")
        if self.candidates and not self.select:
            raise UserError("candidates: are for select: validation")
        if not self.select:
            return
        if self.mode not in ("ridge", "truncate"):
            raise UserError(f"select: chooses a budget or a rank; mode: {self.mode} has neither")
        given = [name for name in ("output_budget", "rank", "energy") if getattr(self, name) is not None]
        if given:
            raise UserError(f"{given[0]}: is what select: validation chooses; name candidates instead")
        for value in self.candidates:
            budget = self.mode == "ridge"
            if not (0 < value < 1 or (not budget and value >= 1 and value == int(value))):
                allowed = "between 0 and 1" if budget else "an energy below 1 or a whole rank"
                raise UserError(f"candidates: {value:g} is not {allowed}")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        given = [path for path in (self.base, self.tokens) if path]
        return [self.model, *given, *self.conversations, *self.documents, *self.images, *self.heldout]

    @property
    def budget(self) -> float:
        """The relative output budget in effect: 0 in all modes but ridge."""
        if self.mode != "ridge":
            return 0.0
        return 0.01 if self.output_budget is None else self.output_budget

    def kinds(self) -> list[dict[str, Any]]:
        """Which shifts to make or to choose from, as keywords of `galenic.flatten.shift`."""
        common = {"free_bias": self.free_bias}
        if self.mode == "truncate":
            if not self.select:
                return [common | {"rank": self.rank, "energy": self.energy}]
            tried = self.candidates or TRUNCATIONS
            return [common | ({"energy": v} if v < 1 else {"rank": int(v)}) for v in tried]
        if self.mode == "curvature":
            return [common]
        budgets = (self.candidates or BUDGETS) if self.select else [self.budget]
        return [common | {"output_budget": value} for value in budgets]
