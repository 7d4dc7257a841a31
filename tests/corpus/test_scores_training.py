import numpy as np
import pytest

from galenic.corpus.scores import agreement
from galenic.corpus.scores.calibration import platt, temperature
from galenic.corpus.scores.features import SHAPES, features
from galenic.corpus.scores.training import (
    Examples,
    Network,
    _errors,
    fresh,
    logits,
    spans,
    train,
)
from galenic.corpus.texts import column

SIZES = [3, 2]


def network(bits=10, seed=0):
    draw = np.random.default_rng(seed)
    return Network(*(draw.normal(size=w.shape).astype(np.float32) for w in fresh(bits, 2 + sum(SIZES), seed)))


def test_logits_are_those_of_the_equations_in_double_precision():
    net = network()
    ids, ends, shapes = features(column(["fever and cough", "", "哮喘 is asthma."]), 10)
    found = logits(net, ids, ends, shapes)
    wide = [w.astype(np.float64) for w in net]
    for i in range(3):
        chosen = ids[ends[i] : ends[i + 1]]
        x = np.concatenate([wide[0][chosen].sum(0) / max(1, len(chosen)) ** 0.5, shapes[i]])
        h = np.maximum(0, x @ wide[1] + wide[2])
        np.testing.assert_allclose(found[i], h @ wide[3] + wide[4], rtol=1e-4, atol=1e-4)


def test_errors_are_the_derivatives_of_the_loss():
    draw = np.random.default_rng(1)
    z = draw.normal(size=7).astype(np.float32)
    scores, labels = np.array([0.3, np.nan], np.float32), np.array([2, -1], np.int32)
    weights = np.array([1.5, 1.0, 0.7, 1.0], np.float32)
    error, scratch = np.empty(7, np.float32), np.empty(7, np.float32)
    places = spans(SIZES, 2)
    assert places.tolist() == [2, 5, 7]
    _errors(z, scores, labels, places, weights, error)
    step = 1e-2
    for k in range(7):
        up, down = z.copy(), z.copy()
        up[k] += step
        down[k] -= step
        slope = _errors(up, scores, labels, places, weights, scratch) - _errors(
            down, scores, labels, places, weights, scratch
        )
        assert error[k] == pytest.approx(slope / (2 * step), abs=1e-3)
    assert (error[[1, 5, 6]] == 0).all()  # no label, no error


def toy(n=300):
    draw = np.random.default_rng(3)
    words = np.array("fever cough lung star planet orbit".split())
    kinds = draw.integers(0, 2, n)
    texts = [" ".join(draw.choice(words[3 * k : 3 * k + 3], 8)) for k in kinds]
    ids, ends, shapes = features(column(texts), 12)
    return Examples(
        ids=ids,
        ends=ends,
        shapes=shapes,
        scores=np.stack([kinds, np.full(n, np.nan)], 1).astype(np.float32),
        labels=np.stack([kinds, np.full(n, -1)], 1).astype(np.int32),
    )


def trained(data, seed=1):
    words = {"bits": 12, "epochs": 5, "rate": 0.1, "dropped": 0.3, "seed": seed}
    return train(data, SIZES, weights=np.ones(4, np.float32), **words)


def test_learns_what_can_be_told_and_gives_the_same_bytes_again():
    data = toy()
    first, second, other = trained(data), trained(data), trained(data, seed=2)
    assert [w.tobytes() for w in first] == [w.tobytes() for w in second]
    assert first.vectors.tobytes() != other.vectors.tobytes()
    z = logits(first, data.ids, data.ends, data.shapes)
    assert ((z[:, 0] > 0) == (data.scores[:, 0] == 1)).all()
    assert (z[:, 2:5].argmax(1) == data.labels[:, 0]).all()
    assert (first.out[:, [1, 5, 6]] == 0).all()  # heads without a label learn nothing
    unseen = np.setdiff1d(np.arange(2**12), data.ids)
    assert (first.vectors[unseen] == 0).all()


def test_platt_finds_slope_and_shift_and_stays_near_the_identity_without_data():
    z = np.linspace(-4, 4, 2001)
    targets = 1 / (1 + np.exp(-(0.5 * z - 1.2)))
    assert platt(z, targets) == pytest.approx((0.5, -1.2), abs=0.01)
    assert platt(z[:0], targets[:0]) == (1.0, 0.0)
    assert platt(z, 1 - targets)[0] == 0  # never turns a score around
    a, b = platt(np.full(10, 3.0), np.ones(10))
    assert np.isfinite([a, b]).all()


def test_temperature_finds_how_much_too_sure():
    draw = np.random.default_rng(5)
    true = draw.normal(size=(20_000, 4)) * 2
    p = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    labels = (p.cumsum(1) > draw.random((len(p), 1))).argmax(1)
    assert temperature(true * 3, labels) == pytest.approx(3, rel=0.05)
    assert temperature(true[:0], labels[:0]) == 1.0


def test_figures_on_small_cases():
    assert agreement.spearman(np.array([1, 2, 3.0]), np.array([10, 20, 90.0])) == pytest.approx(1)
    assert agreement.spearman(np.array([1, 2, 3.0]), np.array([3, 2, 1.0])) == pytest.approx(-1)
    assert agreement.spearman(np.array([1, 1, 2, 3.0]), np.array([1, 2, 3, 3.0])) == pytest.approx(8 / 9)
    assert agreement.spearman(np.ones(3), np.arange(3.0)) == 0
    assert agreement.calibration_error(np.array([0.9, 0.9, 0.1]), np.array([1, 0, 0])) == pytest.approx(
        0.9 / 3
    )
    assert agreement.macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1])) == pytest.approx(2 / 3)


def test_intervals_count_groups_not_documents():
    hits = np.repeat(np.random.default_rng(0).integers(0, 2, 20), 50).astype(float)
    grouped = agreement.interval([str(i // 50) for i in range(1000)], lambda rows: hits[rows].mean(), 1)
    alone = agreement.interval([str(i) for i in range(1000)], lambda rows: hits[rows].mean(), 1)
    assert grouped[0] < hits.mean() < grouped[1]
    assert grouped[1] - grouped[0] > 3 * (alone[1] - alone[0])


def test_class_figures_name_the_worst_confusion():
    labels, chosen = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0])
    found = agreement.class_figures(
        chosen, np.full(5, 0.8), labels, list("abcde"), list("ppppq"), ["x", "y", "z"], 1
    )
    assert found["accuracy"] == 0.4 and found["n"] == 5
    assert found["labels"]["x"] == {"n": 3, "recall": 0.3333}
    assert found["origins"] == {"p": {"n": 4, "accuracy": 0.5}, "q": {"n": 1, "accuracy": 0.0}}
    assert found["confusions"][0] == {"label": "x", "taken_for": "y", "n": 2}


def test_shapes_are_part_of_the_input():
    assert fresh(8, 3, 0).hidden.shape[0] == 32 + len(SHAPES)
