"""Long contexts: full to the token, answerable, made of training documents only."""

import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from synthesis_helpers import prose
from test_synthesis_templates import rows as graph_rows

from galenic.corpus.records import Document
from galenic.corpus.synthesis.long_context import BETWEEN, ask, cut_to_fit, surround
from galenic.corpus.synthesis.steps import Seed
from galenic.corpus.synthesis.synthesise import plan, run
from galenic.corpus.synthesis.synthesise_config import PipelineConfig, SynthesiseConfig
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.model import load_tokenizer
from galenic.runtime import UserError, read_json, read_jsonl


def words(text):
    return len(text.split())


def length(texts):
    return 5 + words(BETWEEN.join(texts))


# ---------------------------------------------------------------------------- surround


@given(
    budget=st.integers(1, 120),
    before=st.floats(0, 1),
    size=st.integers(1, 40),
    others=st.lists(st.integers(1, 30), max_size=12),
)
def test_it_is_full_and_whole(budget, before, size, others):
    main = " ".join(["main"] * size)
    texts = [" ".join(f"{name}.{i}" for i in range(count)) for name, count in enumerate(others)]
    found = surround(main, texts, length=length, count=words, budget=budget, before=before)
    if size + 5 > budget:
        assert found is None
        return
    assert found is not None and found.count(main) == 1 and length(found) <= budget
    place = found.index(main)
    # A word more needs its separator too: at most one place stays empty, unless the texts ran out.
    used = {word.split(".")[0] for text in found if text != main for word in text.split()}
    if len(used) < len(texts):
        assert length(found) >= budget - 1
    room = budget - 5 - size
    assert length(found[: place + 1]) - 5 - size <= round(before * room)
    # Inner texts are whole; in front the end of one is left, behind the beginning.
    assert all(text in texts for text in [*found[1:place], *found[place + 1 : -1]])
    if place:
        assert any(text.endswith(found[0]) for text in texts)
    if place < len(found) - 1:
        assert any(text.startswith(found[-1]) for text in texts)


@given(text=st.text(alphabet="ab 的热。", max_size=30), most=st.integers(0, 30))
def test_a_cut_falls_between_words_and_is_the_longest(text, most):
    def fits(part):
        return len(part) <= most

    found = cut_to_fit(text, fits)
    han = "的热"
    places = [
        n
        for n in range(len(text) + 1)
        if n == len(text)
        or n == 0
        or not (text[n - 1].isalnum() and text[n].isalnum())
        or text[n - 1] in han
        or text[n] in han
    ]
    # Blanks at the end of what fits are dropped, so that they never cost room.
    expected = max((text[:n].rstrip() for n in places if len(text[:n]) <= most), key=len)
    assert found == expected


# ---------------------------------------------------------------------------- questions


def seed_of(text, language="en"):
    return Seed(
        id="s/1",
        text=text,
        source="s",
        licence="",
        language=language,
        category="",
        department="",
        value=0.0,
        most=1,
    )


SENTENCE = "The patient was given two doses of the drug on each of the following days."


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (f"Some words here. {SENTENCE} The end.", {"quote": SENTENCE}),
        (f"# The trial\n\n{SENTENCE}", {"quote": SENTENCE, "title": "The trial"}),
        (f"# Two doses of the drug\n\n{SENTENCE}", {"quote": SENTENCE}),  # the title stands in the sentence
        (f"{SENTENCE} {SENTENCE}", {}),  # its beginning stands twice
        ("- The patient was given two doses of the drug on each of the days.", {}),  # a list
        ("Short. Too short.", {}),
        ("", {}),
    ],
)
def test_what_a_text_is_asked_for(text, answers):
    found = [ask(seed_of(text), seed) for seed in range(30)]
    assert {asked.task: asked.answer for asked in found if asked} == answers


def test_an_entity_is_asked_for_its_facts():
    text = next(row["text"] for row in graph_rows() if row["id"] == "D:3")
    found = {asked.task: asked for seed in range(60) if (asked := ask(seed_of(text), seed))}
    assert found["code"].answer == "D:3" and "Liveritis" in found["code"].question
    assert found["synonyms"].answer == "liver swelling; Morbus liverii"
    assert found["definition"].answer == "A swelling that begins in the liver and lasts for 3 weeks."
    assert found["definition"].unique == ("Liveritis",)


