"""Fixtures shared by the rooms: a tiny tokenizer step and tiny conversations."""

import json

import pytest
import torch

# Small-tensor work with two torch threads can be far slower than with one, and tests share the machine.
torch.set_num_threads(1)

WORDS = "fever cough asthma lung heart pain drug dose daily mild severe acute chronic child adult".split()


def sentence(index: int, length: int = 12) -> str:
    return " ".join(WORDS[(index * 7 + i * (index % 5 + 1)) % len(WORDS)] for i in range(length)) + "."


@pytest.fixture(scope="session")
def tokenizer_step(tmp_path_factory):
    """Folder of a tokenizer step: two sources of 60 short documents, one in ten held out."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from galenic.corpus import tokenizer
    from galenic.corpus.tokenizer_config import TokenizerConfig

    root = tmp_path_factory.mktemp("steps")
    corpus, out = root / "10-corpus", root / "20-tokenizer"
    corpus.mkdir()
    rows = [
        {
            "text": f"{source} {sentence(index)}",
            "source": source,
            "split": "heldout" if index % 10 == 0 else "train",
            "weight": 1.0,
        }
        for source in ("general", "medical")
        for index in range(60)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), corpus / "documents.parquet")
    sources = {name: {"group": name, "documents": 60, "characters": 4000} for name in ("general", "medical")}
    (corpus / "sources.json").write_text(json.dumps(sources))
    out.mkdir()
    tokenizer.run(TokenizerConfig(out=str(out), corpus=str(corpus), vocab_size=512))
    return out


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """A JSON-lines file of 40 conversations."""
    path = tmp_path_factory.mktemp("sft") / "medical.train.jsonl"
    with open(path, "w") as file:
        for index in range(40):
            messages = [
                {"role": "user", "content": f"What follows {WORDS[index % len(WORDS)]}?"},
                {"role": "assistant", "content": f"{WORDS[(index + 1) % len(WORDS)]}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(autouse=True)
def plain_numerics():
    """Undoes what a stage may have set for the whole process: Hypothesis needs subnormal numbers."""
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What merges remember of earlier ones stays inside a test."""
    monkeypatch.setenv("GALENIC_CACHE", str(tmp_path_factory.mktemp("cache")))
