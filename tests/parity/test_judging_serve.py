"""Judging with a real server that holds a random model: what it says is noise, and noise is no score."""

import pytest
from test_serve import server

from galenic.corpus.synthesis.synthesise_config import EndpointConfig
from galenic.evaluate.judging import Judge, JudgeConfig
from galenic.runtime import UserError, read_json, read_jsonl

pytestmark = pytest.mark.parity


def test_noise_is_no_score_and_is_not_asked_for_twice(llama_folder, tmp_path):
    items = [
        {
            "id": str(n),
            "prompt": "mcq",
            "question": "Which?",
            "options": ["a", "b"],
            "answer": f"A {n}",
            "truth": "A",
        }
        for n in range(2)
    ]

    def judge(url):
        endpoint = EndpointConfig(
            base_url=url, model=str(llama_folder), max_tokens=24, concurrency=2, retries=1, backoff=0.1
        )
        with pytest.raises(UserError, match="gave no usable verdict of 2 answers") as error:
            Judge(JudgeConfig(endpoint=endpoint, swapped_share=0.0), tmp_path / "judged").judge(items)
        return str(error.value)

    with server(llama_folder, tmp_path) as url:
        said = judge(url)
    rows = list(read_jsonl(tmp_path / "judged/unusable.jsonl"))
    assert len(rows) == 2 and {row["reason"] for row in rows} <= {"cut off", "not JSON", "empty"}
    assert read_json(tmp_path / "judged/endpoint.json")["json"] == "plain", (
        "this server takes no response_format"
    )
    kept = (tmp_path / "judged/answers.jsonl").read_bytes()
    assert judge(url) == said, "the server is gone: every reply comes from the cache"
    assert (tmp_path / "judged/answers.jsonl").read_bytes() == kept