# ---------------------------------------------------------------------------- the pipeline


def documents():
    for language in ("en", "zh"):
        for number in range(30):
            lines = [prose(f"{language} {number} {line}", language, 6) for line in range(3)]
            if language == "en":
                lines = [line.capitalize() + "." for line in lines]
            held = number % 10 == 9
            yield vars(
                Document(
                    id=f"notes/{language}{number}",
                    text="\n".join(["SECRET. " * held + lines[0], *lines[1:]]),
                    source="notes",
                    licence="CC0",
                    language=language,
                    category="",
                    department="oncology",
                    split="heldout" if held else "train",
                )
            )
    yield from graph_rows()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    parquet.write_table(pyarrow.Table.from_pylist(list(documents())), folder / "documents.parquet")
    return folder


def config(corpus, tokenizer, out, **changes):
    values = {"name": "long-context", "tokenizer": str(tokenizer), "tokens": 1024, "limit": 25}
    return SynthesiseConfig(
        out=str(out), corpus=str(corpus), pipelines=[PipelineConfig(**{**values, **changes})]
    )


def test_conversations_are_full_and_answerable(corpus, tokenizer_step, tmp_path):
    settings = config(corpus, tokenizer_step, tmp_path / "a")
    assert "at most 25 items" in plan(settings).facts["synthetic-long-context"]
    run(settings)
    rows = list(read_jsonl(tmp_path / "a" / "sft.jsonl"))
    tokenizer, train = load_tokenizer(tokenizer_step), {}
    for row in documents():
        if row["split"] == "train":
            train[row["id"]] = row
    assert len(rows) == 25 and {row["category"] for row in rows} == {"long-context"}
    sources = {train[row["document"]]["source"] for row in rows}
    assert sources == {"notes", "onto"}  # the tables say nothing to ask
    assert {train[row["document"]]["language"] for row in rows} == {"en", "zh"}
    assert len({row["task"] for row in rows}) >= 3
    places = []
    for row in rows:
        prompt, answer = (message["content"] for message in row["messages"])
        assert row["tokens"] == len(encode_chat(tokenizer, row["messages"])[0])
        # What is missing has no room for the separator and a word, in a tiny vocabulary.
        assert 1024 - 40 <= row["tokens"] <= 1024
        main = train[row["document"]]
        assert main["text"].strip() in prompt and "SECRET" not in prompt
        assert row["document"] not in row["around"] and set(row["around"]) <= set(train)
        assert prompt.count(BETWEEN) == len(row["around"])
        texts = [train[other]["text"].strip() for other in row["around"]]
        inner = prompt.split(BETWEEN)[1:-1]
        assert all(part in texts or part == main["text"].strip() for part in inner)
        assert sum(text in prompt for text in texts) >= len(texts) - 2
        assert len(set(row["around"])) == len(row["around"]) > 1
        assert all(train[other]["language"] == main["language"] for other in row["around"])
        if row["task"] in ("quote", "definition"):
            assert prompt.count(answer) == 1
        assert all(part in main["text"] for part in answer.split("; "))
        places.append(prompt.index(main["text"].strip()) / len(prompt))
    assert min(places) < 0.25 and max(places) > 0.5  # it stands anywhere
    assert parquet.read_table(tmp_path / "a" / "documents.parquet").num_rows == 0
    run(config(corpus, tokenizer_step, tmp_path / "b"))
    assert (tmp_path / "a" / "sft.jsonl").read_bytes() == (tmp_path / "b" / "sft.jsonl").read_bytes()


def test_any_models_tokens_count(corpus, llama_folder, tmp_path):
    run(config(corpus, llama_folder, tmp_path / "a", tokens=2000, limit=3))
    rows, tokenizer = list(read_jsonl(tmp_path / "a" / "sft.jsonl")), load_tokenizer(llama_folder)
    assert [row["tokens"] for row in rows] == [len(encode_chat(tokenizer, r["messages"])[0]) for r in rows]
    assert len(rows) == 3 and all(1960 <= row["tokens"] <= 2000 for row in rows)


