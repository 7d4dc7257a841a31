import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.tokens.shards import Shard
from galenic.pretrain.data.bins import fill_bins
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.pretrain.data.packing import (
    Rows,
    best_fit,
    cut,
    cut_all,
    draw_documents,
    packing_report,
    phase_rows,
)
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


def fill_slowly(lengths, capacity, most):
    """The rule of `fill_bins`, word for word: every piece and, if `most` is 2, every pair is tried."""
    left, rows = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), []
    while left:
        row = [left.pop(0)]
        free = capacity - lengths[row[0]]
        while True:
            sets = [
                c for n in range(1, most + 1) for c in itertools.combinations([lengths[i] for i in left], n)
            ]
            fitting = [chosen for chosen in sets if sum(chosen) <= free]
            if not fitting:
                break
            length = max(fitting, key=lambda chosen: (sum(chosen), chosen[0]))[0]
            row.append(next(i for i in left if lengths[i] == length))
            left.remove(row[-1])
            free -= length
        rows.append(row)
    return rows


def first_fit_decreasing(lengths, capacity):
    """The longest piece first, each into the oldest row it fits; returns how many rows."""
    free = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row, room in enumerate(free) if room >= length), len(free))
        free += [capacity] * (row == len(free))
        free[row] -= length
    return len(free)


@settings(deadline=None)
@given(st.lists(st.integers(1, 25), max_size=25))
def test_best_fit_is_the_rule_written_out(lengths):
    ahead, plain = (fill_slowly(lengths, 25, most) for most in (2, 1))
    assert best_fit(lengths, 25) == (ahead if len(ahead) <= len(plain) else plain)
    assert len(plain) == first_fit_decreasing(lengths, 25)


