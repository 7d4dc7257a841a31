import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_helpers import Reciter, subject_of

from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.probes import haystack, hops, needle
from galenic.evaluate.probes.asked import first_named, tokens_of
from galenic.evaluate.probes.config import HopsConfig, NeedleConfig
from galenic.evaluate.statistics import wilson
from galenic.runtime import UserError

PLAIN, CHAT = PromptFormat(), PromptFormat(name="chat")
NEEDLE = NeedleConfig(contexts=[400, 700], depths=[0.0, 0.5, 1.0], items=2)
HOPS = HopsConfig(contexts=[900], items=3)


def needles(tokenizer, config=NEEDLE, prompt=PLAIN, filler=None, seed=0):
    return needle.make(config, tokenizer, prompt, filler or haystack.source(None), seed)


def story(item):
    return item.text.split("\n\n")[0]


# ---------------------------------------------------------------------------- what is made


@pytest.mark.parametrize("prompt", [PLAIN, CHAT])
def test_needles_are_where_they_should_be_in_texts_as_long_as_asked(tokenizer, prompt):
    items = needles(tokenizer, prompt=prompt)
    assert len(items) == len({item.id for item in items}) == 2 * 3 * 2 * 2
    for item in items:
        context, depth, language = (item.about[key] for key in ("context", "depth", "language"))
        size = len(tokens_of(tokenizer, prompt, item.text)) + 5
        assert context * 0.8 < size <= context + 5 and item.tokens == context
        right = item.options[item.answer]
        parts = haystack.sentences(story(item))
        (place,) = [number for number, sentence in enumerate(parts) if right in sentence]
        before = [sentence for sentence in parts[:place] if not re.search(r"\d{4}", sentence)]
        assert len(before) == round(depth * (len(parts) - 4))  # of all but the four that tell a code
        assert sorted(re.findall(r"\d{4}", item.text)) == sorted(item.options)
        thing = re.match(r"What is the code of the (.*)\?|(.*)的密码", item.text.split("\n\n")[1])
        assert (thing[1] or thing[2]) in parts[place]
        assert ("的" in item.text) == (language == "zh")
    assert {item.answer for item in items} == {0, 1, 2, 3}


def test_the_seed_fixes_the_items_and_an_item_does_not_depend_on_the_others(tokenizer):
    assert needles(tokenizer) == needles(tokenizer)
    assert needles(tokenizer, seed=1) != needles(tokenizer)
    alone = needles(tokenizer, NeedleConfig(contexts=[700], depths=[0.5], items=1, languages=["zh"]))
    assert alone[0] in needles(tokenizer)


def follow(item):
    """Answers a multi-hop question by the facts in the text, as a reader would."""
    links = {}
    patterns = (
        r"(\w+) is in (ward \d+)\.", r"The beds of (ward \d+) belong to ([\w ]+)\.",
        r"The head of ([\w ]+) is (Dr \w+)\.",
        r"The home of (Dr \w+) is in (\w+)\.", r"(小\w)住在(\d+号病房)",
        r"(\d+号病房)属于(\w+楼)", r"(\w{2}楼)的负责人是(\w医生)",
        r"(\w医生)的家在(\w+镇)",
    )  # fmt: skip
    for sentence in haystack.sentences(story(item)):
        for pattern in patterns:
            match = re.fullmatch(pattern + r"[。]?", sentence)
            if match:
                assert match[1] not in links
                links[match[1]] = match[2]
    question = item.text.split("\n\n")[1]
    (here,) = [name for name in links if re.search(rf"(?<![A-Za-z]){name}(?![A-Za-z])", question)]
    for _ in range(item.about["hops"]):
        here = links[here]
    assert len(links) == 4 * item.about["hops"]
    return here


def test_hops_have_the_answer_that_following_the_facts_gives(tokenizer):
    items = hops.make(HOPS, tokenizer, PLAIN, haystack.source(None), 0)
    assert len(items) == 4 * 2 * 3
    for item in items:
        assert follow(item) == item.options[item.answer]
        assert len(set(item.options)) == 4 and all(option in story(item) for option in item.options)
        assert len(tokens_of(tokenizer, PLAIN, item.text)) < item.tokens == 900
    assert {item.answer for item in items} == {0, 1, 2, 3}


