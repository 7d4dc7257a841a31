import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.records import Entity
from galenic.corpus.starter.holdout import (
    Mentions,
    Pair,
    check_no_leak,
    choose_transfer,
    prune,
    split_pairs,
    stable_key,
    stable_shuffle,
    surface_forms,
    tokens,
)
from galenic.runtime import UserError


def entity(id, name, *, source="hpo", parents=(), **rest):
    return Entity(
        id=id, source=source, name=name, kind="finding", department="neurology", parents=parents, **rest
    )


def test_tokens_fold_case_plural_and_han_characters():
    assert tokens("Febrile Seizures (J45.9) 上火了") == ["febrile", "seizure", "j45", "9", "上", "火", "了"]
    assert tokens("virus, apoptosis, mass, gas") == ["virus", "apoptosis", "mass", "gas"]


def test_stable_key_depends_on_the_parts_and_their_borders_only():
    assert stable_key(1, "a") == stable_key("1", "a")
    assert stable_key("ab", "c") != stable_key("a", "bc")
    assert 0 <= stable_key("x") < 2**64
    # Fixed for ever: another value would move every held-out item.
    assert stable_key("galenic") == 13779460554868483583


@given(st.lists(st.integers(), unique=True))
@settings(deadline=None, max_examples=30)
def test_stable_shuffle_ignores_the_order_it_is_given(items):
    assert stable_shuffle(items, str, 1) == stable_shuffle(reversed(items), str, 1)
    assert sorted(stable_shuffle(items, str, 1)) == sorted(items)


# ---------------------------------------------------------------------------- mentions

WORDS = ("atypical", "absence", "seizure", "seizures", "of", "G40", "癫", "痫")
SEPARATORS = (" ", "-", ", ", ". ", "\n", " (")


@given(
    names=st.dictionaries(
        st.sampled_from("abcde"), st.lists(st.sampled_from(WORDS), min_size=1, max_size=3), min_size=1
    ),
    parts=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SEPARATORS)), max_size=12),
)
@settings(deadline=None, max_examples=30)
def test_mentions_equal_a_regular_expression_per_name(names, parts):
    text = "".join(word + separator for word, separator in parts)
    forms = {key: [" ".join(words)] for key, words in names.items()}
    expected = set()
    for key, words in names.items():
        # A plural s may be there or not; Latin words stand between non-word characters, Han ones anywhere.
        pattern = r"\W*".join(
            word if word in "癫痫" else rf"(?<![A-Za-z0-9]){word.removesuffix('s')}s?(?![A-Za-z0-9])"
            for word in words
        )
        if re.search(pattern, text, re.IGNORECASE):
            expected.add(key)
    mentions = Mentions(forms)
    assert mentions.find(text) == expected
    assert (mentions.first(text) in expected) if expected else (mentions.first(text) is None)


def test_mentions_are_whole_words_and_codes_are_whole_codes():
    mentions = Mentions({"a": ["tic"], "b": ["J45.2"], "c": ["上火"]})
    assert mentions.find("a tactic (J45.20), 上了火") == frozenset()
    assert mentions.find("Tics; j45.2. 他上火了") == {"a", "b", "c"}


def test_mentions_find_names_that_begin_inside_another():
    mentions = Mentions({"long": ["atypical absence seizure status"], "short": ["absence seizure"]})
    assert mentions.find("an atypical absence seizure") == {"short"}


def test_surface_forms_are_name_synonyms_and_codes_once():
    found = surface_forms(entity("a", "Seizure", synonyms=("Fit", "Seizure"), codes=("R56", "R56")))
    assert found == ("Seizure", "Fit", "R56")


def test_prune_removes_what_mentions_and_gives_up_on_names_and_definitions():
    forbidden = Mentions({"x": ["absence status"]})
    rich = entity(
        "a",
        "Seizure",
        definition="An abnormal discharge.",
        synonyms=("Fit", "Absence status"),
        related=(("excludes", "absence status (G40.A)"), ("excludes", "syncope")),
        comment="Unlike absence status.",
    )
    pruned = prune(rich, forbidden)
    assert pruned is not None
    assert pruned.synonyms == ("Fit",)
    assert pruned.related == (("excludes", "syncope"),)
    assert pruned.comment == ""
    assert prune(entity("b", "Nonconvulsive absence status"), forbidden) is None
    assert prune(entity("c", "Seizure", definition="It may follow absence status."), forbidden) is None


# ---------------------------------------------------------------------------- choosing


def family(prefix, count, *, source="hpo", words="rare finding"):
    parent = entity(f"{prefix}0", f"{prefix} {words} group", source=source)
    children = [
        entity(f"{prefix}{i}", f"{prefix} {words} number{i}", source=source, parents=(parent.id,))
        for i in range(1, count + 1)
    ]
    return [parent, *children]