def test_looking_ahead_halves_the_padding():
    drawn = np.random.default_rng(0).lognormal(np.log(130), 0.4, 2000)
    lengths = drawn.clip(40, 384).astype(int).tolist()
    least = -(-sum(lengths) // 384)
    assert len(best_fit(lengths, 384)) - least <= (first_fit_decreasing(lengths, 384) - least) / 2


def test_where_looking_ahead_does_harm_it_is_not_done():
    drawn = np.random.default_rng(160).lognormal(np.log(160), 0.4, 2000)
    lengths = drawn.clip(40, 384).astype(int).tolist()
    assert len(best_fit(lengths, 384)) == first_fit_decreasing(lengths, 384) == 911


def test_a_million_pieces_are_packed_at_once():
    lengths = np.random.default_rng(0).integers(1, 8192, 1_000_000)
    order, bounds = fill_bins(lengths, 8192)
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    sums = np.add.reduceat(lengths[order], bounds[:-1])
    assert sums.max() <= 8192 and sums.mean() > 0.998 * 8192


@pytest.mark.parametrize("lengths", [[3, 41], [0, 3], [-1]])
def test_pieces_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit bins of 40"):
        best_fit(lengths, 40)


@given(st.integers(1, 500), st.integers(1, 64))
def test_cut_covers_the_document_in_full_pieces_and_a_rest(length, context):
    pieces = cut("s", 0, length, context)
    assert [p.start for p in pieces] == list(range(0, length, context))
    assert sum(p.length for p in pieces) == length
    assert all(p.length == context for p in pieces[:-1])
    assert 1 <= pieces[-1].length <= context


def test_all_documents_are_cut_as_one_is():
    lengths = np.array([5, 64, 1, 65, 200])
    owner, starts, sizes = cut_all(lengths, 64)
    one_by_one = [(i, p.start, p.length) for i, n in enumerate(lengths) for p in cut("s", i, int(n), 64)]
    assert list(zip(owner.tolist(), starts.tolist(), sizes.tolist(), strict=True)) == one_by_one


def test_draw_reads_every_document_once_before_any_twice():
    shard = make_shard([3] * 50)
    chosen = draw_documents(shard, 3 * 70, seed=1, key="k").tolist()
    assert sorted(chosen[:50]) == list(range(50))
    assert len(chosen) == 70
    assert chosen != sorted(chosen)
    assert chosen == draw_documents(shard, 3 * 70, seed=1, key="k").tolist()
    assert chosen != draw_documents(shard, 3 * 70, seed=2, key="k").tolist()


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


def test_rows_hold_what_was_drawn_and_nothing_else():
    generator = np.random.default_rng(1)
    shards = {name: make_shard(generator.integers(5, 300, 60).tolist(), [1.5] * 60) for name in ("a", "b")}
    arguments = {"tokens": 9000, "context": 128, "seed": 3, "name": "p"}
    rows = phase_rows(shards, {"a": 1.0, "b": 2.0, "c": 0.0}, **arguments)
    assert all(0 < sum(p.length for p in row) <= 128 for row in rows)
    for name, share in (("a", 3000), ("b", 6000)):
        drawn = draw_documents(shards[name], share, seed=3, key=f"p/{name}")
        expected = [
            (int(d), p.start, p.length)
            for d in drawn
            for p in cut(name, int(d), int(shards[name].offsets[d + 1] - shards[name].offsets[d]), 128)
        ]
        found = [(p.document, p.start, p.length) for row in rows for p in row if p.source == name]
        assert sorted(found) == sorted(expected)
        assert found != sorted(found)  # in random order
    again = phase_rows(shards, {"a": 1.0, "b": 2.0}, **arguments)
    assert list(rows) == list(again)
    assert rows[-1] == rows[len(rows) - 1] and rows[2:5] == [rows[2], rows[3], rows[4]]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_report_counts_split_truncated_and_padding():
    shards = {"a": make_shard([10, 30]), "b": make_shard([70])}
    rows = phase_rows(shards, {"a": 39, "b": 70}, tokens=109, context=32, seed=0, name="p")
    report = packing_report(rows, 32)
    assert (report.documents, report.tokens, report.truncated) == (3, 110, 0)
    assert report.split == {"a": (2, 0, 0), "b": (1, 1, 70)}
    assert report.split_documents == pytest.approx(1 / 3) and report.split_tokens == pytest.approx(70 / 110)
    # 32, 32, 30 and 10 + 6
    assert report.rows == 4 and report.padding == pytest.approx(1 - 110 / 128)
    assert str(report) == "truncated 0 documents, split 33.33% (63.6% of tokens), padding 14.06%"


def test_a_document_cut_although_it_fits_counts_as_truncated():
    arrays = {"source": [0, 0], "document": [0, 0], "start": [0, 10], "length": [10, 5], "whole": [15, 15]}
    rows = Rows(sources=["a"], bounds=np.array([0, 1, 2]), **{n: np.array(a) for n, a in arrays.items()})
    assert packing_report(rows, 32).truncated == 1
    assert packing_report(rows, 12).truncated == 0  # there it had to be split


def test_collate_restarts_positions_and_hides_first_tokens():
    first, second = np.array([1, 10, 11]), np.array([1, 20])
    batch = collate([[(first, first), (second, second)]], 7, pad=3)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 1, 20, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 10, 11, IGNORE, 20, IGNORE, IGNORE]]


def test_rows_are_those_of_earlier_releases():
    """Digest of the rows as they were before phases were packed in blocks: a run goes on with what it began with."""
    generator = np.random.default_rng(1)
    shards = {name: make_shard(generator.integers(5, 300, 60).tolist(), [1.5] * 60) for name in ("a", "b")}
    rows = phase_rows(shards, {"a": 1.0, "b": 2.0, "c": 0.0}, tokens=9000, context=128, seed=3, name="p")
    digest = hashlib.sha256()
    for name in ("source", "document", "start", "length", "whole", "bounds"):
        digest.update(getattr(rows, name).astype("<i8").tobytes())
    assert digest.hexdigest() == "faf295406a34643895a2360168a4a2220531f6725fb6711999982b17639e7df3"
