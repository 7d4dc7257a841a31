import dataclasses
import json
import math
import os
import socket
import subprocess
import sys

import heldout_worker
import numpy as np
import pytest
import torch

from galenic.corpus.tokens.shards import read_shard
from galenic.evaluate.bits_per_byte import Scored, bits_per_byte, document
from galenic.pretrain.data.collate import IGNORE
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.pretrain.watching import heldout
from galenic.pretrain.watching.heldout import heldout_bits, heldout_texts, pieces, scorer
from galenic.pretrain.watching.watch import Watch


def test_texts_are_the_first_that_fit_and_one_at_least(tokenizer_step):
    shard = read_shard(tokenizer_step, "general", "heldout")
    lengths = [len(shard.document(i)) for i in range(len(shard))]
    two = heldout_texts(str(tokenizer_step), "general", sum(lengths[:2]))
    assert [len(text.ids) for text in two] == lengths[:2]
    assert len(heldout_texts(str(tokenizer_step), "general", sum(lengths[:2]) - 1)) == 1
    assert len(heldout_texts(str(tokenizer_step), "general", 1)) == 1
    assert len(heldout_texts(str(tokenizer_step), "general", 10**9)) == len(shard)


def test_each_counted_token_is_the_label_of_one_piece():
    ids = np.arange(100, 121)
    text = document(ids, 60)
    found = pieces(text, 8)
    assert all(len(part) == len(labels) <= 8 for part, labels in found)
    for part, labels in found:
        assert np.array_equal(part[labels != IGNORE], labels[labels != IGNORE])
        assert labels[0] == IGNORE
    labelled = np.concatenate([labels[labels != IGNORE] for _, labels in found])
    assert np.array_equal(labelled, ids[1:-1])  # neither what begins the text nor what ends it


@pytest.mark.parametrize("context", [16, 64])  # documents longer than the context, and shorter ones
def test_the_bits_are_those_of_the_evaluation(tokenizer_step, context):
    config = heldout_worker.configured(tokenizer_step, context)
    model = heldout_worker.network(config)
    found = heldout_bits(model, config, context, Parallel(device="cpu"))
    assert found.keys() == {"general", "medical"}
    for source, bits in found.items():
        texts = heldout_texts(str(tokenizer_step), source, config.heldout_tokens)
        assert len(texts) > 2
        alone, _ = bits_per_byte(model.eval(), texts, context=context, batch_tokens=64)
        assert bits == pytest.approx(alone, rel=1e-5)
    assert found["general"] != pytest.approx(found["medical"], rel=1e-3)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(tokenizer_step):
    config = heldout_worker.configured(tokenizer_step, 32)
    model = heldout_worker.network(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = heldout_bits(model, config, 32, Parallel(device="cpu"))
    texts: list[Scored] = heldout_texts(str(tokenizer_step), "general", config.heldout_tokens)
    tokens, size = sum(text.counted.sum() for text in texts), sum(text.bytes for text in texts)
    assert found["general"] == pytest.approx(math.log2(model.config.vocab_size) * tokens / size, rel=1e-5)


class Counted:
    """Counts the model's calls; `parallel` as of one of several processes that read different rows."""

    def __init__(self, model, data_rank, data_ranks):
        self.model, self.calls, self.shapes = model, 0, set()
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.training = True

    def parameters(self):
        return self.model.parameters()

    def train(self):
        self.model.train()

    def __call__(self, **batch):
        self.calls += 1
        self.shapes.add(tuple(batch["input_ids"].shape))
        return self.model(**batch)

    def rows(self, total):
        own = total // self.data_ranks
        return list(range(self.data_rank * own, (self.data_rank + 1) * own))

    def local(self, batch):
        return batch

    def added(self, sums):
        self.sums = sums
        return sums


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_processes_share_the_rows_and_make_the_same_calls(tokenizer_step, monkeypatch, ranks):
    monkeypatch.setattr(heldout, "BATCH_TOKENS", 32)  # one row a call
    config = heldout_worker.configured(tokenizer_step, 32)
    model = heldout_worker.network(config)
    whole = heldout_bits(model, config, 32, Parallel(device="cpu"))
    sides = [Counted(model, rank, ranks) for rank in range(ranks)]
    parts = [heldout_bits(side, config, 32, side) for side in sides]
    assert len({(side.calls, tuple(side.shapes)) for side in sides}) == 1
    assert sides[0].calls > 1
    for source, bits in whole.items():
        assert sum(part[source] for part in parts) == pytest.approx(bits, rel=1e-6)


def test_scores_come_every_so_many_steps_and_at_the_end_but_once(tmp_path, tokenizer_step, monkeypatch):
    config = heldout_worker.configured(tokenizer_step, 32)
    config = dataclasses.replace(config, watch=dataclasses.replace(config.watch, heldout_steps=4))
    monkeypatch.setattr(heldout, "heldout_bits", lambda *_: {"general": 1.0})

    def steps_scored(watch, steps):
        score = scorer(None, config, config.phases[0], 10, watch, None)
        for step in steps:
            score(step)
        score(10)  # as the run does at the phase's end
        return [row["step"] for row in watch.rows()]

    assert steps_scored(Watch(tmp_path), range(1, 11)) == [4, 8, 10]
    again = Watch(tmp_path)
    again.resume(9)
    assert again.scored == {4, 8}
    assert steps_scored(again, range(8, 11)) == [4, 8, 10]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_the_bits_do_not_depend_on_how_the_model_is_spread(tmp_path, tokenizer_step):
    config = heldout_worker.configured(tokenizer_step, 32)
    whole = heldout_bits(heldout_worker.network(config), config, 32, Parallel(device="cpu"))
    ways = [{}, {"context": 2}, {"tensor": 2}]  # sharded by rows, by a row's tokens, by matrices
    arguments = [heldout_worker.__file__, str(tokenizer_step), "32", json.dumps(ways), str(tmp_path / "bits")]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **place, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    one, other = (json.loads((tmp_path / f"bits.{rank}").read_text()) for rank in range(2))
    assert one == other
    for way, bits in zip(ways, one, strict=True):
        assert bits == pytest.approx(whole, rel=1e-5), way
