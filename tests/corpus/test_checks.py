"""What is wrong is said before the work starts: by the plan, and by a run that has written nothing yet."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from galenic.cli import main, parse_config
from galenic.corpus import checks, corpus
from galenic.corpus.config import CorpusConfig, SourceConfig
from galenic.corpus.mixtures.sampling import Sampling
from galenic.runtime import UserError, read_json

parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("daft")

TEXT = (
    "The patient came with a fever and a cough, and we saw that the lungs were clear on the day of visit {}."
)


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A folder with one source; returns its configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    rows = [{"text": f"Karen Wilson. {TEXT.format(number)}", "id": number} for number in range(30)]
    lines = [json.dumps(row) for row in rows] + ['{"text": "Karen Wilson', '{"body": "Karen Wilson"}']
    (tmp_path / "notes/one.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "names.txt").write_text("Karen Wilson\n")
    (tmp_path / "empty.jsonl").write_text("")
    source = {"name": "notes", "path": "notes", "format": "jsonl", "licence": "ours", "deidentify": True}
    return {
        "out": "out",
        "sources": [source],
        "workers": 1,
        "max_failures": 1.0,
        "deidentification": {"names": ["names.txt"]},
        "near_duplicate": 1.0,
    }


def planned(values):
    return corpus.plan(parse_config("corpus", values)[0])


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"scorer": "notes"}, "notes: not a scorer's folder"),
        ({"difficulty_model": "notes"}, "difficulty_model: notes is not a model folder"),
        ({"decontamination": {"evaluations": ["empty.jsonl"]}}, "empty.jsonl: no items"),
        ({"decontamination": {"evaluations": ["none.jsonl"]}}, "none.jsonl: no such file"),
        ({"deidentification": {"names": ["none.txt"]}}, "none.txt: no such file"),
        ({"deidentification": {"models": ["no_such_pipeline"]}}, "models: .*no_such_pipeline"),
        ({"address": "auto"}, "address: a cluster needs Ray"),
        ({"out": "notes/corpus"}, "out: notes/corpus lies inside notes, which source 'notes' reads"),
        (
            {"sampling": {"score": {"educational": 1}, "score_tiers": {0.1: 2}}},
            "sampling.score: no score 'educational'; they are quality, value; others need `scorer`",
        ),
        (
            {"sampling": {"score": {"medical_value": 1}, "score_tiers": {0.1: 2}}},
            "sampling.score: the column of 'medical_value' is called 'value'",
        ),
        (
            {"sampling": {"score": {"quality": 1}, "score_tiers": {0.1: 2}, "rank_within": "gruop"}},
            r"sampling.rank_within: no column 'gruop' \(did you mean 'group'\?\)",
        ),
        ({"sampling": {"class_factors": {"content": {"x": 0}}}}, "no column 'content' of classes"),
        ({"sampling": {"class_factors": {"quality": {"1": 0}}}}, "no column 'quality' of classes"),
        ({"sampling": {"class_factors": {"source": {"nots": 0}}}}, r"no 'nots' \(did you mean 'notes'\?\)"),
    ],
)
def test_mistakes_are_found_by_the_plan_and_before_a_run_writes_anything(notes, changes, told, monkeypatch):
    if "address" in changes:
        monkeypatch.setattr("galenic.corpus.checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=told) as caught:
        planned(notes | changes)
    assert "\n" not in str(caught.value)
    config = parse_config("corpus", notes | changes)[0]
    with pytest.raises(UserError, match=told):
        corpus.run(config)
    assert not Path(config.out).exists()


def test_rules_alone_are_warned_of(notes, capsys):
    assert "warning" not in planned(notes).facts
    bare = notes | {"deidentification": {}}
    assert "rules alone miss most names" in planned(bare).facts["warning"]
    corpus.run(parse_config("corpus", bare)[0])
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("galenic: warning: notes: without deidentification.names")


def test_a_list_of_names_that_nothing_is_masked_by_is_refused(notes):
    open_source = notes["sources"][0] | {"deidentify": False}
    with pytest.raises(UserError, match="no source has `deidentify: true`, so nothing would be masked"):
        parse_config("corpus", notes | {"sources": [open_source]})


@pytest.mark.parametrize(
    "changes, told", [({"weight": -1}, "weight of 'notes' is -1"), ({"limit": -3}, "limit of 'notes' is -3")]
)
def test_numbers_below_nothing_are_refused(notes, changes, told):
    with pytest.raises(UserError, match=told):
        parse_config("corpus", notes | {"sources": [notes["sources"][0] | changes]})


def test_a_wrong_word_is_told_with_the_right_ones(notes):
    with pytest.raises(
        UserError, match=r"format: Expected one of 'parquet', 'jsonl', .*'fhir'. Got value: owl"
    ):
        parse_config("corpus", notes | {"sources": [notes["sources"][0] | {"format": "owl"}]})


def test_an_option_is_not_to_be_abbreviated(capsys):
    assert main(["corpus", "--out", "x", "--starter", "{}", "--decontamination.evaluation", "[]"]) == 2
    assert "did you mean 'decontamination.evaluations'?" in capsys.readouterr().err


def test_the_ledger_does_not_quote_what_could_not_be_masked(notes):
    corpus.run(parse_config("corpus", notes)[0])
    ledger = parquet.read_table("out/ledger.parquet").to_pylist()
    broken = [row for row in ledger if row["reason"] == "malformed record"]
    assert len(broken) == 2 and all(row["text"] == "" and row["detail"] for row in broken)
    everything = json.dumps([ledger, parquet.read_table("out/documents.parquet").to_pylist()])
    assert "Wilson" not in everything
    assert read_json("out/stats.json")["masked"]["NAME"] == 30
    open_source = {key: notes["sources"][0][key] for key in ("name", "path", "format", "licence")}
    values = {**notes, "sources": [open_source], "deidentification": {}, "out": "open"}
    corpus.run(parse_config("corpus", values)[0])
    assert "Wilson" in json.dumps(parquet.read_table("open/ledger.parquet").to_pylist())


def test_a_configuration_with_numbers_for_keys_reaches_the_workers(notes):
    tiers = {"score": {"quality": 1}, "score_tiers": {0.5: 2, 1: 1}, "count_map": {1: 1, 4: 2}}
    config = parse_config("corpus", notes | {"sampling": tiers})[0]
    again = parse_config("corpus", json.loads(json.dumps(asdict(config))))[0]
    assert again == config and again.sampling.score_tiers == {0.5: 2.0, 1.0: 1.0}
    corpus.run(config)
    assert parquet.read_table("out/documents.parquet").num_rows == 30
    with pytest.raises(UserError, match=r"sampling.count_map: .*'many'.*; its keys are numbers"):
        Sampling(count_map={"many": 2})  # pyrefly: ignore


def test_a_users_guidelines_are_held_out_one_by_one(tmp_path):
    """The starter keeps the sections of its guidelines together by their ids; a folder of files is no such text."""
    folder = tmp_path / "guidelines"
    folder.mkdir()
    for number in range(50):
        (folder / f"{number}.md").write_text(f"# Title {number}\n\n{TEXT.format(number * number)}")
    source = {"name": "guidelines", "path": str(folder), "format": "markdown", "licence": "ours"}
    values = {"out": str(tmp_path / "out"), "sources": [source], "workers": 1, "near_duplicate": 1.0}
    corpus.run(parse_config("corpus", values | {"heldout_share": 0.2})[0])
    assert read_json(tmp_path / "out/sources.json")["guidelines"]["heldout"] == 10


def test_tiers_are_shares_of_text(tmp_path):
    """One long text among short ones: the best half of the bytes, not of the documents."""
    rows = [
        {"text": " ".join(TEXT.format(f"{n} {k}") for k in range(40 if n == 0 else 1))} for n in range(41)
    ]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"name": "notes", "path": str(tmp_path / "one.jsonl"), "format": "jsonl", "licence": "ours"}
    rules = {name: (1.0,) * 6 for name in ("repeated_ngrams",)} | {"top_ngrams": (1.0,) * 3}
    sampling = {"score": {"quality": 1}, "score_tiers": {0.5: 2, 1.0: 0}}
    values = {"out": str(tmp_path / "out"), "sources": [source], "workers": 1, "near_duplicate": 1.0}
    corpus.run(parse_config("corpus", values | {"rules": rules, "sampling": sampling})[0])
    table = parquet.read_table(tmp_path / "out/documents.parquet").to_pylist()
    drawn = sum(len(row["text"]) * row["weight"] for row in table)
    whole = sum(len(row["text"]) for row in rows)
    assert drawn == pytest.approx(whole, rel=0.05)


def test_a_cluster_wants_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    source = SourceConfig(name="notes", path="notes.jsonl", format="jsonl", licence="ours")
    config = CorpusConfig(out=str(tmp_path / "out"), sources=[source], address="auto")
    with pytest.raises(
        UserError, match=r"nodes of a cluster need absolute paths, 'notes\.jsonl' is relative"
    ):
        checks.check(config, {"notes": source})
    remote = dataclasses.replace(source, path="s3://bucket/notes.jsonl")
    config = dataclasses.replace(config, sources=[remote])
    assert checks.check(config, {"notes": remote}) == []
