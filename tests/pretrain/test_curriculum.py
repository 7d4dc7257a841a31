import itertools
import json
import shutil
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.tokens.shards import Shard, read_shard, write_meta, write_shard
from galenic.pretrain import pretrain
from galenic.pretrain.config import PhaseConfig, PretrainConfig
from galenic.pretrain.data import drawing
from galenic.pretrain.data.collate import IGNORE
from galenic.pretrain.data.curriculum import Curriculum, PhaseBatches, Place, open_shards
from galenic.pretrain.data.drawing import Cursor, Stream, draw_documents, scattered
from galenic.pretrain.data.packing import pack, phase_rows
from galenic.pretrain.data.stages import divide, hardness, quantile_ranks, stages_of
from galenic.runtime import UserError


def make_shard(lengths, weights=None, **scores):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Shard(
        tokens=np.arange(offsets[-1]).astype(np.uint16),
        offsets=offsets,
        bytes=np.array(lengths, dtype=np.int64),
        weights=np.array([1.0] * len(lengths) if weights is None else weights, dtype=np.float32),
        **{name: np.array(values, dtype=np.float32) for name, values in scores.items()},
    )


def make_phase(**changes):
    values = {"name": "p", "tokens": 3000, "mixture": {"a": 1.0, "b": 2.0}, "context": 32, "rows": 4}
    return PhaseConfig(**{**values, **changes})


# ---------------------------------------------------------------------------- the stream


@pytest.fixture(params=["in memory", "scattered"])
def way(request, monkeypatch):
    """Both ways to order an epoch, for sources of any size."""
    if request.param == "scattered":
        monkeypatch.setattr(drawing, "IN_MEMORY", 0)
    monkeypatch.setattr(drawing, "_CHUNK", 7)
    return request.param


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    budgets=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    in_memory=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_a_stream_goes_on_where_it_stopped(lengths, budgets, in_memory, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "IN_MEMORY", 2**22 if in_memory else 0)
        patch.setattr(drawing, "_CHUNK", chunk)
        shard = make_shard(lengths, [1.0 + i % 3 / 2 for i in range(len(lengths))])
        cursor, parts = Cursor(), []
        for budget in sorted(budgets):
            # Another reader that knows no more than the cursor.
            drawn, cursor = Stream(shard, seed=5, key="k").draw(cursor, budget)
            parts += drawn.tolist()
            assert cursor.tokens == sum(lengths[d] for d in parts)
            assert cursor.tokens >= budget > cursor.tokens - lengths[parts[-1]] or not len(drawn)
        assert parts == Stream(shard, seed=5, key="k").draw(Cursor(), max(budgets))[0].tolist()


def test_every_document_once_before_any_twice(way):
    shard = make_shard([3] * 50)
    drawn = draw_documents(shard, 3 * 120, seed=1, key="k").tolist()
    assert sorted(drawn[:50]) == sorted(drawn[50:100]) == list(range(50))
    assert drawn[:50] != drawn[50:100] != sorted(drawn[:50])
    assert len(drawn) == 120 and len(set(drawn[100:])) == 20
    assert drawn != draw_documents(shard, 3 * 120, seed=2, key="k").tolist()


def test_an_epoch_repeats_by_weight(way):
    weights = [2.0] * 40 + [0.5] * 400 + [0.0] * 40 + [1.25] * 400
    shard = make_shard([1] * 880, weights)
    epoch, start = [], Cursor()
    stream = Stream(shard, seed=0, key="k")
    while start.epoch == 0:
        drawn, start = stream.draw(start, start.tokens + 1)
        epoch += drawn.tolist()
    times = np.bincount(epoch, minlength=880)
    assert (times[:40] == 2).all() and (times[440:480] == 0).all()
    assert set(times[40:440]) == {0, 1} and 150 < times[40:440].sum() < 250
    assert set(times[480:]) == {1, 2} and 50 < (times[480:] == 2).sum() < 150


def test_weightless_sources_are_read_once_an_epoch(way):
    drawn = draw_documents(make_shard([2] * 10, [0.0] * 10), 40, seed=0, key="k")
    assert np.bincount(drawn).tolist() == [2] * 10


def test_members_alone_are_drawn(way):
    members = np.array([3, 4, 8, 11])
    stream = Stream(make_shard([2] * 12), seed=0, key="k", members=members)
    drawn, _ = stream.draw(Cursor(), 16)
    assert Counter(drawn.tolist()) == dict.fromkeys([3, 4, 8, 11], 2)


