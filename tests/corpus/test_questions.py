from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.records import Entity
from galenic.corpus.starter import conversations
from galenic.corpus.starter.facts import KINDS, Tree, alike, aspect, distractors, fact, pick_lengths, shorten
from galenic.corpus.starter.holdout import Pair
from galenic.corpus.starter.questions import (
    TRANSLATION_WORDINGS,
    WORDINGS,
    recall_questions,
    seal,
    take_in_turn,
    transfer_questions,
    translation_questions,
)

COLOURS = ("crimson", "emerald", "sapphire", "amber", "violet", "ivory")
PLACES = ("liver", "kidney", "spleen", "cortex", "retina")


def node(id, name, *, source="hpo", parents=(), **rest):
    return Entity(
        id=id, source=source, name=name, kind="finding", department="genetics", parents=parents, **rest
    )


def kingdom(source="hpo"):
    """Returns five headings with six leaves each, all with definitions, synonyms and codes of their own."""
    entities = [node("root", "Anything at all", source=source)]
    for p, place in enumerate(PLACES):
        heading = f"G{p}"
        entities.append(node(heading, f"Group of {place[::-1]}", source=source, parents=("root",)))
        for c, colour in enumerate(COLOURS):
            entities.append(
                node(
                    f"{heading}{c}",
                    f"{colour.capitalize()} {place} change",
                    source=source,
                    parents=(heading,),
                    definition=f"It looks {colour[1:]}ish in part {p} under the lamp of the examiner.",
                    synonyms=(f"{place}itis {colour[::-1]}",),
                    codes=(f"{place[0].upper()}{c}0.{p}",),
                )
            )
    return entities


def check_rows(rows):
    assert len({row["id"] for row in rows}) == len(rows)
    counts = Counter(row["answer"] for row in rows)
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(4)) <= 1
    for row in rows:
        assert list(row) == ["id", "question", "options", "answer", "source", "department", "entity"]
        assert len(set(row["options"])) == 4


# ---------------------------------------------------------------------------- facts and distractors


def test_shorten_keeps_whole_sentences_within_the_limit():
    text = "One two three four five. Six seven eight. Nine."
    assert shorten(text, 8) == "One two three four five. Six seven eight."
    assert shorten(text, 7) == "One two three four five."
    assert shorten(text, 4) == ""
    assert shorten("Too short.", 60) == ""


def test_alike_tells_spellings_from_names():
    assert alike("Central apnea", "Central apnoea")
    assert alike("Asthma", "Mild asthma")
    assert not alike("Absent thumb", "Aplasia of the pollex")


def test_aspects_of_an_entity():
    drug = node(
        "D",
        "Doxycycline",
        source="drugs",
        synonyms=("doxycyclin",),
        related=(("brand name", "vibramycin"),),
        codes=("DB1",),
    )
    assert aspect(drug, "brand", 1, 60) == "vibramycin"
    assert aspect(drug, "synonym", 1, 60) == ""  # only a spelling
    assert aspect(drug, "code", 1, 60) == ""  # a serial number
    icd = node("I", "Asthma", source="icd10cm", codes=("J45", "J45.20"))
    assert aspect(icd, "code", 1, 60) == "J45"
    section = node("S", "Chronic diseases", source="icd10cm", codes=("J40-J4A",))
    assert aspect(section, "code", 1, 60) == ""


def test_tree_relatives():
    tree = Tree(kingdom())
    assert tree.siblings("G00") == ["G01", "G02", "G03", "G04", "G05"]
    assert set(tree.cousins("G00")) == {f"G{p}{c}" for p in range(1, 5) for c in range(6)}
    assert tree.ancestors("G00") == {"G0", "root"}
    assert tree.children("G0")[0] == "G00"
    assert tree.siblings("nobody") == []


def test_distractors_leave_out_everything_that_is_right_as_well():
    entities = [
        node("P", "Broad heading"),
        node(
            "A",
            "Alpha sign",
            parents=("P",),
            definition="What the first one looks like.",
            synonyms=("Erstes",),
        ),
        node("B", "Alpha sign seen late", parents=("P",)),  # holds the answer as a phrase
        node("C", "Gamma sign", parents=("P",), synonyms=("Erstes",)),  # shares a name
        node(
            "D", "Delta sign", parents=("P",), definition="What the first one looks like."
        ),  # same definition
        node("E", "Epsilon sign", parents=("P", "A")),  # a descendant too
        node("F", "First one", parents=("P",)),  # stands in the stem
        node("G", "Good sign", parents=("P",)),
        node("H", "Half sign", parents=("P",)),
    ]
    tree = Tree(entities)
    asked = fact(tree, "A", "definition-name", 1)
    assert asked is not None
    found = distractors(tree, asked, allowed=lambda _: True, seed=1, rank=1, n=2)
    assert found is not None
    assert sorted(found) == ["Good sign", "Half sign"]
    assert distractors(tree, asked, allowed=lambda _: True, seed=1, rank=1, n=3) is None


