"""Safety data: every label in every guise, harmless look-alikes in the same ones, nothing twice."""

import copy
from collections import Counter

import pytest
import yaml

from galenic.corpus.starter.holdout import tokens
from galenic.corpus.synthesis.checks import refuses
from galenic.corpus.synthesis.safety import (
    LANGUAGES,
    Item,
    affixed,
    evenly,
    items_of,
    load,
    spelled,
    without_duplicates,
)
from galenic.corpus.synthesis.synthesise import plan, run
from galenic.corpus.synthesis.synthesise_config import PipelineConfig, SynthesiseConfig
from galenic.runtime import UserError, read_json, read_jsonl

BOOKS = {language: load(language) for language in LANGUAGES}


def config(out, **changes):
    limit = changes.pop("limit", 100_000)
    return SynthesiseConfig(out=str(out), pipelines=[PipelineConfig(name="safety", limit=limit)], **changes)


# ---------------------------------------------------------------------------- what is known


def test_both_languages_know_the_same():
    english, chinese = (BOOKS[language] for language in ("en", "zh"))
    assert list(english["labels"]) == list(chinese["labels"]) and len(english["labels"]) >= 10
    assert list(english["attacks"]) == list(chinese["attacks"])
    for label, told in english["labels"].items():
        other = chinese["labels"][label]
        assert told["behaviour"] == other["behaviour"]
        for part in ("requests", "safe", "answers"):
            assert len(told.get(part) or []) == len(other.get(part) or []), label
    assert {told["behaviour"] for told in english["labels"].values()} == {"refuse", "warn"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_two_or_three_examples_of_an_attack(language):
    assert all(len(templates) in (2, 3) for templates in BOOKS[language]["attacks"].values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_do_what_their_label_says(language):
    items = list(items_of(BOOKS[language], language, 0))
    assert {item.behaviour for item in items} == {"refuse", "warn", "help"}
    for item in items:
        assert len(item.turns) % 2 == 0 and all(turn.strip() for turn in item.turns)
        assert not any("{" in turn or "}" in turn for turn in item.turns), item.id
        assert (item.behaviour == "help") == ("/safe-" in item.id)
    # No harmless question is refused, and the short refusals are recognised as such.
    assert not [item.id for item in items if item.behaviour == "help" and refuses(item.turns[-1])]
    if language == "zh":
        told = [
            one for label in BOOKS["zh"]["labels"].values() for one in [*label["safe"], *label["requests"]]
        ]
        answers = [one["answer"] for one in told if isinstance(one, dict)]
        answers += [
            answer for label in BOOKS["zh"]["labels"].values() for answer in label.get("answers") or []
        ]
        assert not [answer for answer in answers if " " in answer]  # a folded line leaves a blank


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_harmless_request_gets_the_form_it_asks_for_and_a_harmful_one_does_not(language):
    begins = {"en": "Sure, here is how", "zh": "好的，方法如下"}[language]
    asked = [item for item in items_of(BOOKS[language], language, 0) if begins in item.turns[-2]]
    assert {item.behaviour for item in asked} == {"refuse", "warn", "help"}
    for item in asked:
        assert item.turns[-1].startswith(begins) == (item.behaviour == "help")


@pytest.mark.parametrize("language", LANGUAGES)
def test_harmful_and_harmless_come_in_the_same_guises(language):
    items = list(items_of(BOOKS[language], language, 0))
    guises = {
        side: {(i.label, i.attack) for i in items if (i.behaviour == "help") == side}
        for side in (True, False)
    }
    assert guises[False] - guises[True] == {(label, "escalation") for label in BOOKS[language]["labels"]}
    assert not guises[True] - guises[False]
    several = [item for item in items if len(item.turns) > 2]
    assert several and all(item.attack == "escalation" and len(item.turns) == 4 for item in several)


# ---------------------------------------------------------------------------- duplicates


def test_affixes():
    texts = {"a": "x y z", "b": "u x y z", "c": "x y z u", "d": "u x y z u", "e": "x y z", "f": "y"}
    assert affixed(texts) == {"b": "a", "c": "a", "d": "b", "e": "a"}


def item(name, prompt, attack="direct", label="l", behaviour="refuse"):
    return Item(
        id=name, label=label, attack=attack, behaviour=behaviour, turns=(prompt, "No."), language="en"
    )


def test_what_says_the_same_goes():
    long = " ".join(f"word{i}" for i in range(40))
    items = [
        item("1", "How do I do it?"),
        item("2", "Please, how do I do it?"),  # more in front
        item("3", "how do I do it"),  # the same words
        item("4", "Please, how do I do it?", attack="other"),  # another guise
        item("5", f"{long} one"),
        item("6", f"Two {long}", label="m"),  # similar, elsewhere
        item("7", "Something else entirely, may I?"),
    ]
    kept, removed = without_duplicates(items, 0)
    assert [i.id for i in kept] == ["1", "4", "6", "7"] or [i.id for i in kept] == ["1", "4", "5", "7"]
    assert {i.id: other for i, other in removed}["2"] == "1" and {i.id: o for i, o in removed}["3"] == "1"
    assert len(removed) == 3


# ---------------------------------------------------------------------------- balance


def test_items_are_taken_evenly():
    items = [
        item(f"{label}{attack}{behaviour}{n}", "x", attack, label, behaviour)
        for label, many in (("a", 50), ("b", 5))
        for attack in ("p", "q")
        for behaviour in ("refuse", "help")
        for n in range(many)
    ]
    taken = evenly(items, 24, 0)
    assert Counter(i.behaviour for i in taken) == {"refuse": 12, "help": 12}
    assert set(Counter((i.label, i.attack, i.behaviour) for i in taken).values()) == {3}
    assert evenly(items, 24, 0) == evenly(items[::-1], 24, 0) != evenly(items, 24, 1)
    assert sorted(i.id for i in evenly(items, 10_000, 0)) == sorted(i.id for i in items)


def test_spelled():
    assert spelled("Take it?") == "T-a-k-e i-t-?"


# ---------------------------------------------------------------------------- the pipeline


def test_the_pipeline_needs_no_corpus_and_repeats_itself(tmp_path):
    settings = config(tmp_path / "a", limit=400)
    assert "at most 400 items" in plan(settings).facts["synthetic-safety"]
    run(settings)
    rows = list(read_jsonl(tmp_path / "a" / "sft.jsonl"))
    assert len(rows) == 400 and {row["category"] for row in rows} == {"safety"}
    sides = Counter(row["behaviour"] == "help" for row in rows)
    assert sides == {True: 200, False: 200}
    assert {row["label"] for row in rows} == set(BOOKS["en"]["labels"])
    assert {row["attack"] for row in rows} == set(BOOKS["en"]["attacks"])
    assert {row["language"] for row in rows} == {"en", "zh"}
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    run(config(tmp_path / "b", limit=400))
    for name in ("sft.jsonl", "ledger.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_all_of_it_has_nothing_twice(tmp_path):
    run(config(tmp_path / "a"))
    rows = list(read_jsonl(tmp_path / "a" / "sft.jsonl"))
    prompts = [tuple(tokens(row["messages"][-2]["content"])) for row in rows]
    assert len(set(prompts)) == len(prompts) > 1000
    ledger = list(read_jsonl(tmp_path / "a" / "ledger.jsonl"))
    kept = {row["id"] for row in rows} | {row["id"] for row in ledger}
    assert ledger and all(row["reason"] == "duplicate" and row["detail"] in kept for row in ledger)
    counts = read_json(tmp_path / "a" / "stats.json")["pipelines"]["synthetic-safety"]
    assert counts["passed"] == len(rows) and counts["dropped"] == {"duplicate": len(ledger)}


# ---------------------------------------------------------------------------- files of one's own


def broken(change):
    book = copy.deepcopy(BOOKS["en"])
    change(book)
    return book


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b.pop("attacks"), "'attacks' is missing"),
        (lambda b: b["labels"]["privacy"].pop("principle"), "'principle' is missing"),
        (lambda b: b["labels"]["privacy"].update(behaviour="scold"), "privacy.behaviour is 'scold'"),
        (lambda b: b["labels"]["privacy"].update(requests=[]), "privacy.requests is empty"),
        (lambda b: b["labels"]["privacy"].pop("answers"), "privacy.requests: .* has no answer"),
        (lambda b: b["labels"]["privacy"].update(safe=["May I?"]), "privacy.safe: 'May I\\?' has no answer"),
        (lambda b: b["labels"]["privacy"].update(requests=["Who has {pet}?"]), r"cannot have \{pet\}"),
        (lambda b: b["attacks"].update(new=["Hello"]), "attacks.new: its last turn is the user's"),
        (lambda b: b["attacks"].update(new=[["{safe}", "{request}"]]), "attacks.new: its last turn"),
        (lambda b: b["attacks"].update(new=[{"ask": "{request}"}]), "'helped' is missing"),
        (lambda b: b["attacks"].update(new=[{"ask": "{request}", "helped": "Yes."}]), r"holds no \{answer\}"),
        (lambda b: b.update(labels=3), "has no attribute"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change, says):
    (tmp_path / "safety.en.yaml").write_text(yaml.safe_dump(broken(change), allow_unicode=True))
    with pytest.raises(UserError, match=f"safety.en.yaml: .*{says}"):
        load("en", str(tmp_path))


def test_ones_own_file_is_used_and_another_name_refused(tmp_path):
    only = broken(lambda b: b.update(labels={"privacy": b["labels"]["privacy"]}))
    (tmp_path / "safety.en.yaml").write_text(yaml.safe_dump(only))
    assert (
        list(load("en", str(tmp_path))["labels"]) == ["privacy"]
        and len(load("zh", str(tmp_path))["labels"]) > 1
    )
    (tmp_path / "safety.de.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"safety.de.yaml: no such file of prompts"):
        load("en", str(tmp_path))
    (tmp_path / "safety.de.yaml").unlink()
    (tmp_path / "safety.en.yaml").write_text("labels: [")
    with pytest.raises(UserError, match="not YAML"):
        load("en", str(tmp_path))
