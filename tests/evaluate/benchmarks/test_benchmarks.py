"""Benchmarks of a model from end to end: asked, kept, scored, counted, judged, refused."""

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from benchmark_helpers import ANSWERS, FIXTURES, PLACES, place
from transformers import LlamaConfig, LlamaForCausalLM

from galenic import cli
from galenic.corpus.synthesis.synthesise_config import EndpointConfig
from galenic.evaluate import evaluate, judging
from galenic.evaluate.benchmarks import benchmarks, items
from galenic.evaluate.benchmarks.config import BenchmarksConfig
from galenic.evaluate.benchmarks.rows import ROWS
from galenic.evaluate.config import EvaluateConfig
from galenic.evaluate.judging import JudgeConfig, Verdict
from galenic.evaluate.statistics import wilson
from galenic.evaluate.written import Written
from galenic.runtime import UserError

RULED = {row: place(row) for row in PLACES if ROWS[row].metric != "judge"}


def measured(config, *given):
    return benchmarks.measure(config, benchmarks.load(config), *given)


def config_of(**changes):
    return BenchmarksConfig(**{"rows": RULED, "new_tokens": 6, **changes})


@dataclass(kw_only=True)
class Told:
    """In the place of a Writer: says what is right, but for what it is told to say instead."""

    model: object
    tokenizer: object
    prompt: object
    context: int
    tokens: int

    instead: ClassVar[dict[str, Written]] = {}
    asked: ClassVar[list[str]] = []

    def __call__(self, prompts, advance=None):
        known = {
            item.prompt: text
            for row, texts in ANSWERS.items()
            for item, text in zip(items.load(row, place(row)), texts, strict=True)
        }
        Told.asked += prompts
        if advance:
            advance(len(prompts))
        return [
            self.instead.get(prompt, Written(text=known.get(prompt, "说明。"), ended=True, truncated=False))
            for prompt in prompts
        ]


@pytest.fixture
def told(monkeypatch, llama):
    monkeypatch.setattr(benchmarks, "Writer", Told)
    monkeypatch.setattr(Told, "instead", {})
    monkeypatch.setattr(Told, "asked", [])
    return llama


def test_a_model_that_knows_everything_has_all_points(told, tokenizer, tmp_path):
    done = []
    numbers, lines = measured(config_of(), told, tokenizer, "m", tmp_path, done.append)
    assert set(numbers) == set(RULED) and sum(done) == len(lines) == sum(map(len, ANSWERS.values()))
    for row, found in numbers.items():
        n = len(ANSWERS[row])
        assert found == {
            "value": 1.0,
            "low": pytest.approx(wilson(n, n)[0]),
            "high": 1.0,
            "n": n,
            "metric": ROWS[row].metric,
            "unanswered": 0,
        }
    assert {(line["kind"], line["id"]) for line in lines if line["right"] != 1.0} == set()


def test_what_cannot_be_scored_is_wrong_and_counted(told, tokenizer, tmp_path):
    row = "MedNLI-Dis"
    asked = items.load(row, place(row))
    said = ["Entailment or neutral.", "contradiction and so on and so on", "Who knows."]
    for number, text in enumerate(said):
        answer = Written(text=text, ended=number != 1, truncated=number == 2)
        Told.instead[asked[number].prompt] = answer
    numbers, lines = measured(config_of(rows={row: place(row)}), told, tokenizer, "m", tmp_path)
    assert [line["problem"] for line in lines] == ["several", "endless", "none"]
    assert [line["said"] for line in lines] == said and [line["right"] for line in lines] == [0.0] * 3
    low, high = wilson(0, 3)
    assert numbers[row] == {
        "value": 0.0,
        "low": low,
        "high": high,
        "n": 3,
        "metric": "label",
        "unanswered": 3,
        "endless": 1,
        "truncated": 1,
    }


