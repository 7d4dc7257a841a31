"""Bits per byte: how many bits the model needs for one byte of text, comparable across tokenizers.

    bits per byte = sum over text tokens of -log2 p(token | tokens before) / UTF-8 bytes of the text

Documents are `<s>` + text + `</s>`. `<s>` is never predicted; `</s>` is not text and is left out. In conversations
only the assistant's turns count: their tokens and the `</s>` that ends each turn in the numerator (stopping in time is
part of an answer), the bytes of the answers' text in the denominator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from galenic.corpus.tokens.chat_template import encode_chat
from galenic.runtime import UserError

from .likelihood import Advance, token_log_probs


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Token ids, which of them count, and how many UTF-8 bytes of text those stand for."""

    ids: np.ndarray
    """(length) int64."""
    counted: np.ndarray
    """(length) bool; the first token never counts."""
    bytes: int


def document(ids: np.ndarray, size: int) -> Scored:
    """Prepares a stored document `<s>` + text + `</s>` of `size` bytes: text tokens count."""
    counted = np.ones(len(ids), dtype=bool)
    counted[0] = counted[-1] = False
    return Scored(ids=ids.astype(np.int64), counted=counted, bytes=size)


def conversation(tokenizer: Any, messages: list[dict[str, str]]) -> Scored:
    """Prepares a conversation in the tokenizer's chat format: the assistant's tokens count, the ends of turns included.

    Raises:
        UserError: the tokenizer's chat template does not allow it.
    """
    try:
        ids, answers = encode_chat(tokenizer, messages)
    except ValueError as error:
        raise UserError(f"a conversation cannot be scored: {error}") from None
    size = sum(len(message["content"].encode()) for message in messages if message["role"] == "assistant")
    return Scored(ids=np.array(ids, dtype=np.int64), counted=np.array(answers, dtype=bool), bytes=size)


def bits_per_byte(
    model: torch.nn.Module,
    texts: Sequence[Scored],
    *,
    context: int,
    batch_tokens: int,
    advance: Advance | None = None,
) -> tuple[float, int]:
    """Returns (bits per byte, bytes) of the counted tokens of all texts together.

    Args:
        model: a causal language model.
        texts: what to score; see `document` and `conversation`.
        context: most tokens the model takes at once; longer texts are scored in overlapping windows.
        batch_tokens: most tokens of one forward pass.
        advance: called with the number of tokens after each batch.
    """
    scores = token_log_probs(
        model, [text.ids for text in texts], context=context, batch_tokens=batch_tokens, advance=advance
    )
    nats = -math.fsum(score[text.counted[1:]].sum() for score, text in zip(scores, texts, strict=True))
    size = sum(text.bytes for text in texts)
    return nats / math.log(2) / size, size
