"""Decontamination against a naive search, planted contamination, and what must stay."""

import json
import random
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from galenic.corpus.contamination import overlap
from galenic.corpus.contamination.decontaminate import (
    Decontamination,
    Evaluations,
    Span,
    contamination_report,
    cut,
    decontaminate_table,
    find_spans,
    markdown,
)
from galenic.corpus.texts import column
from galenic.runtime import UserError

ENGLISH = (
    "A 45-year-old man with a long history of smoking comes to the physician because of a cough that has lasted "
    "three months and now brings up blood; which investigation should be done first?"
)
CHINESE = "患者男性，四十五岁，有长期吸烟史，因反复咳嗽三个月并出现咯血前来就诊，下列哪项检查最为合适？"
FILLER = "Elsewhere the harbour was quiet, and the boats lay in the sun until the tide came in again. " * 12
HAN_FILLER = "港口很安静，渔船停在阳光下，直到潮水再次涨起来。孩子们在岸边玩耍。" * 12
QUESTIONS = [
    {"id": "en", "question": ENGLISH, "options": ["Sputum culture", "Chest radiograph"], "answer": 1},
    {"id": "zh", "question": CHINESE, "options": {"A": "血常规", "B": "胸部X线"}, "answer": "B"},
    {
        "id": "short",
        "question": "Which vitamin prevents scurvy in sailors?",
        "options": ["A", "Vitamin C"],
        "answer": 1,
    },
    {"id": "tiny", "question": "What is it?", "options": ["A", "B"], "answer": 0},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    return Evaluations.read([write(tmp_path_factory.mktemp("evaluations") / "exam.jsonl", QUESTIONS)])


def found(text, evaluations):
    """(item, kind, the text of the span) of every span."""
    table = pa.table({"id": ["d"], "text": [text], "source": ["s"]})
    spans = decontaminate_table(table, evaluations)[2].to_pylist()
    return [(row["item"], row["kind"], text[row["start"] : row["stop"]]) for row in spans]


# ---------------------------------------------------------------------------- an oracle without hashes


def naive_words(text):
    """(folded word, weight in units, start, stop): letter by letter, with Python's own tables."""
    words, current, start, end = [], "", 0, 0
    for place, letter in enumerate(text + " "):
        han = overlap.is_han(ord(letter))
        if unicodedata.category(letter) == "Mn" or letter in "\xad\u200b\u200c\u200d\ufeff":
            continue
        if current and (han or not letter.isalnum()):
            words.append((current, 20, start, end))
            current = ""
        if han:
            words.append((overlap.fold(letter), 13, place, place + 1))
        elif letter.isalnum():
            start = start if current else place
            current += overlap.fold(letter)
        end = place + 1
    return words


def naive_windows(words):
    for i in range(len(words)):
        weight = 0
        for j in range(i, len(words)):
            weight += words[j][1]
            if weight >= 260:
                yield i, j + 1, tuple(word for word, *_ in words[i : j + 1])
                break


def naive_cover(text, item):
    """The characters of `text` that lie in a window that `item` has, too."""
    grams = {gram for _, _, gram in naive_windows(naive_words(item))}
    words = naive_words(text)
    covered = np.zeros(len(text) + 1, dtype=bool)
    for i, j, gram in naive_windows(words):
        if gram in grams:
            covered[words[i][2] : words[j - 1][3]] = True
    return covered


# Few words, so that chance makes long runs; accents, widths, marks and both scripts.
WORDS = ["a", "É", "e\u0301", "Ｂ", "7", "痛", "头", "x-ray", "don’t", "β", "𠀀", "😀"]
word_lists = st.lists(st.sampled_from(WORDS), min_size=0, max_size=40)
joins = st.sampled_from([" ", ", ", "\n", " - "])


@settings(max_examples=150, deadline=None)
@given(word_lists, word_lists, word_lists, st.integers(0, 30), st.integers(8, 30), joins, joins)
def test_the_same_as_a_naive_search(tmp_path_factory, before, middle, after, start, length, one, other):
    item = one.join(["a", "痛", *middle, "É"] * 3)
    shared = item[start : start + 4 * length]
    text = other.join(before) + " " + (shared.upper() if start % 2 else shared) + " " + other.join(after)
    if sum(weight for _, weight, *_ in naive_words(item)) < 260:
        return  # a short item, looked for as a whole
    path = write(tmp_path_factory.mktemp("case") / "e.jsonl", [{"text": item}])
    evaluations = Evaluations.read([path], Decontamination(near_copy=2.0))
    covered = np.zeros(len(text) + 1, dtype=bool)
    for span in find_spans(column([text]), evaluations).get(0, ()):
        covered[span.start : span.stop] = True
    expected = naive_cover(text, item)
    # Windows that touch are one span: what lies between them has no letters.
    between = "".join(letter for letter, more in zip(text, covered & ~expected, strict=False) if more)
    assert not (expected & ~covered).any() and not any(letter.isalnum() for letter in between)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
@example("0\U000e01000 \U000e01ef0\U000e01f00")
def test_words_are_those_of_python(text):
    words, _, at = overlap.split_all(*map(np.asarray, _buffers(text)), overlap.folding(), 20, 13)
    expected = naive_words(text)
    assert at.tolist() == [0, len(expected)]
    groups: dict[str, int] = {}
    for (word, *_), value in zip(expected, words.tolist(), strict=True):
        assert groups.setdefault(word, value) == value
    assert len(set(groups.values())) == len(groups)


def _buffers(text):
    raw = text.encode()
    return np.frombuffer(raw, dtype=np.uint8), np.array([0, len(raw)], dtype=np.int64)


# ---------------------------------------------------------------------------- planted contamination


@pytest.mark.parametrize(("item", "filler", "name"), [(ENGLISH, FILLER, "en"), (CHINESE, HAN_FILLER, "zh")])
@pytest.mark.parametrize("offset", [0, 1, 500])
def test_a_planted_item_is_found_where_it_stands(evaluations, item, filler, name, offset):
    text = filler[:offset] + "\n" + item + "\n" + filler
    ((key, kind, span),) = found(text, evaluations)
    assert (key, kind) == (f"exam.jsonl:{name}", "13-gram")
    assert span == item.rstrip("?？")


def test_case_width_accents_spacing_and_punctuation_do_not_hide_it(evaluations):
    disguised = (
        ENGLISH.upper()
        .replace(" ", " \n ")
        .replace(";", " — ")
        .replace("3", "３")
        .replace("physician", "physi\u0301cian")
    )
    assert [row[:2] for row in found(FILLER + disguised + FILLER, evaluations)] == [
        ("exam.jsonl:en", "13-gram")
    ]


def test_thirteen_words_are_found_and_twelve_are_not(evaluations):
    words = ENGLISH.split()
    rules = replace(evaluations.rules, near_copy=2.0)
    strict = Evaluations(
        rules, evaluations.index, evaluations.items, evaluations.files, evaluations.piece_items, {}
    )
    assert overlap_words("45-year-old") == 3
    taken = [" ".join(words[4 : 4 + n]) for n in (12, 13)]
    assert [overlap_words(t) for t in taken] == [12, 13]
    assert not found(FILLER + taken[0] + " . " + FILLER, strict)
    assert len(found(FILLER + taken[1] + " . " + FILLER, strict)) == 1
    han = re.sub("[，？]", "", CHINESE)
    assert not found(HAN_FILLER + han[3:22] + HAN_FILLER, strict)
    assert len(found(HAN_FILLER + han[3:23] + HAN_FILLER, strict)) == 1


def overlap_words(text):
    return len(naive_words(text))


def test_a_short_question_counts_only_with_its_answer(evaluations):
    question = QUESTIONS[2]["question"]
    assert not found(f"{FILLER}{question} Nobody knew. {FILLER}", evaluations)
    ((item, kind, span),) = found(f"{FILLER}Q: {question.lower()} A: It is vitamin C. {FILLER}", evaluations)
    assert (item, kind) == ("exam.jsonl:short", "whole item")
    assert span.startswith("which vitamin") and span.endswith("vitamin C")
    before = found(f"{FILLER}Vitamin C. {question} {FILLER}", evaluations)
    assert [row[:2] for row in before] == [("exam.jsonl:short", "whole item")]
    far = " ".join(FILLER.split()[:31])
    assert not found(f"{FILLER}{question} {far} vitamin C", evaluations)


def test_what_is_too_short_is_counted(evaluations):
    assert evaluations.unsearched == {"exam.jsonl": 1}


def test_a_long_answer_is_looked_for_and_a_short_one_is_not(tmp_path):
    long = "Give aspirin at once, call the laboratory, and prepare the patient for angiography within ninety minutes"
    rows = [
        {"question": "What now?", "answer": long},
        {"question": "What is the sign?", "answer": "Rigid plank of wood at the belly on palpation"},
    ]
    evaluations = Evaluations.read([write(tmp_path / "qa.jsonl", rows)])
    assert [row[0] for row in found(f"{FILLER}{long}. {FILLER}", evaluations)] == ["qa.jsonl:1"]
    assert not found(f"{FILLER}{rows[1]['answer']}. {FILLER}", evaluations)


@pytest.mark.parametrize(("item", "filler", "step"), [(ENGLISH, FILLER, 11), (CHINESE, HAN_FILLER, 20)])
def test_edits_do_not_hide_a_near_copy(evaluations, item, filler, step):
    """One word in eleven (one character in twenty) replaced: no 13-gram is left."""
    han = overlap.is_han(ord(item[0]))
    words = list(item) if han else item.split()
    for place in range(step // 2, len(words), step):
        if words[place] not in "，？":
            words[place] = "另" if han else "other"
    text = filler + ("" if han else " ").join(words) + filler
    rows = found(text, evaluations)
    assert [row[1] for row in rows] == ["near copy"]
    assert similarity(rows[0][2], item) >= evaluations.rules.near_copy
    loose = replace(evaluations.rules, near_copy=2.0)
    assert not found(
        text,
        Evaluations(
            loose, evaluations.index, evaluations.items, evaluations.files, evaluations.piece_items, {}
        ),
    )


def similarity(left, right):
    """Jaccard similarity of shingles that weigh 60 units, by Python sets."""
    sets = []
    for text in (left, right):
        words, grams = naive_words(text), set()
        for i in range(len(words)):
            weight = 0
            for j in range(i, len(words)):
                weight += words[j][1]
                if weight >= 60:
                    grams.add(tuple(word for word, *_ in words[i : j + 1]))
                    break
        sets.append(grams)
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.4))
def test_near_copies_are_as_similar_as_promised(evaluations, seed, rate):
    rng = random.Random(seed)
    words = [w if rng.random() > rate else rng.choice(FILLER.split()) for w in ENGLISH.split()]
    text = f"{FILLER}. {' '.join(words)} {FILLER}"
    rows = [row for row in found(text, evaluations) if row[0] == "exam.jsonl:en"]
    if any(row[1] == "near copy" for row in rows):
        # Overlapping diagonals are one span, so it may be wider than the best of them.
        best = max(similarity(" ".join(words), ENGLISH), *(similarity(row[2], ENGLISH) for row in rows))
        assert best >= evaluations.rules.near_copy
    runs = {tuple(words[i : i + 6]) for i in range(len(words))} & {
        tuple(ENGLISH.split()[i : i + 6]) for i in range(40)
    }
    if not rows and any(len(run) == 6 for run in runs):
        assert similarity(" ".join(words), ENGLISH) < evaluations.rules.near_copy


