"""Rollouts from a real server that holds the policy: what it says is what the policy says."""

from types import SimpleNamespace

import pytest
from parity_helpers import ANSWERS
from test_serve import server

from galenic.align.config import SamplingConfig
from galenic.align.rollouts import Sampler
from galenic.corpus.synthesis.synthesise_config import EndpointConfig
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any

pytestmark = pytest.mark.parity


def test_the_server_says_what_the_model_says(chat_folder, tmp_path):
    run = SimpleNamespace(
        model=load_any(chat_folder),
        tokenizer=load_tokenizer(chat_folder),
        out=tmp_path,
        config=SimpleNamespace(seed=0),
    )
    asked = [[{"role": "user", "content": question}] for question in ANSWERS]
    numbers = list(range(len(asked)))
    with server(chat_folder, tmp_path) as url:
        endpoint = EndpointConfig(base_url=url, model=str(chat_folder), concurrency=2, retries=1)
        # The model is sure of what it learned: at this temperature it says nothing else.
        config = SamplingConfig(max_new_tokens=24, temperature=0.05, endpoint=endpoint)
        sampler = Sampler(run, config)
        found = sampler(asked, step=0, numbers=numbers, copies=2)
        cut = sampler(asked, step=1, numbers=numbers, stop=" ")
    here = sampler(asked, step=0, numbers=numbers, greedy=True)
    for [one, two], [rollout], [first], answer in zip(found, here, cut, ANSWERS.values(), strict=True):
        assert one.ids == two.ids == rollout.ids and one.ended
        assert sampler.text(one) == answer
        assert answer.startswith(sampler.text(first)) and sampler.text(first).count(" ") == 1
    again = sampler(asked, step=0, numbers=numbers, copies=2)  # the server is gone
    assert again == found
