"""Rows of packed text: whole documents or conversations, laid as in training."""

from typing import Any

import numpy as np

from galenic.align.sft import encode_samples
from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.flatten.config import FlattenConfig
from galenic.flatten.documents import encode_for, read_documents, shuffled
from galenic.model import load_tokenizer
from galenic.pretrain.data.packing import best_fit, phase_rows
from galenic.runtime import UserError

Row = list[tuple[np.ndarray, np.ndarray]]
"""The documents of a row as (token ids, labels)."""


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


def shard_rows(config: FlattenConfig, split: str, tokens: int) -> list[Row]:
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


def conversation_rows(config: FlattenConfig, split: str, tokens: int, alone: bool) -> list[Row]:
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


def document_rows(config: FlattenConfig, split: str, tokens: int, model: Any, alone: bool) -> list[Row]:
    """Draws documents of files, cut into pieces of a row's length; every token is a label."""
    tokenizer = load_tokenizer(config.model)
    files = config.documents if split == "train" else config.heldout
    found = read_documents(files, [config.text_column])
    order, generator = shuffled(len(found), config.seed, split)
    pieces, drawn = [], 0
    for index in order:
        if drawn >= tokens:
            break
        place, (text,) = found[index]
        ids = encode_for(model, tokenizer, text, place)
        cut = [ids[start : start + config.row_length] for start in range(0, len(ids), config.row_length)]
        pieces += cut
        drawn += config.row_length * len(cut) if alone else len(ids)
    packed = best_fit([config.row_length if alone else len(piece) for piece in pieces], config.row_length)
    rows = generator.permutation(len(packed))[: max(1, tokens // config.row_length)]
    return [[(pieces[i], pieces[i]) for i in packed[j]] for j in rows]