def test_common_wording_of_items_is_ignored(tmp_path):
    stock = "Read the following description with care and choose the best answer among those given below"
    names = FILLER.split()
    rows = [
        {"question": f"{stock}: {' '.join(names[i : i + 9])} {i} {i * i}", "answer": "x"} for i in range(12)
    ]
    path = write(tmp_path / "stock.jsonl", rows)
    text = f"{HAN_FILLER} {stock} {HAN_FILLER}"
    assert len(found(text, Evaluations.read([path]))) == 12
    assert not found(text, Evaluations.read([path], Decontamination(stock=11)))


# ---------------------------------------------------------------------------- what is done about it


def test_a_cut_takes_the_window_and_whole_words():
    text = "".join(f"word{i:04d} " for i in range(300))
    left, why = cut(text, [Span(0, 0, 1305, 1400)], Decontamination(window=200))
    assert not why
    first, second = left.split("\n\n")
    assert text.startswith(first + " ") and text.rstrip().endswith(" " + second)
    assert len(first) <= 1105 and len(second) <= len(text) - 1600
    assert not {"word01", "word017"} & set(first.split())


@pytest.mark.parametrize(
    ("spans", "rules", "reason"),
    [
        ([(1000 * i, 1000 * i + 50) for i in range(1, 12)], {}, "11 cuts, at most 10"),
        ([(4000, 11_000)], {}, "left after 1 cuts"),
        ([(0, 12_000)], {"least_left": 0.0}, "0% left"),
    ],
)
def test_documents_that_are_mostly_contaminated_go(spans, rules, reason):
    left, why = cut("word " * 2400, [Span(0, 0, a, b) for a, b in spans], Decontamination(**rules))
    assert not left and reason in why


