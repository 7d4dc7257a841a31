"""Rows of text for statistics, losses and curvature: whole documents or conversations packed as in training."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galenic.align.sft import encode_samples
from galenic.corpus.chat_format import PAD
from galenic.corpus.shards import read_meta, read_shard
from galenic.flatten.config import FlattenConfig
from galenic.model import load_tokenizer
from galenic.pretrain.packing import IGNORE, best_fit, collate, phase_rows
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
    place = str(config.tokens)
    names = list(config.sources) or list(read_meta(place)["sources"])
    sizes = {name: len(read_shard(place, name, split).tokens) for name in names}
    shares = config.sources if isinstance(config.sources, dict) else sizes
    whole = sum(shares[name] for name in names)
    amounts = {name: min(sizes[name], tokens * shares[name] / whole) for name in names if sizes[name]}
    if not amounts:
        raise UserError(f"{config.tokens}: its sources hold no {split} text")
    return amounts


def read_rows(config: FlattenConfig, split: str, tokens: int, alone: bool = False) -> list[Batch]:
    """Packs about so many tokens of a split into rows, chosen by the config's seed, and batches them.

    Args:
        config: names the text.
        split: `train` or `heldout`.
        tokens: filling included.
        alone: one conversation a row, for models that would mix packed ones.
    """
    laid = (
        _conversations(config, split, tokens, alone)
        if config.conversations
        else _documents(config, split, tokens)
    )
    batches = []
    for start in range(0, len(laid), config.batch_rows):
        rows = laid[start : start + config.batch_rows]
        batch = collate(rows, config.row_length, PAD)
        lengths = torch.tensor([sum(len(text) for text, _ in row) for row in rows])
        batches.append(
            Batch(
                labels=batch.pop("labels"),
                mask=torch.arange(config.row_length) < lengths[:, None],
                inputs=batch | {"use_cache": False},
            )
        )
    return batches


Row = list[tuple[np.ndarray, np.ndarray]]
"""The documents of a row as (token ids, labels)."""


def _documents(config: FlattenConfig, split: str, tokens: int) -> list[Row]:
    """Draws documents of the tokenizer step; every token is a label."""
    amounts = source_tokens(config, split, tokens)
    shards = {name: read_shard(str(config.tokens), name, split) for name in amounts}
    rows = phase_rows(
        shards,
        amounts,
        tokens=round(sum(amounts.values())),
        context=config.row_length,
        seed=config.seed,
        name=f"flatten-{split}",
    )[: max(1, tokens // config.row_length)]
    laid = []
    for row in rows:
        texts = [shards[p.source].document(p.document)[p.start : p.start + p.length] for p in row]
        laid.append([(text, text) for text in texts])
    return laid


def _conversations(config: FlattenConfig, split: str, tokens: int, alone: bool) -> list[Row]:
    """Draws conversations, an equal share of each file and none twice; answers are labels."""
    tokenizer = load_tokenizer(config.model)
    files = config.conversations if split == "train" else config.heldout
    generator = np.random.Generator(np.random.Philox(key=[config.seed, split == "train"]))
    chosen: Row = []
    for file in files:
        samples, _ = encode_samples(file, tokenizer, config.row_length)
        drawn = 0
        for index in generator.permutation(len(samples)).tolist():
            if drawn >= tokens / len(files):
                break
            chosen.append(samples[index])
            drawn += config.row_length if alone else len(samples[index][0])
    packed = best_fit([config.row_length if alone else len(ids) for ids, _ in chosen], config.row_length)
    order = generator.permutation(len(packed))[: max(1, tokens // config.row_length)]
    return [[chosen[i] for i in packed[j]] for j in order]


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
