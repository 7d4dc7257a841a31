"""A tiny model folder with a NormHead and token shards to flatten it on."""

import json

import numpy as np
import pytest
import torch

from galenic.corpus.tokens.shards import write_meta, write_shard
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, save

VOCABULARY = 60


def write_tokens(folder):
    """Writes the shards of two sources, 60 and 30 documents, a fifth as many held out."""
    (folder / "tokens").mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": []}))
    generator = np.random.default_rng(0)
    meta = {"dtype": "uint16", "vocab_size": VOCABULARY, "sources": {}}
    for source, count in (("wikipedia", 60), ("drugs", 30)):
        meta["sources"][source] = {"group": "general"}
        for split, size in (("train", count), ("heldout", count // 5)):
            documents = []
            for _ in range(size):
                text = (10 + generator.zipf(1.5, int(generator.integers(5, 40))) % (VOCABULARY - 10)).tolist()
                documents.append(([1, *text, 2], 3 * len(text), 1.0))
            meta["sources"][source][split] = write_shard(
                folder / "tokens", source, split, documents, "uint16"
            )
    write_meta(folder / "tokens", meta)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with `model/` and `tokens` (a tokenizer step's folder); read only."""
    folder = tmp_path_factory.mktemp("flatten")
    write_tokens(folder / "tokenizer")
    torch.manual_seed(0)
    config = BaichuanM1Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_swa_attention_heads=4,
        num_swa_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.2,
    )
    save(
        BaichuanM1ForCausalLM(config).eval(),
        folder / "model",
        tokenizer=folder / "tokenizer",
        provenance={},
        parents=[],
    )
    return folder
