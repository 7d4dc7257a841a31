import pytest
import torch
from evaluate_helpers import TEXTS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from galenic.corpus.tokens.chat_format import SYSTEM_PROMPT, encode_text
from galenic.corpus.tokens.shards import write_meta, write_shard
from galenic.corpus.tokens.tokenizer import save_tokenizer, train_bpe


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """A verb's run sets torch up for its process; the next test starts without that."""
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory):
    """A tokenizer step folder: a tokenizer and held-out shards of two sources and an empty one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_bpe(TEXTS * 3, vocab_size=400, character_coverage=0.98, max_characters=100)
    save_tokenizer(trained, folder, SYSTEM_PROMPT)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    (folder / "tokens").mkdir()
    sources = {}
    for source, texts in {"wikipedia": TEXTS, "hpo": [TEXTS[1] * 4, TEXTS[3] * 9], "empty": []}.items():
        rows = [([1, *encode_text(tokenizer, text), 2], len(text.encode()), 1.0) for text in texts]
        counts = write_shard(folder / "tokens", source, "heldout", rows, "uint16")
        sources[source] = {"group": "general", "train": counts, "heldout": counts}
    write_meta(folder / "tokens", {"dtype": "uint16", "vocab_size": 400, "sources": sources})
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokens_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokens_folder)


@pytest.fixture(scope="session")
def llama(tokenizer):
    """A random model with large logits, so that scores differ."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()
