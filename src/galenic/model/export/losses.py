"""What a change of weights costs on held-out text.

Bits per byte before and after, with a 95% interval of their difference over documents; and how often the likeliest next
token stays the same.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from galenic.evaluate.likelihood import target_log_probs, windows
from galenic.evaluate.statistics import wilson
from galenic.model.export.text import TEXT
from galenic.model.folder import load_tokenizer
from galenic.runtime import Bar, UserError, numbered_jsonl

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Text:
    """A document: token ids, and the UTF-8 bytes they stand for."""

    ids: np.ndarray
    bytes: int


def load(heldout: str | None, tokenizer: Any, limit: int) -> list[Text]:
    """Returns documents of about `limit` tokens, chosen by hash so that the order of files does not matter.

    Args:
        heldout: a tokenizer step folder, a JSON-lines file with `text`, or None: ours.
        tokenizer: of the model.
        limit: most tokens; the last document may go beyond it.

    Raises:
        UserError: no such file, no text of two tokens in it, or shards of another tokenizer.
    """
    if heldout is None:
        return _limited([_encoded(tokenizer, text) for text in TEXT], limit)
    if Path(heldout).is_dir():
        return _limited(_shards(heldout, tokenizer), limit)
    texts = []
    for number, row in numbered_jsonl(heldout):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row.get("text"), str):
            raise UserError(f"{heldout}:{number}: 'text' must be a text")
        if row["text"].strip():
            texts.append(row["text"])
    if not texts:
        raise UserError(f"heldout: {heldout} holds no text")
    order = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())
    return _limited((_encoded(tokenizer, text) for text in order), limit)


def _encoded(tokenizer: Any, text: str) -> Text:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Text(ids=np.array(start + ids, dtype=np.int64), bytes=len(text.encode("utf-8", "replace")))


def _shards(folder: str, tokenizer: Any) -> list[Text]:
    from galenic.corpus.tokens.shards import read_meta, read_shard

    meta = read_meta(folder)
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"heldout: {folder} holds tokens of another tokenizer than the model's; give the texts themselves (JSON "
            "lines with 'text')"
        )
    found = []
    for source in sorted(name for name, entry in meta["sources"].items() if entry["heldout"]["documents"]):
        shard = read_shard(folder, source, "heldout")
        for index in range(len(shard)):  # <s> text </s>, whose end is no text
            ids = shard.document(index)[:-1].astype(np.int64)
            found.append((f"{source}:{index}", Text(ids=ids, bytes=int(shard.bytes[index]))))
    if not found:
        raise UserError(f"heldout: no source of {folder} has held-out documents")
    return [text for _, text in sorted(found, key=lambda item: hashlib.sha256(item[0].encode()).digest())]


def _limited(texts: Any, limit: int) -> list[Text]:
    kept: list[Text] = []
    for text in texts:
        if sum(len(one.ids) for one in kept) >= limit:
            break
        if len(text.ids) > 1:
            kept.append(text)
    if not kept:
        raise UserError("heldout: no text in it is longer than one token")
    return kept


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model made of the documents: each one's bits, and the likeliest token at every place."""

    bits: np.ndarray
    likeliest: list[np.ndarray]


@torch.inference_mode()
def score(model: Any, texts: list[Text], bar: Bar) -> Scores:
    """Scores every token of every document but its first, in windows of the model's context."""
    context = min(2048, int(getattr(model.config, "max_position_embeddings", 2048)))
    bits, likeliest = [], []
    for text in texts:
        ids, total = torch.from_numpy(text.ids), 0.0
        picks = np.empty(len(ids) - 1, dtype=np.int64)
        for start, end, first in windows(len(ids), context):
            logits = model(input_ids=ids[None, start:end], use_cache=False).logits[
                0, first - 1 - start : end - 1 - start
            ]
            total -= float(target_log_probs(logits, ids[first:end]).double().sum())
            picks[first - 1 : end - 1] = logits.argmax(-1).numpy()
        bits.append(total / math.log(2))
        likeliest.append(picks)
        bar.update(len(ids))
    return Scores(bits=np.array(bits), likeliest=likeliest)


def compare(before: Scores, after: Scores, texts: list[Text]) -> dict[str, Any]:
    """Returns bits per byte before and after, their difference, and the agreement of the likeliest tokens.

    The difference's interval is a bootstrap over documents, paired: each resample draws documents, and takes both
    models' bits of them. The agreement's is Wilson's, as if tokens were drawn one by one.
    """
    size = np.array([text.bytes for text in texts], dtype=float)
    draws = np.random.default_rng(0).integers(0, len(texts), (RESAMPLES, len(texts)))
    differences = (after.bits - before.bits)[draws].sum(1) / size[draws].sum(1)
    low, high = np.quantile(differences, (0.025, 0.975))
    same = sum(int((a == b).sum()) for a, b in zip(before.likeliest, after.likeliest, strict=True))
    tokens = sum(map(len, before.likeliest))
    share_low, share_high = wilson(same, tokens)
    return {
        "documents": len(texts),
        "bytes": int(size.sum()),
        "tokens": tokens,
        "bits_per_byte": {
            "before": float(before.bits.sum() / size.sum()),
            "after": float(after.bits.sum() / size.sum()),
            "difference": {
                "value": float((after.bits - before.bits).sum() / size.sum()),
                "low": float(low),
                "high": float(high),
            },
        },
        "top_1_agreement": {"value": same / tokens, "low": share_low, "high": share_high},
    }