@pytest.mark.parametrize("half", [1, 2, 3, 5])
def test_scattered_is_a_permutation(half):
    every = np.arange(4**half)
    orders = [scattered(every, half, key) for key in range(20)]
    assert all(np.array_equal(np.sort(order), every) for order in orders)
    assert len({tuple(order) for order in orders}) > (8 if half == 1 else 15)
    # each number by itself
    assert [int(scattered(np.array([i]), half, 3)[0]) for i in every] == orders[3].tolist()


def test_scattered_looks_like_chance():
    orders = np.stack([scattered(np.arange(256), 4, key * 7919) for key in range(2000)])
    # Every number comes to the first place about as often: 2000 / 256 = 7.8, chi square of 255 degrees.
    counts = np.bincount(orders[:, 0], minlength=256)
    assert abs(((counts - 7.8125) ** 2 / 7.8125).sum() - 255) < 5 * np.sqrt(2 * 255)
    neighbours = np.abs(np.diff(orders, axis=1)).mean()
    assert neighbours == pytest.approx(257 / 3, rel=0.01)  # of uniform permutations


def test_a_source_without_text_is_refused():
    for shard in (make_shard([]), make_shard([0, 0])):
        with pytest.raises(UserError, match="source 'k' has no training documents"):
            Stream(shard, seed=0, key="k")


@pytest.mark.parametrize("offsets", [[0, 4, 2, 6], [0, 4, 99, 6], [0, -1, 3, 6]])
def test_documents_that_begin_nowhere_are_named(offsets):
    shard = replace(make_shard([2, 2, 2]), offsets=np.array(offsets, dtype=np.int64))
    with pytest.raises(UserError, match=r"source 'k': damaged shard, document \d begins or ends nowhere"):
        draw_documents(shard, 100, seed=0, key="k")


# ---------------------------------------------------------------------------- blocks


def pieces(rows):
    return Counter((p.source, p.document, p.start, p.length) for row in rows for p in row)


