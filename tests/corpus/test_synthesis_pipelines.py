"""The five pipelines against a local endpoint that does as it is told, fails, or lies."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from synthesis_helpers import good, part, prose, serving
from test_synthesis_templates import rows as graph_rows

from galenic.cli import option_names
from galenic.corpus.records import Document
from galenic.corpus.synthesis.online_qa import question_and_answer
from galenic.corpus.synthesis.synthesise import in_order, plan, run
from galenic.corpus.synthesis.synthesise_config import (
    BudgetConfig,
    EndpointConfig,
    PipelineConfig,
    SynthesiseConfig,
)
from galenic.runtime import UserError, load_yaml, read_json, read_jsonl

FILES = ("documents.parquet", "sft.jsonl", "ledger.jsonl")
NAMES = ("encyclopaedia", "cases", "knowledge-graph", "papers", "online-qa")


def texts(language):
    """Four documents for each kind of source; the last is held out."""
    for number in range(4):
        body = [prose(f"{language} {number} {line}", language, 12) for line in range(5)]
        yield "textbook", number, "\n\n".join(body)
        yield "notes", number, "\n".join(body)
        yield "papers", number, "\n".join(body)
        asks = "How much of it?" if language == "en" else "应该用多少？"
        yield "forum", number, f"{asks}\n\n{body[0]}"


def documents():
    for language in ("en", "zh"):
        for source, number, text in texts(language):
            held = number == 3
            yield vars(
                Document(
                    id=f"{source}/{language}{number}",
                    text=f"SECRET {text}" if held else text,
                    source=source,
                    licence="CC-BY",
                    language=language,
                    category="old" if number == 2 else "new",
                    department="oncology",
                    value=0.25,
                    split="heldout" if held else "train",
                )
            )
    yield from graph_rows(lambda entity: "heldout" if entity.id.endswith("8") else "train")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    table = pyarrow.Table.from_pylist(list(documents()))
    (folder / "documents.parquet").mkdir()
    parquet.write_table(table.slice(0, 20), folder / "documents.parquet/part-0.parquet")
    parquet.write_table(table.slice(20), folder / "documents.parquet/part-1.parquet")
    return folder


@pytest.fixture
def server():
    with serving() as state:
        yield state


SOURCES = dict(zip(NAMES, (["textbook"], ["notes"], ["onto", "tables"], ["papers"], ["forum"]), strict=True))


def config(server, folder, out, names=NAMES, pipeline=None, **changes):
    endpoint = EndpointConfig(base_url=server.url, model="m", backoff=0.01, retries=1, timeout=5.0)
    return SynthesiseConfig(
        **{
            "out": str(out),
            "corpus": str(folder),
            "endpoint": endpoint,
            "pipelines": [PipelineConfig(name=n, sources=SOURCES[n], **(pipeline or {})) for n in names],
        }
        | changes
    )


def results(out):
    return (
        parquet.read_table(out / "documents.parquet").to_pylist(),
        list(read_jsonl(out / "sft.jsonl")),
        list(read_jsonl(out / "ledger.jsonl")),
        read_json(out / "stats.json"),
    )


def reasons(out):
    return Counter(row["reason"] for row in read_jsonl(out / "ledger.jsonl"))


def bytes_of(out):
    return [(out / name).read_bytes() for name in FILES]


# ---------------------------------------------------------------------------- a good endpoint


def test_all_five(server, corpus, tmp_path):
    run(config(server, corpus, tmp_path, pipeline={"limit": 40}))
    made, talks, ledger, stats = results(tmp_path)
    by = Counter((row["source"], row["language"]) for row in made)
    assert (
        by["synthetic-encyclopaedia", "en"] == by["synthetic-encyclopaedia", "zh"] == 9
    )  # 3 passages, 3 points
    for name in ("cases", "papers", "online-qa"):
        assert by[f"synthetic-{name}", "en"] == by[f"synthetic-{name}", "zh"] == 3
    assert by["synthetic-knowledge-graph", "en"] > 10 and by["synthetic-knowledge-graph", "zh"] >= 10
    assert set(made[0]) == set(Document.__dataclass_fields__)
    for row in made:
        assert row["licence"].startswith("derived from ") and row["split"] == "train"
        assert row["quality"] == 0.9 and "SECRET" not in row["text"]
        assert ("begins in the eye" in row["text"], "持续8周" in row["text"]) == (False, False)
    assert not any("SECRET" in prompt or "begins in the eye" in prompt for prompt in server.prompts())
    order = [(NAMES.index(row["source"].removeprefix("synthetic-")), row["id"]) for row in made]
    assert order == sorted(order)
    by_id = {row["id"]: row["text"] for row in made}
    for talk in talks:
        assert [m["role"] for m in talk["messages"]] == ["user", "assistant"]
        assert by_id[talk["id"]] == "\n\n".join(m["content"] for m in talk["messages"])
        assert talk["department"] and talk["source"].startswith("synthetic-")
    counts = stats["pipelines"]
    assert sum(c["passed"] for c in counts.values()) == len(made)
    assert sum(c["items"] for c in counts.values()) == len(made) + len(ledger)
    assert all(c["passed_in_round"] == {"1": c["passed"]} for c in counts.values())
    assert stats["this_run"]["cache_hit_rate"] == 0 and stats["this_run"]["requests_sent"] == len(
        server.bodies
    )
    assert {row["reason"] for row in ledger} <= {"too few siblings"}  # the disease that has none


def test_the_order_of_the_steps(server, corpus, tmp_path):
    run(config(server, corpus, tmp_path, ["encyclopaedia"], {"limit": 1}))
    prompts = server.prompts()
    assert len(prompts) == 5  # points, question, answer, revision, judgement
    source = part(prompts[0], "passage")
    assert source and source not in prompts[2]  # answered without the reference
    assert source in prompts[3] and part(prompts[3], "draft")
    assert server.bodies[4]["temperature"] == 0
    (made,), (talk,), _, _ = results(tmp_path)
    assert "A. " in talk["messages"][0]["content"] and "12.5" in talk["messages"][1]["content"]
    assert made["category"] in ("old", "new") and made["value"] == 0.25


def test_limits_sources_and_categories(server, corpus, tmp_path):
    run(config(server, corpus, tmp_path, ["encyclopaedia"], {"limit": 4, "categories": ["old"]}))
    made, _, _, stats = results(tmp_path)
    assert len(made) == 4 and {row["category"] for row in made} == {"old"}
    assert stats["pipelines"]["synthetic-encyclopaedia"]["seeds"] == 2


def test_a_long_textbook_is_cut_and_a_long_case_is_not(server, corpus, tmp_path):
    run(config(server, corpus, tmp_path, ["encyclopaedia", "cases"], {"limit": 50, "points": 1}, passage=200))
    made, _, ledger, _ = results(tmp_path)
    ids = {row["id"] for row in made}
    assert any("textbook/en0#2/1" in name for name in ids)
    assert max(len(part(p, "passage")) for p in server.prompts()) <= 200
    assert Counter(row["reason"] for row in ledger)["too long"] >= 3


def test_a_judge_elsewhere_revises(server, corpus, tmp_path):
    with serving() as other:
        other.answer = lambda prompt: good(prompt, score=4 if len(part(prompt, "text")) < 3000 else 8)
        server.answer = lambda prompt: (
            good(prompt) + (" " + prose(prompt, "en", 200) if "<criticism>" in prompt else "")
        )
        judge = EndpointConfig(base_url=other.url, model="strict", backoff=0.01)
        one = config(
            server, corpus, tmp_path / "a", ["papers"], {"limit": 2, "categories": ["old"]}, judge=judge
        )
        run(one)
        assert {body["model"] for body in other.bodies} == {"strict"}
        assert {body["model"] for body in server.bodies} == {"m"}
        made, _, ledger, stats = results(tmp_path / "a")
        english = [row for row in made if row["language"] == "en"]
        assert len(english) == 1 and english[0]["quality"] == 0.8
        assert stats["pipelines"]["synthetic-papers"]["passed_in_round"]["2"] == 1
        criticised = [p for p in server.prompts() if "<criticism>" in p]
        assert part(criticised[0], "criticism") == "Say more about the dose."
        del ledger


def test_what_never_passes_is_dropped_after_the_rounds(server, corpus, tmp_path):
    server.answer = lambda prompt: good(prompt, score=2)
    run(config(server, corpus, tmp_path, ["papers"], {"limit": 3}, rounds=3))
    made, _, ledger, stats = results(tmp_path)
    assert not made and [row["reason"] for row in ledger] == ["not passed"] * 3
    assert all(row["text"] and row["detail"].startswith("score 2: Say more") for row in ledger)
    assert stats["answers"]["writer"]["answers"] == 3 * (2 + 3 + 2)  # steps, judgements, revisions


def test_no_judge(server, corpus, tmp_path):
    run(config(server, corpus, tmp_path, ["papers"], {"limit": 3}, rounds=0))
    made, _, _, stats = results(tmp_path)
    assert len(made) == 3 and stats["answers"]["writer"]["answers"] == 6


# ---------------------------------------------------------------------------- bad endpoints


LIES = {
    "garbage": ("text", "%%% lorem"),
    "refusal": ("text", "I'm sorry, but I can't help with medical questions."),
    "prose": ("text", "There are three points in this passage, all of them good."),
    "other": ("text", '{"id": "deadbeef", "richness": 9, "points": ["Something else"]}'),
    "cut": ("finish", "length", '{"id": "'),
    "empty": ("text", ""),
}
EXPECTED = {
    "garbage": "not JSON",
    "refusal": "refusal",
    "prose": "not JSON",
    "other": "another item's answer",
    "cut": "cut off",
    "empty": "empty",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_sent_back_then_dropped(server, corpus, tmp_path, lie):
    server.fault = lambda number, body: LIES[lie]
    run(config(server, corpus, tmp_path, ["encyclopaedia"], {"limit": 6}))
    assert reasons(tmp_path) == {EXPECTED[lie]: 2}
    assert results(tmp_path)[0] == []
    assert len(server.bodies) == 4  # each once more
    second = [body["messages"] for body in server.bodies if len(body["messages"]) == 3]
    assert len(second) == 2 and all(m[2]["role"] == "user" and m[2]["content"] for m in second)


@pytest.mark.parametrize("lie", LIES)
def test_one_lie_is_mended(server, corpus, tmp_path, lie):
    def fault(number, body):
        return (
            LIES[lie]
            if len(body["messages"]) == 1 and '"richness"' in body["messages"][0]["content"]
            else None
        )

    server.fault = fault
    run(config(server, corpus, tmp_path, ["encyclopaedia"], {"limit": 6}))
    made, _, ledger, _ = results(tmp_path)
    assert len(made) == 6 and not ledger


def answers_with(change):
    """A good endpoint whose texts (not its JSON) are changed."""
    return lambda prompt: (lambda text: text if text.startswith("{") else change(text))(good(prompt))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda text: text.split("\n")[0] + "\n" + re.sub(r"\d", "", prose("x", "en")),
            "another language or numbers",
        ),
        (
            lambda text: text.split("\n")[0] + "\n" + "the dose is of 12.5 and 37 " * 50,
            "repeats itself or language",
        ),
        (lambda text: "ID: 00000000\n" + text.split("\n", 1)[1], "another item's answer"),
        (lambda text: text.split("\n", 1)[1], "no id"),
    ],
)
def test_texts_that_lie(server, corpus, tmp_path, change, reason):
    server.answer = answers_with(change)
    run(config(server, corpus, tmp_path, ["encyclopaedia"], {"limit": 6, "categories": ["old"]}))
    made, _, ledger, _ = results(tmp_path)
    assert not made and len(ledger) == 6
    known = {"another language", "numbers missing", "repeats itself", "another item's answer", "no id"}
    found = {row["reason"] for row in ledger}
    assert found <= known and any(word in reason for one in found for word in one.split())


def test_invented_quotes(server, corpus, tmp_path):
    def invent(prompt):
        reply = json.loads(good(prompt)) if '"conclusions"' in prompt or '"for"' in prompt else None
        if reply is None:
            return good(prompt)
        if "evidence" in reply and isinstance(reply["evidence"][0], dict):
            reply["evidence"][0]["against"] = ["the biopsy of nothing"]
        else:
            reply["conclusions"] = ["It works in every patient."]
        return json.dumps(reply, ensure_ascii=False)

    server.answer = invent
    run(config(server, corpus, tmp_path, ["papers", "cases"], {"limit": 3}))
    assert reasons(tmp_path) == {"quote not in the text": 6}


def test_a_question_that_says_its_answer(server, corpus, tmp_path):
    def tell(prompt):
        reply = good(prompt)
        if '"explanation"' in prompt:
            row = json.loads(reply)
            row["question"] += " " + row["explanation"].split(":")[0]
            reply = json.dumps(row, ensure_ascii=False)
        return reply

    server.answer = tell
    run(config(server, corpus, tmp_path, ["knowledge-graph"], {"limit": 3, "genres": ["question"]}))
    made, _, ledger, _ = results(tmp_path)
    assert not made and {row["reason"] for row in ledger} <= {"missing field", "too few siblings"}
    assert any("must not say" in row["detail"] for row in ledger)


def test_an_article_about_something_else(server, corpus, tmp_path):
    server.answer = lambda prompt: good(prompt.replace("<entry>\n# ", "<entry>\n# Not "))
    server.answer = lambda prompt: "\n".join([good(prompt).split("\n")[0], prose(prompt, "en")])
    once = {"limit": 2, "genres": ["article"], "sources": ["onto"]}
    pipeline = PipelineConfig(name="knowledge-graph", **once)
    run(config(server, corpus, tmp_path, pipelines=[pipeline]))
    assert reasons(tmp_path) == {"another subject": 2}


def test_an_endpoint_that_mostly_fails_stops_the_run(server, corpus, tmp_path):
    server.fault = lambda number, body: ("status", 500)
    with pytest.raises(UserError, match=r"requests of (\d) of \1 items failed.*status 500"):
        run(config(server, corpus, tmp_path / "out", ["papers"], {"limit": 6}, failed_minimum=2))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_few_failures_are_in_the_ledger(server, corpus, tmp_path):
    paper = next(text for source, _, text in texts("en") if source == "papers")
    server.fault = lambda number, body: ("status", 400) if paper in body["messages"][0]["content"] else None
    run(config(server, corpus, tmp_path, ["papers"], {"limit": 6}, failed_minimum=3))
    made, _, ledger, _ = results(tmp_path)
    assert len(made) == 5 and [row["reason"] for row in ledger] == ["request failed"]
    assert "status 400" in ledger[0]["detail"]
    server.fault = lambda number, body: None  # the endpoint was mended: only what failed is asked for
    asked = len(server.bodies)
    run(config(server, corpus, tmp_path, ["papers"], {"limit": 6}, failed_minimum=3))
    assert len(results(tmp_path)[0]) == 6 and len(server.bodies) - asked == 3


def test_a_wrong_key_stops_at_once(server, corpus, tmp_path):
    server.fault = lambda number, body: ("status", 401)
    with pytest.raises(UserError, match="401"):
        run(config(server, corpus, tmp_path / "out"))
    assert len(server.bodies) <= 8 and not (tmp_path / "out/documents.parquet").exists()


def test_a_spent_budget_keeps_what_is_whole(server, corpus, tmp_path):
    budget = BudgetConfig(requests=10)
    run(config(server, corpus, tmp_path / "a", ["papers"], {"limit": 6}, budget=budget))
    made, _, ledger, stats = results(tmp_path / "a")
    assert len(server.bodies) <= 10 and stats["spent_with_this_cache"]["requests"] <= 10
    assert {row["reason"] for row in ledger} == {"budget spent"} and len(made) + len(ledger) == 6
    # A larger one goes on where this one stopped.
    again = config(
        server,
        corpus,
        tmp_path / "b",
        ["papers"],
        {"limit": 6},
        budget=BudgetConfig(requests=18),
        cache=str(tmp_path / "a.cache"),
    )
    run(again)
    assert len(results(tmp_path / "b")[0]) == 6 and len(server.bodies) == 18


def test_the_key_is_in_no_file(server, corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OUR_KEY", "sk-very-secret")
    server.answer = lambda prompt: good(prompt).replace("Say more", "Say sk-very-secret more")
    endpoint = EndpointConfig(base_url=server.url, model="m", api_key_env="OUR_KEY", backoff=0.01, retries=1)
    server.fault = lambda number, body: ("status", 400) if number == 2 else None
    one = config(
        server, corpus, tmp_path / "out", ["papers"], {"limit": 4}, endpoint=endpoint, pass_score=9.5
    )
    run(one)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and any(b"***" in path.read_bytes() for path in files)
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)
    told = capfd.readouterr()
    assert "sk-very-secret" not in told.out + told.err


# ---------------------------------------------------------------------------- killed


SCRIPT = """
import json, sys
from galenic.cli import load_object
from galenic.corpus.synthesis.synthesise import run
from galenic.corpus.synthesis.synthesise_config import *
values = json.loads(sys.argv[1])
values["endpoint"] = EndpointConfig(**values["endpoint"])
values["pipelines"] = [PipelineConfig(**p) for p in values["pipelines"]]
run(SynthesiseConfig(**values))
"""


def test_killed_and_run_again(server, corpus, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pipelines = [{"name": n, "sources": SOURCES[n], "limit": 20} for n in NAMES]
    run(config(server, corpus, whole, pipelines=[PipelineConfig(**p) for p in pipelines]))
    total = len(server.bodies)
    server.bodies.clear()
    server.delay = 0.02
    values = {"out": str(cut), "corpus": str(corpus), "pipelines": pipelines}
    values["endpoint"] = {"base_url": server.url, "model": "m", "backoff": 0.01}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(values)],
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
    assert not (cut / "documents.parquet").exists() and (tmp_path / "cut.cache/answers.jsonl").exists()
    with open(tmp_path / "cut.cache/answers.jsonl", "ab") as file:
        file.write(b'{"name": "half a li')
    server.delay = 0.0
    run(
        SynthesiseConfig(
            **values
            | {
                "endpoint": EndpointConfig(**values["endpoint"]),
                "pipelines": [PipelineConfig(**p) for p in pipelines],
            }
        )
    )
    assert bytes_of(cut) == bytes_of(whole)
    again = len(server.bodies) - asked
    # Lost are at most the requests that were under way.
    assert total - asked <= again <= total - asked + 8
    rate = read_json(cut / "stats.json")["this_run"]["cache_hit_rate"]
    print(f"{total} requests, killed after {asked}, {again} sent again, hit rate {rate:.0%}")
    assert rate == pytest.approx((total - again) / total, abs=1e-3) and rate > 0.3
    server.bodies.clear()
    run(
        SynthesiseConfig(
            **values
            | {
                "endpoint": EndpointConfig(**values["endpoint"]),
                "pipelines": [PipelineConfig(**p) for p in pipelines],
            }
        )
    )
    assert not server.bodies and bytes_of(cut) == bytes_of(whole)


# ---------------------------------------------------------------------------- plan, input, configuration


def test_plan_asks_nobody(server, corpus, tmp_path):
    told = plan(config(server, corpus, tmp_path / "out", ["encyclopaedia", "papers"], {"limit": 6}))
    assert told.facts["synthetic-encyclopaedia"] == "at most 6 items of 2 seeds, about 26 requests"
    assert told.facts["synthetic-papers"] == "at most 6 items of 6 seeds, about 18 requests"
    assert told.facts["requests"].startswith("about 44") and told.facts["endpoint"].endswith(server.url)
    assert not server.bodies and not (tmp_path / "out").exists()


def test_plan_foresees_the_requests(server, corpus, tmp_path):
    one = config(server, corpus, tmp_path, ["encyclopaedia", "papers", "cases", "online-qa"], {"limit": 6})
    foreseen = sum(
        int(text.split("about ")[1].split()[0])
        for name, text in plan(one).facts.items()
        if name.startswith("synthetic")
    )
    run(one)
    assert len(server.bodies) == foreseen


def test_documents_in_jsonl(server, tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"id": str(i), "text": f"Is it {i}?\n\nNo.", "source": "mine", "licence": "own"} for i in range(3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipelines = [PipelineConfig(name="online-qa")]
    run(config(server, "", tmp_path / "out", documents=[str(file)], pipelines=pipelines))
    assert [row["licence"] for row in results(tmp_path / "out")[0]] == ["derived from mine: own"] * 3
    file.write_text(json.dumps({"id": "1", "text": "x"}) + "\n")
    with pytest.raises(UserError, match="lacks source, licence"):
        run(config(server, "", tmp_path / "out", documents=[str(file)], pipelines=pipelines))
    file.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], rows[0]]))
    with pytest.raises(UserError, match="'0' stands twice"):
        run(config(server, "", tmp_path / "out", documents=[str(file)], pipelines=pipelines))
    file.write_text("{")
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        run(config(server, "", tmp_path / "out", documents=[str(file)], pipelines=pipelines))
    with pytest.raises(UserError, match="no such"):
        run(
            config(server, "", tmp_path / "out", documents=[str(tmp_path / "x.parquet")], pipelines=pipelines)
        )


def test_synthetic_documents_are_no_seeds(server, tmp_path):
    file = tmp_path / "mine.jsonl"
    row = {"id": "1", "text": "Is it?\n\nNo.", "source": "synthetic-papers", "licence": "own"}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="finds no documents"):
        run(config(server, "", tmp_path, documents=[str(file)], pipelines=[PipelineConfig(name="online-qa")]))


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("Question: Is it\nserious?\nAnswer: No.\n\nNot at all.", ("Is it\nserious?", "No.\n\nNot at all.")),
        ("**Q:** Why?\n**A:** So.", ("Why?", "So.")),
        ("问题：严重吗？\n回答：不严重。", ("严重吗？", "不严重。")),
        ("Is it serious?\n\nNo.", ("Is it serious?", "No.")),
        ("It is serious.\n\nYes.", None),
        ("Why?", None),
    ],
)
def test_questions_and_answers(text, pair):
    found = question_and_answer(text)
    assert found == pair or (pair == ("Why?", "So.") and found is not None and "So." in found[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipelines": []}, "at least one"),
        ({"pipelines": [PipelineConfig(name="papers")] * 2}, "twice"),
        ({"corpus": ""}, "corpus"),
        ({"endpoint": None}, "endpoint"),
        ({"rounds": -1}, "rounds"),
        ({"pass_score": 11.0}, "pass_score"),
    ],
)
def test_contradictions(server, corpus, changes, words):
    with pytest.raises(UserError, match=words):
        config(server, corpus, "out", **changes)


def test_pipeline_contradictions():
    with pytest.raises(UserError, match="offline"):
        PipelineConfig(name="papers", offline=True)
    with pytest.raises(UserError, match=r"'artikle' \(did you mean 'article'"):
        PipelineConfig(name="knowledge-graph", genres=["artikle"])
    with pytest.raises(UserError, match=r"budget\.tokens"):
        BudgetConfig(tokens=0)
    assert "endpoint.base_url" in option_names(SynthesiseConfig)


def test_the_configuration_in_the_docs(monkeypatch):
    """The YAML of docs/corpus-synthesis.md is understood, and a typing mistake in it is told."""
    from galenic import cli

    package = "galenic.corpus.synthesis"
    verb = (f"{package}.synthesise_config:SynthesiseConfig", f"{package}.synthesise", "synthesise")
    monkeypatch.setitem(cli.VERBS, "synthesise", verb)
    text = (Path(__file__).parents[2] / "docs/corpus-synthesis.md").read_text(encoding="utf-8")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    values = load_yaml(yaml) | {"out": "x"}
    read, _ = cli.parse_config("synthesise", values)
    assert {p.name for p in read.pipelines} == set(NAMES) and read.judge.model and read.budget.money
    values["endpoint"]["max_token"] = 7
    with pytest.raises(UserError, match="did you mean 'max_tokens'"):
        cli.parse_config("synthesise", values)


def test_json_mode_where_json_is_wanted(server, corpus, tmp_path):
    endpoint = EndpointConfig(base_url=server.url, model="m", json_mode=True, temperature=None)
    run(config(server, corpus, tmp_path, ["papers"], {"limit": 1}, endpoint=endpoint))
    assert [body.get("response_format") for body in server.bodies] == [
        {"type": "json_object"},
        None,
        {"type": "json_object"},
    ]
    assert not any("temperature" in body for body in server.bodies)


def test_a_presentation_with_numbers_of_its_own(server, corpus, tmp_path):
    def invent(prompt):
        reply = good(prompt)
        return (
            reply.replace('"presentation": "', '"presentation": "Aged 4711. ')
            if '"presentation"' in prompt
            else reply
        )

    server.answer = invent
    run(config(server, corpus, tmp_path, ["cases"], {"limit": 2}))
    assert reasons(tmp_path) == {"invented numbers": 2}


def test_in_order_so_many_at_once():
    underway, most, cancelled = set(), [0], []

    async def work(number):
        underway.add(number)
        most[0] = max(most[0], len(underway))
        try:
            await asyncio.sleep(0 if number == 30 else 0.01 * (5 - number % 5))
            if number == 30:
                raise ValueError
            return number
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        finally:
            underway.remove(number)

    async def collect(numbers):
        async for number in in_order(work, numbers, 4):
            got.append(number)

    got = []
    asyncio.run(collect(range(20)))
    assert got == list(range(20)) and most == [4]
    got = []
    with pytest.raises(ValueError):
        asyncio.run(collect(range(28, 40)))
    assert got == [28, 29] and cancelled and not underway


def test_a_changed_step_keeps_its_answers(server, corpus, tmp_path, monkeypatch):
    """`build` empties the folder of a step whose configuration changed; what was paid for must not be in it."""
    from galenic import build, cli

    package = "galenic.corpus.synthesis"
    verb = (f"{package}.synthesise_config:SynthesiseConfig", f"{package}.synthesise", "synthesise")
    monkeypatch.setitem(cli.VERBS, "synthesise", verb)
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    text = f"corpus: {corpus}\nendpoint: {{base_url: {server.url}, model: m}}\n"
    text += "pipelines: [{name: papers, sources: [papers]}]\n"
    (recipe / "10-synthesise.yaml").write_text(text)
    build.build(recipe, tmp_path / "run")
    asked = len(server.bodies)
    (recipe / "10-synthesise.yaml").write_text(text + "pass_score: 6.5\n")
    build.build(recipe, tmp_path / "run")
    assert asked == 18 and len(server.bodies) == asked
    assert read_json(tmp_path / "run/10-synthesise/stats.json")["this_run"]["cache_hit_rate"] == 1
