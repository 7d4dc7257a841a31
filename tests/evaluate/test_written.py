"""Answers that models write: how they are scored, by hand; and that what is scored is what the model writes."""

import json

import pytest
import torch
from evaluate_helpers import question, write_rows

from galenic.corpus.tokens.chat_format import encode_conversation, encode_text
from galenic.evaluate import evaluate
from galenic.evaluate.config import EvaluateConfig
from galenic.evaluate.inputs import read_questions
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.statistics import wilson
from galenic.evaluate.written import Grade, Writer, Written, answered, grade, posed
from galenic.model.foreign import load_any
from galenic.runtime import UserError

SUM = {
    "id": "s",
    "question": "Add up: 8 + 5 + 9 mg.",
    "options": ["21 mg", "22 mg", "1 g", "22 mL"],
    "answer": 1,
}
DRUG = {
    "id": "d",
    "question": "Which one lowers fever?",
    "options": ["insulin", "aspirin", "iron", "zinc"],
    "answer": 1,
}
NOTHING = Grade(pick=None, right=False, answered=False)


def graded(row, text, rule, ended=True):
    return grade(row, Written(text=text, ended=ended, truncated=False), rule)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 + 5 = 13\n13 + 9 = 22\nAnswer: 22 mg", Grade(pick=1, right=True, answered=True)),
        ("22", Grade(pick=1, right=True, answered=True)),  # without a unit: the true one's
        ("0.022 g", Grade(pick=1, right=True, answered=True)),
        ("8 + 5 + 9 = 22 mg", Grade(pick=1, right=True, answered=True)),
        ("Answer: 21 mg", Grade(pick=0, right=False, answered=True)),
        ("Answer: 1000 mg", Grade(pick=2, right=False, answered=True)),
        ("Answer: 22 mL", Grade(pick=3, right=False, answered=True)),
        ("Answer: 22.1 mg", Grade(pick=None, right=False, answered=True)),  # near, but no near miss is right
        ("Answer: 22 mg\nAnswer: 5 mg", Grade(pick=None, right=False, answered=True)),  # the last one counts
        ("Answer: 21 or 22 mg", NOTHING),
        ("8 + 5 = 13\nAnswer:", NOTHING),
        ("I do not know", NOTHING),
        ("", NOTHING),
    ],
)
def test_numbers(text, expected):
    assert graded(SUM, text, "numeric") == expected
    assert graded(SUM, text, "numeric", ended=False) == NOTHING, "what does not end is no answer"


def test_a_question_may_allow_an_error():
    assert graded(SUM | {"tolerance": 0.01}, "22.1 mg", "numeric").right
    assert not graded(SUM | {"tolerance": 0.001}, "22.1 mg", "numeric").right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aspirin", Grade(pick=1, right=True, answered=True)),
        ("It cools.\nAnswer: B", Grade(pick=1, right=True, answered=True)),
        ("Answer: (c) iron", Grade(pick=2, right=False, answered=True)),
        ("Answer: aspirin or iron", NOTHING),
        ("Answer: paracetamol", NOTHING),
        ("Answer: E", NOTHING),
    ],
)
def test_options(text, expected):
    assert graded(DRUG, text, "option") == expected
    assert graded(DRUG, text, "option", ended=False) == NOTHING


def test_options_are_shown_where_one_has_to_be_named():
    assert posed(DRUG, "option") == ("Which one lowers fever?\nChoose one: insulin; aspirin; iron; zinc.")
    assert posed(SUM, "numeric") == SUM["question"]


