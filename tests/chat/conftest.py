"""A tiny model folder of random weights that can be talked to."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from galenic import model as model_room
from galenic.corpus.tokens.chat_format import SYSTEM_PROMPT
from galenic.corpus.tokens.tokenizer import save_tokenizer, train_bpe

TEXTS = [
    "Fever is a rise of the body temperature. It is common in infections of children.",
    "What is the blood pressure? The heart pumps blood; the pressure is measured in mmHg.",
    "Asthma is a disease of the airways. Cough and wheeze come and go.",
    "发热是体温升高。感染常见发热。",
]


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_bpe(TEXTS * 3, vocab_size=400, character_coverage=0.98, max_characters=100)
    save_tokenizer(trained, folder, SYSTEM_PROMPT)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokens_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokens_folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokens_folder, tokenizer):
    torch.manual_seed(3)
    config = model_room.BaichuanM1Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=16,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    model = model_room.BaichuanM1ForCausalLM(config).eval()
    with torch.no_grad():
        # Otherwise unit rows on a normalised state give nearly uniform predictions.
        model.model.norm.weight.mul_(8)
    folder = tmp_path_factory.mktemp("chat") / "model"
    model_room.save(model, folder, tokenizer=tokens_folder, provenance={"verb": "sft"})
    return folder
