"""Rows of text for statistics, losses and curvature: whole documents packed as in training."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galenic.corpus.chat_format import PAD
from galenic.corpus.shards import read_meta, read_shard
from galenic.flatten.config import FlattenConfig
from galenic.pretrain.packing import IGNORE, collate, phase_rows
from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A few rows of packed documents."""

    inputs: dict[str, Any]
    """`input_ids` and `position_ids`, (rows, tokens) int64, as the model's keywords."""
    labels: Tensor
    """(rows, tokens) int64: the tokens themselves, -100 where nothing is predicted."""
    mask: Tensor
    """(rows, tokens) bool: True on tokens of documents, False on the filling at a row's end."""

    @property
    def tokens(self) -> int:
        """Tokens of documents."""
        return int(self.mask.sum())


def source_tokens(config: FlattenConfig, split: str, tokens: int) -> dict[str, float]:
    """Divides a budget of tokens over the sources by their shares; a small source gives all it has, never twice.

    Raises:
        UserError: an unknown source, or no text at all.
    """
    names = list(config.sources) or list(read_meta(config.tokens)["sources"])
    sizes = {name: len(read_shard(config.tokens, name, split).tokens) for name in names}
    shares = config.sources if isinstance(config.sources, dict) else sizes
    whole = sum(shares[name] for name in names)
    amounts = {name: min(sizes[name], tokens * shares[name] / whole) for name in names if sizes[name]}
    if not amounts:
        raise UserError(f"{config.tokens}: its sources hold no {split} text")
    return amounts


def read_rows(config: FlattenConfig, split: str, tokens: int) -> list[Batch]:
    """Packs about so many tokens of a split into rows, chosen by the config's seed, and batches them."""
    amounts = source_tokens(config, split, tokens)
    shards = {name: read_shard(config.tokens, name, split) for name in amounts}
    rows = phase_rows(
        shards,
        amounts,
        tokens=round(sum(amounts.values())),
        context=config.row_length,
        seed=config.seed,
        name=f"flatten-{split}",
    )[: max(1, tokens // config.row_length)]
    batches = []
    for start in range(0, len(rows), config.batch_rows):
        laid = []
        for row in rows[start : start + config.batch_rows]:
            texts = [shards[p.source].document(p.document)[p.start : p.start + p.length] for p in row]
            laid.append([(text, text) for text in texts])
        batch = collate(laid, config.row_length, PAD)
        labels = batch.pop("labels")
        mask = batch["input_ids"] != PAD
        batches.append(
            Batch(inputs=batch | {"use_cache": False}, labels=labels.masked_fill(~mask, IGNORE), mask=mask)
        )
    return batches


def first_rows(batches: list[Batch], count: int) -> list[Batch]:
    """Returns the first so many rows, in the given batches (the last one cut)."""
    chosen = []
    for batch in batches:
        if count <= 0:
            break
        inputs = {k: v[:count] if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
        chosen.append(Batch(inputs=inputs, labels=batch.labels[:count], mask=batch.mask[:count]))
        count -= len(batch.labels)
    return chosen


def summed_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Returns the summed cross-entropy (nats) of next tokens and their number."""
    targets = batch.labels[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
    return loss, int((targets != IGNORE).sum())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[Batch]) -> float:
    """Returns the loss in nats per predicted token."""
    total, count = 0.0, 0
    for batch in batches:
        loss, tokens = summed_loss(model(**batch.inputs).logits, batch)
        total += float(loss)
        count += tokens
    return per_token(total, count)


def per_token(total: float, count: int) -> float:
    """Divides a summed loss by its number of predicted tokens.

    Raises:
        UserError: there are none.
    """
    if not count:
        raise UserError("the text has nothing to predict: every document is a single token")
    return total / count