def test_accuracy_and_what_is_unanswered_by_hand():
    says = ["Answer: 22 mg", "22", "21 mg", "none", "22 mg"]
    asked = []

    def writer(questions, advance):
        asked.extend(questions)
        return [Written(text=text, ended=i < 4, truncated=i == 0) for i, text in enumerate(says)]

    rows, accuracy = answered(writer, "sums", [SUM | {"id": str(i)} for i in range(5)], "numeric")
    assert asked == [SUM["question"]] * 5
    low, high = wilson(2, 5)
    assert accuracy == {
        "value": 0.4, "low": low, "high": high, "n": 5, "chance": None, "unanswered": 2, "truncated": 1,
    }  # fmt: skip
    assert [row["right"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [row["pick"] for row in rows] == [1, 1, 0, None, None]
    assert rows[4] == {
        "kind": "sums", "id": "4", "answer": 1, "pick": None, "right": 0.0, "answered": False, "ended": False,
        "said": "22 mg",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_a_writer_writes_what_generate_does_in_batches_of_any_size(llama, tokenizer, name, monkeypatch):
    questions = [f"What is sign {i}{' of fever' * (i % 3)}?" for i in range(5)]
    llama.generation_config.eos_token_id = 2
    given = {"model": llama, "tokenizer": tokenizer, "prompt": PromptFormat(name=name), "context": 64}
    found = Writer(**given, tokens=8)(questions)
    for question_text, written in zip(questions, found, strict=True):
        if name == "chat":
            ids = encode_conversation(tokenizer, [{"role": "user", "content": question_text}])[0]
        else:
            ids = [1, *encode_text(tokenizer, f"Question: {question_text}\nAnswer:")]
        prompt = torch.tensor([ids[:1] + ids[len(ids) - 55 :] if len(ids) > 56 else ids])
        new = llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=2,
            pad_token_id=3,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        assert written.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (written.ended, written.truncated) == (2 in new, len(ids) > 56)
    monkeypatch.setattr("galenic.evaluate.written.BATCH", 2)
    counts = []
    assert Writer(**given, tokens=8)(questions, counts.append) == found and counts == [2, 2, 1]
    with pytest.raises(UserError, match="written_tokens: 63 leave no room for a question"):
        Writer(**given, tokens=63)(questions)


def test_a_written_kind_stands_beside_the_others(llama_folder, tmp_path):
    write_rows(tmp_path / "q/recall.jsonl", [question(i) for i in range(3)])
    sums = [SUM | {"id": f"s{i}", "question": f"{i} + 5 mg?", "options": [f"{i + k} mg" for k in (4, 5, 6, 7)]}
            for i in range(4)]  # fmt: skip
    write_rows(tmp_path / "q/sums.jsonl", sums)
    values = {
        "models": {"base": str(llama_folder)},
        "questions": str(tmp_path / "q"),
        "shown": 4,
        "written_tokens": 6,
    }
    values |= {"out": str(tmp_path / "out"), "prompt": "chat", "experts": {"recall": "base"}}
    config = EvaluateConfig(**values, answer={"sums": "numeric"})
    facts = evaluate.plan(config).facts
    assert facts["options scored"] == "12" and facts["answers written"].startswith(
        "6 of at most 6"
    )  # 4 and 2 shown
    evaluate.run(config)
    results = json.loads((tmp_path / "out/results.json").read_text())
    accuracy = results["models"]["base"]["accuracy"]
    assert "scorings" in accuracy["recall"] and "unanswered" not in accuracy["recall"]
    assert (accuracy["sums"]["n"], accuracy["sums"]["chance"]) == (4, None)
    rows = [json.loads(line) for line in (tmp_path / "out/items/base.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["recall"] * 3 + ["sums"] * 4
    for row in rows[:3]:
        assert row["right"] == float(row["picks"]["per_byte"] == row["answer"])
    writer = Writer(
        model=load_any(llama_folder), tokenizer=evaluate.load_tokenizer(str(llama_folder)),
        prompt=PromptFormat(name="chat"), context=256, tokens=6,
    )  # fmt: skip
    texts = writer([row["question"] for row in sums])
    assert [row["said"] for row in rows[3:]] == [text.text for text in texts]
    assert accuracy["sums"]["unanswered"] == sum(not row["answered"] for row in rows[3:])
    assert list(results["shared_words"]) == ["recall"]
    shown = {row["question"]: row for row in results["shown"]}
    assert set(shown) & {row["question"] for row in sums}
    for row, item in zip(sums, rows[3:], strict=True):
        if row["question"] in shown:
            assert shown[row["question"]]["picks"] == {"base": item["pick"]}
            assert shown[row["question"]]["said"] == {"base": item["said"]}
    assert "no options are shown" in results["protocol"]["accuracy of sums"]
    assert "at most 6" in results["protocol"]["accuracy of sums"]


def test_what_cannot_be_written_is_refused(tmp_path):
    values = {"out": "o", "models": {"a": "m"}, "tokens": "t", "questions": str(tmp_path / "q")}
    with pytest.raises(UserError, match=r"answer.sums is numeric, which is written: say in written_tokens"):
        EvaluateConfig(**values, answer={"sums": "numeric"})
    EvaluateConfig(**values, answer={"sums": "likelihood"})
    with pytest.raises(UserError, match="answer needs questions"):
        EvaluateConfig(**values | {"questions": None}, answer={"sums": "likelihood"})
    write_rows(tmp_path / "q/sums.jsonl", [SUM, DRUG])
    config = EvaluateConfig(**values, answer={"sum": "numeric"}, written_tokens=4)
    with pytest.raises(UserError, match=r"answer: no questions of kind 'sum'.*did you mean 'sums'"):
        evaluate.plan(config)
    config = EvaluateConfig(**values, answer={"sums": "numeric"}, written_tokens=4)
    with pytest.raises(UserError, match=r"sums.jsonl:2: the right option 'aspirin' holds no number"):
        evaluate.plan(config)
    write_rows(tmp_path / "q/sums.jsonl", [SUM | {"tolerance": "1%"}])
    with pytest.raises(UserError, match=r"sums.jsonl:1: 'tolerance' must be a number from 0 to 1, got '1%'"):
        read_questions(tmp_path / "q/sums.jsonl", rule="numeric")
    assert len(read_questions(tmp_path / "q/sums.jsonl", rule="option")) == 1