def test_short_pieces_between_cuts_go():
    text = "a " * 1000 + "K " * 60 + "b " * 1000
    spans = [Span(0, 0, 1900, 2000), Span(0, 0, 2121, 2200)]
    left, _ = cut(text, spans, Decontamination(window=0))
    assert "K" not in left and left.count("\n\n") == 1
    kept, _ = cut(text, spans, Decontamination(window=0, shortest=100))
    assert "K" in kept


def test_tables_keep_order_columns_and_every_row_once(evaluations):
    texts = [FILLER, FILLER * 3 + ENGLISH + FILLER * 3, ENGLISH, HAN_FILLER, ""]
    table = pa.table({"id": list("abcde"), "source": ["s"] * 5, "text": texts, "extra": range(5)})
    kept, dropped, spans = decontaminate_table(table, evaluations)
    assert kept.column_names == table.column_names and kept["id"].to_pylist() == ["a", "b", "d", "e"]
    assert dropped["id"].to_pylist() == ["c"] and dropped["text"].to_pylist() == [ENGLISH]
    assert "exam.jsonl:en" in dropped["detail"][0].as_py()
    assert ENGLISH[:20] not in kept["text"][1].as_py() and kept["text"][0].as_py() == FILLER
    assert {row["outcome"] for row in spans.to_pylist() if row["id"] == "b"} == {"cut"}
    # what is left is clean
    assert not len(decontaminate_table(kept, evaluations)[2])
    nothing = decontaminate_table(table.slice(0, 0), evaluations)
    assert [len(part) for part in nothing] == [0, 0, 0]
    sliced = decontaminate_table(table.slice(2, 2), evaluations)
    assert sliced[0]["id"].to_pylist() == ["d"] and sliced[1]["id"].to_pylist() == ["c"]


