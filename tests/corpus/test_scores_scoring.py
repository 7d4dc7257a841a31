import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from galenic.corpus.scores import scorer
from galenic.corpus.scores.labels import Labelled, part, read_labels, split, title_of
from galenic.corpus.scores.scorer_config import ScorerConfig
from galenic.corpus.scores.scoring import Scorer
from galenic.corpus.scores.taxonomy import CLASSES
from galenic.corpus.texts import column
from galenic.runtime import UserError, write_jsonl

pa = pytest.importorskip("pyarrow")

MEDICAL = "fever cough asthma lung heart pain drug dose 咳嗽 发热 哮喘 肺炎".split()
OTHER = "star planet orbit river castle novel song market 今天 朋友 公园 学校".split()


def rows(n=400):
    draw = np.random.default_rng(0)
    found = []
    for i in range(n):
        medical = i % 2 == 0
        words = draw.choice(MEDICAL if medical else OTHER, 12)
        found.append(
            {
                "text": " ".join(words) + f" number {i}.",
                "group": f"g{i}",
                "medical": medical,
                "general": "medicine" if medical else "history",
                "medical_value": 0.9 if medical else 0.0,
                "quality": None,
            }
        )
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    write_jsonl(folder / "labels.jsonl", rows())
    return ScorerConfig(out=str(folder / "out"), labels=[str(folder / "labels.jsonl")], bits=12)


@pytest.fixture(scope="module")
def folder(config):
    scorer.run(config)
    return config.out


def test_scores_are_calibrated_and_held_out_figures_are_kept(folder, capsys):
    facts = Scorer.load(folder).facts
    assert set(facts["scores"]) == {"medical_value"} and set(facts["classes"]) == {"general", "medical"}
    assert facts["heldout"]["medical"]["accuracy"] == 1
    assert facts["heldout"]["medical"]["n"] == facts["heldout"]["medical"]["groups"] > 40
    assert facts["heldout"]["medical"]["calibration_error"] < 0.05
    assert facts["heldout"]["medical_value"]["mean_absolute_error"] < 0.05
    assert sum(facts["trained_on"][p]["labels.jsonl"] for p in ("train", "calibration", "heldout")) == 400
    assert "| medical |" in scorer.table(facts)


def test_a_text_scores_the_same_in_any_batch(folder):
    score = Scorer.load(folder)
    texts = [row["text"] for row in rows(1200)] + ["", "  ", "x" * 50_000]
    whole = score(column(texts))
    for i in (0, 1, 511, 512, 1199, 1200, 1202):
        alone = score(column([texts[i]]))
        assert set(alone) == set(whole)
        assert all(alone[name].tobytes() == whole[name][i : i + 1].tobytes() for name in whole)
    chunked = pa.chunked_array([column(texts[:7]), column(texts[7:])])
    sliced = column(["a", *texts, "b"])[1:-1]
    for again in (score(chunked), score(sliced)):
        assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)


def test_results_have_the_contracts_types(folder):
    found = Scorer.load(folder)(column(["咳嗽 发热 哮喘 肺炎 fever", "castle novel song market"]))
    assert set(found) == {"medical_value", "general", "general_probability", "medical", "medical_probability"}
    assert found["medical_value"].dtype == np.float32 and found["general"].dtype == np.int32
    assert found["medical"].tolist() == [1, 0]
    assert found["medical_probability"][0] > 0.9 and found["medical_probability"][1] < 0.1
    assert [CLASSES["general"][i] for i in found["general"]] == ["medicine", "history"]
    empty = Scorer.load(folder)(column([]))
    assert all(len(values) == 0 for values in empty.values())


def test_training_again_gives_the_same_bytes(folder, config, tmp_path):
    scorer.run(replace(config, out=str(tmp_path)))
    for name in ("scorer.safetensors", "scorer.json"):
        assert (tmp_path / name).read_bytes() == (Path(folder) / name).read_bytes()


