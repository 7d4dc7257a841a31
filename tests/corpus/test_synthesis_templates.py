"""Knowledge graphs without an endpoint."""

import pyarrow
import pytest
from pyarrow import parquet

from galenic.corpus.records import Document, Entity
from galenic.corpus.starter import conversations, questions
from galenic.corpus.starter.facts import phrase_in
from galenic.corpus.starter.render import Family, render
from galenic.corpus.synthesis.knowledge_graph import description, parse, tree_of
from galenic.corpus.synthesis.synthesise import plan, run
from galenic.corpus.synthesis.synthesise_config import OFFLINE_GENRES, PipelineConfig, SynthesiseConfig
from galenic.corpus.synthesis.templates import WORDINGS, offline
from galenic.runtime import UserError, read_jsonl

ORGANS = "heart lung liver kidney spleen brain skin eye".split()
ORGANS_ZH = "心脏 肺部 肝脏 肾脏 脾脏 大脑 皮肤 眼睛".split()


def entities():
    made = [Entity(id="D:0", source="onto", name="Organ disease", kind="disease", department="medicine")]
    for number, organ in enumerate(ORGANS, start=1):
        made.append(
            Entity(
                id=f"D:{number}",
                source="onto",
                name=f"{organ.title()}itis",
                kind="disease",
                department="medicine",
                definition=f"A swelling that begins in the {organ} and lasts for {number} weeks.",
                synonyms=(f"{organ} swelling", f"Morbus {organ}ii"),
                codes=(f"D:{number}",),
                parents=("D:0",),
            )
        )
    for number, organ in enumerate(ORGANS_ZH, start=1):
        made.append(
            Entity(
                id=f"Z:{number}",
                source="tables",
                name=f"{organ}病",
                kind="疾病",
                department="内科",
                related=(("症状", f"持续{number}周的疼痛"), ("药物", f"甲{number}素"), ("科室", "内科")),
            )
        )
    return made


def rows(split=lambda entity: "train"):
    everything = entities()
    family = Family(everything)
    for entity in everything:
        language = "zh" if entity.id.startswith("Z") else "en"
        yield vars(
            Document(
                id=entity.id,
                text=render(entity, family),
                source=entity.source,
                licence="CC0",
                language=language,
                category=entity.kind,
                department=entity.department,
                split=split(entity),
            )
        )


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    table = pyarrow.Table.from_pylist(list(rows(lambda e: "heldout" if e.id in ("D:8", "Z:8") else "train")))
    parquet.write_table(table, folder / "documents.parquet")
    return folder


def config(corpus, out, **changes):
    pipeline = PipelineConfig(name="knowledge-graph", offline=True, **changes)
    return SynthesiseConfig(out=str(out), corpus=str(corpus), pipelines=[pipeline])


def test_entities_come_back_out_of_their_text():
    for entity, row in zip(entities(), rows(), strict=True):
        found = parse(row)
        for name in ("name", "kind", "department", "definition", "comment", "synonyms"):
            assert getattr(found, name) == getattr(entity, name), name
        assert set(entity.related) <= set(found.related)


@pytest.mark.parametrize(
    "text",
    [
        "Plain text.",
        "# Title\n\nA text.",
        "# Title\n\n- Population: adults\n\nText",
        "# A\n# B\n\n- Type: x",
        "",
    ],
)
def test_other_documents_are_no_entities(text):
    assert parse({"id": "x", "text": text, "source": "s", "department": ""}) is None


def test_siblings_by_parent_or_department():
    tree = tree_of(rows())
    assert set(tree.siblings("D:1")) == {f"D:{i}" for i in range(2, 9)}
    assert set(tree.siblings("Z:1")) == {f"Z:{i}" for i in range(2, 9)}


@pytest.mark.parametrize(("key", "language"), [("D:3", "en"), ("Z:3", "zh")])
def test_genres(key, language):
    tree = tree_of(rows())
    entity = tree.entities[key]
    drafts = {genre: offline(tree, key, genre, language, 1) for genre in OFFLINE_GENRES}
    assert None not in drafts.values()
    choice = drafts["choice"]
    stem, *options = choice.question.split("\nA. ")[0], *choice.question.split("\n")[-4:]
    names = [option[3:] for option in options]
    assert entity.name in names and len(set(names)) == 4
    assert {name for name in names} <= {e.name for e in tree.entities.values()}
    right = names.index(entity.name)
    assert choice.answer.endswith(f"{'ABCD'[right]}. {entity.name}")
    for letter, name in zip("ABCD", names, strict=True):  # each option is told why
        assert f"{letter}. {name}" in choice.answer
    for genre in ("choice", "term"):
        assert description(entity) in drafts[genre].question
    assert not phrase_in(entity.name, stem) and not phrase_in(entity.name, drafts["term"].question)
    assert drafts["term"].answer.startswith(entity.name)
    for genre in ("note", "card", "comparison"):
        assert drafts[genre].question == "" and entity.name in drafts[genre].answer


def test_answers_stand_in_every_place():
    tree = tree_of(rows())
    letters = {
        offline(tree, f"D:{i}", "choice", "en", seed).answer.split("Answer: ")[1][0]
        for i in range(1, 9)
        for seed in range(4)
    }
    assert letters == set("ABCD")


def test_wordings_are_used_nowhere_else():
    ours = [w.replace("{given}", "").strip() for by in WORDINGS.values() for ws in by.values() for w in ws]
    theirs = [*questions.WORDINGS.values(), *(w for ws in conversations.WORDINGS.values() for w in ws)]
    theirs = {w.replace("{given}", "").strip() for w in theirs}
    assert not theirs & set(ours)


def test_the_verb_needs_no_endpoint(corpus, tmp_path):
    run(config(corpus, tmp_path / "out", limit=40))
    table = parquet.read_table(tmp_path / "out/documents.parquet").to_pylist()
    assert len(table) == 40
    assert [row["id"] for row in table] == sorted(row["id"] for row in table)
    assert {row["source"] for row in table} == {"synthetic-knowledge-graph"}
    assert {row["licence"] for row in table} == {"derived from onto: CC0", "derived from tables: CC0"}
    assert {row["language"] for row in table} == {"en", "zh"}
    talks = list(read_jsonl(tmp_path / "out/sft.jsonl"))
    assert {row["id"].split("/")[-1] for row in talks} == {"choice", "term"}
    everything = (tmp_path / "out/sft.jsonl").read_text() + "".join(row["text"] for row in table)
    assert "begins in the eye" not in everything and "持续8周" not in everything  # held out
    assert not (tmp_path / "out.cache").exists()
    again = tmp_path / "again"
    run(config(corpus, again, limit=40))
    for name in ("documents.parquet", "sft.jsonl", "ledger.jsonl"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_plan(corpus, tmp_path):
    told = plan(config(corpus, tmp_path / "out"))
    assert (
        told.facts["synthetic-knowledge-graph (templates)"] == "at most 100 items of 15 entities, no request"
    )
    assert not (tmp_path / "out").exists()


def test_no_entities(corpus, tmp_path):
    with pytest.raises(UserError, match="finds no entities in nowhere"):
        run(config(corpus, tmp_path / "out", sources=["nowhere"]))
