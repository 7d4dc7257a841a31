"""A small model that has learned a few answers, so that text, stops and chat can be compared."""

import pytest
import torch
from parity_helpers import ANSWERS, random_model

from galenic.model import load_tokenizer, save


def learned(folder, tokenizer_step, **sizes):
    tokenizer = load_tokenizer(tokenizer_step)
    rows = []
    for question, answer in ANSWERS.items():
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(tokenizer.apply_chat_template(messages, tokenize=False))
    batch = tokenizer(rows, return_tensors="pt", padding=True, padding_side="right")
    model = random_model(vocab_size=len(tokenizer), sliding_window=8, **sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for _ in range(80):
        loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    save(model.eval(), folder, tokenizer=tokenizer_step, provenance={"title": "Chat"})
    return folder


@pytest.fixture(scope="session")
def chat_folder(tokenizer_step, tmp_path_factory):
    return learned(tmp_path_factory.mktemp("chat") / "model", tokenizer_step)


@pytest.fixture(scope="session")
def wide_chat_folder(tokenizer_step, tmp_path_factory):
    """Heads of 64 and 32, the smallest that vLLM's attention on CPUs takes."""
    return learned(tmp_path_factory.mktemp("wide") / "model", tokenizer_step, hidden_size=128)
