from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.align.conversations import CATEGORIES
from galenic.corpus.records import Entity
from galenic.corpus.starter.conversations import (
    ANSWER_WORDS,
    TABLE_WORDINGS,
    Dialogue,
    Disease,
    conversation_text,
    dialogue_conversations,
    medical_conversations,
    split_rows,
)
from galenic.corpus.starter.holdout import Mentions, Pair

NOTHING = Mentions({})
ASTHMA = Disease(
    id="DISEASE:001",
    name="Asthma",
    name_zh="哮喘",
    code="J45",
    symptoms=("Wheezing", "Cough"),
    symptoms_zh=("喘息", "咳嗽"),
    drugs=("Salbutamol",),
    drugs_zh=("沙丁胺醇",),
    department="pulmonology",
    department_zh="呼吸内科",
)


def entity(id, name, *, source="hpo", **rest):
    return Entity(id=id, source=source, name=name, kind="finding", department="neurology", **rest)


def tree():
    heading = entity("P", "Disorder of gait")
    leaves = [
        entity(
            f"L{i}",
            f"{word} gait",
            parents=("P",),
            definition=f"A way of walking that reminds of {word.lower()} things in motion.",
            synonyms=(f"Walking by {word[::-1].lower()}",),
            related=(("lay term", f"Walks like {word.lower()}"),),
        )
        for i, word in enumerate(("Waddling", "Steppage", "Scissor", "Ataxic", "Shuffling", "Spastic"))
    ]
    return [heading, *leaves]


def check_shape(rows):
    for row in rows:
        assert list(row) == ["messages", "source", "department", "category"]
        assert row["category"] in CATEGORIES
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(message["content"].strip() for message in row["messages"])


def first(rows):
    return {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}


def test_disease_tables_are_asked_in_both_languages():
    rows = medical_conversations([], [ASTHMA], forbidden=NOTHING, count=100, seed=1)
    check_shape(rows)
    answers = first(rows)
    assert len(rows) == sum(map(len, TABLE_WORDINGS.values()))
    assert answers["What are common symptoms of Asthma?"] == "Wheezing, Cough"
    assert answers["哮喘有哪些常见症状？"] == "喘息、咳嗽"
    assert answers["哮喘应该挂哪个科？"] == "呼吸内科"
    assert answers["Which clinic treats Asthma?"] == "Pulmonology"
    assert answers["哮喘的ICD-10编码是什么？"] == "J45"
    # The other language's name is a translation pair, which may be held out.
    assert not any("哮喘" in text and "Asthma" in text for text in map(conversation_text, rows))


def test_terms_and_codes_are_understanding_and_the_rest_is_knowledge():
    rows = medical_conversations(tree(), [ASTHMA], forbidden=NOTHING, count=500, seed=1)
    found = {row["messages"][0]["content"]: row["category"] for row in rows}
    assert found["ICD-10 code of Asthma?"] == found["哮喘的ICD-10编码是什么？"] == "understanding"
    assert found["What are common symptoms of Asthma?"] == "knowledge"
    defined = {
        row["category"] for row in rows if row["messages"][1]["content"].startswith("A way of walking")
    }
    assert defined == {"knowledge"}
    lay = {row["category"] for row in rows if row["messages"][1]["content"].startswith("Walks like")}
    assert lay == {"understanding"}
    pair = Pair(id="1", source="hsk", zh="你好", en="hello")
    talk = dialogue_conversations([pair], [], forbidden=NOTHING, count=9, seed=1)
    assert talk and {row["category"] for row in talk} == {"general"}