def test_held_out_text_can_be_the_haystack(tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [("Held out one. Code 1234!\nHeld out two?", "heldout"), ("Seen in training.", "train")]
    (tmp_path / "corpus").mkdir()
    table = pa.Table.from_pylist([{"text": text, "split": split} for text, split in rows])
    parquet.write_table(table, tmp_path / "corpus/documents.parquet")
    (tmp_path / "a.txt").write_text(rows[0][0])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": rows[0][0]}) + "\n")
    made = [
        needles(tokenizer, filler=haystack.source(str(tmp_path / name)))
        for name in ("corpus", "a.txt", "a.jsonl")
    ]
    assert made[0] == made[1] == made[2]
    assert "Held out one." in made[0][0].text and "Seen" not in made[0][0].text
    unlucky = [item for item in made[0] if "1234" in item.options]
    assert not unlucky or all("1234!" not in item.text for item in unlucky)

    def refused(message, path):
        with pytest.raises(UserError, match=message):
            haystack.source(str(path))

    refused("is no .txt or .jsonl file and no corpus", tmp_path / "nowhere")
    (tmp_path / "empty.txt").write_text(" \n")
    refused("holds no text", tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    refused("bad.jsonl:1: 'text' must be a text, got 3", tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    refused("bad.jsonl:1: not valid JSON", tmp_path / "bad.jsonl")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    refused("not UTF-8", tmp_path / "bad.txt")
    parquet.write_table(table.slice(1), tmp_path / "corpus/documents.parquet")
    refused("no held-out documents", tmp_path / "corpus")


def test_a_haystack_that_names_the_options_or_has_no_short_sentence_ends(tokenizer):
    def same(random, language):
        while True:
            yield "the code is " + " ".join(map(str, range(1000, 10000)))

    items = needles(tokenizer, NeedleConfig(contexts=[400], depths=[0.5], items=1), filler=same)
    assert all(len(haystack.sentences(story(item))) == 4 for item in items)  # the facts alone


def test_sentences():
    assert haystack.sentences("One. Two!  Three?\nfour 3.5 mg") == ["One.", "Two!", "Three?", "four 3.5 mg"]
    assert haystack.sentences("一。二！三?\n\n") == ["一。", "二！", "三?"]


# ---------------------------------------------------------------------------- what a model answers


def knower(tokenizer, items, knows=lambda item: True, prompt=PLAIN, context=1024):
    """A model that knows some items, and is sure of a wrong option of the others."""
    model = Reciter(tokenizer, context)
    for item in items:
        model.learn(prompt, item.text, item.options[(item.answer + (not knows(item))) % 4])
    return model


@pytest.mark.parametrize("prompt", [PLAIN, CHAT])
def test_who_always_knows_and_who_never_does(tokenizer, prompt):
    items = needles(tokenizer, prompt=prompt)
    for knows in (True, False):
        model = knower(tokenizer, items, lambda item, knows=knows: knows, prompt)
        numbers, rows = needle.measure(NEEDLE, subject_of(model, prompt), haystack.source(None), 0)
        assert numbers["value"] == float(knows) and numbers["n"] == len(rows) == 24
        assert (numbers["low"], numbers["high"]) == wilson(24 * knows, 24)
        assert all(row["right"] == float(knows) and row["kind"] == "probe-needle" for row in rows)
        assert all((row["pick"] == row["answer"]) == knows for row in rows)
        assert numbers["too_long"] == 0 and "written" not in numbers and numbers["chance"] == 0.25


def test_results_by_length_depth_and_language(tokenizer):
    items = needles(tokenizer)
    model = knower(
        tokenizer, items, lambda item: item.about["depth"] == 0.5 and item.about["language"] == "zh"
    )
    numbers, _ = needle.measure(NEEDLE, subject_of(model), haystack.source(None), 0)
    assert {depth: found["value"] for depth, found in numbers["by"]["depth"].items()} == {
        "0.0": 0,
        "0.5": 0.5,
        "1.0": 0,
    }
    assert {name: found["value"] for name, found in numbers["by"]["language"].items()} == {
        "en": 0.0,
        "zh": pytest.approx(1 / 3),
    }
    assert list(numbers["grid"]) == ["400", "700"]
    assert numbers["grid"]["700"]["0.5"] == {
        "value": 0.5,
        "low": pytest.approx(wilson(2, 4)[0]),
        "high": pytest.approx(wilson(2, 4)[1]),
        "n": 4,
    }


def test_what_the_model_cannot_read_is_wrong_and_counted(tokenizer):
    items = needles(tokenizer)
    model = knower(tokenizer, items, context=500)
    numbers, rows = needle.measure(NEEDLE, subject_of(model), haystack.source(None), 0)
    assert numbers["too_long"] == 12 and numbers["value"] == 0.5
    assert numbers["by"]["context"]["400"]["value"] == 1.0 and numbers["by"]["context"]["700"]["value"] == 0.0
    assert all(row["pick"] is None and row["too_long"] for row in rows if row["context"] == 700)


@pytest.mark.parametrize("prompt", [PLAIN, CHAT])
def test_written_answers(tokenizer, prompt):
    """The model writes the code itself; what it says is scored apart from what it finds likeliest."""
    config = NeedleConfig(contexts=[400], depths=[0.5], items=3, written_tokens=12)
    items = needles(tokenizer, config, prompt)
    model = Reciter(tokenizer)
    for item in items[:3]:
        model.learn(prompt, item.text, item.options[item.answer])
    numbers, rows = needle.measure(config, subject_of(model, prompt), haystack.source(None), 0)
    assert [row["said"] for row in rows[:3]] == [item.options[item.answer] for item in items[:3]]
    assert [row["said_right"] for row in rows] == [1.0] * 3 + [0.0] * 3
    assert numbers["written"]["value"] == 0.5 and numbers["written"]["unanswered"] == 3
    assert all(row["right"] == 1.0 for row in rows[:3])
    short = subject_of(knower(tokenizer, items, prompt=prompt, context=399), prompt)
    numbers, rows = needle.measure(config, short, haystack.source(None), 0)
    assert numbers["written"]["unanswered"] == numbers["too_long"] == 6 and numbers["written"]["value"] == 0.0


def test_hops_by_number_of_hops(tokenizer):
    items = hops.make(HOPS, tokenizer, PLAIN, haystack.source(None), 0)
    model = knower(tokenizer, items, lambda item: item.about["hops"] <= 2)
    numbers, rows = hops.measure(HOPS, subject_of(model), haystack.source(None), 0)
    assert [found["value"] for found in numbers["by"]["hops"].values()] == [1.0, 1.0, 0.0, 0.0]
    assert list(numbers["grid"]["900"]) == ["1", "2", "3", "4"]
    assert numbers["value"] == 0.5 and numbers["n"] == 24 and rows[0]["kind"] == "probe-hops"


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("It is 4821, not 1234.", ["1234", "4821"], 1),
        ("14821", ["4821"], None),
        ("48210 or 4821", ["4821"], 0),
        ("密码是4821。", ["1234", "4821"], 1),
        ("Ward 12", ["ward 1", "ward 12"], 1),
        ("在13号病房", ["3号病房", "13号病房"], 1),
        ("dr gray", ["Dr Grayson", "Dr Gray"], 1),
        ("Farrows", ["Farrow"], None),
        ("a.c or abc", ["abc", "a.c"], 1),
        ("", ["a"], None),
    ],
)
def test_which_option_a_text_names_first(text, options, named):
    assert first_named(text, options) == named


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True), st.data())
def test_a_text_that_names_one_option_names_it(numbers, data):
    options = [f"ward {number}" for number in numbers]
    index = data.draw(st.integers(0, len(options) - 1))
    assert first_named(f"I think it is {options[index]}.", options) == index
    assert first_named("I do not know.", options) is None
