import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.mixtures.sampling import (
    BINS,
    Sampling,
    ScoreHistogram,
    add_ranks,
    class_factor,
    count_factor,
    rank_score,
    tier_repeats,
    weights,
)
from galenic.corpus.tokens.shards import Shard
from galenic.pretrain.data.packing import draw_documents
from galenic.runtime import UserError


def text(*values):
    return np.array(values, dtype=object)


def test_by_default_a_document_found_n_times_weighs_one_and_log2_n_and_at_most_ten():
    counts = np.array([1, 2, 3, 8, 512, 4096])
    result, reasons = weights({"duplicates": counts}, Sampling())
    expected = [round(min(10.0, 1 + math.log2(n)), 4) for n in counts.tolist()]
    assert result.tolist() == expected == [1.0, 2.0, 2.585, 4.0, 10.0, 10.0]
    assert (reasons == "").all()


def test_a_map_of_counts_goes_through_its_points_and_is_flat_beyond():
    points = {1: 1.0, 2: 1.5, 4: 2.0, 10: 3.0}
    assert count_factor(np.array([1, 2, 4, 10, 1000]), points).tolist() == [1.0, 1.5, 2.0, 3.0, 3.0]
    assert 1.5 < count_factor(np.array([3]), points)[0] < 2.0
    assert count_factor(np.array([1]), {2: 0.5}).tolist() == [0.5]


def test_the_reports_two_arms_draw_as_much_text_and_drop_the_rest():
    scores = np.random.default_rng(0).random(20_000)
    sizes = np.random.default_rng(1).integers(100, 2000, 20_000)
    columns = {"quality": scores, "bytes": sizes}
    best = {}
    for top, repeats in ((0.1, 10.0), (1 / 3, 3.0)):
        result, reasons = weights(columns, Sampling(score={"quality": 1}, score_tiers={top: repeats}))
        assert (result * sizes).sum() / sizes.sum() == pytest.approx(1.0, abs=1e-6)
        assert sizes[result > 0].sum() / sizes.sum() == pytest.approx(top, abs=2e-3)
        assert set(reasons.tolist()) == {"", f"below the top {top:.4g} by score"}
        best[top] = result
    assert best[0.1].max() == 10.0 and ((best[0.1] > 0) <= (best[1 / 3] > 0)).all()


@settings(deadline=None, max_examples=60)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.2, 0.2001, 0.5, 0.9, 1.0]), min_size=1, max_size=60),
    cuts=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4, unique=True),
    data=st.data(),
)
def test_repeats_rise_with_the_score_and_ties_change_no_total(scores, cuts, data):
    repeats = sorted(
        data.draw(st.lists(st.floats(0, 10), min_size=len(cuts), max_size=len(cuts))), reverse=True
    )
    tiers = dict(zip(sorted(cuts), repeats, strict=True))
    scores = np.array(scores)
    histogram = ScoreHistogram()
    histogram.add(scores)
    result = tier_repeats(*histogram.above(scores), tiers)
    order = np.argsort(scores)
    assert (np.diff(result[order]) >= -1e-9).all()
    tops = np.diff([0.0, *sorted(cuts)])
    assert result.mean() == pytest.approx(float(np.dot(tops, repeats)), abs=1e-9)


def test_histograms_of_units_in_any_order_are_that_of_all_and_weights_do_not_know_the_units():
    generator = np.random.default_rng(3)
    n = 3000
    columns = {
        "educational": generator.random(n),
        "knowledge": np.where(generator.random(n) < 0.3, np.nan, generator.random(n)),
        "group": text(*generator.choice(["general", "medical"], n)),
        "general": text(*generator.choice(["news", "science"], n)),
        "quality": generator.random(n),
        "duplicates": generator.integers(1, 40, n),
        "bytes": generator.integers(1, 900, n),
    }
    sampling = Sampling(
        quality_floor=0.1,
        score={"educational": 1, "knowledge": 2},
        rank_within="group",
        score_tiers={0.2: 4, 0.6: 1},
        class_factors={"general": {"news": 0.5}},
    )
    units = [{k: v[start : start + 700] for k, v in columns.items()} for start in range(0, n, 700)]
    merged = {}
    for unit in reversed(units):
        own = {}
        add_ranks(own, unit, sampling)
        for key, histogram in own.items():
            merged.setdefault(key, ScoreHistogram()).merge(histogram)
    whole, why = weights(columns, sampling)
    parts = [weights(unit, sampling, merged) for unit in units]
    assert np.concatenate([w for w, _ in parts]).tobytes() == whole.tobytes()
    assert (np.concatenate([r for _, r in parts]) == why).all()
    assert ((whole == 0) == (why != "")).all() and whole.max() <= 10


