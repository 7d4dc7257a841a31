"""Fixtures shared by the rooms: a tiny tokenizer step and tiny conversations."""

import json
import shutil

import pytest
import torch

# Small-tensor work with two torch threads can be far slower than with one, and tests share the machine.
torch.set_num_threads(1)

WORDS = "fever cough asthma lung heart pain drug dose daily mild severe acute chronic child adult".split()


def sentence(index: int, length: int = 12) -> str:
    return " ".join(WORDS[(index * 7 + i * (index % 5 + 1)) % len(WORDS)] for i in range(length)) + "."


def make_tokenizer_step(root):
    """Makes the folder of a tokenizer step: two sources of 60 short documents, one in ten held out."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from galenic.corpus.tokens import tokenizer
    from galenic.corpus.tokens.tokenizer_config import TokenizerConfig

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
def tokenizer_step(tmp_path_factory):
    return make_tokenizer_step(tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """A JSON-lines file of 40 conversations; `medical.heldout.jsonl` beside it holds the same."""
    path = tmp_path_factory.mktemp("sft") / "medical.train.jsonl"
    with open(path, "w") as file:
        for index in range(40):
            messages = [
                {"role": "user", "content": f"What follows {WORDS[index % len(WORDS)]}?"},
                {"role": "assistant", "content": f"{WORDS[(index + 1) % len(WORDS)]}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    shutil.copyfile(path, path.with_name("medical.heldout.jsonl"))
    return path


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template in the style of SmolLM2's, with a default system message and no marks around the answers."""


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A model folder of another architecture than ours: a random Llama with a byte-level tokenizer and ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    inner.train_from_iterator([sentence(index) for index in range(60)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def plain_numerics():
    """Undoes what a stage may have set for the whole process: Hypothesis needs subnormal numbers."""
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What merges remember of earlier ones stays inside a test."""
    monkeypatch.setenv("GALENIC_CACHE", str(tmp_path_factory.mktemp("cache")))
