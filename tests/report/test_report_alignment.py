"""The section on alignment: every stage's health, and what the models say before and after."""

import json
import re
import shutil

import fake_run
import pytest
from balanced import Balanced
from markupsafe import Markup

from galenic.report import report, score_charts
from galenic.report.inputs import read_run
from galenic.runtime import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("aligned")
    config = fake_run.build(root)
    return root, config, section(report.render(config, read_run(config)))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without drawings, where the drawings are not what is tested."""
    monkeypatch.setattr("galenic.report.charts.draw_figure", lambda key, label, *_: Markup("<svg></svg>"))


def section(text):
    return re.search(r'<section id="alignment".*?</section>', text, re.DOTALL)[0]


def words(text):
    page = Balanced()
    page.feed(text)
    return page.text


def rewritten(built, tmp_path, file, change):
    """The section after a change to one file of a copy of the run."""
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config, path = fake_run.build(copy), copy / file
    content = path.read_text()
    rows = (
        [json.loads(line) for line in content.splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(content)
    )
    fake_run.write(path, change(rows))
    return section(report.render(config, read_run(config)))


def test_each_stage_has_its_curves_in_order(built):
    charts = re.findall(
        r'<svg class="chart"[^>]*aria-label="Health of ([^"]*)">(.*?)</svg>', built[2], re.DOTALL
    )
    assert [label.split()[0] for label, _ in charts] == list(fake_run.STAGES)
    for (label, drawing), name in zip(charts, fake_run.STAGES, strict=True):
        drawn = [text for text in re.findall(r">([^<]+)</text>", drawing)]
        rows = [json.loads(line) for line in (built[0] / fake_run.STAGES[name] / "metrics.jsonl").open()]
        last = [row for row in rows if row["kind"] == "train"][-1]
        for measure, title in (
            ("reward", "reward"),
            ("kl", "KL, nats a token"),
            ("clipped", "clipped, share"),
        ):
            assert (title in drawn) == (measure in last)
            if measure in last:
                assert f"{measure} {last[measure]:.3g}" in label
        assert "loss" in drawn
    assert "sft → elo → tdpo → reward → ppo" in built[2]


def test_the_tables_tell_ends_and_what_was_held_out(built):
    stages, heldout = re.findall(r"<table>.*?</table>", built[2], re.DOTALL)[-2:]
    every = re.findall(r'<tr><th scope="row">([\w-]+)</th>(.*?)</tr>', stages, re.DOTALL)
    rows = dict(every)
    assert [name for name, _ in every] == list(fake_run.STAGES)
    assert "fine-tuning – – – – –" in words(rows["sft"])
    metrics = [json.loads(line) for line in (built[0] / "56-elo/metrics.jsonl").open()]
    rewards = [row["reward"] for row in metrics if row["kind"] == "train"]
    first, last = sum(rewards[:12]) / 12, sum(rewards[-12:]) / 12
    assert f"ELO {first:.3g} → {last:.3g}" in words(rows["elo"])
    measured = [
        (name, words(told).strip())
        for name, told in re.findall(r'<tr><th scope="row">([\w-]+)</th>(.*?)</tr>', heldout, re.DOTALL)
    ]
    assert ("sft", "answers tasks 2.750 1.250") in measured
    assert ("elo", "accuracy 0.125 0.625") in measured
    assert ("elo", "log likelihood -1.500 -0.875") in measured
    assert {name for name, _ in measured} == set(fake_run.STAGES)


def test_five_questions_go_from_the_base_through_the_stages(built):
    cards = re.findall(r'<div class="card question written">.*?</div>', built[2], re.DOTALL)
    assert len(cards) == 5
    for number, card in enumerate(cards):
        names = re.findall(r"</span>([\w-]+)(?: <span class=\"tag\">|</dt>)", card)
        assert names == [fake_run.PHASES[-1], "after-sft", "after-elo", "after-tdpo", "after-ppo"]
        assert f"{fake_run.PHASES[-1]} says that it is fever {number}" in card
    right = re.findall(r"<dt>(?:(?!</dt>).)*&#10003;", cards[0])
    assert len(right) == 1 and "after-ppo" in right[0]
    assert "nothing" in cards[0] and "myocardial infarction" in cards[0]
    assert "&lt;script&gt;" in cards[3]


def test_without_a_stage_among_the_models_all_are_shown(undrawn, built, tmp_path):
    def change(results):
        for model in results["models"].values():
            model["path"] = "elsewhere/model"
        return results

    text = rewritten(built, tmp_path, "70-evaluate/results.json", change)
    assert text.count("says that it is fever 1") == len(fake_run.MODELS)


def test_without_written_answers_there_are_none(undrawn, built, tmp_path):
    def change(results):
        for question in results["shown"]:
            del question["said"]
        return results

    text = rewritten(built, tmp_path, "70-evaluate/results.json", change)
    assert "What the models say" not in text and "Stages" in text


def test_a_stage_under_way_or_gone_astray_says_so(undrawn, built, tmp_path):
    def change(rows):
        kept = [row for row in rows if row["step"] < 40]
        kept[3]["reward"] = float("nan")
        return [
            *kept,
            {"kind": "stopped", "step": 40, "loss": "nan", "grad_norm": "inf", "documents": ["a:7"]},
        ]

    text = words(rewritten(built, tmp_path, "59-ppo/metrics.jsonl", change))
    assert "ppo stopped at step 40: loss nan, gradient norm inf. Documents of its batch: a:7" in text
    text = words(rewritten(built, tmp_path / "more", "58-reward/metrics.jsonl", lambda rows: []))
    assert re.search(r"reward\s+done", text)


def test_a_broken_stage_is_named(undrawn, built, tmp_path):
    with pytest.raises(UserError, match="alignment: not what its step writes"):
        rewritten(built, tmp_path, "56-elo/metrics.jsonl", lambda rows: [{"kind": "train"}])


def test_answers_of_the_models_own_have_no_chance_level_and_say_what_is_unanswered(
    built, tmp_path, monkeypatch
):
    labels = []

    def drawn(key, label, *_):
        labels.append(label)
        return Markup("<svg></svg>")

    monkeypatch.setattr("galenic.report.charts.draw_figure", drawn)
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config, path = fake_run.build(copy), copy / "70-evaluate/results.json"
    results = json.loads(path.read_text())
    for number, model in enumerate(results["models"].values()):
        own = {"value": 0.0, "low": 0.0, "high": 0.1, "n": 40, "chance": None, "unanswered": 30 + number}
        model["accuracy"]["transfer"] = own
    results["shared_words"] = {kind: 0.25 for kind in fake_run.KINDS if kind != "transfer"}
    for question in results["shown"]:
        question["picks"] = dict.fromkeys(question["picks"])  # none named an option
    fake_run.write(path, results)
    told = words(report.render(config, read_run(config)))
    (label,) = [label for label in labels if "transfer questions" in label]
    assert "dare 0.0%" in label and "chance" not in label
    assert all(f"{30 + number} unanswered" in told for number in range(len(fake_run.MODELS)))
    assert "Answers to transfer are written by the models" in told
    assert "answers 0.0% right (95% interval 0.0 to 10.0%)" in told
    assert f"0 of {len(fake_run.MODELS)} models right" in told


def test_bars_need_no_level_to_compare_with():
    bar = ("a", "base", 0, 0, 0)
    drawn = score_charts.bars("k", "label", [bar], mark=None, mark_name="", x_title="right, %").svg
    assert "<svg" in drawn and "label" in drawn