def test_a_quantile_is_within_a_bin_of_the_sorted_scores():
    scores = np.random.default_rng(5).beta(2, 5, 10_001)
    histogram = ScoreHistogram()
    histogram.add(scores)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert histogram.quantile(share) == pytest.approx(np.quantile(scores, share), abs=2 / BINS)
    assert math.isnan(ScoreHistogram().quantile(0.5))


def test_scores_beyond_the_bins_and_missing_ones():
    histogram = ScoreHistogram()
    histogram.add(np.array([-1.0, 2.0, np.nan, 1.0]))
    assert histogram.counts[0] == 1 and histogram.counts[-1] == 2 and histogram.counts.sum() == 3
    columns = {"a": np.array([0.2, np.nan, np.nan]), "b": np.array([0.8, 0.4, np.nan])}
    sampling = Sampling(score={"a": 1, "b": 3}, score_tiers={0.5: 2})
    assert rank_score(columns, sampling)[:2] == pytest.approx([0.65, 0.4])
    result, reasons = weights(columns, sampling)
    assert result.tolist() == [2.0, 0.0, 1.0] and reasons.tolist()[2] == ""


def test_classes_multiply_and_zero_drops_with_its_reason():
    columns = {
        "general": text("entertainment", "mathematics", "mathematics"),
        "content": text("article", "article", "advertisement"),
        "weight": np.array([2.0, 2.0, 2.0]),
    }
    sampling = Sampling(
        class_factors={"general": {"entertainment": 0.25, "mathematics": 3}, "content": {"advertisement": 0}}
    )
    assert class_factor(columns, sampling).tolist() == [0.25, 3.0, 0.0]
    result, reasons = weights(columns, sampling)
    assert result.tolist() == [0.5, 6.0, 0.0]
    assert reasons.tolist() == ["", "", "class content: advertisement"]


def test_low_quality_goes_first_and_takes_no_rank():
    columns = {"quality": np.array([0.1, 0.2, 0.8, 0.9])}
    sampling = Sampling(quality_floor=0.5, score={"quality": 1}, score_tiers={0.5: 10})
    result, reasons = weights(columns, sampling)
    assert result.tolist() == [0.0, 0.0, 0.0, 10.0]  # half of the two that stay, not of four
    assert reasons.tolist() == ["quality below 0.5"] * 2 + ["below the top 0.5 by score", ""]


def test_drawing_repeats_a_document_as_often_as_it_weighs():
    columns = {"duplicates": np.array([1, 3, 100, 2]), "weight": np.array([0.3, 1.0, 1.0, 1.0])}
    result, _ = weights(columns, Sampling())
    offsets = np.arange(5, dtype=np.int64) * 10
    shard = Shard(
        tokens=np.zeros(40, dtype=np.uint16),
        offsets=offsets,
        bytes=np.full(4, 10),
        weights=result.astype(np.float32),
    )
    epochs = 2000
    drawn = draw_documents(shard, tokens=epochs * 10 * result.sum(), seed=0, key="x")
    assert np.bincount(drawn, minlength=4) / epochs == pytest.approx(result, abs=0.04)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"score": {"quality": 1}}, "score_tiers"),
        ({"score_tiers": {0.1: 10}}, "score"),
        ({"score": {"quality": 0}, "score_tiers": {0.1: 10}}, "above 0"),
        ({"score": {"quality": 1}, "score_tiers": {1.5: 10}}, "(0, 1]"),
        ({"score": {"quality": 1}, "score_tiers": {0.1: 1, 0.5: 2}}, "lower tier"),
        ({"count_map": {0: 1.0}}, "from 1 on"),
        ({"count_map": {1: -1.0}}, "count_map.1"),
        ({"class_factors": {"general": {"news": float("nan")}}}, "general.news"),
        ({"most_repeats": 0}, "above 0"),
        ({"rank_within": "group"}, "rank_within"),
    ],
)
def test_contradictions_are_refused(options, word):
    with pytest.raises(UserError, match=word.replace("(", r"\(").replace("]", r"\]")):
        Sampling(**options)


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="no column 'general'; they have duplicates"):
        weights({"duplicates": np.array([1])}, Sampling(class_factors={"general": {"news": 0.5}}))