@pytest.mark.parametrize(("allowed_siblings", "with_cousins"), [("12", True), ("12345678", False)])
def test_cousins_only_fill_up_what_siblings_leave_open(allowed_siblings, with_cousins):
    more = [node(f"G0{i}", f"Further{i} extra{i}", parents=("G0",)) for i in (6, 7, 8)]
    tree = Tree([*kingdom(), *more])
    near = {tree.entities[f"G0{i}"].name for i in allowed_siblings}
    for seed in range(12):
        asked = fact(tree, "G00", "definition-name", seed)
        assert asked is not None
        options = distractors(
            tree,
            asked,
            allowed=lambda i: i[:2] != "G0" or i[2] in allowed_siblings,
            seed=seed,
            rank=seed % 4,
        )
        assert options is not None
        assert (not set(options) <= near) == with_cousins


def test_a_broader_term_has_broader_terms_as_distractors():
    entities = [*kingdom(), node("lonely", "Lonely heading of nothing", parents=("root",))]
    headings = {f"Group of {place[::-1]}" for place in PLACES}
    rows = [r for r in recall_questions(entities, count=500, seed=1) if r["id"].endswith("/name-parent")]
    assert rows
    for row in rows:
        assert set(row["options"]) <= headings


@given(
    st.lists(st.text("ab", min_size=1, max_size=9), min_size=3, max_size=12, unique=True), st.integers(0, 3)
)
@settings(deadline=None, max_examples=30)
def test_pick_lengths_keeps_the_rank_where_it_can(texts, rank):
    answer = "xxxxx"
    chosen = pick_lengths(answer, texts, rank, 3)
    assert chosen is not None
    assert len(set(chosen)) == 3
    if sum(len(t) < 5 for t in texts) >= rank and sum(len(t) > 5 for t in texts) >= 3 - rank:
        assert sum(len(t) < 5 for t in chosen) <= rank
        assert sum(len(t) > 5 for t in chosen) <= 3 - rank
    assert pick_lengths(answer, texts[:2], rank, 3) is None


def test_an_answer_that_alone_echoes_the_stem_is_refused():
    echo = [
        node("P", "Heading"),
        node("A", "Purple glow", parents=("P",), definition="There is a purple glow to be seen."),
        *(node(f"N{i}", f"Name{i} other{i}", parents=("P",)) for i in range(5)),
    ]
    tree = Tree(echo)
    asked = fact(tree, "A", "definition-name", 1)
    assert asked is not None
    assert distractors(tree, asked, allowed=lambda _: True, seed=1, rank=1) is None


def test_a_stem_that_says_the_answer_is_refused():
    told = node("A", "Purple glow", parents=("P",), definition="A purple glow is a glow of purple colour.")
    others = [node(f"N{i}", f"Purple{i} glow", parents=("P",)) for i in range(5)]
    tree = Tree([told, *others])
    for kind in ("definition-name", "name-definition"):
        asked = fact(tree, "A", kind, 1)
        assert asked is not None
        assert distractors(tree, asked, allowed=lambda _: True, seed=1, rank=1) is None


# ---------------------------------------------------------------------------- questions


@pytest.mark.parametrize("source", ["hpo", "icd10cm", "mesh", "drugs", "radiology"])
def test_recall_answers_are_right_and_positions_balanced(source):
    entities = kingdom(source)
    by_id = {e.id: e for e in entities}
    rows = recall_questions(entities, count=37, seed=1)
    assert len(rows) == 37
    check_rows(rows)
    for row in rows:
        asked, kind, right = by_id[row["entity"]], row["id"].rsplit("/", 1)[1], row["options"][row["answer"]]
        truth = {
            "name": asked.name,
            "definition": asked.definition,
            "synonym": asked.synonyms[0] if asked.synonyms else None,
            "code": asked.codes[0] if asked.codes else None,
            "parent": by_id[asked.parents[0]].name if asked.parents else None,
        }
        assert right == truth[kind.split("-")[1]]
        given_side = truth[kind.split("-")[0]]
        assert given_side is not None
        assert given_side in row["question"]


def test_recall_takes_at_most_two_questions_of_an_entity():
    rows = recall_questions(kingdom("icd10cm"), count=10_000, seed=1)
    assert max(Counter(row["entity"] for row in rows).values()) <= 2


