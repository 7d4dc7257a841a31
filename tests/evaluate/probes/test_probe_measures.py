"""Calibration, positions, contamination: on rows and models whose numbers are known."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from evaluate_helpers import question, write_rows
from hypothesis import given
from hypothesis import strategies as st
from probe_helpers import Reciter, subject_of

from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.probes import calibration, contamination, positions
from galenic.evaluate.probes.config import CalibrationConfig, PositionsConfig
from galenic.evaluate.statistics import calibration_error, wilson
from galenic.runtime import UserError

# ---------------------------------------------------------------------------- calibration


def test_calibration_of_rows():
    def row(number, shares, answer):
        scores = [math.log(share) - 7 for share in shares]
        return {"kind": "recall", "id": str(number), "answer": answer, "total": scores, "pmi": scores[::-1]}

    rows = [row(i, [0.7, 0.1, 0.1, 0.1], 0 if i < 5 else 1) for i in range(10)]
    rows += [row(10 + i, [0.2, 0.5, 0.2, 0.1], 1) for i in range(10)]
    found = calibration.measure(CalibrationConfig(), rows, ["total", "pmi"], 0)["recall"]["total"]
    assert found["error"]["value"] == pytest.approx((10 * 0.2 + 10 * 0.5) / 20)
    assert found["error"]["n"] == found["n"] == 20
    assert found["confidence"]["value"] == pytest.approx(0.6) and found["accuracy"]["value"] == 0.75
    expected = calibration_error([0.7] * 10 + [0.5] * 10, [1] * 5 + [0] * 5 + [1] * 10)
    assert found["error"]["low"] == pytest.approx(expected.error.low)
    assert found["error"]["high"] == pytest.approx(expected.error.high)
    assert [(b["confidence"], b["accuracy"], b["n"]) for b in found["error"]["bins"]] == [
        (pytest.approx(0.5), 1.0, 10),
        (pytest.approx(0.7), 0.5, 10),
    ]
    other = calibration.measure(CalibrationConfig(), rows, ["pmi"], 0)["recall"]["pmi"]
    assert other["accuracy"]["value"] == 0.0
    assert (
        calibration.measure(CalibrationConfig(), [{"kind": "x", "id": "1", "right": 1.0}], ["total"], 0) == {}
    )


@given(st.lists(st.floats(-800, 0), min_size=2, max_size=6))
def test_shares_add_up(scores):
    shares = calibration.probabilities(scores)
    assert shares.sum() == pytest.approx(1) and (shares >= 0).all()
    assert (
        int(np.argmax(shares)) == int(np.argmax(scores))
        or len(set(scores)) < len(scores)
        or max(shares) > 0.1
    )


# ---------------------------------------------------------------------------- positions

QUESTIONS = {"recall": [question(number) for number in range(8)]}
CONFIG = PositionsConfig(questions=6)


@given(options=st.integers(2, 6), turn=st.integers(0, 5))
def test_orders_are_cyclic(options, turn):
    asked = {"question": "q", "options": [f"option {i}" for i in range(options)], "answer": 0}
    text, order = positions.put(asked, turn % options)
    assert sorted(order) == list(range(options)) and order[turn % options] == 0
    lines = text.split("\n")
    assert lines[0] == "q"
    assert lines[1:] == [f"{'ABCDEF'[place]}. option {option}" for place, option in enumerate(order)]
    places = {positions.put(asked, t)[1].index(1 % options) for t in range(options)}
    assert places == set(range(options))  # each option stands behind each letter once


def letters(tokenizer, choose, prompt, questions=QUESTIONS):
    """A model that answers each order with the letter `choose(question, order)`; nothing leaves it unsure."""
    model = Reciter(tokenizer)
    for asked in questions["recall"]:
        for turn in range(len(asked["options"])):
            text, order = positions.put(asked, turn)
            letter = choose(asked, order)
            if letter is not None:
                model.learn(prompt, text, letter)
    return model


@pytest.mark.parametrize("prompt", [PromptFormat(), PromptFormat(name="chat")])
def test_a_model_that_always_picks_a(tokenizer, prompt):
    model = letters(tokenizer, lambda *_: "A", prompt)
    numbers, rows = positions.measure(CONFIG, subject_of(model, prompt), QUESTIONS, 0)
    found = numbers["recall"]
    assert [found["letters"][letter]["value"] for letter in "ABCD"] == [1, 0, 0, 0]
    assert found["bias"] == {"value": 0.75, "low": 0.75, "high": 0.75, "n": 6}
    assert found["consistency"]["value"] == 0.0
    assert found["accuracy"]["value"] == found["accuracy"]["chance"] == 0.25
    assert [found["accuracy_at"][letter]["value"] for letter in "ABCD"] == [1, 0, 0, 0]
    assert found["spread"]["value"] == 1.0
    assert found["truncated"] == found["left_out"] == 0
    assert len(rows) == 6 and all(row["right"] == 0.25 and row["letters"] == [0] * 4 for row in rows)


@pytest.mark.parametrize("prompt", [PromptFormat(), PromptFormat(name="chat")])
def test_a_model_that_knows_and_one_that_is_consistently_wrong(tokenizer, prompt):
    for shift in (0, 1):
        model = letters(
            tokenizer,
            lambda asked, order, shift=shift: "ABCD"[order.index((asked["answer"] + shift) % 4)],
            prompt,
        )
        numbers, rows = positions.measure(CONFIG, subject_of(model, prompt), QUESTIONS, 0)
        found = numbers["recall"]
        assert all(found["letters"][letter]["value"] == 0.25 for letter in "ABCD")
        assert found["bias"]["value"] == found["spread"]["value"] == 0.0
        assert found["consistency"]["value"] == 1.0
        assert (found["consistency"]["low"], found["consistency"]["high"]) == wilson(6, 6)
        assert found["accuracy"]["value"] == 1 - shift
        assert {row["right"] for row in rows} == {1.0 - shift}


def test_half_a_bias(tokenizer):
    """Knows half the questions and says B to the others."""
    known = {asked["id"] for asked in QUESTIONS["recall"][:4]}
    model = letters(
        tokenizer,
        lambda asked, order: "ABCD"[order.index(asked["answer"])] if asked["id"] in known else "B",
        PromptFormat(),
    )
    numbers, _ = positions.measure(PositionsConfig(questions=8), subject_of(model), QUESTIONS, 0)
    found = numbers["recall"]
    assert found["letters"]["B"]["value"] == pytest.approx(0.625)
    assert found["bias"]["value"] == pytest.approx(0.375)
    assert 0 <= found["bias"]["low"] < 0.375 < found["bias"]["high"] <= 0.75
    assert found["consistency"]["value"] == 0.5 and found["spread"]["value"] == 0.5
    assert found["accuracy"]["value"] == 0.625


def test_questions_of_other_lengths_are_left_out(tokenizer):
    odd = {**question(9), "options": ["a", "b", "c"], "answer": 2}
    questions = {"recall": [*QUESTIONS["recall"], odd]}
    model = letters(tokenizer, lambda *_: "A", PromptFormat(), questions)
    numbers, rows = positions.measure(PositionsConfig(), subject_of(model), questions, 0)
    assert numbers["recall"]["left_out"] == 1 and len(rows) == 8


# ---------------------------------------------------------------------------- contamination


def words(seed, count):
    return " ".join(f"w{seed}x{number}" for number in range(count))


@pytest.fixture
def files(tmp_path):
    asked = [{**question(number), "question": words(number, 20)} for number in range(6)]
    asked.append({**question(6), "question": "Why?"})
    write_rows(tmp_path / "questions/recall.jsonl", asked)
    write_rows(tmp_path / "questions/code.jsonl", [{**question(0, "code"), "question": words(77, 16)}])
    rows = [
        {"id": "a", "text": f"Something else. {words(2, 20)} and more.", "split": "train"},
        {"id": "b", "text": f"Held out: {words(3, 20)}.", "split": "heldout"},
        {"id": "c", "text": f"Only half of it: {words(4, 8)}.", "split": "train"},
    ]
    (tmp_path / "corpus").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus/documents.parquet")
    return sorted((tmp_path / "questions").glob("*.jsonl"))


def test_questions_in_training_documents_are_found(files, tmp_path):
    told = contamination.search(files, str(tmp_path / "corpus"))
    assert told == {
        "code": {"found": [], "unsearched": []},
        "recall": {"found": ["recall-2"], "unsearched": ["recall-6"]},
    }
    rows = [
        {"kind": "recall", "id": f"recall-{number}", "right": float(number == 2)} for number in (1, 2, 3, 6)
    ]
    numbers = contamination.measure(told, [*rows, {"kind": "probe-needle", "id": "x", "right": 1.0}])
    assert (numbers["recall"]["value"], numbers["recall"]["n"]) == (0.25, 4)
    assert (numbers["recall"]["low"], numbers["recall"]["high"]) == wilson(1, 4)
    assert numbers["recall"]["unsearched"] == 1
    assert (numbers["recall"]["clean"]["value"], numbers["recall"]["clean"]["n"]) == (0.0, 3)
    assert (numbers["recall"]["found"]["value"], numbers["recall"]["found"]["n"]) == (1.0, 1)
    assert numbers["code"] == {
        **dict.fromkeys(("value", "low", "high")), "n": 0, "unsearched": 0,
        "clean": {"value": None, "low": None, "high": None, "n": 0},
        "found": {"value": None, "low": None, "high": None, "n": 0},
    }  # fmt: skip


def test_the_search_is_made_once(files, tmp_path, monkeypatch):
    place = tmp_path / "contamination.json"
    first = contamination.remembered(place, files, str(tmp_path / "corpus"))
    monkeypatch.setattr(contamination, "search", lambda *_: pytest.fail("searched again"))
    assert contamination.remembered(place, files, "elsewhere") == first


def test_a_corpus_that_cannot_be_searched(files, tmp_path):
    with pytest.raises(UserError, match="is no corpus step's folder"):
        contamination.search(files, str(tmp_path))
    rows = [{"id": "b", "text": "Held out.", "split": "heldout"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus/documents.parquet")
    with pytest.raises(UserError, match="holds no training documents"):
        contamination.search(files, str(tmp_path / "corpus"))
