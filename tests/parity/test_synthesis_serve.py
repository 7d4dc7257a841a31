"""Synthesis with a real server that holds a random model: what it says is noise, and noise goes to the ledger."""

import json

import pytest
from test_serve import server

from galenic.corpus.synthesis.synthesise import run
from galenic.corpus.synthesis.synthesise_config import EndpointConfig, PipelineConfig, SynthesiseConfig
from galenic.runtime import read_json, read_jsonl

pytestmark = pytest.mark.parity


def test_noise_is_in_the_ledger_and_not_asked_for_twice(llama_folder, tmp_path):
    documents = tmp_path / "documents.jsonl"
    rows = [
        {"id": f"{i}", "text": f"Is a fever of {i} serious?\n\nNo.", "source": "forum", "licence": "own"}
        for i in range(3)
    ]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(url):
        endpoint = EndpointConfig(
            base_url=url, model=str(llama_folder), max_tokens=24, concurrency=2, retries=1
        )
        return SynthesiseConfig(
            out=str(tmp_path / "out"),
            documents=[str(documents)],
            endpoint=endpoint,
            pipelines=[PipelineConfig(name="online-qa"), PipelineConfig(name="papers")],
        )

    with server(llama_folder, tmp_path) as url:
        run(config(url))
    ledger = (tmp_path / "out/ledger.jsonl").read_bytes()
    rows = list(read_jsonl(tmp_path / "out/ledger.jsonl"))
    assert len(rows) == 6 and (tmp_path / "out/sft.jsonl").read_text() == ""
    assert {row["reason"] for row in rows} <= {"cut off", "no id", "not JSON", "empty"}
    assert read_json(tmp_path / "out/stats.json")["this_run"]["requests_sent"] == 12
    run(config(url))  # the server is gone: every answer comes from the cache
    assert read_json(tmp_path / "out/stats.json")["this_run"]["cache_hit_rate"] == 1
    assert (tmp_path / "out/ledger.jsonl").read_bytes() == ledger
