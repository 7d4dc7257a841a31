import math

import numpy as np
import pytest
from evaluate_helpers import TEXTS, naive_log_probs

from galenic.corpus.tokens.chat_format import encode_text
from galenic.evaluate.bits_per_byte import bits_per_byte, conversation, document
from galenic.evaluate.likelihood import token_log_probs, windows


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_equals_one_by_one(llama, tokenizer, batch_tokens):
    ids = [[1, *encode_text(tokenizer, text), 2] for text in TEXTS]
    texts = [document(np.array(row), len(text.encode())) for row, text in zip(ids, TEXTS, strict=True)]
    value, size = bits_per_byte(llama, texts, context=64, batch_tokens=batch_tokens)
    nats = -sum(naive_log_probs(llama, row)[:-1].sum() for row in ids)  # the last token is </s>
    assert size == sum(len(text.encode()) for text in TEXTS)
    assert value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_long_documents_are_scored_in_half_overlapping_windows(llama, tokenizer):
    ids = [1, *encode_text(tokenizer, TEXTS[0] * 5), 2]
    context = 24
    assert len(ids) > 3 * context
    (scores,) = token_log_probs(llama, [ids], context=context, batch_tokens=100)
    expected = list(naive_log_probs(llama, ids[:context]))
    start = 12
    while len(expected) < len(ids) - 1:
        window = naive_log_probs(llama, ids[start : start + context])
        expected += list(window[len(expected) - start :])
        start += 12
    assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("length", "context"), [(1, 8), (8, 8), (9, 8), (100, 8), (57, 9), (5, 1)])
def test_windows_score_every_token_once(length, context):
    scored = [target for start, end, first in windows(length, context) for target in range(first, end)]
    assert scored == list(range(1, length))
    assert all(end - start <= context for start, end, _ in windows(length, context))


def test_conversation_counts_answers_and_their_end(llama, tokenizer):
    messages = [
        {"role": "user", "content": "What is asthma?"},
        {"role": "assistant", "content": "a disease"},
        {"role": "user", "content": "And fever?"},
        {"role": "assistant", "content": "体温"},
    ]
    scored = conversation(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(scored.ids) == tokenizer.encode(text, add_special_tokens=False)
    assert scored.bytes == len("a disease") + len("体温".encode())
    assert tokenizer.decode(scored.ids[scored.counted]) == "a disease</s>体温</s>"
    value, size = bits_per_byte(llama, [scored], context=64, batch_tokens=100)
    nats = -naive_log_probs(llama, scored.ids.tolist())[scored.counted[1:]].sum()
    assert value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
