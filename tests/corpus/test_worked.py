"""Synthetic reasoning is right, uses no operands of questions, and tells of no entity that is held out."""

import random
import re

import pytest

from galenic.corpus.records import Entity
from galenic.corpus.starter.holdout import Mentions, check_no_leak, stable_key
from galenic.corpus.starter.reasoning import arithmetic_questions
from galenic.corpus.starter.selection import document_id, heldout_groups
from galenic.corpus.starter.worked import (
    SCENARIOS,
    asked,
    calculations,
    eliminations,
    reasoning_documents,
    surely_trained,
)

NUMBER = r"(\d+(?:\.\d+)?)"


def problems(text):
    return [block.split("\n") for block in text.split("\n\n")]


def equations(line):
    """Returns (left, sign, right, result) of every equation in a line, units taken out."""
    plain = re.sub(r"(?<=\d) ?(mg/kg|mg/mL|drops/mL|drops an hour|mL|mg|kg)", "", line)
    found = re.findall(rf"{NUMBER} ([-+*/]) {NUMBER} = {NUMBER}", plain)
    return [(float(a), sign, float(b), float(c)) for a, sign, b, c in found]


def test_every_equation_is_right():
    count = 0
    for document in calculations(200, 1):
        for lines in problems(document.text):
            assert len(lines) >= 4 and lines[-1].startswith("Answer: ")
            for a, sign, b, c in (e for line in lines[1:-1] for e in equations(line)):
                assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == pytest.approx(c), lines
                count += 1
    assert count > 1800


def test_the_answer_is_that_of_the_last_step():
    for document in calculations(200, 2):
        for lines in problems(document.text):
            answer, steps = lines[-1], " ".join(lines[1:-1])
            given = re.findall(NUMBER, answer)
            assert all(re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", steps) for number in given), lines
            if "wrong" in answer or "it is right" in answer:
                claimed = re.search(r"Given was (\d+)", steps)[1]
                result = re.search(r"Together: .* = (\d+)\.", steps)[1]
                assert ("wrong" in answer) == (claimed != result)
            elif "more in than out" in answer or "more out than in" in answer:
                gained, lost = (int(re.search(rf"{way}: .*? = (\d+) mL", steps)[1]) for way in ("In", "Out"))
                assert ("in than out" in answer) == (gained > lost) and int(given[0]) == abs(gained - lost)
            elif re.match(r"Answer: [AB], by", answer):
                a, b = (int(re.search(rf"{name}: .*? = (\d+) mg", steps)[1]) for name in "AB")
                assert answer == f"Answer: {'A' if a > b else 'B'}, by {abs(a - b)} mg."


def test_no_step_uses_operands_of_a_question():
    products, sums = set(), set()
    for document in calculations(300, 1):
        for a, sign, b, _ in equations(document.text):
            if a == int(a) and b == int(b):
                pair = tuple(sorted((int(a), int(b))))
                products |= {pair} if sign == "*" else set()
                sums |= {pair} if sign == "+" else set()
                assert not (sign == "-" and asked("subtract", int(a), int(b)))
    assert len(products) > 200 and len(sums) > 200
    assert not [pair for pair in products if asked("multiply", *pair)]
    assert not [
        pair for pair in products for p in (pair, pair[::-1]) if asked("daily dose", *p) or asked("dose", *p)
    ]
    assert not [pair for pair in sums if asked("add", *pair)]
    texts = [(document.id, document.text) for document in calculations(300, 1)]
    check_no_leak(arithmetic_questions(1600, 1), [], texts)


def test_scenarios_take_turns_and_seeds_differ():
    assert calculations(9, 1) == calculations(9, 1) != calculations(9, 2)
    texts = [document.text for document in calculations(150, 1)]
    assert len(set(texts)) == 150 and len({document.id for document in calculations(150, 1)}) == 150
    for scenario in SCENARIOS:
        draw = random.Random(0)
        assert sum(scenario(draw) is not None for _ in range(200)) > 5


def entities(count=240):
    things = ("heart", "lung", "kidney", "liver", "brain", "skin", "hand", "foot")
    syllables = ("ka", "mo", "ri", "te", "lu", "so", "ven", "dor")
    return [
        Entity(
            id=f"HP:{i:07d}",
            source="hpo",
            name=f"{syllables[i // 64]}{syllables[i // 8 % 8]}{syllables[i % 8]}oplasia",
            kind="phenotypic abnormality",
            department="cardiology",
            definition=f"An unusual shape number {i} of the {things[i % 8]} seen on imaging in group {i // 12}.",
            parents=(f"HP:9{i // 12:06d}",),
        )
        for i in range(count)
    ]


def test_choices_end_with_what_was_described():
    documents = eliminations(entities(), count=50, seed=1)
    assert len(documents) == 50
    by_name = {entity.name: entity for entity in entities()}
    for document in documents:
        letter, name = re.search(r"\nAnswer: ([A-D])\. (.+)$", document.text).groups()
        assert document.id == f"reasoning/choice/{by_name[name].id}"
        assert by_name[name].definition in document.text.split("\n\n")[0] + document.text.split("\n\n")[1]
        assert f"{letter}. {name} fits: {by_name[name].definition}" in document.text
        assert document.text.count("does not fit") + document.text.count("another entry") == 3


@pytest.mark.parametrize("share", [0.04, 0.2, 0.5])
def test_no_choice_tells_of_a_document_held_out_for_losses(share):
    import numpy as np

    every = entities()
    groups = np.array([stable_key(7, "heldout", document_id(e)) for e in every], dtype=np.uint64)
    held = {e.id for e, out in zip(every, heldout_groups(groups, share), strict=True) if out}
    assert len(held) >= share * len(every)
    kept = surely_trained(every, share, 7)
    assert not held & {entity.id for entity in kept} and len(kept) >= 0.2 * len(every)
    mentions = Mentions({e.id: [e.name, e.definition] for e in every if e.id in held})
    documents = reasoning_documents(every, count=60, heldout_share=share, seed=7)
    assert len(documents) > 50
    assert not [document.id for document in documents if mentions.first(document.text)]


def test_other_sources_and_too_few_entities_leave_calculations():
    documents = reasoning_documents(entities(3), count=20, heldout_share=0.04, seed=1)
    assert len(documents) == 10 and all("/calculation/" in document.id for document in documents)
    assert all(document.source == "reasoning" for document in documents)
