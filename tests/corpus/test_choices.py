"""Tasks with options: the answer is among siblings, held-out entities are apart, conversations ask something else."""

from galenic.align.tasks import task_of
from galenic.corpus.records import Entity
from galenic.corpus.starter.choices import choice_tasks
from galenic.corpus.starter.conversations import choice_kind, medical_conversations
from galenic.corpus.starter.holdout import Mentions


def entities(count=120):
    return [
        Entity(
            id=f"HP:{i:07d}",
            source="hpo",
            name=f"Anomaly {'abcdefgh'[i % 8]}{i}",
            kind="phenotypic abnormality",
            department="cardiology",
            definition=f"A thing numbered {i} of shape {i * 7 % 31} in group {i // 6}.",
            synonyms=(f"Shape {i * 13} variant",),
            parents=(f"HP:9{i // 6:06d}",),
        )
        for i in range(count)
    ]


def make(**values):
    settings = {"forbidden": Mentions({}), "count": 60, "heldout": 15, "seed": 1} | values
    return choice_tasks(entities(), **settings)


def test_the_answer_is_the_entitys_and_the_others_are_not():
    train, heldout = make()
    assert len(train) == 60 and len(heldout) == 15
    texts = {e.id: {e.name, *e.synonyms} for e in entities()}
    for row in train + heldout:
        right = row["options"][row["answer"]]
        assert len(set(row["options"])) == 4 and right in texts[row["id"].removeprefix("choices/")]
        task = task_of(row, "x")
        assert task.rule == "option" and task.answer == right and task.domain == "choices"
    positions = [row["answer"] for row in train]
    assert set(positions) == {0, 1, 2, 3}


def test_held_out_entities_are_apart_and_a_fifth_at_most():
    train, heldout = make()
    assert not {row["id"] for row in train} & {row["id"] for row in heldout}
    train, heldout = make(count=10, heldout=1000)
    assert len(heldout) == (len(train) + len(heldout)) // 5
    assert make() == make() != make(seed=2)


def test_what_conversations_give_options_for_is_not_asked_again():
    rows = medical_conversations(entities(), [], forbidden=Mentions({}), count=2000, seed=1)
    asked = {
        row["messages"][0]["content"].partition("\nChoose one")[0] for row in rows if "Choose one" in str(row)
    }
    assert len(asked) > 20
    assert not asked & {row["question"] for rows in make() for row in rows}
    assert len({choice_kind(e.id, 1) for e in entities()}) > 3


def test_forbidden_entities_are_in_no_task():
    forbidden = Mentions({"x": ["anomaly a0", "anomaly a8"]})
    for row in (row for rows in make(forbidden=forbidden) for row in rows):
        assert forbidden.first("\n".join((row["question"], *row["options"]))) is None
