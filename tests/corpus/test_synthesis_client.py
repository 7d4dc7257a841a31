"""The client against a real local server that fails in every way a server can."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest
from synthesis_helpers import serving

from galenic.corpus.synthesis.budget import Budget, BudgetSpent
from galenic.corpus.synthesis.cache import Cache, digest
from galenic.corpus.synthesis.client import Client, RequestFailed, retry_after
from galenic.corpus.synthesis.synthesise_config import BudgetConfig, EndpointConfig
from galenic.runtime import UserError


@pytest.fixture
def server():
    with serving() as state:
        yield state


def endpoint(server, **changes):
    return EndpointConfig(
        **{
            "base_url": server.url,
            "model": "m",
            "backoff": 0.02,
            "timeout": 5.0,
            "retries": 2,
            "max_tokens": 64,
        }
        | changes
    )


def message(text="ID: 1"):
    return [{"role": "user", "content": text}]


def ask(config, folder, keys, budget=None, more=""):
    """Asks for every key at once; returns answers or exceptions, and the client."""

    async def go():
        cache = Cache(folder / "answers.jsonl")
        try:
            async with Client(config, cache, budget) as client:
                tasks = (client.chat(message(f"ID: {key}{more}"), key=key) for key in keys)
                return await asyncio.gather(*tasks, return_exceptions=True), client
        finally:
            cache.close()

    return asyncio.run(go())


def test_an_answer_is_asked_for_once(server, tmp_path):
    first, client = ask(endpoint(server), tmp_path, "abc")
    assert all(isinstance(answer, str) for answer in first) and len(server.bodies) == 3
    assert (client.usage.answers, client.usage.cached, client.usage.sent) == (3, 0, 3)
    again, client = ask(endpoint(server), tmp_path, "abc")
    assert again == first and len(server.bodies) == 3
    assert (client.usage.answers, client.usage.cached, client.usage.sent) == (3, 3, 0)
    assert (client.usage.prompt_tokens, client.usage.completion_tokens) == (300, 150)


def test_other_settings_are_another_question(server, tmp_path):
    ask(endpoint(server), tmp_path, "a")
    ask(endpoint(server, temperature=0.1), tmp_path, "a")
    ask(endpoint(server, model="n"), tmp_path, "a")
    assert len(server.bodies) == 3
    assert [body["temperature"] for body in server.bodies] == [0.7, 0.1, 0.7]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (("status", 500), "status 500"),
        (("status", 503), "status 503"),
        (("status", 429), "status 429"),
        (("drop",), "connection lost"),
        (("raw", b"<html>busy</html>"), "an answer that is no chat completion"),
        (("raw", b'{"choices": []}'), "an answer that is no chat completion"),
        (("raw", b'{"choices": [{"message": {"content": 7}}]}'), "an answer that is no chat completion"),
        (("raw", b"[" * 100_000), "an answer that is no chat completion"),
        (
            ("raw", b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": Infinity}}'),
            "an answer that is no chat completion",
        ),
        (("endless",), "an answer without end"),
    ],
)
def test_what_may_pass_is_tried_again(server, tmp_path, fault, reason):
    server.fault = lambda number, body: fault if number < 2 else None
    (answer,), client = ask(endpoint(server), tmp_path, "a")
    assert isinstance(answer, str) and len(server.bodies) == 3
    assert client.usage.retries == {reason: 2}


def test_what_does_not_pass_fails_the_request_only(server, tmp_path):
    server.fault = lambda number, body: ("status", 500) if body["messages"][0]["content"] == "ID: b" else None
    answers, _ = ask(endpoint(server), tmp_path, "abc")
    assert [type(answer) for answer in answers] == [str, RequestFailed, str]
    assert str(answers[1]) == "status 500, 3 times"
    assert len(server.bodies) == 5


def test_a_stalled_answer_is_given_up(server, tmp_path):
    server.fault = lambda number, body: ("stall",)
    started = time.monotonic()
    (answer,), _ = ask(endpoint(server, timeout=0.3, retries=1), tmp_path, "a")
    assert str(answer) == "no answer in time, 2 times"
    assert 0.6 <= time.monotonic() - started < 5


def test_no_server_at_all(server, tmp_path):
    config = endpoint(server, base_url="http://127.0.0.1:9/v1", retries=1)
    (answer,), _ = ask(config, tmp_path, "a")
    assert str(answer) == "no connection, 2 times"


def test_retry_after_holds_back_every_request(server, tmp_path):
    server.fault = lambda number, body: ("status", 429, {"Retry-After": "1"}) if number == 0 else None
    answers, _ = ask(endpoint(server, concurrency=1), tmp_path, "abc")
    assert all(isinstance(answer, str) for answer in answers)
    assert server.times[1] - server.times[0] >= 0.99


def test_an_endless_wait_is_the_users_to_decide(server, tmp_path):
    server.fault = lambda number, body: ("status", 429, {"Retry-After": "90000"})
    (answer,), _ = ask(endpoint(server), tmp_path, "a")
    assert isinstance(answer, UserError) and "25:00:00" in str(answer)


def test_retry_after_is_a_number_or_a_date():
    assert retry_after("2.5") == 2.5
    assert retry_after("-3") == 0
    assert retry_after(None) is None and retry_after("soon") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e6


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_the_user_has_to_mend(server, tmp_path, monkeypatch, status):
    monkeypatch.setenv("OUR_KEY", "sk-very-secret")
    with serving() as elsewhere:
        server.fault = lambda number, body: ("status", status, {"Location": elsewhere.url})
        (answer,), _ = ask(endpoint(server, api_key_env="OUR_KEY"), tmp_path, "a")
        assert isinstance(answer, UserError) and str(status) in str(answer)
        assert "sk-very-secret" not in str(answer)  # the server says it back
        assert len(server.bodies) == 1 and not elsewhere.bodies
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"


def test_a_refused_request_is_not_repeated(server, tmp_path):
    server.fault = lambda number, body: ("status", 400)
    (answer,), _ = ask(endpoint(server), tmp_path, "a")
    assert isinstance(answer, RequestFailed) and "status 400" in str(answer)
    assert len(server.bodies) == 1


def test_a_cut_answer_is_told(server, tmp_path):
    server.fault = lambda number, body: ("finish", "length", "half of it")
    (answer,), _ = ask(endpoint(server), tmp_path, "a")
    assert isinstance(answer, RequestFailed) and "cut off" in str(answer)


def test_lone_surrogates_do_not_break_the_cache(server, tmp_path):
    server.fault = lambda number, body: ("raw", b'{"choices": [{"message": {"content": "a\\ud800b"}}]}')
    (answer,), _ = ask(endpoint(server), tmp_path, "a")
    assert answer == "a?b" and ask(endpoint(server), tmp_path, "a")[0] == ["a?b"]


@pytest.mark.parametrize("variable", ["", "with\nbreak", "schlüssel"])
def test_a_key_that_is_none(server, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("OUR_KEY", variable)
    with pytest.raises(UserError, match="OUR_KEY"):
        ask(endpoint(server, api_key_env="OUR_KEY"), tmp_path, "a")


def test_environment_proxies_are_left_alone(server, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(ask(endpoint(server), tmp_path, "a")[0][0], str)
    failed = ask(endpoint(server, environment_proxies=True, retries=0), tmp_path, "b")[0][0]
    assert isinstance(failed, RequestFailed)


def test_concurrency_is_kept(server, tmp_path):
    server.delay = 0.05
    ask(endpoint(server, concurrency=3), tmp_path, "abcdefghij")
    assert server.most == 3


def test_requests_are_paced(server, tmp_path):
    ask(endpoint(server, requests_per_minute=600), tmp_path, "abcdef")
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert server.times[-1] - server.times[0] >= 0.45 and min(gaps) > 0.03


def test_tokens_are_paced(server, tmp_path):
    # 150 tokens of an answer at 18,000 a minute: half a second each.
    ask(endpoint(server, tokens_per_minute=18_000, concurrency=1), tmp_path, "abc")
    assert server.times[2] - server.times[0] >= 0.35


@pytest.mark.parametrize(
    ("limits", "answers"),
    [({"requests": 4}, 4), ({"tokens": 620}, 4), ({"money": 0.0011}, 4)],
)
def test_a_budget_is_never_exceeded(server, tmp_path, limits, answers):
    # An answer takes 100 + 50 tokens: 0.0001 + 0.00015 of money.
    # The prompt is estimated at 102 tokens, the answer's limit is 60.
    config = endpoint(server, price_prompt=1.0, price_completion=3.0, max_tokens=60)
    server.delay = 0.02
    budget = Budget(BudgetConfig(**limits))
    got, _ = ask(config, tmp_path, "abcdefgh", budget, more="x" * 300)
    assert sum(isinstance(one, str) for one in got) == answers
    assert all(isinstance(one, str | BudgetSpent) for one in got)
    for index, name in enumerate(("requests", "tokens", "money")):
        assert budget.spent[index] <= limits.get(name, 1e9)


# ---------------------------------------------------------------------------- the cache


def row(text):
    return {"text": text, "finish": "stop", "prompt_tokens": 3, "completion_tokens": 4, "money": 0.5}


def test_a_cache_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "whole.jsonl"
    names = [digest("m", message(), {}, str(i)) for i in range(3)]
    cache = Cache(path)
    for name, text in zip(names, ("one", "zwei\n", "三"), strict=True):
        cache.put(name, row(text))
    cache.close()
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    edges = {end + step for end in [0, *ends] for step in (-1, 0, 1)}
    for cut in sorted(edges & set(range(len(content) + 1)) | set(range(0, len(content), 40))):
        part = tmp_path / "part.jsonl"
        part.write_bytes(content[:cut])
        cache = Cache(part)
        whole = sum(end <= cut for end in ends)
        assert len(cache) == whole and (cache.requests, cache.tokens, cache.money) == (
            whole,
            7 * whole,
            0.5 * whole,
        )
        cache.put(names[2], row("三"))
        cache.close()
        cache = Cache(part)
        assert cache.get(names[2])["text"] == "三"
        assert all(cache.get(name) is not None for name in names[:whole])
        cache.close()


def test_a_damaged_line_is_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    cache = Cache(path)
    names = [digest("m", message(), {}, str(i)) for i in range(3)]
    for name in names:
        cache.put(name, row("x"))
    cache.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\xff garbage\n" + lines[2])
    cache = Cache(path)
    assert [cache.get(name) is not None for name in names] == [True, False, True]
    cache.close()


def test_a_cache_belongs_to_one_run_at_a_time(tmp_path):
    path = tmp_path / "answers.jsonl"
    cache = Cache(path)
    assert not path.exists()  # until there is something to keep
    cache.put(digest("m", [], {}, ""), row("x"))
    code = (
        "import sys; from pathlib import Path; from galenic.corpus.synthesis.cache import Cache\n"
        "try: Cache(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "UserError", done.stderr
    cache.close()
    assert path.stat().st_mode & 0o077 == 0  # patients' cases may be in it
    assert json.loads(path.read_text())["text"] == "x"


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_url": "localhost:8000"}, "http"),
        ({"base_url": "http://me:secret@host/v1"}, "api_key_env"),
        ({"base_url": "http://host/v1?key=secret"}, "api_key_env"),
        ({"api_key_env": "sk-123"}, "name of an environment variable"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": -1.0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"extra": {"stream": True}}, "stream"),
    ],
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(UserError, match=words) as error:
        EndpointConfig(**{"base_url": "http://host/v1", "model": "m"} | changes)
    assert "secret" not in str(error.value) and "sk-123" not in str(error.value)


def test_what_is_sent(server, tmp_path):
    config = endpoint(server, temperature=None, max_tokens_name="max_completion_tokens", extra={"top_p": 0.5})
    ask(config, tmp_path, "a")
    expected = {"model": "m", "messages": message("ID: a"), "max_completion_tokens": 64, "top_p": 0.5}
    assert server.bodies == [expected]
