"""Rollouts from a real local server, good ones and every kind of bad one."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "corpus"))
from synthesis_helpers import serving

from galenic.align.config import SamplingConfig
from galenic.align.endpoint import rollout_of
from galenic.align.rollouts import Sampler, ends_with
from galenic.corpus.synthesis.client import Reply
from galenic.corpus.synthesis.synthesise_config import EndpointConfig
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any
from galenic.runtime import UserError


@pytest.fixture
def server():
    with serving() as state:
        state.answer = lambda prompt: f"{prompt} is a symptom"
        yield state


@pytest.fixture
def sampler(llama_folder, server, tmp_path):
    run = SimpleNamespace(
        model=load_any(llama_folder),
        tokenizer=load_tokenizer(llama_folder),
        out=tmp_path,
        config=SimpleNamespace(seed=0),
    )
    endpoint = EndpointConfig(base_url=server.url, model="m", backoff=0.02, retries=1, timeout=5.0)
    return Sampler(run, SamplingConfig(max_new_tokens=30, temperature=0.8, endpoint=endpoint))


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_come_from_the_server_once(sampler, server):
    found = sampler(ask("fever", "cough"), step=2, numbers=[0, 1], copies=2)
    texts = [[sampler.text(rollout) for rollout in rollouts] for rollouts in found]
    assert texts == [["fever is a symptom"] * 2, ["cough is a symptom"] * 2]
    end = sampler.run.tokenizer.eos_token_id
    assert all(r.ended and r.ids[-1] == end and r.log_probs == [] for rollouts in found for r in rollouts)
    assert len(server.bodies) == 4
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0.8, 30)}
    server.answer = lambda prompt: "something else"
    assert sampler(ask("fever", "cough"), step=2, numbers=[0, 1], copies=2) == found
    assert len(server.bodies) == 4  # a resumed run repeats what it was told
    assert sampler(ask("fever"), step=3, numbers=[0]) != found[:1]


def test_what_measures_the_model_does_not_ask_the_server(sampler, server):
    sampler(ask("fever"), step=0, numbers=[0], greedy=True)
    assert server.bodies == []


def test_a_text_is_cut_where_a_marker_ends(sampler, server):
    server.answer = lambda prompt: "it coughs.\nAnswer: lung"
    rollout = sampler(ask("fever"), step=0, numbers=[0], stop="\nAnswer:")[0][0]
    assert sampler.text(rollout) == "it coughs.\nAnswer:" and rollout.ended
    assert "stop" not in server.bodies[0]


def test_a_text_that_does_not_end_is_told(sampler, server):
    server.fault = lambda number, body: ("finish", "length", "and then and then")
    rollout = sampler(ask("fever"), step=0, numbers=[0])[0][0]
    assert not rollout.ended and sampler.run.tokenizer.eos_token_id not in rollout.ids


def test_a_server_that_fails_is_named_and_its_answers_are_kept(sampler, server):
    server.fault = lambda number, body: ("status", 500) if body["messages"][0]["content"] == "cough" else None
    with pytest.raises(UserError, match="asked m for answer 0 to prompt 8 of step 4, which failed"):
        sampler(ask("fever", "cough"), step=4, numbers=[7, 8])
    server.fault = lambda number, body: None
    before = len(server.bodies)
    sampler(ask("fever", "cough"), step=4, numbers=[7, 8])
    assert len(server.bodies) == before + 1
    server.fault = lambda number, body: ("finish", "length", "")
    with pytest.raises(UserError, match="said nothing"):
        sampler(ask("fever"), step=5, numbers=[0])
    server.fault = lambda number, body: ("status", 404)
    with pytest.raises(UserError, match="no such address or no model 'm'"):
        sampler(ask("fever"), step=6, numbers=[0])


def test_log_probabilities_are_kept_if_they_fit(sampler, server):
    def answer(count):
        content = [{"token": "x", "logprob": -float(n + 1)} for n in range(count)]
        message = {"role": "assistant", "content": "fever"}
        choice = {"message": message, "finish_reason": "stop", "logprobs": {"content": content}}
        return lambda number, body: ("raw", json.dumps({"choices": [choice]}).encode())

    size = len(sampler.run.tokenizer.encode("fever", add_special_tokens=False))
    server.fault = answer(size + 1)  # vLLM tells that of the end
    rollout = sampler(ask("fever"), step=0, numbers=[0])[0][0]
    assert rollout.log_probs == [-float(n + 1) for n in range(size + 1)]
    assert sampler(ask("fever"), step=0, numbers=[0])[0][0] == rollout  # from disk
    server.fault = answer(size)  # OpenAI does not
    *most, last = sampler(ask("fever"), step=1, numbers=[0])[0][0].log_probs
    assert most == [-float(n + 1) for n in range(size)] and math.isnan(last)
    server.fault = answer(size + 3)  # other tokens than ours
    assert sampler(ask("fever"), step=2, numbers=[0])[0][0].log_probs == []


def test_a_reply_is_cut_with_its_log_probabilities(sampler):
    tokenizer, end = sampler.run.tokenizer, sampler.end[0]
    size = len(tokenizer.encode("ab: c", add_special_tokens=False)) + 1
    told = [-float(n) for n in range(size)]
    reply = Reply(text="ab: c", finish="stop", prompt_tokens=1, completion_tokens=size, log_probs=told)
    rollout = rollout_of(reply, tokenizer, end, ends_with(tokenizer, ":"))
    assert tokenizer.decode(rollout.ids) == "ab:" and rollout.log_probs == told[: len(rollout.ids)]
