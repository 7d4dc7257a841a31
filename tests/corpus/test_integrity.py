"""Shards that are cut short, altered or gone are refused by name before training; scores go along."""

import json
import shutil

import numpy as np
import pytest

from galenic.corpus.tokens import integrity, lookup
from galenic.corpus.tokens import tokenizer as verb
from galenic.corpus.tokens.integrity import check_shards
from galenic.corpus.tokens.shards import PARTS, SCORES, join_shards, read_meta, read_shard, write_shard
from galenic.corpus.tokens.tokenizer_config import TokenizerConfig
from galenic.runtime import UserError


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A corpus of two files, only the first with difficulty, and its tokenizer step."""
    import pyarrow as pa
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("steps")
    (root / "corpus" / "documents.parquet").mkdir(parents=True)
    rows = [
        {
            "id": f"{'ab'[i % 2]}/{i}",
            "text": f"text {i} of many words {'again ' * (i % 7)}",
            "source": "ab"[i % 2],
            "split": "heldout" if i % 10 == 4 else "train",
            "weight": 1.0,
            "quality": None if i == 3 else i / 100,
            "difficulty": 2.0 + i,
        }
        for i in range(80)
    ]
    for number in range(2):
        part = rows[40 * number :][:40]
        if number:
            part = [{k: v for k, v in row.items() if k != "difficulty"} for row in part]
        file = root / "corpus" / "documents.parquet" / f"{number:06d}.parquet"
        parquet.write_table(pa.Table.from_pylist(part), file)
    told = {s: {"group": "general", "documents": 40, "characters": 1000} for s in "ab"}
    (root / "corpus" / "sources.json").write_text(json.dumps(told))
    out = root / "tokenizer"
    out.mkdir()
    verb.run(TokenizerConfig(out=str(out), corpus=str(root / "corpus"), vocab_size=512))
    return root, rows


@pytest.fixture
def folder(steps, tmp_path):
    shutil.copytree(steps[0] / "tokenizer", tmp_path / "step")
    return tmp_path / "step"


def test_scores_go_along_with_their_documents(steps):
    root, rows = steps
    for source in "ab":
        kept = [row for row in rows if (row["source"], row["split"]) == (source, "train")]
        shard = read_shard(root / "tokenizer", source, "train")
        expected = [np.nan if row["quality"] is None else row["quality"] for row in kept]
        np.testing.assert_array_equal(shard.quality, np.array(expected, dtype=np.float32))
        expected = [row["difficulty"] if int(row["id"][2:]) < 40 else np.nan for row in kept]
        np.testing.assert_array_equal(shard.difficulty, np.array(expected, dtype=np.float32))


def test_scores_are_joined_and_may_be_missing(tmp_path):
    for number, scores in enumerate(({"quality": [0.5, 0.25]}, None, {"quality": [1.0]})):
        (tmp_path / str(number)).mkdir()
        rows = [([1, 2], 3, 1.0)] * (1 if number == 2 else 2)
        write_shard(tmp_path / str(number), "s", "train", rows, "uint16", scores)
    (tmp_path / "all").mkdir()
    join_shards([tmp_path / str(n) for n in range(3)], tmp_path / "all", "s", "train", "uint16")
    quality = np.load(tmp_path / "all" / "s.train.quality.npy")
    np.testing.assert_array_equal(quality, np.array([0.5, 0.25, np.nan, np.nan, 1.0], dtype=np.float32))
    assert not (tmp_path / "all" / "s.train.difficulty.npy").exists()


def test_every_file_is_known_by_size_and_hash(folder):
    files = read_meta(folder)["files"]
    stored = {file.name: file for file in (folder / "tokens").glob("*.npy")}
    assert files.keys() == stored.keys() and len(files) == 4 * len(PARTS) + 3 * len(
        SCORES
    )  # b holds nothing out
    assert all(files[name]["bytes"] == file.stat().st_size for name, file in stored.items())
    check_shards(folder, ["a", "b"])
    check_shards(folder, ["a", "b"], split="heldout")


@pytest.mark.parametrize("part", [*PARTS, *SCORES])
def test_real_faults_are_named(folder, part):
    file = folder / "tokens" / f"b.train.{part}.npy"
    whole = file.read_bytes()
    for damaged, says in ((whole[:-3], "shard files disagree"), (whole + b"\0", "shard files disagree")):
        file.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"b\.train\.{part}\.npy: {says}, it has \d+ bytes where \d+ were"
        ):
            check_shards(folder, ["a", "b"])
    for place in (len(whole) - 1, len(whole) // 2, 20):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        file.write_bytes(flipped)
        named = rf"b\.train\.{part}\.npy: damaged shard|b\.train in .*: shard files disagree"
        with pytest.raises(UserError, match=named):
            check_shards(folder, ["a", "b"])
        check_shards(folder, ["a"])  # what is not read does not matter
    file.unlink()
    with pytest.raises(
        UserError, match=rf"b\.train\.{part}\.npy: this shard file is missing; run the tokenizer"
    ):
        check_shards(folder, ["a", "b"])


def test_large_shards_are_looked_at(folder):
    check_shards(folder, ["a", "b"], most=10)
    tokens = folder / "tokens"
    for part, change, says in (
        ("tokens", lambda a: a.__setitem__(5, 60_000), "token 60000 of a vocabulary of"),
        ("offsets", lambda a: a.__setitem__(3, 10**9), "documents out of order"),
        ("weights", lambda a: a.__setitem__(0, np.nan), "a weight is no number"),
    ):
        file = tokens / f"a.train.{part}.npy"
        whole = file.read_bytes()
        array = np.load(file)
        change(array)
        np.save(file, array)
        with pytest.raises(UserError, match=rf"a\.train\.{part}\.npy: damaged shard, {says}"):
            check_shards(folder, ["a", "b"], most=10)
        file.write_bytes(whole)


def test_folders_made_before_there_were_hashes_still_read(folder):
    meta = read_meta(folder)
    del meta["files"]
    (folder / "tokens" / "meta.json").write_text(json.dumps(meta))
    for name in SCORES:
        (folder / "tokens" / f"a.train.{name}.npy").unlink()
    check_shards(folder, ["a", "b"])
    shard = read_shard(folder, "a", "train")
    assert shard.quality is None and shard.difficulty is None
    (folder / "tokens" / "a.train.bytes.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.train\.bytes\.npy: damaged shard"):
        check_shards(folder, ["a"])


def test_a_quality_of_other_documents_is_refused(folder):
    np.save(folder / "tokens" / "a.train.quality.npy", np.zeros(3, dtype=np.float32))
    meta = read_meta(folder)
    del meta["files"]
    (folder / "tokens" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="shard files disagree"):
        read_shard(folder, "a", "train")


def test_budget_of_hashes(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(integrity, "sha256_file", lambda path: hashed.append(path) or "x")
    check_shards(folder, ["a"], most=1)
    assert not hashed
    with pytest.raises(UserError, match="SHA-256 differs"):
        check_shards(folder, ["a"])
    assert len(hashed) == 1


def test_a_name_leads_back_to_text_and_id(steps):
    root, rows = steps
    kept = [row for row in rows if (row["source"], row["split"]) == ("b", "train")]
    for number in (0, 25, len(kept) - 1):
        assert lookup.text_of(root / "tokenizer", f"b:{number}") == kept[number]["text"]
        assert lookup.id_of(root / "corpus", f"b:{number}") == kept[number]["id"]
    for look, folder in ((lookup.text_of, "tokenizer"), (lookup.id_of, "corpus")):
        with pytest.raises(UserError, match=rf"b:{len(kept)}: "):
            look(root / folder, f"b:{len(kept)}")
        with pytest.raises(UserError, match="'b' is not source:number"):
            look(root / folder, "b")
