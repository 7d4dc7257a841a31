import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.tokens import tokenizer as verb
from galenic.corpus.tokens import tokenizer_units
from galenic.corpus.tokens.shards import PARTS, join_shards, read_meta, read_shard, write_shard
from galenic.corpus.tokens.tokenizer_config import TokenizerConfig
from galenic.runtime import UserError

GROUPS = {"wiki": "general", "cardio": "medical", "hsk": "general"}


def documents(count=90):
    words = "fever cough heart pain chronic renal failure 糖尿病 血糖 the of and history".split()
    generator = np.random.default_rng(5)
    return [
        {
            "text": " ".join(generator.choice(words, generator.integers(1, 30))) + "\n<C_A> 1234",
            "source": list(GROUPS)[i * 7 % 3],
            "split": "heldout" if i % 6 == 0 else "train",
            "weight": 1.0 + i / 7,
        }
        for i in range(count)
    ]


def write_corpus(folder, parts, row_group_size=8192):
    """Writes a corpus folder; one part is a file, several are a folder of files."""
    import pyarrow as pa
    from pyarrow import parquet

    place = folder / "documents.parquet"
    folder.mkdir()
    if len(parts) > 1:
        place.mkdir()
    for number, rows in enumerate(parts):
        path = place / f"{number:05d}.parquet" if len(parts) > 1 else place
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    sources = {
        name: {
            "group": group,
            "documents": sum(row["source"] == name for rows in parts for row in rows),
            "characters": sum(len(row["text"]) for rows in parts for row in rows if row["source"] == name),
        }
        for name, group in GROUPS.items()
    }
    (folder / "sources.json").write_text(json.dumps(sources))
    return folder


