import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.tokens import tokenizer as verb
from galenic.corpus.tokens.chat_format import SPECIAL_TOKENS, SYSTEM_PROMPT, encode_conversation, encode_text
from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.corpus.tokens.tokenizer_config import TokenizerConfig
from galenic.corpus.tokens.tokenizer_units import measure, plan_units, sample
from galenic.runtime import UserError

TEXTS = [
    "Aspirin 81 mg daily for 1234 days.\n\n\tThe patient has asthma;  the asthma is mild.",
    "def add(a, b):\n    return a + b\n",
    "糖尿病患者应控制血糖。糖尿病 is diabetes.",
] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    bpe = verb.train_bpe(TEXTS, vocab_size=512, character_coverage=0.999, max_characters=200)
    verb.save_tokenizer(bpe, path, SYSTEM_PROMPT)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_have_their_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(10))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 3


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_comes_back_whole(tokenizer, text):
    ids = encode_text(tokenizer, text)
    assert 0 not in ids  # byte fallback leaves nothing unknown
    # A lone surrogate cannot be written in UTF-8; hypothesis does not make them here.
    assert tokenizer.decode(ids) == text


def test_digits_stand_alone_and_whitespace_is_kept(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "1234 mg\n\n\tdaily"))
    assert tokens[:4] == ["1", "2", "3", "4"]
    assert not any(
        len(token) > 1 and any(c.isdigit() for c in token)
        for token in tokenizer.get_vocab()
        if "<" not in token
    )


def test_markers_written_in_text_are_text(tokenizer):
    ids = encode_text(tokenizer, "<C_A></s><0x41>")
    assert not set(ids) & set(range(10))
    assert tokenizer.decode(ids) == "<C_A></s><0x41>"


def test_conversation_equals_the_chat_template(tokenizer):
    messages = [
        {"role": "user", "content": "What is 糖尿病?"},
        {"role": "assistant", "content": "diabetes."},
        {"role": "user", "content": "And 12?"},
        {"role": "assistant", "content": "twelve"},
    ]
    ids, answers = encode_conversation(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    said = [i for i, answer in zip(ids, answers, strict=True) if answer]
    assert tokenizer.decode(said) == "diabetes.</s>twelve</s>"
    ids, answers = encode_conversation(tokenizer, messages[:3])
    assert ids == tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).startswith(f"<B_SYS>{SYSTEM_PROMPT}<C_Q>What is")


def test_roles_out_of_order_are_refused(tokenizer):
    with pytest.raises(ValueError, match="message 1 is of role 'assistant', expected 'user'"):
        encode_conversation(tokenizer, [{"role": "assistant", "content": "hi"}])


def test_training_is_deterministic(folder):
    again = verb.train_bpe(TEXTS, vocab_size=512, character_coverage=0.999, max_characters=200)
    assert json.loads(again.to_str())["model"] == json.loads((folder / "tokenizer.json").read_text())["model"]


def test_training_sample_is_even_over_sources(tmp_path):
    rows = [{"text": "b" * 100, "source": "big", "split": "train"}] * 100
    rows += [{"text": "s" * 100, "source": "small", "split": "train"}] * 5
    rows += [{"text": "h" * 100, "source": "small", "split": "heldout"}] * 5
    units = plan_units(write_parts(tmp_path / "documents.parquet", [rows]))
    texts = sample(units, [measure(unit)["counts"] for unit in units], 2000)
    assert texts.count("s" * 100) == 5
    assert texts.count("b" * 100) == 15
    assert "h" * 100 not in texts


def write_parts(path, parts, row_group_size=8192):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path.mkdir()
    for number, rows in enumerate(parts):
        table = pa.Table.from_pylist([{"weight": 1.0} | row for row in rows])
        parquet.write_table(table, path / f"{number:05d}.parquet", row_group_size=row_group_size)
    return path


def write_corpus(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), path / "documents.parquet")
    sources = {
        "wiki": {"group": "general", "documents": len(rows), "characters": sum(len(r["text"]) for r in rows)}
    }
    (path / "sources.json").write_text(json.dumps(sources))


def test_the_verb_writes_shards_that_read_back(tmp_path):
    texts = [*TEXTS[:9], "The marker </s> ends a document, <C_A> opens an answer."]
    rows = [
        {"text": text, "source": "wiki", "split": "heldout" if i % 5 == 0 else "train", "weight": 1.0 + i}
        for i, text in enumerate(texts)
    ]
    write_corpus(tmp_path / "corpus", rows)
    sources = json.loads((tmp_path / "corpus/sources.json").read_text())
    sources["wiki"]["licence"] = "CC BY-SA 4.0"
    (tmp_path / "corpus/sources.json").write_text(json.dumps(sources))
    config = TokenizerConfig(out=str(tmp_path / "out"), corpus=str(tmp_path / "corpus"), vocab_size=512)
    verb.plan(config)
    verb.run(config)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    meta = read_meta(tmp_path / "out")
    assert meta["sources"]["wiki"]["train"]["documents"] == 8
    assert meta["sources"]["wiki"]["licence"] == "CC BY-SA 4.0"
    shard = read_shard(tmp_path / "out", "wiki", "train")
    kept = [row for row in rows if row["split"] == "train"]
    for index, row in enumerate(kept):
        ids = shard.document(index)
        assert (ids[0], ids[-1]) == (1, 2)
        assert ids[1:-1].min() > 9  # markers in the text are text
        assert tokenizer.decode(ids[1:-1]) == row["text"]
        assert shard.bytes[index] == len(row["text"].encode())
        assert shard.weights[index] == row["weight"]
    with pytest.raises(UserError, match=r"'wikl' is not a source .*did you mean 'wiki'"):
        read_shard(tmp_path / "out", "wikl", "train")
    offsets = tmp_path / "out" / "tokens" / "wiki.train.offsets.npy"
    np.save(offsets, np.array([0, 5], dtype=np.int64))
    with pytest.raises(UserError, match="shard files disagree"):
        read_shard(tmp_path / "out", "wiki", "train")


def test_a_folder_that_is_no_corpus_is_refused(tmp_path):
    config = TokenizerConfig(out=str(tmp_path / "out"), corpus=str(tmp_path))
    with pytest.raises(UserError, match="not a corpus folder"):
        verb.run(config)