def test_a_row_that_is_answered_is_kept(told, tokenizer, tmp_path, monkeypatch):
    def measure(**changes):
        Told.asked.clear()
        found = measured(config_of(**changes), told, tokenizer, "m", tmp_path)
        return found, len(Told.asked)

    every = sum(map(len, ANSWERS.values()))
    first, asked = measure()
    assert asked == every
    kept = {file.name: file.read_bytes() for file in (tmp_path / "benchmarks" / "m").iterdir()}
    assert len(kept) == len(RULED)
    assert measure() == (first, 0)
    (tmp_path / "benchmarks" / "m" / "MedCalc.json").unlink()  # as if killed before it
    assert measure() == (first, 4)
    assert {file.name: file.read_bytes() for file in (tmp_path / "benchmarks" / "m").iterdir()} == kept
    assert measure(new_tokens=7)[1] == every  # another question altogether


def test_samples_do_not_depend_on_the_order_of_the_file(tmp_path):
    rows = [json.loads(line) for line in open(place("MedNLI-Dis"))]
    for order, name in ((1, "a.jsonl"), (-1, "b.jsonl")):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows[::order]))
    for seed in range(3):
        configs = [
            config_of(rows={"MedNLI-Dis": str(tmp_path / name)}, samples=2, seed=seed)
            for name in ("a.jsonl", "b.jsonl")
        ]
        picks = [{item.id for item in benchmarks.load(config)["MedNLI-Dis"]} for config in configs]
        assert picks[0] == picks[1] and len(picks[0]) == 2


JUDGE = JudgeConfig(endpoint=EndpointConfig(base_url="http://127.0.0.1:9/v1", model="nobody"))


def test_a_judge_scores_open_answers_and_diagnoses(told, tokenizer, tmp_path, monkeypatch):
    shown = []

    def judge(self, asked):
        shown.append(asked)
        values = [0.75, None, 0.0][: len(asked)]
        return [Verdict(score=v, reason=f"reason {n}", raw="", said=v and "1") for n, v in enumerate(values)]

    monkeypatch.setattr(judging.Judge, "judge", judge)
    rows = {row: place(row) for row in ("CMBClin", "NEJMQA", "MedCalc")}
    clinical = items.load("CMBClin", place("CMBClin"))
    Told.instead[clinical[2].prompt] = Written(text="痛风" * 50, ended=False, truncated=False)
    numbers, lines = measured(config_of(rows=rows, judge=JUDGE), told, tokenizer, "m", tmp_path)
    assert [len(asked) for asked in shown] == [
        2,
        2,
    ]  # what does not end is not shown; calculations need no judge
    assert shown[0][0] == {
        "id": "0/0",
        "prompt": "cmb-clin",
        "question": clinical[0].question,
        "answer": "说明。",
        "truth": ["急性阑尾炎；转移性右下腹痛。"],
        "language": "zh",
    }
    assert shown[1][0]["truth"] == ["Myocardial infarction", "Heart attack", "Acute coronary syndrome"]
    assert shown[1][0]["rule"] == 1
    by_row = {row: [line for line in lines if line["kind"] == row] for row in rows}
    assert [line["right"] for line in by_row["CMBClin"]] == [0.75, 0.0, 0.0]
    assert [line.get("problem") for line in by_row["CMBClin"]] == [None, "judge", "endless"]
    assert numbers["CMBClin"]["value"] == 0.25 and numbers["CMBClin"]["unanswered"] == 1
    assert numbers["CMBClin"]["judge_failed"] == 1 and numbers["CMBClin"]["judge"]["n"] == 2
    low, high = wilson(0.75, 3)
    assert (numbers["CMBClin"]["low"], numbers["CMBClin"]["high"]) == (low, high)
    assert [line["rule"] for line in by_row["NEJMQA"]] == [1.0, 1.0]  # what the rule said is kept beside it
    assert [line["right"] for line in by_row["NEJMQA"]] == [0.75, 0.0]
    assert numbers["MedCalc"]["value"] == 1.0 and "judge" not in numbers["MedCalc"]
    again = measured(config_of(rows=rows, judge=JUDGE), told, tokenizer, "m", tmp_path)
    assert again == (numbers, lines) and len(shown) == 2  # nothing is judged twice
    Told.asked.clear()
    other = JudgeConfig(endpoint=EndpointConfig(base_url="http://127.0.0.1:9/v1", model="somebody"))
    measured(config_of(rows=rows, judge=other), told, tokenizer, "m", tmp_path)
    assert len(shown) == 4 and not Told.asked  # another judge reads the same answers