def test_no_other_text_answers_too(corpus, tokenizer_step, tmp_path):
    """Siblings that name an entity may not stand beside it: here every other text names it, so none does."""
    rows = [row for row in graph_rows() if row["id"] == "D:3"]
    for number in range(5):
        rows.append({**rows[0], "id": f"x/{number}", "text": f"{number}: Liveritis was seen.", "source": "x"})
    folder = tmp_path / "corpus"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "documents.parquet")
    run(config(folder, tokenizer_step, tmp_path / "a"))
    [row] = read_jsonl(tmp_path / "a" / "sft.jsonl")
    named = row["task"] in ("definition", "code", "synonyms")
    assert (row["around"] == []) == named
    reasons = [line["reason"] for line in read_jsonl(tmp_path / "a" / "ledger.jsonl")]
    assert reasons == ["nothing to ask"] * 5


def test_given_questions_are_asked_amid_other_texts(corpus, tokenizer_step, tmp_path):
    asked = tmp_path / "asked.jsonl"
    turns = [{"role": "user", "content": "Which dose?"}, {"role": "assistant", "content": "12 mg."}]
    rows = [
        {"messages": turns, "document": "notes/en1"},
        {"messages": turns, "document": "notes/en9"},  # held out
        {"messages": turns[:1], "document": "notes/en1"},
        {"messages": turns, "document": "notes/en2#1"},  # a passage
        {"messages": turns, "document": "notes/en2#7"},  # one that is not there
        {"messages": [*turns, *turns], "document": "notes/en1"},
        {"messages": "x"},
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config(corpus, tokenizer_step, tmp_path / "a", conversations=str(asked)))
    made = list(read_jsonl(tmp_path / "a" / "sft.jsonl"))
    assert [(row["document"], row["task"]) for row in made] == [
        ("notes/en1", "given"),
        ("notes/en2#1", "given"),
    ]
    assert all(row["messages"][1]["content"] == "12 mg." for row in made)
    assert all("Which dose?" in row["messages"][0]["content"] for row in made)
    ledger = [(row["id"], row["reason"]) for row in read_jsonl(tmp_path / "a" / "ledger.jsonl")]
    assert ledger == [
        ("synthetic-long-context/line-2", "its document is not there"),
        ("synthetic-long-context/line-3", "not one question with one answer"),
        ("synthetic-long-context/line-5", "its document is not there"),
        ("synthetic-long-context/line-6", "not one question with one answer"),
        ("synthetic-long-context/line-7", "not one question with one answer"),
    ]
    assert read_json(tmp_path / "a" / "stats.json")["pipelines"]["synthetic-long-context"]["passed"] == 2


def test_a_main_text_without_room_is_ledgered(corpus, tokenizer_step, tmp_path):
    run(config(corpus, tokenizer_step, tmp_path / "a", tokens=64, sources=["notes"]))
    reasons = {row["reason"] for row in read_jsonl(tmp_path / "a" / "ledger.jsonl")}
    assert "too long" in reasons and not list(read_jsonl(tmp_path / "a" / "sft.jsonl"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "long-context"}, "'long-context' counts tokens; name a tokenizer's"),
        (
            {"name": "long-context", "tokenizer": "t", "tokens": 63},
            "tokens of 'long-context' are 63; 64 or more",
        ),
        ({"name": "papers", "tokenizer": "t"}, "belong to long-context, not to 'papers'"),
        ({"name": "safety", "offline": True}, "belong to knowledge-graph, not to 'safety'"),
    ],
)
def test_contradictions_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        PipelineConfig(**changes)


def test_nothing_to_take_is_said(corpus, tokenizer_step, tmp_path):
    with pytest.raises(UserError, match="'long-context' finds no documents in nowhere"):
        run(config(corpus, tokenizer_step, tmp_path / "a", sources=["nowhere"]))
    with pytest.raises(UserError, match="endpoint: needed"):
        SynthesiseConfig(out="o", corpus="c", pipelines=[PipelineConfig(name="papers")])
    with pytest.raises(UserError, match="corpus: give a corpus folder"):
        SynthesiseConfig(out="o", pipelines=[PipelineConfig(name="long-context", tokenizer="t")])
