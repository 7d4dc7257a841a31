"""All probes in a real evaluation, killed and resumed, compared; and what their configuration refuses."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from evaluate_helpers import question, write_rows
from test_evaluate import config_of, folders, read  # noqa: F401  # a fixture

from galenic import cli
from galenic.evaluate import compare, evaluate
from galenic.evaluate.compare_config import CompareConfig
from galenic.evaluate.config import EvaluateConfig
from galenic.evaluate.probes import probes
from galenic.evaluate.probes.config import (
    CalibrationConfig,
    ContaminationConfig,
    HopsConfig,
    NeedleConfig,
    PositionsConfig,
    ProbesConfig,
    SafetyConfig,
)
from galenic.runtime import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    text = f"Before. {question(0)['question']} fever 0 is the answer. What is sign 1 of nothing?"
    parquet.write_table(
        pa.Table.from_pylist([{"text": text, "split": "train"}]), folder / "documents.parquet"
    )
    return folder


def all_probes(corpus):
    return ProbesConfig(
        needle=NeedleConfig(
            contexts=[90, 96, 200], depths=[0.0, 1.0], items=1, languages=["en"], written_tokens=4
        ),
        hops=HopsConfig(contexts=[95], hops=[1], items=2, languages=["en"]),
        safety=SafetyConfig(written_tokens=4),
        calibration=CalibrationConfig(bins=4),
        positions=PositionsConfig(questions=3),
        contamination=ContaminationConfig(corpus=str(corpus)),
    )


@pytest.fixture(scope="module")
def probed(folders, tokens_folder, tmp_path_factory, corpus):  # noqa: F811
    config = config_of(folders, tokens_folder, tmp_path_factory.mktemp("probed"), probes=all_probes(corpus))
    evaluate.run(config)
    return config


def shares(value):
    """Every dict in a nested one that holds a value."""
    if isinstance(value, dict):
        if "value" in value:
            yield value
        for inner in value.values():
            yield from shares(inner)


def test_every_share_has_its_interval_and_number(probed):
    results = read(probed, "results.json")
    for name in ("one", "two"):
        found = results["models"][name]["probes"]
        assert list(found) == ["needle", "hops", "safety", "positions", "calibration", "contamination"]
        numbers = list(shares(found))
        assert len(numbers) > 50
        for number in numbers:
            assert {"value", "low", "high", "n"} <= set(number)
            assert number["n"] == 0 or 0 <= number["low"] <= number["value"] <= number["high"] <= 1
        assert found["needle"]["too_long"] >= 2  # this model reads 96 tokens
        rows = read(probed, f"items/{name}.jsonl")
        assert all(0 <= row["right"] <= 1 for row in rows)
        kinds = {row["kind"] for row in rows}
        assert kinds == {
            "recall", "code", "probe-needle", "probe-hops", "probe-safety-harmful", "probe-safety-harmless",
            "probe-positions-recall", "probe-positions-code",
        }  # fmt: skip
        asked = [row for row in rows if row["kind"] == "recall"]
        assert found["calibration"]["recall"]["per_byte"]["n"] == len(asked) == 7
        for row in asked:
            assert row["right"] == float(row["picks"]["per_byte"] == row["answer"])
    assert set(results["protocol"]) >= {f"probes.{name}" for name in found}
    assert read(probed, "contamination.json").keys() == {"recall", "code"}


def test_a_killed_evaluation_ends_with_the_same_bytes(
    probed,
    tmp_path,
    monkeypatch,
    folders,  # noqa: F811
    tokens_folder,
    corpus,
):
    config = config_of(folders, tokens_folder, tmp_path, probes=all_probes(corpus))
    real, calls = probes.positions.measure, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(probes.positions, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config)
    evaluate.run(config)
    assert len(calls) == 3
    for name in (
        "results.json",
        "contamination.json",
        "items/one.jsonl",
        "items/two.jsonl",
        "items/two.json",
    ):
        with open(f"{probed.out}/{name}", "rb") as file:
            assert (tmp_path / name).read_bytes() == file.read()


def test_probes_can_be_compared(probed):
    found = compare.compare(CompareConfig(a=f"{probed.out}:one", b=f"{probed.out}:two"))
    assert {"recall", "probe-needle", "probe-safety-harmless", "probe-positions-code"} <= set(found["kinds"])
    assert found["kinds"]["probe-positions-code"]["test"] in ("sign flips", "mcnemar")


def test_progress_counts_every_prompt(probed, tmp_path, monkeypatch):
    counts = probes.prompts(probed.probes, {"recall": [question(i) for i in range(7)], "code": []})
    assert counts == {
        "needle": 12, "hops": 2, "safety": 160, "positions": 12, "calibration": 0, "contamination": 0,
    }  # fmt: skip
    plan = evaluate.plan(probed)
    assert "needle (12 prompts), hops (2 prompts), safety (160 prompts)" in plan.facts["probes"]
    done, totals = [], []

    @contextmanager
    def counted(total, *args, **kwargs):
        totals.append(total)
        yield SimpleNamespace(update=lambda n=1, note="": done.append(n))

    monkeypatch.setattr(evaluate, "progress", counted)
    evaluate.run(replace(probed, out=str(tmp_path)))
    assert [sum(done)] == totals


def test_probes_alone_from_yaml(folders, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "probes.yaml"
    file.write_text(
        f"out: {tmp_path / 'out'}\nmodels: {{one: {folders / 'one'}}}\n"
        "probes:\n  needle: {contexts: [90], depths: [0.5], items: 2, languages: [en]}\n"
    )
    assert cli.main(["evaluate", "--config", str(file)]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["models"]["one"]["probes"]["needle"]["n"] == 2
    assert results["models"]["one"]["accuracy"] == {}
    assert cli.main(["evaluate", "--config", str(file), "--probes.needle.depths", "[1.5]"]) == 2
    assert "probes.needle.depths: 1.5 is not from 0" in capsys.readouterr().err
    assert cli.main(["evaluate", "--config", str(file), "--probes.needle.item", "3"]) == 2
    assert "items" in capsys.readouterr().err


def test_the_haystack_is_told(folders, tmp_path):  # noqa: F811
    (tmp_path / "texts.txt").write_text("Held out. " * 30)
    probe = ProbesConfig(
        needle=NeedleConfig(contexts=[90], depths=[0.5], items=1), haystack=str(tmp_path / "texts.txt")
    )
    config = EvaluateConfig(out=str(tmp_path / "out"), models={"one": str(folders / "one")}, probes=probe)
    assert str(tmp_path / "texts.txt") in config.reads()
    evaluate.run(config)
    assert "held-out text of texts.txt" in read(config, "results.json")["protocol"]["probes.needle"]
    missing = EvaluateConfig(
        out="o",
        models={"one": str(folders / "one")},
        probes=ProbesConfig(needle=NeedleConfig(), haystack="nowhere.txt"),
    )
    with pytest.raises(UserError, match=r"probes.haystack: nowhere.txt is no .txt"):
        evaluate.plan(missing)
    bad = ProbesConfig(contamination=ContaminationConfig(corpus="nowhere"))
    write_rows(tmp_path / "questions/recall.jsonl", [question(0)])
    missing = EvaluateConfig(
        out="o", models={"one": str(folders / "one")}, probes=bad, questions=str(tmp_path / "questions")
    )
    with pytest.raises(UserError, match=r"probes.contamination.corpus: nowhere is no corpus"):
        evaluate.plan(missing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProbesConfig(), "probes names none; give one of needle, hops"),
        (
            lambda: ProbesConfig(safety=SafetyConfig(), haystack="x"),
            "haystack is used by needle and hops only",
        ),
        (lambda: ProbesConfig(needle=NeedleConfig(depths=[-0.1])), "needle.depths: -0.1 is not from 0"),
        (
            lambda: ProbesConfig(needle=NeedleConfig(contexts=[])),
            r"needle.contexts is \[\]; give at least one",
        ),
        (lambda: ProbesConfig(needle=NeedleConfig(depths=[1, 1])), "needle.depths is .*each once"),
        (
            lambda: ProbesConfig(needle=NeedleConfig(contexts=[0])),
            "needle.contexts is 0; it must be at least 1",
        ),
        (lambda: ProbesConfig(needle=NeedleConfig(items=0)), "needle.items is 0"),
        (lambda: ProbesConfig(needle=NeedleConfig(written_tokens=-1)), "needle.written_tokens is -1"),
        (lambda: ProbesConfig(hops=HopsConfig(hops=[5])), "hops.hops: 5 is more than the 4"),
        (lambda: ProbesConfig(hops=HopsConfig(hops=[0])), "hops.hops is 0"),
        (lambda: ProbesConfig(safety=SafetyConfig(written_tokens=0)), "safety.written_tokens is 0"),
        (lambda: ProbesConfig(safety=SafetyConfig(languages=[])), "safety.languages is"),
        (lambda: ProbesConfig(calibration=CalibrationConfig(bins=0)), "calibration.bins is 0"),
        (lambda: ProbesConfig(positions=PositionsConfig(questions=0)), "positions.questions is 0"),
        (
            lambda: EvaluateConfig(
                out="o", models={"a": "m"}, probes=ProbesConfig(calibration=CalibrationConfig())
            ),
            "probes.calibration needs questions",
        ),
        (lambda: EvaluateConfig(out="o", models={"a": "m"}), "conversations, benchmarks or probes"),
    ],
)
def test_config_refuses_contradictions(make, message):
    with pytest.raises(UserError, match=message):
        make()