def test_damaged_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"no scorer\.json"):
        Scorer.load(tmp_path)
    facts = (Path(folder) / "scorer.json").read_text()
    weights = (Path(folder) / "scorer.safetensors").read_bytes()
    for change, data in (
        (lambda f: f | {"format": 99}, weights),
        (lambda f: f | {"bits": 13}, weights),
        (lambda f: f | {"classes": {}}, weights),
        (lambda f: {"format": 1}, weights),
        (lambda f: f, weights[:1000]),
        (lambda f: f, weights[:-4] + b"\0\0\0\1"),
    ):
        (tmp_path / "scorer.json").write_text(json.dumps(change(json.loads(facts))))
        (tmp_path / "scorer.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="train"):
            Scorer.load(tmp_path)
    (tmp_path / "scorer.safetensors").unlink()
    with pytest.raises(UserError, match="damaged scorer"):
        Scorer.load(tmp_path)


def test_plan_writes_nothing(config, tmp_path):
    plan = scorer.plan(replace(config, out=str(tmp_path / "out")))
    assert plan.reads == config.labels and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no such file"):
        scorer.plan(replace(config, labels=[str(tmp_path / "none.jsonl")]))


# ---------------------------------------------------------------------------- labels


def test_groups_stay_together_and_titles_do_not_leak():
    texts = [
        Labelled(
            text=f"t{i}",
            group=f"g{i // 5}",
            origin="o",
            title=title_of(f"Title {i % 40}"),
            scores={"quality": 1},
        )
        for i in range(1000)
    ]
    parts, taken_out = split(texts, seed=1)
    groups = {name: {row.group for row in found} for name, found in parts.items()}
    assert not groups["train"] & groups["heldout"] and not groups["calibration"] & groups["heldout"]
    titles = {row.title for row in parts["train"]}
    assert not titles & {row.title for name in ("calibration", "heldout") for row in parts[name]}
    assert taken_out + sum(map(len, parts.values())) == 1000 and taken_out > 0
    counts = [part(f"group {i}", 7) for i in range(4000)]
    assert counts.count("train") / 4000 == pytest.approx(0.7, abs=0.03)
    assert counts.count("heldout") / 4000 == pytest.approx(0.18, abs=0.03)


def test_files_of_both_kinds_give_the_same_rows(tmp_path):
    import pyarrow.parquet as parquet

    some = rows(20)
    write_jsonl(tmp_path / "a.jsonl", some)
    parquet.write_table(pa.Table.from_pylist([r | {"extra": 1} for r in some]), tmp_path / "a.parquet")
    first, second = (read_labels([str(tmp_path / name)]) for name in ("a.jsonl", "a.parquet"))
    assert first == [replace(row, origin="a.jsonl") for row in second]
    assert first[0].labels == {"medical": 1, "general": CLASSES["general"].index("medicine")}
    assert first[0].scores == {"medical_value": 0.9}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"quality": 1}, "no field 'text'"),
        ({"text": "a"}, "none of the fields"),
        ({"text": "a", "quality": 5}, r"a.jsonl:2: quality is 5, not a number in \[0, 1\]"),
        ({"text": "a", "quality": True}, "quality is True"),
        ({"text": "a", "general": "medicin"}, r"no label 'medicin' \(did you mean 'medicine'\?\)"),
    ],
)
def test_bad_labels_name_the_row(tmp_path, row, message):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "fine", "quality": 0.5}, row])
    with pytest.raises(UserError, match=message):
        read_labels([str(tmp_path / "a.jsonl")])


def test_bad_files_are_told(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"none")
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in (
        ("a.parquet", "not a readable"),
        ("a.csv", ".jsonl or .parquet"),
        ("empty.jsonl", "no rows"),
    ):
        with pytest.raises(UserError, match=message):
            read_labels([str(tmp_path / name)])


def test_too_few_groups_are_told(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a b c", "quality": 0.5}])
    with pytest.raises(UserError, match="no text falls into the part"):
        scorer.run(ScorerConfig(out=str(tmp_path / "out"), labels=[str(tmp_path / "a.jsonl")], bits=8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to learn from"),
        ({"wheels": "w"}, "wheels is given without requirements"),
        ({"labels": ["a"], "bits": 40}, "bits"),
        ({"labels": ["a"], "dropped": 1.0}, "dropped"),
        ({"labels": ["a"], "rate": 0.0}, "rate"),
        ({"labels": ["a"], "weights": {"qualty": 1.0}}, "did you mean 'quality'"),
        ({"labels": ["a"], "weights": {"quality": -1.0}}, "negative"),
        ({"labels": ["a"], "epochs": 0}, "epochs"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ScorerConfig(out="x", **values)


def test_reads_are_the_inputs():
    config = ScorerConfig(out="x", labels=["a", "b"], wheels="w", requirements="r")
    assert config.reads() == ["a", "b", "r", "w"]