def test_recall_asks_only_what_the_rendered_text_says():
    names = [f"{a}{b}nym" for a in ("klo", "vru", "sta", "gni") for b in ("ba", "du", "fi", "ho", "ze")]
    many = [
        node(f"N{i}", f"Item {i} thing", parents=("P",), synonyms=tuple(f"{n} {i}q" for n in names))
        for i in range(12)
    ]
    rows = recall_questions([node("P", "Heading"), *many], count=100, seed=1)
    asked = [row for row in rows if row["id"].endswith("name-synonym")]
    by_id = {e.id: e for e in many}
    for row in asked:  # rendering prints the first eight
        assert row["options"][row["answer"]] in by_id[row["entity"]].synonyms[:8]


def test_transfer_options_come_from_the_held_out_side_only():
    entities = kingdom()
    transfer = frozenset(f"G{p}{c}" for p in (0, 1) for c in range(6))
    names = {e.name: e.id for e in entities}
    rows = transfer_questions(entities, transfer, count=1000, seed=1)
    check_rows(rows)
    assert {row["entity"] for row in rows} == transfer
    assert max(Counter(row["entity"] for row in rows).values()) <= 3
    for row in rows:
        kind = row["id"].rsplit("/", 1)[1]
        held_out = [names[o] in transfer for o in row["options"] if o in names]
        if kind.endswith("-name"):
            assert held_out == [True] * 4
        if kind == "name-parent":
            assert held_out == [False] * 4


@given(st.integers(0, 1000), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=5)
def test_questions_do_not_depend_on_input_order(seed, random):
    entities = kingdom()
    shuffled = random.sample(entities, len(entities))
    assert recall_questions(entities, count=20, seed=seed) == recall_questions(shuffled, count=20, seed=seed)


@given(st.integers(0, 40), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_seal_balances_positions_and_keeps_answers(count, seed):
    rows = [{"id": str(i), "options": ["right", "w1", "w2", "w3"], "answer": 0} for i in range(count)]
    sealed = seal(rows, seed)
    assert sorted(r["id"] for r in sealed) == sorted(r["id"] for r in rows)
    assert all(r["options"][r["answer"]] == "right" and len(set(r["options"])) == 4 for r in sealed)
    counts = Counter(r["answer"] for r in sealed)
    assert max((counts[i] for i in range(4)), default=0) - min(counts[i] for i in range(4)) <= 1


def test_take_in_turn_is_fair_until_a_stream_ends():
    assert take_in_turn([iter("abc"), iter("x"), iter("123")], 6) == ["a", "x", "1", "b", "2", "c"]
    assert take_in_turn([iter("ab")], 9) == ["a", "b"]


# ---------------------------------------------------------------------------- translation


def test_translation_asks_both_ways_with_options_of_similar_length():
    pairs = [
        Pair(
            id=f"hsk/{i:03d}",
            source="hsk",
            zh=f"第{chr(0x4E00 + i)}个字。",
            en=f"Sentence about thing{i}" + " more" * (i % 13) + ".",
        )
        for i in range(240)
    ]
    rows = translation_questions(pairs, count=80, seed=1)
    check_rows(rows)
    assert len(rows) == 80
    truth = {p.id: p for p in pairs}
    for row in rows:
        pair, direction = truth[row["entity"]], row["id"].rsplit("/", 1)[1]
        given_text, right = (pair.zh, pair.en) if direction == "zh-en" else (pair.en, pair.zh)
        assert row["options"][row["answer"]] == right
        assert given_text in row["question"]
        lengths = [len(option) for option in row["options"]]
        assert max(lengths) - min(lengths) <= 20  # they range over 60


def test_translation_leaves_out_single_characters_and_other_right_answers():
    pairs = [Pair(id="a", source="cedict", zh="塞", en="stopper")]
    pairs += [Pair(id=f"b{i}", source="cedict", zh=f"电{c}", en="power") for i, c in enumerate("力源流")]
    pairs += [
        Pair(id=f"c{i}", source="cedict", zh=f"水{c}", en=f"water {c}") for i, c in enumerate("甲乙丙丁")
    ]
    for row in translation_questions(pairs, count=50, seed=1):
        assert row["entity"] != "a"
        assert row["options"].count("power") <= 1


# ---------------------------------------------------------------------------- wording


def literal(template):
    """Returns the words of a template around its slots."""
    return template.replace("{", "\0").replace("}", "\0").split("\0")[::2]


def test_no_wording_is_shared_with_training_conversations():
    ours = [*WORDINGS.values(), *TRANSLATION_WORDINGS.values()]
    groups = (
        *conversations.WORDINGS.values(),
        *conversations.TABLE_WORDINGS.values(),
        *conversations.TRANSLATE.values(),
        conversations.DEPARTMENT,
        conversations.LAY,
    )
    theirs = {tuple(literal(t)) for group in groups for t in group}
    assert not {tuple(literal(t)) for t in ours} & theirs
    assert all(("", kind) in WORDINGS or kind in ("brand-name", "code-name", "name-code") for kind in KINDS)
