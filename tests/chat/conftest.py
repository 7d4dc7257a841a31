"""A tiny model folder of random weights that can be talked to."""

import pytest
from transformers import PreTrainedTokenizerFast

from galenic import model as model_room
from galenic.corpus.tokens.chat_format import SYSTEM_PROMPT
from galenic.corpus.tokens.tokenizer import save_tokenizer, train_bpe
from network_helpers import fresh_model

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
    model = fresh_model(len(tokenizer), seed=3)
    folder = tmp_path_factory.mktemp("chat") / "model"
    model_room.save(model, folder, tokenizer=tokens_folder, provenance={"verb": "sft"})
    return folder
