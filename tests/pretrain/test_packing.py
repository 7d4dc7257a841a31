import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.shards import Shard
from galenic.pretrain.packing import IGNORE, best_fit, collate, cut, draw_documents, phase_rows
from galenic.runtime import UserError


def make_shard(lengths, weights=None):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Shard(
        tokens=np.arange(offsets[-1], dtype=np.uint16),
        offsets=offsets,
        bytes=np.array(lengths, dtype=np.int64),
        weights=np.array(weights or [1.0] * len(lengths), dtype=np.float32),
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80))
def test_best_fit_places_each_piece_once_within_capacity(lengths):
    rows = best_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    # No two rows could be one: best fit never opens a row for a piece that fits an open one.
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > 40


@given(st.integers(1, 500), st.integers(1, 64))
def test_cut_covers_the_document_in_full_pieces_and_a_rest(length, context):
    pieces = cut("s", 0, length, context)
    assert [p.start for p in pieces] == list(range(0, length, context))
    assert sum(p.length for p in pieces) == length
    assert all(p.length == context for p in pieces[:-1])
    assert 1 <= pieces[-1].length <= context


def test_draw_reads_every_document_once_before_any_twice():
    shard = make_shard([3] * 50)
    chosen = draw_documents(shard, 3 * 70, seed=1, key="k")
    assert sorted(chosen[:50]) == list(range(50))
    assert len(chosen) == 70
    assert chosen != sorted(chosen)
    assert chosen == draw_documents(shard, 3 * 70, seed=1, key="k")
    assert chosen != draw_documents(shard, 3 * 70, seed=2, key="k")


def test_draw_repeats_by_weight():
    shard = make_shard([1] * 300, [2.0] * 100 + [0.5] * 100 + [0.0] * 100)
    epoch = draw_documents(shard, 200, seed=0, key="k")
    counts = np.bincount(epoch, minlength=300)
    assert (counts[:100] == 2).sum() > 60  # an epoch holds about 250 pieces, cut at 200
    assert counts[100:200].max() == 1
    assert counts[200:].max() == 0


def test_draw_refuses_an_empty_source():
    with pytest.raises(UserError, match="source 'p/none' has no training documents"):
        draw_documents(make_shard([]), 10, seed=0, key="p/none")


def test_phase_keeps_shares_and_pads_little():
    generator = np.random.default_rng(0)
    shards = {name: make_shard(generator.integers(5, 120, 400).tolist()) for name in ("a", "b")}
    rows = phase_rows(shards, {"a": 3.0, "b": 1.0}, tokens=20_000, context=256, seed=0, name="p")
    tokens = {name: sum(p.length for row in rows for p in row if p.source == name) for name in shards}
    assert tokens["a"] == pytest.approx(15_000, abs=120)
    assert tokens["b"] == pytest.approx(5_000, abs=120)
    assert sum(tokens.values()) / (len(rows) * 256) > 0.985


def test_collate_restarts_positions_and_hides_first_tokens():
    first, second = np.array([1, 10, 11]), np.array([1, 20])
    batch = collate([[(first, first), (second, second)]], 7, pad=3)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 1, 20, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 10, 11, IGNORE, 20, IGNORE, IGNORE]]