def test_one_block_is_the_phase_packed_at_once():
    generator = np.random.default_rng(0)
    shards = {s: make_shard(generator.integers(2, 60, 80)) for s in "ab"}
    phase = make_phase()
    (rows,) = Curriculum(phase, shards, seed=3).blocks()
    whole = phase_rows(shards, phase.mixture, tokens=3000, context=32, seed=3, name="p")
    assert list(rows) == list(whole)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1
    ),
    block_rows=st.integers(1, 40),
    tokens=st.integers(64, 3000),
    seed=st.integers(0, 5),
)
def test_no_document_is_lost_or_doubled_at_a_blocks_edge(sizes, block_rows, tokens, seed):
    shards = {source: make_shard(lengths) for source, lengths in sizes.items()}
    mixture = {source: 1.0 + number for number, source in enumerate(sorted(sizes))}
    phase = make_phase(tokens=tokens, mixture=mixture, context=16)
    blocks = list(Curriculum(phase, shards, seed, block_rows).blocks())
    assert len(blocks) == -(-tokens // (block_rows * 16))
    whole = phase_rows(shards, mixture, tokens=tokens, context=16, seed=seed, name="p")
    assert pieces(row for rows in blocks for row in rows) == pieces(whole)
    # Within each block, every source has its share, to a document.
    mass = sum(mixture.values())
    drawn = dict.fromkeys(mixture, 0)
    for number, rows in enumerate(blocks, start=1):
        for row in rows:
            for piece in row:
                drawn[piece.source] += piece.length
        for source, share in mixture.items():
            due = tokens * share / mass * number / len(blocks)
            assert due <= drawn[source] + 1e-6 < due + max(sizes[source])


def test_blocks_by_enumeration():
    """Two documents of two tokens, rows of four, blocks of one row: each block goes on in the order of the epochs."""
    shards = {"a": make_shard([2, 2])}
    phase = make_phase(tokens=20, mixture={"a": 1.0}, context=4, rows=1)
    order = draw_documents(shards["a"], 20, seed=0, key="p/a").tolist()
    curriculum = Curriculum(phase, shards, 0, block_rows=1)
    found, place, places = [], Place(), []
    while not curriculum.is_end(place):
        places.append(place)
        rows, place = curriculum.block(place)
        found.append(sorted(p.document for row in rows for p in row))
    assert found == [sorted(order[i : i + 2]) for i in range(0, 10, 2)] == [[0, 1]] * 5
    assert [p.row for p in places] == [0, 1, 2, 3, 4]
    assert [p.cursors.get("a", Cursor()).epoch for p in places] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------- batches


@pytest.fixture
def folder(tmp_path):
    """A tokenizer step of two sources; a document is <s>, ids of its own, </s>."""
    generator = np.random.default_rng(4)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    sources = {}
    for number, source in enumerate(("a", "b", "empty")):
        rows, scores = [], {"quality": [], "difficulty": []}
        for document in range(0 if source == "empty" else 40):
            length = int(generator.integers(1, 70))
            rows.append(([1, *[10 + number * 100 + document] * length, 2], 3 * length, 1.0))
            scores["quality"].append(document / 40)
            scores["difficulty"].append(1.0 - document / 40)
        sources[source] = {"train": write_shard(tokens, source, "train", rows, "uint16", scores)}
    write_meta(tokens, {"vocab_size": 300, "dtype": "uint16", "sources": sources})
    return tmp_path


def make_config(folder, phase):
    return PretrainConfig(out="x", tokenizer=str(folder), phases=[phase], seed=7)


def make_batches(folder, phase, block_rows=2**18):
    shards = {source: read_shard(folder, source, "train") for source in phase.mixture}
    return PhaseBatches(make_config(folder, phase), phase, shards, block_rows)


def laid(batches, step):
    return {n: t.tolist() for n, t in batches.batch(step, range(batches.rows)).items()}


@pytest.mark.parametrize("block_rows", [2**18, 5, 1])
def test_a_batch_holds_its_documents(folder, block_rows):
    batches = make_batches(folder, make_phase(), block_rows)
    assert batches.domains == ["a", "b"] and (batches.rows, batches.context) == (4, 32)
    assert batches.steps >= 3000 // (4 * 32)
    for step in range(batches.steps):
        batch = batches.batch(step, range(4))
        assert all(t.shape == (4, 32) and t.dtype == torch.int64 for t in batch.values())
        ids, domains = batch["input_ids"], batch["domains"]
        own = ids >= 10
        assert ((ids - 10) // 100)[own].tolist() == domains[own].tolist()
        assert ids[domains == -1].unique().tolist() in ([3], [])
        assert (batch["labels"] == ids)[batch["labels"] != IGNORE].all()
        seen = {
            f"{'ab'[d]}:{(i - 10) % 100}"
            for i, d in zip(ids[own].tolist(), domains[own].tolist(), strict=True)
        }
        assert seen <= set(batches.documents(step))
        assert len(batches.documents(step)) == len(set(batches.documents(step)))
    with pytest.raises(IndexError):
        batches.batch(10_000, [0])


def test_ranks_read_different_rows_of_one_batch(folder):
    phase = make_phase()
    whole, ranks = make_batches(folder, phase, 3), [make_batches(folder, phase, 3) for _ in range(3)]
    for step in range(whole.steps):
        batch = whole.batch(step, range(4))
        for name, tensor in batch.items():
            parts = [
                ranks[0].batch(step, [0])[name],
                ranks[1].batch(step, [1, 2])[name],
                ranks[2].batch(step, [3])[name],
            ]
            assert torch.equal(torch.cat(parts), tensor)
        assert all(rank.documents(step) == whole.documents(step) for rank in ranks)
        assert {json.dumps(reader.state(step + 1)) for reader in [whole, *ranks]} == {
            json.dumps(whole.state(step + 1))
        }


@pytest.mark.parametrize("order", ["shuffled", "easy-to-hard"])
def test_a_resumed_reader_gives_the_same_rows(folder, order):
    phase = make_phase(order=order, stages=3)
    whole = make_batches(folder, phase, 6)
    expected = [laid(whole, step) for step in range(whole.steps)]
    reader = make_batches(folder, phase, 6)
    for step in range(whole.steps):
        assert laid(reader, step) == expected[step]
        state = json.loads(json.dumps(reader.state(step + 1)))
        assert state["row"] == 4 * (step + 1) and len(json.dumps(state)) < 400
        reader = make_batches(folder, phase, 6)
        reader.restore(state)
        read = []
        original = reader._curriculum.block
        reader._curriculum.block = lambda place, read=read, original=original: (
            read.append(place),
            original(place),
        )[1]
    # The last one went on at its block, not from the beginning.
    assert laid(reader, whole.steps - 1) == expected[-1]
    assert read and read[0].row > 20


def test_without_a_state_or_backwards_it_is_slower_and_the_same(folder):
    phase = make_phase()
    expected = [laid(make_batches(folder, phase, 6), step) for step in range(12)]
    reader = make_batches(folder, phase, 6)
    for step in (11, 3, 0, 7, 2):
        assert laid(reader, step) == expected[step]
    reader.restore({"phase": "another", "seed": 7, "row": 0, "place": None})
    reader.restore({"phase": "p", "seed": 8, "row": 0, "place": None})
    assert laid(reader, 5) == expected[5]


def test_a_released_reader_holds_no_block_and_reads_the_same(folder):
    batches = make_batches(folder, make_phase(), block_rows=4)
    before = laid(batches, batches.steps - 1)
    batches.release()
    assert not batches._held
    assert laid(batches, batches.steps - 1) == before


def test_the_next_block_is_made_while_this_one_trains(folder):
    batches = make_batches(folder, make_phase(), 6)
    threads = []
    original = batches._curriculum.block
    batches._curriculum.block = lambda place: (threads.append(threading.current_thread()), original(place))[1]
    for step in range(4):
        batches.batch(step, range(4))
    assert threads[0] is threading.main_thread()
    assert len(threads) > 2 and threading.main_thread() not in threads[1:]


def test_a_token_outside_the_vocabulary_is_named(folder):
    file = folder / "tokens" / "b.train.tokens.npy"
    tokens = np.load(file)
    offsets = np.load(folder / "tokens" / "b.train.offsets.npy")
    tokens[offsets[17] + 1] = 300
    np.save(file, tokens)
    batches = make_batches(folder, make_phase(tokens=6000, mixture={"b": 1.0}))
    with pytest.raises(
        UserError, match=r"b\.train\.tokens\.npy: damaged shard, document 17 holds token 300 of a vocab"
    ):
        for step in range(batches.steps):
            batches.batch(step, range(4))


def test_a_curriculum_is_checked_before_it_starts(folder):
    assert list(open_shards(make_config(folder, make_phase(mixture={"b": 1, "a": 1, "empty": 0})))) == [
        "a",
        "b",
    ]
    with pytest.raises(UserError, match=r"'b' would be read [\d.]+ times, above the cap of 10"):
        open_shards(make_config(folder, make_phase(tokens=30_000)))
    with pytest.raises(UserError, match="'c' is not a source"):
        open_shards(make_config(folder, make_phase(mixture={"c": 1})))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("fault", ["cut short", "altered", "gone"])
def test_damaged_shards_stop_a_run_before_it_trains(tokenizer_step, tmp_path, split, fault):
    step, out = tmp_path / "step", tmp_path / "out"
    shutil.copytree(tokenizer_step, step)
    file = step / "tokens" / f"medical.{split}.tokens.npy"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut short": whole[:-2], "altered": whole[:-1] + bytes([whole[-1] ^ 1]), "gone": b""}[fault]
    )
    if fault == "gone":
        file.unlink()
    phase = make_phase(tokens=256, mixture={"general": 1.0, "medical": 1.0})
    config = replace(make_config(step, phase), out=str(out))
    with pytest.raises(UserError, match=rf"medical\.{split}\.tokens\.npy: .*run the tokenizer step again"):
        pretrain.run(config)
    assert not list(out.rglob("*.safetensors"))


def test_the_report_is_of_what_is_trained_on(folder):
    phase = make_phase()
    batches = make_batches(folder, phase)
    shards = {source: read_shard(folder, source, "train") for source in phase.mixture}
    steps, report = Curriculum(phase, shards, make_config(folder, phase).seed).packed()
    assert steps == batches.steps
    assert report.rows // 4 == batches.steps and report.truncated == 0


# ---------------------------------------------------------------------------- easy to hard


def test_quantile_ranks_share_ties():
    assert quantile_ranks(np.array([5.0, 1.0, 5.0, np.nan, 9.0])).tolist()[:3] == [0.5, 0.125, 0.5]
    assert np.isnan(quantile_ranks(np.array([5.0, np.nan]))[1])
    assert quantile_ranks(np.array([2.0, 2.0, 2.0])).tolist() == [0.5] * 3
    assert quantile_ranks(np.array([])).tolist() == []


def test_hardness_is_the_mean_of_what_is_known():
    quality, difficulty = np.array([0.9, 0.1, np.nan, np.nan]), np.array([3.0, 1.0, 2.0, np.nan])
    # ranks of quality 3/4, 1/4; of difficulty 5/6, 1/6, 1/2
    assert hardness(quality, difficulty).tolist() == pytest.approx(
        [(1 / 4 + 5 / 6) / 2, (3 / 4 + 1 / 6) / 2, 0.5, 0.5]
    )
    assert hardness(quality, None).tolist() == [0.25, 0.75, 0.5, 0.5]
    assert hardness(None, difficulty).tolist() == pytest.approx([5 / 6, 1 / 6, 0.5, 0.5])


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_stages_hold_every_document_in_order_and_none_is_empty(documents, stages, seed):
    hard, sizes = (np.array(column, dtype=float) for column in zip(*documents, strict=True))
    chance = np.random.default_rng(seed).permutation(len(documents))
    members = divide(hard, sizes, stages, chance)
    assert len(members) == stages and all(len(m) and np.array_equal(m, np.unique(m)) for m in members)
    weight = np.maximum(sizes, 0 if sizes.any() else 1)
    assert all(weight[m].any() for m in members)  # something to draw
    assert set(np.concatenate(members)) >= {i for i in range(len(documents)) if weight[i]}
    for easy, harder in itertools.pairwise(members):
        assert hard[easy].max() <= hard[harder].min()
    # A document is in the stage of its middle, so a stage is off its share by less than its outermost documents.
    for m in members:
        assert abs(weight[m].sum() - weight.sum() / stages) <= 2 * weight.max()


def test_ties_are_broken_by_seeded_chance():
    hard, sizes = np.zeros(1000), np.ones(1000)
    first, second = divide(hard, sizes, 2, np.random.default_rng(0).permutation(1000))
    assert len(first) == len(second) == 500 and 150 < (first < 500).sum() < 350
    shard = make_shard([2] * 1000, quality=[1.0] * 1000)
    one, again, other = (stages_of(shard, "a", 2, seed)[0].tolist() for seed in (1, 1, 2))
    assert one == again != other


def test_easy_documents_come_first(folder):
    phase = make_phase(order="easy-to-hard", stages=4, tokens=2400)
    shards = {source: read_shard(folder, source, "train") for source in phase.mixture}
    stages = list(Curriculum(phase, shards, 7).blocks())
    assert len(stages) == 4
    seen = []
    for rows in stages:
        tokens = Counter()
        for row in rows:
            for piece in row:
                tokens[piece.source] += piece.length
        assert tokens["a"] == pytest.approx(200, abs=72) and tokens["b"] == pytest.approx(400, abs=72)
        seen.append(
            {source: [p.document for row in rows for p in row if p.source == source] for source in "ab"}
        )
    # Quality rises and difficulty falls with the number: the last documents are the easiest.
    for easy, harder in itertools.pairwise(seen):
        for source in "ab":
            assert min(easy[source]) > max(harder[source])
    batches = make_batches(folder, phase)
    assert batches.steps == sum(map(len, stages)) // 4
    assert batches.batch(0, [0])["input_ids"].shape == (1, 32)


def test_one_stage_draws_all_documents(folder):
    phase = make_phase(order="easy-to-hard", stages=1)
    shards = {source: read_shard(folder, source, "train") for source in phase.mixture}
    (rows,) = Curriculum(phase, shards, 7).blocks()
    assert list(rows) == list(next(Curriculum(replace(phase, order="shuffled"), shards, 7).blocks()))


@pytest.mark.parametrize("scores", [{}, {"quality": [np.nan] * 3}])
def test_easy_to_hard_without_scores_is_refused(scores):
    shards = {"a": make_shard([2, 2, 2], **scores), "b": make_shard([9], difficulty=[1.0])}
    phase = make_phase(order="easy-to-hard")
    with pytest.raises(
        UserError, match=r"needs the quality or difficulty .* shards of 'a' do not have; .* shuffled"
    ):
        Curriculum(phase, shards, 0)


def test_an_empty_draw_packs_no_row():
    shards = {"a": make_shard([2])}
    assert len(pack(shards, {"a": np.zeros(0, dtype=np.int64)}, context=8, seed=0, name="p")) == 0
