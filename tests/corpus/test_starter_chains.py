"""Calculations of several steps are right, end in their answer, and keep out what is held out or asked elsewhere."""

import re

import pytest

from galenic.align.data.tasks import task_of
from galenic.corpus.starter.chains import (
    KINDS,
    MARKER,
    Chain,
    chain_conversations,
    chain_pairs,
    chain_questions,
    chain_tasks,
)
from galenic.corpus.starter.holdout import check_no_leak
from galenic.corpus.starter.reasoning import arithmetic_questions
from galenic.corpus.starter.worked import asked

STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def steps(text):
    """The equations of a working as numbers, each line one."""
    working, _ = text.split(MARKER)
    found = [STEP.fullmatch(line) for line in working.split("\n")]
    assert all(found), text
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in found]


def test_every_step_follows_and_the_answer_is_the_last_result():
    rows = chain_conversations(300, 1, "train")
    assert len(rows) == 300
    for row in rows:
        prompt, text = (message["content"] for message in row["messages"])
        found = steps(text)
        for a, sign, b, result in found:
            assert result == (a + b if sign == "+" else a - b) >= 1
        assert [first for first, *_ in found[1:]] == [result for *_, result in found[:-1]]
        numbers = [int(number) for number in re.findall(r"\d+", prompt)]
        assert numbers == [found[0][0], *(b for _, _, b, _ in found)]
        answer, unit = text.split(MARKER)[1].split(" ")
        assert int(answer) == found[-1][3] and unit in {kind.unit for kind in KINDS}


def test_a_worked_example():
    chain = Chain("stock", (9, -2, 5), "?", "tablets")
    assert chain.worked() == "9 - 2 = 7\n7 + 5 = 12\nAnswer: 12 tablets"
    assert chain.worked((0, 1)) == "9 - 2 = 8\n8 + 5 = 13\nAnswer: 13 tablets"
    assert chain.worked((1, -10)) == "9 - 2 = 7\n7 + 5 = 2\nAnswer: 2 tablets"


def test_training_and_held_out_terms_are_apart_in_any_order():
    def terms(row):
        first, *rest = map(int, row["id"].split("/")[2].split(","))
        return row["id"].split("/")[1], *(sorted((first, *rest)) if min(rest) > 0 else (first, *sorted(rest)))

    train = {terms(row) for row in chain_tasks(1500, 1, "train")}
    heldout = {terms(row) for row in chain_tasks(200, 1, "heldout")}
    assert len(heldout) > 50 and not train & heldout
    asked = {terms(row) for row in chain_questions(200, 1)}
    assert len(asked) > 50 and not asked & (train | heldout)
    for numbers in ((2, 3, 4), (5, 9, 12), (7, 7, 8)):
        one, other = (Chain("total", some, "", "mg") for some in (numbers, numbers[::-1]))
        assert one.side == other.side
    prompts = {row["prompt"] for row in chain_tasks(200, 1, "heldout")}
    learnt = {row["messages"][0]["content"] for row in chain_conversations(300, 1, "train")}
    compared = {row["prompt"] for row in chain_pairs(300, 1, "train")}
    assert not prompts & (learnt | compared)


def test_no_step_is_one_that_questions_ask_for():
    rows = chain_conversations(300, 1, "train") + chain_conversations(100, 1, "heldout")
    texts = [row["messages"][1]["content"] for row in rows]
    for a, sign, b, _ in (step for text in texts for step in steps(text)):
        assert not (asked("add", *sorted((a, b))) if sign == "+" else asked("subtract", a, b))
    check_no_leak(arithmetic_questions(1600, 1), [], [(str(i), text) for i, text in enumerate(texts)])


def test_tasks_are_read_as_tasks_with_the_answer_of_the_steps():
    for row in chain_tasks(100, 1, "train"):
        task = task_of(row, "x")
        assert task.rule == "numeric" and task.tolerance == 0 and task.domain == "chains"
        assert task.id == row["id"] and task.answer == row["answer"]
        total = sum(map(int, row["id"].split("/")[2].split(",")))
        assert row["answer"].split(" ")[0] == str(total)
    ids = [row["id"] for row in chain_tasks(1500, 1, "train")]
    assert len(set(ids)) == len(ids)


def test_a_slip_is_one_wrong_step_that_the_others_follow():
    rows = chain_pairs(300, 1, "train")
    assert len(rows) == 300 and rows == chain_pairs(300, 1, "train") != chain_pairs(300, 2, "train")
    places = set()
    for row in rows:
        right, wrong = steps(row["chosen"]), steps(row["rejected"])
        errors = [i for i, (a, s, b, c) in enumerate(wrong) if c != (a + b if s == "+" else a - b)]
        assert len(errors) == 1 and len(right) == len(wrong)
        assert wrong[: errors[0]] == right[: errors[0]] and all(c >= 1 for *_, c in wrong)
        assert [first for first, *_ in wrong[1:]] == [result for *_, result in wrong[:-1]]
        assert row["chosen"].split(MARKER)[1] != row["rejected"].split(MARKER)[1]
        assert row["rejected"].split(MARKER)[1].split(" ")[0] == str(wrong[-1][3])
        places.add(errors[0])
    assert places == {0, 1, 2}


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_prompts_differ(side):
    rows = chain_tasks(200, 3, side)
    assert len({row["prompt"] for row in rows}) == len(rows) == 200


def test_questions_have_one_right_result_at_every_place():
    rows = chain_questions(400, 1)
    assert len(rows) == 400 and {row["answer"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        values = [int(option.split(" ")[0]) for option in row["options"]]
        assert values[row["answer"]] == sum(map(int, row["id"].split("/")[2].split(",")))
        assert len(set(values)) == 4
    ranks = []  # by size; small results have few below them
    for row in rows:
        values = [int(option.split(" ")[0]) for option in row["options"]]
        ranks.append(sorted(values).index(values[row["answer"]]))
    assert all(40 < ranks.count(rank) < 180 for rank in range(4))
