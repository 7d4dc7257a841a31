import pytest

from galenic.corpus.config import CorpusConfig, SourceConfig, StarterConfig
from galenic.corpus.privacy.deidentify import Deidentification
from galenic.runtime import UserError

NOTES = {"name": "notes", "path": "notes.jsonl", "format": "jsonl", "licence": "ours"}


def test_unknown_source_names_the_nearest():
    with pytest.raises(UserError, match=r"limits: unknown source 'wikipedai' \(did you mean 'wikipedia'\?\)"):
        StarterConfig(limits={"wikipedai": 3})
    with pytest.raises(UserError, match="weights: unknown source"):
        StarterConfig(weights={"nothing": 1.0})


@pytest.mark.parametrize(
    "values", [{"transfer_share": 0.6}, {"pair_share": -0.1}, {"limits": {"hpo": -1}}, {"questions": 0}]
)
def test_contradictions_in_the_starter_name_the_field(values):
    with pytest.raises(UserError, match=next(iter(values))):
        StarterConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"heldout_share": 0.0},
        {"near_duplicate": 1.5},
        {"max_failures": -0.1},
        {"unit_bytes": 10},
    ],
)
def test_contradictions_name_the_field(values):
    with pytest.raises(UserError, match=next(iter(values))):
        CorpusConfig(out="x", starter=StarterConfig(), **values)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"name": "My Notes"}, "name 'My Notes' is not of lower-case letters"),
        ({"trust": 2.0}, "trust of 'notes' is 2.0"),
        ({"licence": " "}, "'notes' names no licence"),
    ],
)
def test_contradictions_in_a_source_name_it(values, told):
    with pytest.raises(UserError, match=told):
        SourceConfig(**(NOTES | values))


def test_a_corpus_needs_a_source_and_names_differ():
    with pytest.raises(UserError, match="sources: none given"):
        CorpusConfig(out="x")
    twice = [SourceConfig(**NOTES), SourceConfig(**NOTES)]
    with pytest.raises(UserError, match="the name 'notes' stands twice"):
        CorpusConfig(out="x", sources=twice)
    with pytest.raises(UserError, match=r"'hpo' stands twice \(the starter has one\)"):
        CorpusConfig(out="x", starter=StarterConfig(), sources=[SourceConfig(**(NOTES | {"name": "hpo"}))])


def test_reads_are_the_inputs_that_lie_on_this_machine():
    starter = StarterConfig(wheels="w", requirements="r")
    remote = SourceConfig(**(NOTES | {"name": "remote", "path": "s3://bucket/notes.jsonl"}))
    pattern = SourceConfig(**(NOTES | {"name": "pattern", "path": "data/notes/*.jsonl"}))
    config = CorpusConfig(out="x", starter=starter, sources=[SourceConfig(**NOTES), remote, pattern])
    assert config.reads() == ["notes.jsonl", "data/notes", "r", "w"]


def test_reads_know_other_marks_homes_and_lists_of_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a [1]").mkdir()
    paths = ["data/202?/notes.jsonl", "data/[ab]/x", "~/notes", "a [1]", "*.jsonl"]
    sources = [
        SourceConfig(**(NOTES | {"name": f"s{number}", "path": path, "deidentify": True}))
        for number, path in enumerate(paths)
    ]
    config = CorpusConfig(out="x", sources=sources, deidentification=Deidentification(names=("staff.txt",)))
    assert config.reads() == ["data", "data", f"{tmp_path}/notes", "a [1]", ".", "staff.txt"]
