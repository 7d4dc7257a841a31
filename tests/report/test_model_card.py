"""The card of a model folder, read by the Hub's own library."""

import json
from pathlib import Path

import compare_run
import pytest
from huggingface_hub import ModelCard

from galenic import cli
from galenic.report import cards
from galenic.report.config import ReportConfig
from galenic.report.model_card import Card, fenced, licences, render, split, with_evaluation
from galenic.runtime import UserError

SCORE = {"value": 0.5, "low": 0.4, "high": 0.6175, "n": 99, "chance": 0.25}
NUMBERS = {
    "accuracy": {"recall": SCORE, "transfer": SCORE | {"low": 0.2, "value": 0.3, "high": 0.35}},
    "benchmarks": {"CMExam": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 1000, "metric": "exact_match"}},
    "bits_per_byte": {"a": {"value": 1.0}, "b": {"value": 2.0}},
    "normalised_average": 0.875,
}


def simple(**changes):
    values = {
        "title": "A: model",
        "description": "Says # things.",
        "licence": "other",
        "languages": ["en", "zh"],
    }
    return Card(**values | {"parents": ["org/base"], "tags": ["medical", "galenic"]} | changes)


def test_the_hub_reads_every_card():
    card = ModelCard(render(simple(relation="merge", pipeline="text-generation")))
    assert card.data.license == "other" and card.data.language == ["en", "zh"]
    assert card.data.base_model == ["org/base"] and card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"
    assert "not medical advice" in card.text and "# A: model" in card.text
    assert ModelCard(render(Card(title="x", description="y"))).data.to_dict()["tags"] == ["galenic"]


def test_the_hub_reads_the_evaluation():
    text = with_evaluation(render(simple()), "mine", NUMBERS, {"accuracy": "by <s>", "other": "not told"})
    card = ModelCard(text)
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert card.data.model_name == "mine" and list(found) == [
        "recall questions",
        "transfer questions",
        "CMExam",
    ]
    first = found["recall questions"]
    assert (first.metric_type, first.metric_value) == ("accuracy", 50.0)
    assert first.metric_args == {"n": 99, "low": 40.0, "high": 61.75, "interval": "95%"}
    assert found["CMExam"].metric_type == "exact_match" and found["CMExam"].metric_value == 25.0
    for told in ("| recall | 50.0 | 40.0 to 61.8 | 99 | 25 |", "1.500 bits per byte", "0.875", "`by <s>`"):
        assert told in card.text
    assert "Not distinguishable from chance: transfer." in card.text and "not told" not in card.text
    assert card.text.index("## Evaluation") < card.text.index("## Intended use and limits")


def test_a_card_is_completed_again_without_doubling():
    once = with_evaluation(render(simple()), "mine", NUMBERS, {}, made_by=["`10-corpus`: 1 s"])
    assert with_evaluation(once, "mine", NUMBERS, {}, made_by=["`10-corpus`: 1 s"]) == once
    assert once.count("## Evaluation") == 1 and "* `10-corpus`: 1 s" in once
    without = with_evaluation(once, "mine", None, {})
    assert "It was not evaluated." in without and "model-index" not in without and "| recall |" not in without


@pytest.mark.parametrize("text", ["", "# only words\n", "---\n- a\n---\n\nbody\n", "---\n: [\n---\nbody\n"])
def test_a_card_of_others_may_have_no_front_matter(text):
    assert split(text) == ({}, text)
    done = with_evaluation(text, "mine", NUMBERS, {})
    assert ModelCard(done).data.eval_results and text.strip() in done


def test_sections_and_fences():
    assert licences({}) == "" and "* a: MIT" in licences({"a": "MIT"})
    assert fenced({"a": 1}) == '```json\n{\n  "a": 1\n}\n```'
    assert "more lines in galenic.json" in fenced({str(i): i for i in range(100)})
    sources = {"web": {"title": "a | b", "licence": "two\nlines", "url_or_package": "x"}}
    assert "| web | a \\| b | two lines | x |" in with_evaluation("", "m", None, {}, sources=sources)


# ---------------------------------------------------------------------------- from a run


@pytest.fixture
def run(tmp_path):
    root = compare_run.build(tmp_path / "run")
    model = root / "60-flatten/model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text(render(simple(title="Flattened")), encoding="utf-8")
    (root / "60-flatten/provenance.json").write_text(
        json.dumps({"verb": "flatten", "inputs": {"RUN/50-merge-metagpt/model": "", "RUN/10-corpus": ""}})
    )
    file = root / "70-evaluate/results.json"
    results = json.loads(file.read_text())
    results["models"]["flattened"]["path"] = "60-flatten/model"
    file.write_text(json.dumps(results))
    return root


def test_a_model_of_a_run_has_its_evaluation_texts_and_steps(run, tmp_path):
    model = run / "60-flatten/model"
    before = (model / "README.md").read_bytes()
    assert cli.main(["report", "--card", str(model), "--out", str(tmp_path / "card")]) == 0
    card = ModelCard((tmp_path / "card/README.md").read_text(encoding="utf-8"))
    assert (model / "README.md").read_bytes() == before  # what a step made stays as it is
    results = json.loads((run / "70-evaluate/results.json").read_text())["models"]["flattened"]
    assert [r.metric_value for r in card.data.eval_results] == [
        round(100 * score["value"], 2) for score in results["accuracy"].values()
    ]
    steps = [line.split("`")[1] for line in card.text.splitlines() if line.startswith("* `")]
    assert steps == [
        *(
            "10-corpus",
            "41-sft-medical",
            "42-sft-dialogue",
            "43-sft-reasoning",
            "50-merge-metagpt",
            "60-flatten",
        )
    ]
    assert "| wikipedia |" in card.text and str(run) not in card.content


def test_what_has_no_evaluation_says_so(run, tmp_path):
    model = run / "50-merge-metagpt/model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert "It was not evaluated." in cards.card(ReportConfig(card=str(model)))
    with pytest.raises(
        UserError, match=r"70-evaluate has no model 50-merge-metagpt/model; it has .*flattened"
    ):
        cards.card(ReportConfig(card=str(model), evaluate=str(run / "70-evaluate")))
    with pytest.raises(UserError, match=r"holds no config.json"):
        cards.card(ReportConfig(card=str(tmp_path)))
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    assert "not evaluated" in cards.card(ReportConfig(card=str(outside)))
    assert Path(outside / "README.md").exists() is False
