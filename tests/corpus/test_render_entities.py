from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.records import Entity
from galenic.corpus.starter.holdout import Mentions, prune
from galenic.corpus.starter.render import Family, render


def entity(key, name, **more):
    return Entity(
        id=key, source="hpo", name=name, kind="phenotypic abnormality", department="neurology", **more
    )


ROOT = entity("R", "Abnormal movement")
SEIZURE = entity(
    "S",
    "Seizure",
    definition="An event of the brain.",
    comment="Often brief.",
    synonyms=("seizures", "Fit", "Epileptic seizure"),
    codes=("HP:0001250", "HP:0001275"),
    parents=("R",),
    related=(("excludes", "syncope"), ("excludes", "tic")),
)
TREMOR = entity("T", "Tremor", parents=("R",))
FEBRILE = entity("F", "Febrile seizure", parents=("S",))


def test_template():
    assert render(SEIZURE, Family([ROOT, SEIZURE, TREMOR, FEBRILE])) == (
        "# Seizure\n\n"
        "- Type: phenotypic abnormality\n"
        "- Code: HP:0001250\n"
        "- Also called: Fit; Epileptic seizure\n"
        "- Kind of: Abnormal movement\n\n"
        "An event of the brain.\n\n"
        "Often brief.\n\n"
        "- Excludes: syncope; tic\n"
        "- More specific: Febrile seizure\n"
        "- See also: Tremor"
    )


def test_chinese_labels():
    text = render(entity("Z", "哮喘", codes=("J45.9",), related=(("症状", "咳嗽"),)), Family([]))
    assert text == "# 哮喘\n\n- 类型: phenotypic abnormality\n- 代码: J45.9\n\n- 症状: 咳嗽"


WORDS = ["alpha", "beta", "gamma", "delta", "kappa", "sigma"]
NAMES = [f"{a} {b} syndrome" for a in WORDS for b in WORDS if a != b]


@given(st.sets(st.sampled_from(range(len(NAMES))), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_a_left_out_entity_is_never_printed(left_out, random):
    entities = []
    for number, name in enumerate(NAMES):
        others = random.sample(NAMES, 3)
        entities.append(
            entity(
                f"E{number}",
                name,
                codes=(f"HP:{number:07d}",),
                synonyms=(f"morbus {number}x", others[0]),
                parents=tuple(f"E{p}" for p in random.sample(range(number), min(2, number))),
                related=(("excludes", f"{others[1]} (HP:{random.randrange(len(NAMES)):07d})"),),
                comment=f"Not {others[2]}.",
            )
        )
    hidden = [entities[number] for number in sorted(left_out)]
    forbidden = Mentions({e.id: (e.name, e.synonyms[0], *e.codes) for e in hidden})
    allowed = [p for e in entities if e not in hidden and (p := prune(e, forbidden))]
    family = Family(allowed)
    assert allowed
    for one in allowed:
        text = render(one, family)
        assert one.name in text
        for gone in hidden:
            assert gone.name not in text and gone.synonyms[0] not in text and gone.codes[0] not in text