def config(corpus, out, **changes):
    return TokenizerConfig(**{"corpus": str(corpus), "out": str(out), "vocab_size": 512, **changes})


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of one file with one row group: the output folder."""
    root = tmp_path_factory.mktemp("whole")
    verb.run(config(write_corpus(root / "corpus", [documents()]), root / "out"))
    return root / "out"


def test_any_division_gives_the_same_bytes(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(tokenizer_units, "UNIT_BYTES", 1000)
    rows = documents()
    corpus = write_corpus(tmp_path / "corpus", [rows[:35], rows[35:40], rows[40:]], row_group_size=10)
    assert len(tokenizer_units.plan_units(corpus / "documents.parquet")) > 4
    verb.run(config(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(whole)
    assert not list(tmp_path.rglob("*.partial"))


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, whole):
    rows = documents()
    corpus = write_corpus(tmp_path / "corpus", [rows[:35], rows[35:40], rows[40:]])
    words = [sys.executable, "-m", "galenic.cli", "tokenizer", "--corpus", corpus, "--out", tmp_path / "out"]
    done = subprocess.run([*words, "--vocab_size", "512", "--workers", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out").items() >= contents(whole).items()


def test_batches_smaller_than_a_unit_change_nothing(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(tokenizer_units, "BATCH", 7)
    verb.run(config(write_corpus(tmp_path / "corpus", [documents()]), tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(whole)


def test_shards_hold_the_documents_in_their_order(whole):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(whole / "tokenizer.json"))
    for source in GROUPS:
        for split in ("train", "heldout"):
            rows = [row for row in documents() if (row["source"], row["split"]) == (source, split)]
            shard = read_shard(whole, source, split)
            texts = [
                tokenizer.decode(shard.document(i)[1:-1], skip_special_tokens=False)
                for i in range(len(shard))
            ]
            assert texts == [row["text"] for row in rows]
            assert shard.weights.tolist() == pytest.approx([row["weight"] for row in rows])


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, whole):
    rows = documents()
    parts = [rows[start : start + 9] for start in range(0, 90, 9)]
    corpus, out = write_corpus(tmp_path / "corpus", parts), tmp_path / "out"
    # Each unit takes a while longer, so that the kill comes between two of them.
    code = (
        "import sys, time\nfrom galenic.corpus.tokens import tokenizer as verb\n"
        "from galenic.corpus.tokens.tokenizer_config import TokenizerConfig\n"
        "encode = verb.encode\n"
        "verb.encode = lambda unit: (encode(unit), time.sleep(0.1))[0]\n"
        "verb.run(TokenizerConfig(corpus=sys.argv[1], out=sys.argv[2], vocab_size=512))\n"
    )
    there = out / ".tokens.partial" / "parts"
    for target in (2, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(corpus), str(out)], stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(there.glob("0*"))) < target:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert target <= len(list(there.glob("0*"))) < 10
        assert not (out / "tokens").exists()
    done = {part: os.stat(part).st_ino for part in there.glob("0*")}
    encoded = []
    real = verb.encode
    try:
        verb.encode = lambda unit: encoded.append(unit["out"]) or real(unit)
        verb.run(config(corpus, out))
    finally:
        verb.encode = real
    assert len(encoded) == 10 - len(done) and not set(encoded) & {str(part) for part in done}
    assert contents(out) == contents(whole)


def test_what_was_encoded_otherwise_is_not_gone_on_with(tmp_path, monkeypatch):
    rows = documents()
    corpus, out = write_corpus(tmp_path / "corpus", [rows[:40], rows[40:]]), tmp_path / "out"
    real = verb.encode

    def fail(unit):
        if unit["number"] == 1:
            raise OSError("disk gone")
        return real(unit)

    monkeypatch.setattr(verb, "encode", fail)
    with pytest.raises(OSError, match="disk gone"):
        verb.run(config(corpus, out))
    assert len(list((out / ".tokens.partial" / "parts").glob("0*"))) == 1
    monkeypatch.setattr(verb, "encode", real)
    verb.run(config(corpus, out, vocab_size=530))
    verb.run(config(corpus, tmp_path / "fresh", vocab_size=530))
    assert contents(out) == contents(tmp_path / "fresh")


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 9), st.floats(0, 4))),
        max_size=4,
    )
)
def test_joined_shards_are_those_of_all_documents(tmp_path_factory, parts):
    root = tmp_path_factory.mktemp("join")
    folders = [root / str(number) for number in range(len(parts))]
    for folder, rows in zip(folders, parts, strict=True):
        folder.mkdir()
        if rows:
            write_shard(folder, "s", "train", rows, "uint16")
    (root / "joined").mkdir()
    (root / "once").mkdir()
    joined = join_shards(folders, root / "joined", "s", "train", "uint16")
    once = write_shard(root / "once", "s", "train", [row for rows in parts for row in rows], "uint16")
    assert joined == once
    assert contents(root / "joined") == contents(root / "once")
    assert len(contents(root / "joined")) == len(PARTS)


# ---------------------------------------------------------------------------- two BPEs


def test_an_additional_bpe_is_merged_in(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [documents()])
    chosen = {"vocab_size": 560, "additional": ["medical", "hsk"], "additional_share": 0.6}
    assert (
        "60% of the merges from cardio, hsk" in verb.plan(config(corpus, "x", **chosen)).facts["vocabulary"]
    )
    verb.run(config(corpus, tmp_path / "out", **chosen))
    verb.run(config(corpus, tmp_path / "again", **chosen))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert read_meta(tmp_path / "out")["vocab_size"] <= 560


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"additional": ["medica"]},
            r"'medica' is neither a group nor a source \(did you mean 'medical'\?\)",
        ),
        ({"additional": ["medical", "general"]}, "names every source"),
        ({"additional_share": 1.0}, r"additional_share: 1.0 is not in \(0, 1\)"),
        ({"additional": ["hsk"], "tokenizer": "x"}, "not both"),
        ({"workers": 0}, "workers: 0 is below 1"),
    ],
)
def test_contradictions_are_refused(tmp_path, changes, says):
    corpus = write_corpus(tmp_path / "corpus", [documents()])
    with pytest.raises(UserError, match=says):
        verb.run(config(corpus, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- an existing tokenizer


def test_shards_for_a_model_that_has_a_tokenizer(tmp_path, llama_folder):
    from transformers import AutoTokenizer

    rows = documents()
    rows[1]["text"] = "A text with <|im_end|> and <|im_start|> in it."
    corpus = write_corpus(tmp_path / "corpus", [rows])
    verb.plan(config(corpus, "x", tokenizer=str(llama_folder)))
    verb.run(config(corpus, tmp_path / "out", tokenizer=str(llama_folder)))
    theirs, ours = (
        AutoTokenizer.from_pretrained(llama_folder),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    meta = read_meta(tmp_path / "out")
    assert meta["vocab_size"] == len(theirs)
    assert meta["special"] == {
        "bos": theirs.bos_token_id,
        "eos": theirs.eos_token_id,
        "pad": theirs.eos_token_id,
    }
    kept = [row for row in rows if (row["source"], row["split"]) == ("cardio", "train")]
    assert rows[1] in kept
    shard = read_shard(tmp_path / "out", "cardio", "train")
    for index, row in enumerate(kept):
        ids = shard.document(index)
        assert (ids[0], ids[-1]) == (theirs.bos_token_id, theirs.eos_token_id)
        assert not {theirs.bos_token_id, theirs.eos_token_id} & set(ids[1:-1].tolist())
        assert theirs.decode(ids[1:-1]) == row["text"]


def test_a_text_begins_with_its_end_where_there_is_no_beginning(tmp_path, llama_folder):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "gpt"
    inner = PreTrainedTokenizerFast.from_pretrained(llama_folder).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(folder)
    corpus = write_corpus(tmp_path / "corpus", [documents()])
    verb.run(config(corpus, tmp_path / "out", tokenizer=str(folder / "tokenizer.json")))
    assert read_meta(tmp_path / "out")["special"] == {"bos": 0, "eos": 0, "pad": 0}
    ids = read_shard(tmp_path / "out", "hsk", "train").document(0)
    assert (ids[0], ids[-1]) == (0, 0) and ids[1:-1].min() > 0


def test_tokenizers_that_do_not_do_are_refused(tmp_path, llama_folder):
    from transformers import PreTrainedTokenizerFast

    corpus = write_corpus(tmp_path / "corpus", [documents()])
    endless = tmp_path / "endless"
    inner = PreTrainedTokenizerFast.from_pretrained(llama_folder).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(endless)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    for place, says in (
        (endless, "which token ends a text"),
        (broken, "not a usable tokenizer"),
        (tmp_path, "no tokenizer.json"),
    ):
        with pytest.raises(UserError, match=says):
            verb.run(config(corpus, tmp_path / "out", tokenizer=str(place)))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- bad documents


def test_documents_that_do_not_do_are_refused(tmp_path):
    rows = documents()
    cases = [
        ([rows[0] | {"split": "test"}], "split 'test' is neither train nor heldout"),
        ([rows[0] | {"source": "other"}], "documents of 'other', which sources.json does not know"),
        ([{"text": "a", "source": "wiki"}], "no column split, weight"),
        ([row for row in rows if row["split"] == "heldout"], "no training documents"),
    ]
    for number, (bad, says) in enumerate(cases):
        corpus = write_corpus(tmp_path / str(number), [bad])
        with pytest.raises(UserError, match=says):
            verb.run(config(corpus, tmp_path / "out"))
    (corpus / "documents.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable documents file"):
        verb.run(config(corpus, tmp_path / "out"))
    (corpus / "documents.parquet").unlink()
    with pytest.raises(UserError, match="run the corpus step first"):
        verb.run(config(corpus, tmp_path / "out"))
    (corpus / "documents.parquet").mkdir()
    with pytest.raises(UserError, match=r"no \*\.parquet files"):
        verb.run(config(corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
