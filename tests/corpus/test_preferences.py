from galenic.corpus.records import Entity
from galenic.corpus.starter.holdout import Mentions
from galenic.corpus.starter.preferences import preference_pairs


def entity(id, name, **rest):
    return Entity(id=id, source="icd10cm", name=name, kind="disease category", department="neurology", **rest)


WORDS = (
    "Migraine",
    "Cluster headache",
    "Tension headache",
    "Cough headache",
    "Thunderclap pain",
    "Hemicrania",
)
ENTITIES = [
    entity("P", "Headache syndromes", codes=("G43-G44",)),
    *(entity(f"L{i}", word, parents=("P",), codes=(f"G4{i}",)) for i, word in enumerate(WORDS)),
    entity("Q", "Sleep disorders", codes=("G47",)),
    entity("M", "Narcolepsy", parents=("Q",), codes=("G47.4",)),
]


def test_rejected_is_a_siblings_answer_of_the_same_kind():
    rows = preference_pairs(ENTITIES, forbidden=Mentions({}), count=100, seed=1)
    names = {e.name for e in ENTITIES if e.parents == ("P",)}
    codes = {e.codes[0] for e in ENTITIES if e.parents == ("P",)}
    owner = {side: e for e in ENTITIES for side in (e.name, *e.codes)}
    assert len(rows) == 12  # name to code and code to name, for each of the six
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected", "source", "department"]
        assert row["chosen"] != row["rejected"]
        same = names if row["chosen"] in names else codes
        assert {row["chosen"], row["rejected"]} <= same
        right = owner[row["chosen"]]
        assert (right.name if same is codes else right.codes[0]) in row["prompt"]


def test_forbidden_count_and_order():
    forbidden = Mentions({"x": ["cough headache"]})
    rows = preference_pairs(ENTITIES, forbidden=forbidden, count=100, seed=1)
    assert rows
    assert all(forbidden.first(f"{r['prompt']}\n{r['chosen']}\n{r['rejected']}") is None for r in rows)
    some = preference_pairs(ENTITIES, forbidden=Mentions({}), count=5, seed=1)
    assert len(some) == 5
    assert some == preference_pairs(ENTITIES[::-1], forbidden=Mentions({}), count=5, seed=1)


def test_length_does_not_tell_chosen_from_rejected():
    entities = [entity("P", "Heading")]
    entities += [
        entity(f"L{i:03d}", f"{'x' * (1 + i * 7 % 40)}q{i} item", parents=("P",), codes=(f"A{i:02d}",))
        for i in range(100)
    ]
    rows = preference_pairs(entities, forbidden=Mentions({}), count=1000, seed=1)
    names = [r for r in rows if r["chosen"].endswith("item")]
    longer = sum(len(r["chosen"]) > len(r["rejected"]) for r in names)
    assert 0.35 < longer / len(names) < 0.65
