"""The judge behind a real local endpoint: good replies, useless ones, every way to fail, and a kill."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "corpus"))
from synthesis_helpers import serving

from galenic.corpus.synthesis.synthesise_config import BudgetConfig, EndpointConfig
from galenic.evaluate.judging import Judge, JudgeConfig, summary
from galenic.runtime import UserError, read_json, read_jsonl

OPTIONS = ["aspirin", "heparin", "warfarin", "none of these"]


@pytest.fixture
def server():
    with serving() as state:
        state.answer = judged
        yield state


def judged(prompt):
    """A judge that does as it is told: finds `I choose X` in an answer, gives as many points as that has words."""
    if prompt.startswith("Reply with"):
        return '{"ready": "yes"}'
    if '"better"' in prompt:
        return json.dumps({"reason": "r", "better": "first"})
    said = answer_in(prompt)
    if '"select"' in prompt:
        found = re.search("I choose ([A-Z])", said)
        return json.dumps({"select": found[1] if found else "none"})
    return json.dumps({"reason": "r", "points": min(4, len(said.split())), "correct": int(said == "right")})


def answer_in(prompt):
    found = re.search("<answer>\n(.*?)\n</answer>", prompt, re.DOTALL)
    return found[1] if found else ""


def about(server):
    """The first message of each request that is about an item."""
    return [prompt for prompt in server.prompts() if not prompt.startswith("Reply with")]


def judge(server, folder, *, endpoint=(), **changes):
    settings = {"base_url": server.url, "model": "m", "backoff": 0.02, "retries": 1, "timeout": 5.0}
    config = {"json": "plain", "swapped_share": 0.0, **changes}
    return Judge(JudgeConfig(endpoint=EndpointConfig(**{**settings, **dict(endpoint)}), **config), folder)


def mcq(*answers, **more):
    return [
        {
            "id": f"q{n}",
            "prompt": "mcq",
            "question": f"Which drug {n}?",
            "options": OPTIONS,
            "answer": answer,
            "truth": "A",
            **more,
        }
        for n, answer in enumerate(answers)
    ]


# ---------------------------------------------------------------------------- verdicts


def test_verdicts_of_every_prompt(server, tmp_path):
    common = {"question": "Which?", "truth": "right"}
    items = [
        *mcq("I choose A", "I choose B", "no idea"),
        {"id": "c", "prompt": "cmb-clin", "answer": "two words", **common},
        {"id": "d", "prompt": "diagnosis", "answer": "right", **common},
        {"id": "e", "prompt": "medcalc", "answer": "wrong", **common},
        {"id": "f", "prompt": "correct", "answer": "right", **common},
    ]
    told = []
    verdicts = judge(server, tmp_path).judge(items, told.append)
    assert [verdict.score for verdict in verdicts] == [1, 0, 0, 0.5, 1, 0, 1]
    assert [verdict.said for verdict in verdicts] == ["A", "B", "none", "2", "1", "0", "1"]
    assert verdicts[3].reason == "r" and json.loads(verdicts[3].raw)["points"] == 2
    assert sum(told) == len(items) and {body["temperature"] for body in server.bodies} == {0}
    assert not (tmp_path / "unusable.jsonl").exists()
    assert stat.S_IMODE((tmp_path / "answers.jsonl").stat().st_mode) == 0o600
    assert judge(server, tmp_path).judge([]) == []


def test_nothing_is_asked_twice(server, tmp_path):
    items = mcq("I choose A", "I choose B")
    first = judge(server, tmp_path).judge([*items, {**items[0], "id": "another"}])
    assert len(server.bodies) == 2, "equal questions with equal answers are one"
    server.answer = lambda prompt: '{"select": "C"}'
    assert judge(server, tmp_path).judge(items) == first[:2]
    assert len(server.bodies) == 2
    judge(server, tmp_path).judge(mcq("I choose A", "I choose D"))
    assert len(server.bodies) == 3, "another model's other answer"


def test_empty_answers_are_wrong_unasked_and_counted(server, tmp_path):
    items = mcq("", "I choose A", "  ")
    verdicts = judge(server, tmp_path).judge(items)
    assert [verdict.score for verdict in verdicts] == [0, 1, 0] and len(server.bodies) == 1
    assert verdicts[0].reason == "the answer is empty" and verdicts[0].said is None
    assert summary(items, verdicts)["mcq"]["blank"] == 2
    assert [one.score for one in judge(server, tmp_path / "x").judge(mcq("", ""))] == [0, 0]
    assert len(server.bodies) == 1 and not (tmp_path / "x").exists()


def test_ones_own_prompt(server, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "kind.md").write_text("---\nreply: {tone: [warm, cold]}\n---\nHow kind is this?\n{answer}")
    server.answer = lambda prompt: '{"tone": "Warm"}'
    items = [{"id": "1", "prompt": "kind", "question": "q", "answer": "Dear", "truth": "cold"}]
    (verdict,) = judge(server, tmp_path / "a", prompts=str(own)).judge(items)
    assert (verdict.score, verdict.said) == (0, "warm") and about(server) == ["How kind is this?\nDear"]
    with pytest.raises(UserError, match=r"judge\.prompts: .*nowhere is no folder"):
        judge(server, tmp_path, prompts=str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------- trust


def test_agreement_with_rules_is_measured(server, tmp_path):
    answers = ["I choose A"] * 6 + ["I choose B"] * 3 + ["hm"]
    items = mcq(*answers)
    for item, rule in zip(items, ["A"] * 5 + ["B"] + ["B"] * 3 + [None], strict=True):
        item["rule"] = rule
    found = summary(items, judge(server, tmp_path).judge(items))["mcq"]
    assert (found["rule"]["value"], found["rule"]["n"]) == (0.9, 10)
    chance = (5 * 6 + 4 * 3 + 1 * 1) / 100
    assert found["rule"]["kappa"]["value"] == pytest.approx((0.9 - chance) / (1 - chance))
    assert found["rule"]["confusion"] == {"A": {"A": 5}, "B": {"A": 1, "B": 3}, "none": {"none": 1}}
    assert found["unusable"]["value"] == 0 and found["unusable"]["high"] > 0.2


def test_a_judge_that_takes_what_stands_first_is_found_out(server, tmp_path):
    def lazy(prompt):
        return json.dumps({"select": re.search("<options>\n([A-Z])", prompt)[1]})

    items = mcq(*(f"I choose {'ABCD'[n % 4]} {n}" for n in range(40)))
    honest = judge(server, tmp_path / "a", swapped_share=1.0).judge(items)
    assert summary(items, honest)["mcq"]["order"]["value"] == 1 and len(server.bodies) == 80
    server.answer = lazy
    verdicts = judge(server, tmp_path / "b", swapped_share=0.5).judge(items)
    order = summary(items, verdicts)["mcq"]["order"]
    assert order["value"] == 0 and 10 < order["n"] < 30 and order["high"] < 0.3
    assert order["confusion"] == {"A": {"D": order["n"]}}


def test_a_pair_is_judged_in_both_orders(server, tmp_path):
    items = [
        {"id": str(n), "prompt": "pair", "question": "Which?", "answer": f"mine {n}", "other": f"yours {n}"}
        for n in range(30)
    ]
    verdicts = judge(server, tmp_path / "a", swapped_share=1.0).judge(items)
    assert summary(items, verdicts)["pair"]["order"]["value"] == 0, "`first` whatever stands there"
    assert 5 < sum(verdict.score for verdict in verdicts) < 25, "who stands first is drawn"

    def prefers_mine(prompt):
        first = re.search("<first_answer>\n(.*?)\n", prompt)[1]
        return json.dumps({"reason": "", "better": "first" if "mine" in first else "second"})

    server.answer = prefers_mine
    verdicts = judge(server, tmp_path / "b", swapped_share=1.0).judge(items)
    assert {(v.score, v.said, v.again) for v in verdicts} == {(1.0, "first", "first")}


# ---------------------------------------------------------------------------- JSON


def forms(server):
    return [(body.get("response_format") or {}).get("type", "plain") for body in server.bodies]


def test_the_strictest_form_is_found_out_once(server, tmp_path):
    items = mcq("I choose A", "I choose B")
    judge(server, tmp_path, json="find-out").judge(items)
    assert forms(server) == ["json_schema"] * 3
    sent = server.bodies[1]["response_format"]["json_schema"]
    assert sent["strict"] and sent["schema"]["properties"]["select"]["enum"] == [*"ABCD", "none"]
    assert read_json(tmp_path / "endpoint.json") == {"base_url": server.url, "model": "m", "json": "schema"}
    judge(server, tmp_path, json="find-out").judge(mcq("I choose A", "I choose D"))
    assert forms(server) == ["json_schema"] * 4, "found out once"


@pytest.mark.parametrize(
    ("refused", "status", "expected"),
    [
        ({"json_schema"}, 400, ["json_schema", "json_object", "json_object"]),
        ({"json_schema", "json_object"}, 422, ["json_schema", "json_object", "plain", "plain"]),
        ({"json_schema", "json_object"}, 500, ["json_schema"] * 2 + ["json_object"] * 2 + ["plain"] * 2),
    ],
)
def test_a_server_that_knows_no_schema(server, tmp_path, refused, status, expected):
    def fault(number, body):
        refuses = (body.get("response_format") or {}).get("type") in refused
        return ("status", status) if refuses else None

    server.fault = fault
    (verdict,) = judge(server, tmp_path, json="find-out").judge(mcq("I choose A"))
    assert verdict.score == 1 and forms(server) == expected
    judge(server, tmp_path, json="find-out").judge(mcq("I choose B"))
    assert forms(server) == [*expected, expected[-1]], "found out once"


def test_a_form_that_spoils_replies_is_not_taken(server, tmp_path):
    def fault(number, body):
        return ("text", "") if (body.get("response_format") or {}).get("type") == "json_schema" else None

    server.fault = fault
    judge(server, tmp_path, json="find-out").judge(mcq("I choose A"))
    assert forms(server) == ["json_schema", "json_object", "json_object"]


def test_a_form_can_be_told(server, tmp_path):
    judge(server, tmp_path / "a", json="schema").judge(mcq("I choose A"))
    judge(server, tmp_path / "b", json="object").judge(mcq("I choose A"))
    judge(server, tmp_path / "c", json="find-out", endpoint={"json_mode": True}).judge(mcq("I choose A"))
    judge(server, tmp_path / "d", endpoint={"temperature": None}).judge(mcq("I choose A"))
    assert forms(server) == ["json_schema", "json_object", "json_object", "plain"]
    assert "temperature" not in server.bodies[-1] and len(about(server)) == 4


# ---------------------------------------------------------------------------- useless replies


def bad(what):
    """A fault for requests about the answer `bad` only."""

    def fault(number, body):
        return what if answer_in(body["messages"][0]["content"]) == "bad" else None

    return fault


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (("text", "The answer seems to choose A."), "not JSON"),
        (("text", '{"select": "A'), "not JSON"),
        (("text", '{"points": 3}'), "missing field: select"),
        (("text", '{"select": "Q"}'), "out of range: select is 'Q', not one of A, B, C, D, none"),
        (("text", ""), "empty"),
        (("finish", "length", '{"select": "A"}'), "cut off"),
    ],
)
def test_a_reply_that_stays_useless_is_no_zero(server, tmp_path, reply, reason):
    server.fault = bad(reply)
    items = mcq("I choose A", "bad", "I choose B")
    verdicts = judge(server, tmp_path).judge(items)
    assert [verdict.score for verdict in verdicts] == [1, None, 0]
    assert verdicts[1].reason == reason and verdicts[1].said is None and verdicts[1].raw == reply[-1]
    assert len(server.bodies) == 4, "asked once more"
    (again,) = [body["messages"] for body in server.bodies if len(body["messages"]) == 3]
    assert again[1]["content"] == (reply[-1] or "...")
    (row,) = read_jsonl(tmp_path / "unusable.jsonl")
    assert (row["id"], row["prompt"], row["reason"]) == ("q1", "mcq", reason)
    unusable = summary(items, verdicts)["mcq"]["unusable"]
    assert (unusable["value"], unusable["reasons"]) == (1 / 3, {reason.split(":")[0]: 1})
    server.fault = lambda number, body: None
    assert judge(server, tmp_path).judge(items) == verdicts, "a resumed run goes the same way"
    assert len(server.bodies) == 4


def test_points_outside_the_scale(server, tmp_path):
    items = [
        {"id": str(n), "prompt": "cmb-clin", "question": "q", "answer": answer, "truth": "t"}
        for n, answer in enumerate(["bad", "ok"])
    ]
    server.fault = bad(("text", '{"reason": "great", "points": 5}'))
    verdicts = judge(server, tmp_path).judge(items)
    assert [verdict.score for verdict in verdicts] == [None, 0.25]
    assert verdicts[0].reason == "out of range: points is '5', not one of 0, 1, 2, 3, 4"


def test_a_useless_reply_is_mended_when_told(server, tmp_path):
    def fault(number, body):
        return ("text", "Splendid!") if len(body["messages"]) == 1 else None

    server.fault = fault
    (verdict,) = judge(server, tmp_path).judge(mcq("I choose A"))
    assert verdict.score == 1 and "JSON object" in server.bodies[1]["messages"][2]["content"]


def test_the_ledger_keeps_other_models_and_forgets_what_is_mended(server, tmp_path):
    server.fault = bad(("status", 400))
    judge(server, tmp_path).judge(mcq("I choose A", "bad"))
    judge(server, tmp_path).judge(mcq("I choose B", "I choose C", "bad"))
    assert [row["id"] for row in read_jsonl(tmp_path / "unusable.jsonl")] == ["q1", "q2"]
    server.fault = lambda number, body: None
    judge(server, tmp_path).judge(mcq("I choose A", "bad"))
    assert [row["id"] for row in read_jsonl(tmp_path / "unusable.jsonl")] == ["q2"]


# ---------------------------------------------------------------------------- endpoints that fail


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (("status", 500), "request failed: status 500, 2 times", 2),
        (("status", 429, {"Retry-After": "0"}), "request failed: status 429, 2 times", 2),
        (("status", 400), "request failed: status 400: no: None", 1),
        (("drop",), "request failed: connection lost, 2 times", 2),
        (("stall",), "request failed: no answer in time, 2 times", 2),
        (("raw", b"<html>busy</html>"), "request failed: an answer that is no chat completion, 2 times", 2),
    ],
)
def test_a_request_that_fails_is_no_zero_and_is_asked_again_later(server, tmp_path, fault, reason, requests):
    server.fault = bad(fault)
    items = mcq("I choose A", "bad", "I choose B")
    verdicts = judge(server, tmp_path, endpoint={"timeout": 0.5}).judge(items)
    assert [verdict.score for verdict in verdicts] == [1, None, 0]
    assert verdicts[1].reason == reason and len(server.bodies) == 2 + requests
    server.fault = lambda number, body: None
    verdicts = judge(server, tmp_path).judge(items)
    assert [verdict.score for verdict in verdicts] == [1, 0, 0]
    assert len(server.bodies) == 3 + requests and not list(read_jsonl(tmp_path / "unusable.jsonl"))


def test_what_may_pass_is_tried_again(server, tmp_path):
    server.fault = lambda number, body: ("status", 429) if number == 0 else None
    assert judge(server, tmp_path).judge(mcq("I choose A"))[0].score == 1
    assert len(server.bodies) == 2


def test_where_nothing_works_the_run_ends_with_a_name(server, tmp_path):
    dead = {"base_url": "http://127.0.0.1:9/v1"}
    with pytest.raises(UserError, match=r"m at http://127\.0\.0\.1:9/v1 failed \(no connection, 2 times\)"):
        judge(server, tmp_path, json="find-out", endpoint=dead).judge(mcq("x"))
    with pytest.raises(
        UserError, match=r"no usable verdict of 2 answers, .* at last: request failed: no connection"
    ):
        judge(server, tmp_path, endpoint=dead).judge(mcq("x", "y"))
    server.fault = lambda number, body: ("status", 401)
    with pytest.raises(UserError, match="401, the endpoint does not let us in; set api_key_env"):
        judge(server, tmp_path).judge(mcq("x"))
    server.fault = lambda number, body: ("text", "Splendid!")
    with pytest.raises(
        UserError, match=r"no usable verdict of 2 answers, .* not JSON \('Splendid!'\)"
    ) as error:
        judge(server, tmp_path).judge(mcq("x", "y"))
    assert "\n" not in str(error.value) and "another judge or prompt" in str(error.value)


def test_a_judge_of_no_use_is_not_asked_to_the_end(server, tmp_path):
    server.fault = lambda number, body: ("text", "Splendid!")
    items = mcq(*(f"I choose A {n}" for n in range(100)), "")
    with pytest.raises(UserError, match="no usable verdict of 10 answers, all there were so far"):
        judge(server, tmp_path, failed_minimum=10, endpoint={"concurrency": 2}).judge(items)
    assert 20 <= len(server.bodies) < 40
    with pytest.raises(UserError, match="no usable verdict of 1 answers"):
        judge(server, tmp_path).judge([items[0], items[-1]])  # an empty answer is no verdict


def test_an_endpoint_that_fails_most_of_it_is_not_asked_to_the_end(server, tmp_path):
    server.fault = lambda number, body: ("status", 400) if number > 2 else None
    items = mcq(*(f"I choose A {n}" for n in range(100)))
    with pytest.raises(UserError, match=r"requests of 8 of 11 items failed"):
        judge(server, tmp_path, failed_minimum=10, failed_share=0.7, endpoint={"concurrency": 1}).judge(items)
    assert len(server.bodies) < 20
    server.fault = lambda number, body: None
    assert all(verdict.score == 1 for verdict in judge(server, tmp_path).judge(items))


def test_the_key_is_sent_and_never_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "sk-very-secret")
    server.fault = bad(("status", 400))
    verdicts = judge(server, tmp_path, endpoint={"api_key_env": "OUR_KEY"}).judge(mcq("I choose A", "bad"))
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "Bearer ***" in verdicts[1].reason
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------- budget, many at once, a kill


@pytest.mark.parametrize("limits", [{"requests": 4}, {"tokens": 600}, {"money": 0.001}])
def test_a_budget_holds_over_restarts_and_can_be_raised(server, tmp_path, limits):
    # A reply takes 100 + 50 tokens: 0.0001 + 0.00015 of money.
    server.fault = lambda number, body: None
    items = mcq(*(f"I choose A {n}" for n in range(6)))
    priced = {"price_prompt": 1.0, "price_completion": 3.0, "max_tokens": 1, "concurrency": 1}
    for _ in range(2):
        with pytest.raises(UserError, match=r"the budget is spent; raise judge\.budget"):
            judge(server, tmp_path, budget=BudgetConfig(**limits), endpoint=priced).judge(items)
    spent = len(server.bodies)
    assert 1 <= spent <= 4
    verdicts = judge(server, tmp_path, endpoint=priced).judge(items)
    assert [verdict.score for verdict in verdicts] == [1] * 6 and len(server.bodies) == 6


def test_many_are_asked_at_once(server, tmp_path):
    server.delay = 0.05
    judge(server, tmp_path, endpoint={"concurrency": 3}).judge(mcq(*(f"I choose A {n}" for n in range(12))))
    assert server.most == 3


KILLED = """
import json, sys
from galenic.corpus.synthesis.synthesise_config import EndpointConfig
from galenic.evaluate.judging import Judge, JudgeConfig
assert "torch" not in sys.modules
endpoint = EndpointConfig(base_url=sys.argv[1], model="m", concurrency=1)
items = [{"id": str(n), "prompt": "cmb-clin", "question": "q", "answer": "a " * (n % 5) + str(n), "truth": "t"}
         for n in range(12)]
verdicts = Judge(JudgeConfig(endpoint=endpoint), sys.argv[2]).judge(items)
print(json.dumps([[verdict.score, verdict.raw] for verdict in verdicts]))
"""


def test_a_killed_run_asks_only_for_what_is_missing(server, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}

    def command(folder):
        return [sys.executable, "-c", KILLED, server.url, str(tmp_path / folder)]

    def finished(folder):
        done = subprocess.run(command(folder), env=environment, check=True, capture_output=True)
        return json.loads(done.stdout)

    server.fault = bad(None)
    server.delay = 0.2
    process = subprocess.Popen(command("killed"), env=environment)
    end = time.monotonic() + 60
    while len(server.bodies) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.delay = 0.0
    before = len(server.bodies)
    known = (tmp_path / "killed" / "answers.jsonl").read_bytes().count(b"\n")
    assert before >= 5 and known >= 4, "the probe and some items"
    found = finished("killed")
    assert len(server.bodies) == before + 13 - known
    assert [score for score, _ in found] == [min(4, n % 5 + 1) / 4 for n in range(12)]
    assert finished("whole") == found
    assert len(server.bodies) == before + 26 - known
    assert finished("killed") == found and len(server.bodies) == before + 26 - known