def test_medical_answers_are_the_entitys_own():
    entities = tree()
    rows = medical_conversations(entities, [], forbidden=NOTHING, count=500, seed=1)
    check_shape(rows)
    assert any(len(row["messages"]) == 4 for row in rows)
    assert any("\nChoose one: " in row["messages"][0]["content"] for row in rows)
    for row in rows:
        assert row["source"] == "hpo"
        assert row["department"] == "neurology"
        user, answer = (message["content"] for message in row["messages"][:2])
        assert len(answer.split()) <= ANSWER_WORDS
        prompt, _, options = user.partition("\nChoose one: ")
        if options:
            assert answer in options.removesuffix(".").split("; ")
        owners = [e for e in entities if any(t in prompt for t in (e.name, e.definition, *e.synonyms) if t)]
        truths = {"Disorder of gait", "Neurology"}
        truths.update(
            t for e in owners for t in (e.name, e.definition, *e.synonyms, *(x for _, x in e.related))
        )
        assert answer in truths


def test_forbidden_mentions_never_get_in():
    forbidden = Mentions({"x": ["ataxic gait"], "y": ["哮喘"]})
    rows = medical_conversations(tree(), [ASTHMA], forbidden=forbidden, count=500, seed=1)
    assert rows
    assert all(forbidden.first(conversation_text(row)) is None for row in rows)
    assert any("Asthma" in conversation_text(row) for row in rows)


def test_radiology_and_drugs_are_not_referred_to_a_department():
    drug = entity("D", "Doxycycline", source="drugs")
    assert medical_conversations([drug], [], forbidden=NOTHING, count=9, seed=1) == []


PAIRS = [Pair(id=f"hsk/{i}", source="hsk", zh=f"第{i}句话。", en=f"Sentence {i}.") for i in range(12)]
TALK = [
    Dialogue(
        id="en/1", language="en", category="greetings", turns=("Hello", "Hi", "Bye", "See you", "alone")
    ),
    Dialogue(id="zh/1", language="zh", category="greetings", turns=("你好", "你好！")),
]


def test_dialogue_translates_both_ways_and_talks_in_turns():
    rows = dialogue_conversations(PAIRS, TALK, forbidden=NOTHING, count=1000, seed=1)
    check_shape(rows)
    sides = {p.zh: p.en for p in PAIRS} | {p.en: p.zh for p in PAIRS}
    translations = [row for row in rows if row["source"] == "hsk"]
    assert len(translations) == 12 + 12 + 4
    for row in translations:
        turns = [message["content"] for message in row["messages"]]
        for user, answer in zip(turns[::2], turns[1::2], strict=True):
            assert any(given in user and sides[given] == answer for given in sides)
    talk = next(row for row in rows if row["source"] == "dialogue-en")
    assert [m["content"] for m in talk["messages"]] == ["Hello", "Hi", "Bye", "See you"]


def test_counts_are_kept_and_order_of_input_does_not_matter():
    one = dialogue_conversations(PAIRS, TALK, forbidden=NOTHING, count=7, seed=1)
    assert len(one) == 7
    assert one == dialogue_conversations(PAIRS[::-1], TALK[::-1], forbidden=NOTHING, count=7, seed=1)
    two = medical_conversations(tree(), [ASTHMA], forbidden=NOTHING, count=15, seed=1)
    assert len(two) == 15
    assert two == medical_conversations(tree()[::-1], [ASTHMA], forbidden=NOTHING, count=15, seed=1)


@given(st.lists(st.sampled_from("abcdefghij"), max_size=40), st.integers(0, 10))
@settings(deadline=None, max_examples=30)
def test_split_keeps_equal_prompts_together(prompts, heldout):
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": str(i)}]}
        for i, p in enumerate(prompts)
    ]
    train, held = split_rows(rows, heldout=heldout, seed=1)
    key = conversation_text
    assert sorted(map(key, train + held)) == sorted(map(key, rows))
    assert not {r["messages"][0]["content"] for r in train} & {r["messages"][0]["content"] for r in held}
    assert len(held) >= min(heldout, len(rows))
    biggest = max(Counter(prompts).values(), default=0)
    assert len(held) < heldout + max(biggest, 1)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_prompt_with_its_answer_occurs_twice(seed):
    rows = medical_conversations(tree(), [ASTHMA], forbidden=NOTHING, count=500, seed=seed)
    texts = [conversation_text(row) for row in rows]
    assert len(set(texts)) == len(texts)
