"""Agreement of two judges: published and worked tables, properties, and how often an interval holds the truth."""

import json
import math

import numpy as np
import pytest

from galenic.evaluate.judging import Verdict, kappa, summary
from galenic.evaluate.judging.agreement import agreement, chance_agreement, confusion, label, share
from galenic.evaluate.statistics import wilson


def pairs(table):
    return [(str(i), str(j)) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]


def test_kappa_of_a_published_table():
    # J. L. Fleiss, Statistical Methods for Rates and Proportions, table of two raters' diagnoses of 100 patients.
    found = pairs([[75, 1, 4], [5, 4, 1], [0, 0, 10]])
    assert chance_agreement(found) == pytest.approx(0.80 * 0.80 + 0.10 * 0.05 + 0.10 * 0.15)
    assert kappa(found)["value"] == pytest.approx((0.89 - 0.66) / 0.34)


def test_kappa_of_labels_that_stand_in_one_column_only():
    assert kappa([("A", "A"), ("A", "B"), ("B", "C"), ("B", "B")])["value"] == pytest.approx(
        (0.5 - (0.5 * 0.25 + 0.5 * 0.5)) / (1 - 0.375)
    )


def test_kappa_at_the_ends():
    assert kappa([]) is None
    assert kappa([("A", "A")] * 9) is None, "one label: agreement is all chance"
    perfect = kappa(pairs([[5, 0], [0, 5]]))
    assert perfect["value"] == perfect["high"] == 1 and 0 < perfect["low"] < 1
    assert kappa(pairs([[0, 5], [5, 0]]))["value"] == -1
    assert kappa(pairs([[1, 30], [0, 0]]))["low"] >= -1
    assert kappa(pairs([[25, 25], [25, 25]]))["value"] == pytest.approx(0)


def test_kappa_does_not_know_the_order_of_judges_items_or_names():
    found = pairs([[7, 2, 0], [1, 6, 3], [2, 0, 9]])
    names = {"0": "neutral", "1": "yes", "2": "no"}
    for other in ([(b, a) for a, b in found], found[::-1], [(names[a], names[b]) for a, b in found]):
        assert kappa(other) == pytest.approx(kappa(found))


TABLES = {
    "balanced": [[0.45, 0.05], [0.05, 0.45]],
    "skewed": [[0.85, 0.03], [0.04, 0.08]],
    "four options": (np.eye(4) * 0.95 / 4 + (1 - np.eye(4)) * 0.05 / 12).tolist(),
    "nearly all": [[0.495, 0.005], [0.005, 0.495]],
    "low": [[0.3, 0.2], [0.2, 0.3]],
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("n", [30, 100])
def test_the_interval_holds_the_true_kappa(name, n):
    table = np.array(TABLES[name])
    chance = (table.sum(0) * table.sum(1)).sum()
    true = (np.trace(table) - chance) / (1 - chance)
    dice = np.random.default_rng(1)
    draws = dice.multinomial(n, table.ravel(), size=400).reshape(-1, *table.shape)
    found = [one for one in (kappa(pairs(draw)) for draw in draws) if one is not None]
    held = np.mean([one["low"] - 1e-9 <= true <= one["high"] + 1e-9 for one in found])
    assert held > 0.895, "95%, give or take what 400 draws allow"


def test_agreement_tells_all():
    found = agreement([("A", "A"), ("A", "none"), ("B", "B"), ("B", "B")])
    low, high = wilson(3, 4)
    assert {key: found[key] for key in ("value", "low", "high", "n")} == {
        "value": 0.75,
        "low": low,
        "high": high,
        "n": 4,
    }
    assert found["confusion"] == {"A": {"A": 1, "none": 1}, "B": {"B": 2}}
    assert found["kappa"]["low"] < found["kappa"]["value"] < found["kappa"]["high"]
    assert agreement([]) is None and share(0, 0) is None and confusion([]) == {}
    json.dumps(found, allow_nan=False)


def test_labels_are_written_in_one_way():
    assert [label(value) for value in (None, True, False, 3, 3.0, 0.5, "A")] == [
        "none",
        "1",
        "0",
        "3",
        "3",
        "0.5",
        "A",
    ]


def test_a_summary_loses_nothing():
    def verdict(said, **more):
        return Verdict(score=None if said is None else 1.0, reason="", raw="", said=said, **more)

    items = [
        {"id": "1", "prompt": "mcq", "rule": "A"},
        {"id": "2", "prompt": "mcq", "rule": None},
        {"id": "3", "prompt": "mcq", "rule": "B"},
        {"id": "4", "prompt": "mcq"},
        {"id": "5", "prompt": "mcq", "rule": "none"},
        {"id": "6", "prompt": "correct", "rule": 1.0},
    ]
    verdicts = [
        verdict("A", again="B"),
        verdict("A", again="A", shortened=True),
        Verdict(score=None, reason="out of range: select is 'Q'", raw="{}"),
        verdict("C"),
        Verdict(score=0.0, reason="the answer is empty", raw="", blank=True),
        verdict("1"),
    ]
    found = summary(items, verdicts)
    mcq = found["mcq"]
    assert (mcq["n"], mcq["blank"], mcq["shortened"]) == (5, 1, 1)
    assert (mcq["unusable"]["value"], mcq["unusable"]["n"]) == (0.2, 5)
    assert mcq["unusable"]["reasons"] == {"out of range": 1}
    assert 0 < mcq["unusable"]["low"] < 0.2 < mcq["unusable"]["high"]
    assert (mcq["rule"]["value"], mcq["rule"]["n"], mcq["rule"]["unusable"]) == (0.5, 2, 1)
    assert mcq["rule"]["confusion"] == {"A": {"A": 1}, "none": {"A": 1}}
    assert (mcq["order"]["value"], mcq["order"]["n"]) == (0.5, 2)
    assert found["correct"]["rule"]["value"] == 1 and found["correct"]["rule"]["kappa"] is None
    assert found["correct"]["order"] is None
    assert not any(math.isnan(value) for value in (mcq["rule"]["low"], mcq["rule"]["high"]))
    assert summary([], []) == {}