def texts_of(entities):
    return [f"{e.name}. {e.definition}" for e in entities]


def test_transfer_takes_whole_sibling_groups_and_never_parents():
    entities = [e for prefix in "ABCDEF" for e in family(prefix, 5)]
    chosen = choose_transfer(entities, texts_of(entities), share=0.3, seed=3, minimum=5)
    groups = {key[0] for key in chosen}
    assert chosen == {f"{g}{i}" for g in groups for i in range(1, 6)}
    assert 0.3 * 36 <= len(chosen) < 0.3 * 36 + 5


def test_transfer_prefers_what_few_texts_mention():
    entities = family("A", 5) + family("B", 5)
    texts = texts_of(entities) + ["A rare finding number1 is all over this corpus"] * 20
    assert choose_transfer(entities, texts, share=0.3, seed=1, minimum=4) == {f"B{i}" for i in range(1, 6)}


def test_transfer_never_takes_groups_with_generic_names_or_inner_nodes():
    generic = family("A", 4)
    generic[1] = entity("A1", "A rare finding number1", synonyms=("Fit",), parents=("A0",))
    inner = family("B", 4)
    deeper = entity("C1", "C finding below another", parents=("B2",))
    small = family("D", 3)
    good = family("E", 4)
    entities = [*generic, *inner, deeper, *small, *good]
    chosen = choose_transfer(entities, texts_of(entities), share=0.9, seed=1, minimum=4)
    assert chosen == {"E1", "E2", "E3", "E4"}


def test_transfer_is_independent_of_order_and_moves_with_the_seed():
    entities = [e for prefix in "ABCDEFGHKLMN" for e in family(prefix, 4)]
    texts = texts_of(entities)
    one = choose_transfer(entities, texts, share=0.1, seed=1, minimum=4)
    assert one == choose_transfer(entities[::-1], texts[::-1], share=0.1, seed=1, minimum=4)
    assert any(one != choose_transfer(entities, texts, share=0.1, seed=s, minimum=4) for s in range(2, 6))


def test_transfer_says_when_there_is_too_little():
    with pytest.raises(UserError, match=r"only 4 entities .* 50 are needed"):
        choose_transfer(family("A", 4), [], share=0.2, seed=1, minimum=50)
    with pytest.raises(UserError, match="share"):
        choose_transfer(family("A", 4), [], share=1.5, seed=1, minimum=1)


# ---------------------------------------------------------------------------- pairs


@given(
    st.lists(st.tuples(st.sampled_from("甲乙丙丁戊己庚辛"), st.sampled_from("abcdefgh")), max_size=30),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=30)
def test_split_pairs_keeps_shared_sides_together_and_loses_none(sides, seed):
    pairs = [Pair(id=f"{i:02d}", source="hsk", zh=zh, en=en) for i, (zh, en) in enumerate(sides)]
    training, heldout = split_pairs(pairs, 0.5, seed)
    assert sorted(training + heldout, key=lambda p: p.id) == pairs
    assert not {p.zh for p in training} & {p.zh for p in heldout}
    assert not {p.en for p in training} & {p.en for p in heldout}
    assert split_pairs(pairs[::-1], 0.5, seed) == (training, heldout)


def test_split_pairs_holds_out_about_its_share():
    pairs = [Pair(id=str(i), source="hsk", zh=f"第{chr(0x4E00 + i)}", en=f"word{i}x") for i in range(2000)]
    _, heldout = split_pairs(pairs, 0.1, 1)
    assert 150 < len(heldout) < 250


# ---------------------------------------------------------------------------- proof

QUESTION = {"id": "recall/1", "question": "What is 7 + 5?", "options": ["12", "2", "11", "13"], "answer": 0}
HELD_OUT = entity("HP:9", "Zebra stripe sign", synonyms=("Striped zebra",), codes=("HP:0000009",))


def test_no_leak_passes_clean_texts():
    texts = [("a.jsonl:1", "What is 7 - 5? 2"), ("a.jsonl:2", "A zebra. Stripe sign-posts. HP:00000099")]
    check_no_leak([QUESTION], [entity("HP:8", "Zebra stripe signpost")], texts)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("He asked: what  is\n7 + 5? 12", "recall/1"),
        ("the ZEBRA stripe-sign was seen", "HP:9"),
        ("striped zebras", "HP:9"),
        ("see HP:0000009.", "HP:9"),
    ],
)
def test_no_leak_names_the_planted_leak(text, culprit):
    with pytest.raises(RuntimeError, match=rf"train\.jsonl:7: .*{culprit}"):
        check_no_leak([QUESTION], [HELD_OUT], [("train.jsonl:6", "clean"), ("train.jsonl:7", text)])
