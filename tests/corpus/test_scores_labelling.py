"""A teacher behind a local endpoint: it labels, fails, talks nonsense; the scorer learns what it said."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from synthesis_helpers import part, serving

from galenic.cli import main, parse_config
from galenic.corpus.records import Document
from galenic.corpus.scores import scorer
from galenic.corpus.scores.labelling import draw
from galenic.corpus.scores.scorer_config import ScorerConfig, TeacherConfig
from galenic.corpus.scores.taxonomy import SCORES
from galenic.corpus.synthesis.synthesise_config import BudgetConfig, EndpointConfig
from galenic.runtime import UserError, load_yaml, read_json, read_jsonl, write_jsonl

MEDICAL = "fever cough asthma lung heart pain drug dose 咳嗽 发热 哮喘 肺炎".split()
OTHER = "star planet orbit river castle novel song market 今天 朋友 公园 学校".split()
SIZES = {"notes": 150, "stories": 120, "letters": 30}
"""Source -> documents of the training split."""
FILES = ("scorer.safetensors", "scorer.json", "teacher/labels.jsonl", "teacher/ledger.jsonl")


def documents():
    """Of each source half are medical; every tenth is held out on top."""
    draw = np.random.default_rng(0)
    for source, size in SIZES.items():
        for number in range(size + size // 10):
            held = number >= size
            words = draw.choice(MEDICAL if number % 2 else OTHER, 12)
            text = " ".join(words) + f" number {number} of {source}."
            yield Document(
                id=f"{source}/{number}",
                text=f"SECRET {text}" if held else text,
                source=source,
                licence="own",
                language="en",
                category="",
                department="",
                split="heldout" if held else "train",
            )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    parquet.write_table(
        pyarrow.Table.from_pylist([vars(one) for one in documents()]), folder / "documents.parquet"
    )
    return folder


def taught(prompt):
    """What a teacher says who looks for the words above, and shrugs at the numbers that end in 7."""
    text = part(prompt, "document")
    if re.search(r"number \d*7 of", text):
        return "I would rather not."
    medical = any(word in text for word in MEDICAL)
    answer = {name: {"score": 5 if medical else 0, "reason": "by its words"} for name in SCORES}
    answer |= {"quality": {"score": 4, "reason": "half a pair: \ud83d"}}
    answer |= {
        "general": "medicine" if medical else "history",
        "medical": medical,
        "content": "clinical note",
    }
    return f"Here:\n```json\n{json.dumps(answer | {'department': ''})}\n```"


@pytest.fixture
def server():
    with serving() as state:
        state.answer = taught
        yield state


def config(server, corpus, out, endpoint=None, **changes):
    address = {"base_url": server.url, "model": "m", "backoff": 0.01, "retries": 1, "timeout": 5.0}
    teacher = {
        "endpoint": EndpointConfig(**(address | (endpoint or {}))),
        "corpus": str(corpus),
        "count": 300,
    }
    return ScorerConfig(out=str(out), bits=12, teacher=TeacherConfig(**(teacher | changes)))


def written(tmp_path, server, corpus, out, **endpoint):
    """Writes the configuration for the command line."""
    path = tmp_path / f"{Path(out).name}.yaml"
    address = {"base_url": server.url, "model": "m", "backoff": 0.01, **endpoint}
    teacher = {"endpoint": address, "corpus": str(corpus), "count": 300}
    path.write_text(yaml.safe_dump({"out": str(out), "bits": 12, "teacher": teacher}))
    return str(path)


def reasons(out):
    return Counter(row["reason"] for row in read_jsonl(out / "teacher/ledger.jsonl"))


def bytes_of(out):
    return [(out / name).read_bytes() for name in FILES]


# ---------------------------------------------------------------------------- a good teacher


def test_the_scorer_learns_what_the_teacher_says(server, corpus, tmp_path):
    out = tmp_path / "out"
    scorer.run(config(server, corpus, out))
    rows = list(read_jsonl(out / "teacher/labels.jsonl"))
    assert len(server.bodies) == 300 and len(rows) == 270 and reasons(out) == {"no labels": 30}
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert not any("SECRET" in prompt for prompt in server.prompts())
    assert {body["temperature"] for body in server.bodies} == {0}
    assert rows[0]["quality"] == 0.8 and rows[0]["reasons"]["quality"] == "half a pair: ?"
    facts = read_json(out / "scorer.json")
    medical, value = facts["heldout"]["medical"], facts["heldout"]["medical_value"]
    assert medical["accuracy"] > 0.95 and medical["groups"] > 20
    assert value["mean_absolute_error"] < 0.1 and value["spearman"] > 0.8
    parts = [facts["trained_on"][name] for name in ("train", "calibration", "heldout")]
    assert {name for group in parts for name in group} == {f"m on {source}" for source in SIZES}
    assert sum(sum(group.values()) for group in parts) + facts["trained_on"]["near_copies_taken_out"] == 270


def test_labels_of_ones_own_are_learned_from_too(server, corpus, tmp_path):
    own = [{"text": f"{OTHER[i % 8]} {i}", "medical": False} for i in range(200)]
    write_jsonl(tmp_path / "own.jsonl", own)
    both = replace(config(server, corpus, tmp_path / "out", count=60), labels=[str(tmp_path / "own.jsonl")])
    scorer.run(both)
    assert set(read_json(tmp_path / "out/scorer.json")["trained_on"]["train"]) == {
        "own.jsonl",
        *(f"m on {source}" for source in SIZES),
    }
    assert both.reads() == [str(tmp_path / "own.jsonl"), str(corpus)]


def test_json_mode_and_no_temperature(server, corpus, tmp_path):
    scorer.run(config(server, corpus, tmp_path, {"json_mode": True, "temperature": None}, count=60))
    assert all(body["response_format"] == {"type": "json_object"} for body in server.bodies)
    assert not any("temperature" in body for body in server.bodies)


# ---------------------------------------------------------------------------- which documents


def test_documents_are_drawn_evenly_and_a_larger_count_keeps_those_of_a_smaller(server, corpus, tmp_path):
    teacher = config(server, corpus, tmp_path, count=120).teacher
    few, many = ({row["id"]: row for row in draw(replace(teacher, count=n))} for n in (120, 250))
    assert Counter(row["source"] for row in few.values()) == {"notes": 45, "stories": 45, "letters": 30}
    assert set(few) < set(many) and len(many) == 250
    assert list(few) == sorted(few) and not any("SECRET" in row["text"] for row in many.values())
    assert set(few) != {row["id"] for row in draw(replace(teacher, seed=2))}
    table = parquet.read_table(corpus / "documents.parquet")
    turned = tmp_path / "turned.parquet"
    parquet.write_table(table.take(np.arange(len(table))[::-1]), turned)
    assert draw(replace(teacher, corpus="", documents=[str(turned)])) == list(few.values())


def test_documents_in_jsonl(server, tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"id": str(i), "text": f"{'fever' if i % 2 else 'star'} {i}", "source": "mine"} for i in range(80)
    ]
    write_jsonl(file, [*rows, {"id": "blank", "text": " \n", "source": "mine"}])
    scorer.run(config(server, "", tmp_path / "out", documents=[str(file)]))
    assert len(server.bodies) == 80 and reasons(tmp_path / "out") == {"no text": 1}
    for bad, words in (
        ([{"id": "1", "text": "x"}], "lacks source; documents need id, text, source"),
        ([rows[0], rows[0]], "'0' stands twice"),
        ([{"id": 7, "text": "x", "source": "s"}], "the id 7 is no string"),
        ([{**rows[0], "split": "heldout"}], "no document of the training split"),
    ):
        write_jsonl(file, bad)
        with pytest.raises(UserError, match=words):
            scorer.run(config(server, "", tmp_path / "bad", documents=[str(file)]))
    with pytest.raises(UserError, match="no such file"):
        scorer.plan(config(server, tmp_path / "nowhere", tmp_path / "bad"))
    assert not (tmp_path / "bad").exists() and len(server.bodies) == 80


def test_plan_asks_nobody_and_foresees_the_cost(server, corpus, tmp_path):
    prices = {"price_prompt": 1.0, "price_completion": 2.0, "max_tokens": 1000}
    one = config(server, corpus, tmp_path / "out", prices, count=60, budget=BudgetConfig(money=5))
    told = scorer.plan(one)
    assert told.facts["requests"].startswith("at most 60,") and told.facts["budget"] == "money 5"
    assert told.facts["documents"] == "60 of 3 sources, none held out"
    assert "at most 60k of answers" in told.facts["tokens"]
    prompts = float(told.facts["cost"].split()[2]) - 0.12
    assert 0.01 < prompts < 0.2, "60 prompts of some 700 tokens"
    assert told.facts["teacher"] == f"m at {server.url}"
    assert [name.removeprefix(f"{one.out}/") for name in told.writes] == [*FILES[2:], *FILES[:2]]
    assert not server.bodies and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- bad teachers


def test_useless_answers_are_in_the_ledger(server, corpus, tmp_path):
    half = json.dumps({"quality": 9, "knowledge": 3, "general": "cooking"})
    faults = {
        0: ("text", "I cannot help with that."),
        1: ("text", half),
        2: ("finish", "length", '{"quality": 3'),
        3: ("status", 400),
        4: ("text", '{"quality": "\\ud83d"}'),
    }
    server.fault = lambda number, body: faults.get(number)
    server.answer = lambda prompt: taught(prompt.replace("7 of", "8 of"))
    scorer.run(config(server, corpus, tmp_path / "out", {"concurrency": 1}, count=60))
    ledger = list(read_jsonl(tmp_path / "out/teacher/ledger.jsonl"))
    assert reasons(tmp_path / "out") == {"no labels": 2, "a label left out": 1, "no answer": 2}
    assert {entry["detail"] for entry in ledger if entry["reason"] == "no answer"} > {
        "the answer was cut off at max_tokens"
    }
    assert any("I cannot" in entry["answer"] for entry in ledger)
    (left,) = (entry for entry in ledger if entry["reason"] == "a label left out")
    assert "quality: 9" in left["detail"] and "general: cooking" in left["detail"]
    (row,) = (row for row in read_jsonl(tmp_path / "out/teacher/labels.jsonl") if row["id"] == left["id"])
    assert row["knowledge"] == 0.6 and "quality" not in row


def test_an_endpoint_that_fails_too_often_ends_the_run(server, corpus, tmp_path):
    out = tmp_path / "out"
    server.fault = lambda number, body: ("status", 500) if number >= 40 else None
    path = written(tmp_path, server, corpus, out, retries=0)
    one, _ = parse_config("scorer", ["--config", path])
    with pytest.raises(
        UserError, match=r"requests of \d+ of \d+ items failed, the last one with: status 500"
    ):
        scorer.run(one)
    asked = len(server.bodies)
    assert asked < 200 and not out.exists()
    server.fault = lambda number, body: None
    server.bodies.clear()
    assert main(["scorer", "--config", path]) == 0
    assert len(server.bodies) == 260, "the 40 answers are kept"


def test_a_teacher_that_says_nothing_of_use(server, corpus, tmp_path, capsys):
    server.answer = lambda prompt: "No."
    assert main(["scorer", "--config", written(tmp_path, server, corpus, tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "none of the 300 documents was labelled" in told and "no JSON object in the answer" in told
    assert not list((tmp_path / "out").iterdir()), "a mended configuration may have the folder"


def test_a_spent_budget_leaves_what_there_is_and_a_larger_one_goes_on(server, corpus, tmp_path):
    one = config(server, corpus, tmp_path / "out", budget=BudgetConfig(requests=200))
    scorer.run(one)
    assert len(server.bodies) == 200
    ledger = list(read_jsonl(tmp_path / "out/teacher/ledger.jsonl"))
    assert sum(entry["detail"] == "the budget is spent" for entry in ledger) == 100
    scorer.run(replace(one, teacher=replace(one.teacher, budget=BudgetConfig())))
    assert len(server.bodies) == 300 and reasons(tmp_path / "out") == {"no labels": 30}


# ---------------------------------------------------------------------------- secrets, kills


def test_the_key_is_in_no_file(server, corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OUR_KEY", "sk-very-secret")
    server.answer = lambda prompt: taught(prompt).replace("by its words", "sk-very-secret")
    server.fault = lambda number, body: ("status", 400) if number == 2 else None
    path = written(tmp_path, server, corpus, tmp_path / "out", api_key_env="OUR_KEY")
    assert main(["scorer", "--config", path]) == 0
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "scorer.json", "labels.jsonl", "ledger.jsonl", "answers.jsonl"} <= {
        path.name for path in files
    }
    assert b"***" in (tmp_path / "out/teacher/labels.jsonl").read_bytes()
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)
    told = capfd.readouterr()
    assert "sk-very-secret" not in told.out + told.err


def test_killed_and_run_again(server, corpus, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["scorer", "--config", written(tmp_path, server, corpus, whole)]) == 0
    total = len(server.bodies)
    server.bodies.clear()
    server.delay = 0.02
    command = ["scorer", "--config", written(tmp_path, server, corpus, cut)]
    process = subprocess.Popen(
        [sys.executable, "-m", "galenic.cli", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(server.bodies) < total // 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    asked = len(server.bodies)
    assert not (cut / "teacher").exists() and (tmp_path / "cut.cache/answers.jsonl").exists()
    with open(tmp_path / "cut.cache/answers.jsonl", "ab") as file:
        file.write(b'{"name": "half a li')
    server.delay = 0.0
    assert main(command) == 0
    assert bytes_of(cut) == bytes_of(whole)
    again = len(server.bodies) - asked
    assert total - asked <= again <= total - asked + 8, "lost are at most the requests under way"
    server.bodies.clear()
    scorer.run(parse_config("scorer", command[1:])[0])
    assert not server.bodies and bytes_of(cut) == bytes_of(whole)


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": ""}, "nothing to label"),
        ({"count": 0}, "count"),
        ({"failed_share": 1.5}, "failed_share"),
    ],
)
def test_contradictions(changes, words):
    endpoint = EndpointConfig(base_url="http://127.0.0.1/v1", model="m")
    with pytest.raises(UserError, match=rf"teacher.*{words}"):
        TeacherConfig(**({"endpoint": endpoint, "corpus": "c"} | changes))
    teacher = TeacherConfig(endpoint=endpoint, corpus="c", documents=["d.jsonl"])
    with pytest.raises(UserError, match="what the teacher writes"):
        ScorerConfig(out="x", teacher=teacher, labels=["y/../x/teacher/labels.jsonl"])
    assert ScorerConfig(out="x/", teacher=teacher).cache_folder == "x.cache"
    assert ScorerConfig(out="x", teacher=teacher).reads() == ["c", "d.jsonl"]


def test_the_configuration_in_the_docs():
    text = (Path(__file__).parents[2] / "docs/corpus-scores.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    values = load_yaml(found) | {"out": "x"}
    read, _ = parse_config("scorer", values)
    assert read.teacher.endpoint.model and read.teacher.budget.money and read.labels
    values["teacher"]["cuont"] = 7
    with pytest.raises(UserError, match=r"did you mean '(teacher\.)?count'"):
        parse_config("scorer", values)