def test_saved_and_loaded_it_finds_the_same(evaluations, tmp_path):
    evaluations.save(tmp_path / "one.npz")
    evaluations.save(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = Evaluations.load(tmp_path / "one.npz")
    assert loaded.rules == evaluations.rules and loaded.items == evaluations.items
    assert found(FILLER + ENGLISH, loaded) == found(FILLER + ENGLISH, evaluations) != []


def test_one_item_in_two_files_is_listed_twice(tmp_path):
    one, two = (write(tmp_path / name, QUESTIONS[:1]) for name in ("a.jsonl", "b.jsonl"))
    evaluations = Evaluations.read([one, two])
    assert [row[0] for row in found(FILLER + ENGLISH, evaluations)] == ["a.jsonl:en", "b.jsonl:en"]


def test_the_report_counts_items_documents_and_sources(evaluations):
    table = pa.table(
        {
            "id": list("abc"),
            "source": ["s", "s", "t"],
            "text": [FILLER * 3 + ENGLISH + FILLER * 3, ENGLISH, CHINESE],
        }
    )
    spans = decontaminate_table(table, evaluations)[2]
    report = contamination_report(spans, {"s": 10, "t": 5, "u": 1}, evaluations)
    file = report["files"]["exam.jsonl"]
    assert (file["items"], file["unsearched"], file["touched"], file["documents"]) == (4, 1, 2, 3)
    assert file["kinds"] == {"13-gram": 3}
    counts = {name: (row["cut"], row["dropped"], row["spans"]) for name, row in report["sources"].items()}
    assert counts == {"s": (1, 1, 2), "t": (0, 1, 1), "u": (0, 0, 0)}
    assert json.loads(json.dumps(report)) == report
    text = markdown(report)
    assert "| exam.jsonl | 4 | 1 | 2 | 3 | 13-gram 3 |" in text and "| s | 10 | 1 | 1 | 2 |" in text
    assert "blood" not in markdown(contamination_report(spans, {}, evaluations, examples=0))


# ---------------------------------------------------------------------------- files


def test_every_published_shape_is_read(tmp_path):
    rows = [
        {"question": ENGLISH, "choices": ["a", "b"], "answer": 1},
        {"question": ENGLISH, "options": {"A": "a", "B": "b"}, "answer": "b", "answer_idx": "B"},
        {"question": ENGLISH, "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": ENGLISH, "answer": ["b", "c"]},
        {"question": ENGLISH},
        {"text": ENGLISH},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ENGLISH}]},
        {"prompt": [{"role": "user", "content": ENGLISH}]},
        {"prompt": ENGLISH, "completion": "b"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "table.parquet")
    evaluations = Evaluations.read([str(tmp_path / "list.json"), str(tmp_path / "table.parquet")])
    assert len(found(ENGLISH, evaluations)) == 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: no items"),
        ("a.jsonl", '{"text": "x"}\nnope\n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"query": "x"}\n', "a.jsonl:1: has the fields query"),
        ("a.jsonl", '{"text": " "}\n', "a.jsonl:1: an item without text"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl:1: a lone surrogate"),
        ("a.jsonl", '{"question": 3}\n', "a.jsonl:1: question is int, not a text"),
        ("a.jsonl", '{"question": "x", "options": ["a"], "answer": 4}\n', "answer 4 of 1 options"),
        ("a.jsonl", '{"messages": "x"}\n', "a.jsonl:1: messages is not a list"),
        ("a.json", '{"text": "x"}', "a.json: expected a list"),
        ("a.json", "[1]", "a.json:1: expected a JSON object"),
        ("a.parquet", "PAR", "a.parquet: not a Parquet file"),
        ("a.csv", "x", "a.csv: evaluation sets are"),
        ("a.jsonl", None, "a.jsonl: no such file"),
        ("a.parquet", None, "a.parquet: no such file"),
    ],
)
def test_bad_files_are_refused_by_name_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Evaluations.read([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_no_file_is_refused():
    with pytest.raises(UserError, match="no file is named"):
        Evaluations.read([])


@pytest.mark.parametrize(
    "words",
    [{"ngram": 1}, {"shingle": 13}, {"near_copy": 0.0}, {"window": -1}, {"least_left": 1.5}, {"stock": 0}],
)
def test_contradictions_are_refused(words):
    with pytest.raises(UserError, match=next(iter(words))):
        Decontamination(**words)