def test_every_row_with_a_judge_has_a_prompt_that_takes_its_items():
    rows = {row: place(row) for row in PLACES if ROWS[row].judge}
    config = config_of(rows=rows, judge=JUDGE)
    facts = benchmarks.facts(config)
    count = sum(len(items.load(row, place(row))) for row in rows)
    assert facts["judge"].startswith("nobody at") and str(count) in facts["judge's requests"]
    assert benchmarks.protocol(config)["benchmarks"].endswith("by nobody as a judge, see `judge`")


# ---------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def folder(tokens_folder, tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1200,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    place = tmp_path_factory.mktemp("model") / "model"
    LlamaForCausalLM(settings).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_the_verb_evaluates_every_row(folder, tmp_path, prompt):
    nested = config_of(prompt=prompt)
    config = EvaluateConfig(out=str(tmp_path / "out"), models={"m": str(folder)}, benchmarks=nested)
    facts = evaluate.plan(config).facts
    assert facts["benchmarks"] == f"{sum(map(len, ANSWERS.values()))} items of 20 rows, each model"
    assert str(FIXTURES / "medqa.jsonl") in config.reads()
    evaluate.run(config)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["models"]["m"]["benchmarks"]
    assert list(found) == list(RULED)
    for numbers in found.values():
        assert 0 <= numbers["low"] <= numbers["value"] <= numbers["high"] <= 1
        assert numbers["unanswered"] >= numbers.get("endless", 0)
    lines = [json.loads(line) for line in open(tmp_path / "out" / "items" / "m.jsonl")]
    assert len(lines) == sum(numbers["n"] for numbers in found.values())
    assert all({"kind", "id", "right", "said"} <= set(line) for line in lines)
    assert "at most 6" in results["protocol"]["benchmarks"]
    first = (tmp_path / "out" / "results.json").read_bytes()
    (tmp_path / "out" / "items" / "m.json").unlink()
    evaluate.run(config)  # what is kept makes the same results again
    assert (tmp_path / "out" / "results.json").read_bytes() == first


def test_the_command_line_says_what_is_wrong(folder, tmp_path, capsys):
    def said(yaml):
        (tmp_path / "e.yaml").write_text(f"out: {tmp_path}/out\nmodels: {{m: {folder}}}\n{yaml}")
        code = cli.main(["evaluate", "--config", str(tmp_path / "e.yaml"), "--plan"])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    code, text = said(f"benchmarks: {{rows: {{MedCalc: {place('MedCalc')}}}, tasks: [medqa_4options]}}")
    assert code == 0 and "4 items of 1 rows, 1 lm-eval tasks, each model" in text
    for yaml, wrong in (
        ("benchmarks: {}", "benchmarks: name rows of the report with their data, or tasks of lm-eval"),
        ("benchmarks: {rows: {MedCalk: x.csv}}", "no row 'MedCalk' (did you mean 'MedCalc'?)"),
        ("benchmarks: {rows: {MedCalc: none.csv}}", "benchmarks.rows.MedCalc: none.csv is no file"),
        ("benchmarks: {rows: {CMBClin: x.json}}", "only a judge can score"),
        ("benchmarks: {tasks: [a], samples: 0}", "benchmarks.samples is 0; it must be at least 1"),
        ("benchmarks: {tasks: [a], fewshot: -1}", "benchmarks.fewshot is -1"),
        (
            "benchmarks: {tasks: [a], prompt: plain, system: Be brief.}",
            "benchmarks.system is used by prompt=chat",
        ),
    ):
        code, text = said(yaml)
        assert code == 2 and wrong in text, text


def test_no_room_for_a_question(llama, tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"benchmarks.new_tokens: 63 leave no room for a question; the model reads 64"
    ):
        measured(config_of(new_tokens=63), llama, tokenizer, "m", tmp_path)


def test_tasks_need_lm_eval(llama, tokenizer, tmp_path, monkeypatch):
    for name in ("lm_eval", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'galenic\[eval\]'"):
        measured(config_of(rows={}, tasks=["pubmedqa"]), llama, tokenizer, "m", tmp_path)
    with pytest.raises(UserError, match=r"rows.USMLE: hub:a/b needs the datasets library"):
        items.load("USMLE", "hub:a/b")
