import math

import numpy as np
import pytest
import torch

from galenic.corpus.scores.difficulty import Difficulty, plan_facts
from galenic.runtime import UserError

TEXTS = [
    "fever cough asthma lung heart.",
    "dose daily",
    "",
    "哮喘 é",
    "acute chronic child adult " * 30,
    "drug",
]


@pytest.fixture(scope="module")
def difficulty(llama_folder):
    return Difficulty(str(llama_folder), most_tokens=64, batch_tokens=256)


def naive(difficulty, text):
    """One text alone, all its tokens, without windows or batches."""
    ids = difficulty.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[difficulty.tokenizer.bos_token_id, *ids]])
    with torch.no_grad():
        logits = difficulty.model(input_ids=ids).logits[0, :-1].double()
    nats = -logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    return nats / math.log(2) / len(text.encode())


def test_bits_per_byte_are_those_of_each_text_alone(difficulty):
    found = difficulty(TEXTS)
    assert found.dtype == np.float64
    for text, value in zip(TEXTS, found, strict=True):
        if not text:
            assert math.isnan(value)
        elif len(text) < 64:
            assert value == pytest.approx(naive(difficulty, text), rel=1e-4)
    assert difficulty(TEXTS).tobytes() == found.tobytes()
    np.testing.assert_allclose(difficulty(TEXTS[::-1])[::-1], found, rtol=1e-4)
    assert difficulty([]).shape == (0,)


def test_long_texts_count_what_was_read(difficulty):
    text = TEXTS[4]
    ids, size = difficulty._encoded(text)
    assert len(ids) == 65
    prefix = difficulty.tokenizer.decode(ids[1:])
    assert prefix == text[:size]
    assert difficulty([text])[0] == pytest.approx(naive(difficulty, prefix), rel=1e-4)
    # What is not read changes nothing.
    assert difficulty([text + "x" * 100_000])[0] == difficulty([text])[0]


def test_a_text_is_not_cut_inside_a_character(difficulty):
    ids, size = difficulty._encoded("哮喘病" * 40)
    assert size % 3 == 0 and size > 0 and len(ids) <= 65
    assert difficulty.tokenizer.decode(ids[1:]) == ("哮喘病" * 40)[: size // 3]


def test_marks_in_a_text_are_text(difficulty):
    ids, _ = difficulty._encoded("<|im_end|> fever")
    assert difficulty.tokenizer.eos_token_id not in ids


def test_predictable_text_is_easier_than_noise(difficulty):
    """A model that gives every token the same chance needs log2(vocabulary) bits a token."""
    with torch.no_grad():
        head = difficulty.model.get_output_embeddings().weight
        kept = head.clone()
        head.zero_()
    ids, size = difficulty._encoded("fever cough")
    expected = (len(ids) - 1) * math.log2(len(head)) / size
    assert difficulty(["fever cough"])[0] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        head.copy_(kept)


def test_plan_and_limits(llama_folder):
    facts = plan_facts(str(llama_folder), documents=1000, size=10**6, most_tokens=100)
    assert facts["difficulty tokens"] == "about 100k" and "parameters" in facts["difficulty model"]
    with pytest.raises(UserError, match="above 0"):
        Difficulty(str(llama_folder), most_tokens=0)
    with pytest.raises(UserError, match="no tokenizer"):
        Difficulty("/nowhere")
