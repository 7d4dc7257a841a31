import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.cleaning import clean as room
from galenic.corpus.cleaning.clean import clean_table
from galenic.corpus.cleaning.rules import Rules
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document
from galenic.corpus.texts import column
from galenic.runtime import UserError

GOOD = (
    "Pneumonia is an infection of the lungs that fills the air sacs with fluid. It begins with a cough and a fever, "
    "and the diagnosis is made from a film of the chest.\nTreatment depends on the germ: most patients are given an "
    "antibiotic by mouth for five to seven days, and those with a low oxygen level are admitted."
)
CHINESE = (
    "肺炎是肺泡、远端气道和肺间质的感染性炎症，以发热、咳嗽和咳痰为主要表现。"
    "诊断依据症状、体征和胸部影像，治疗首先选用抗菌药物。"
)


def table(*texts, language=None, **columns):
    return pa.table(
        {
            "id": [f"d/{i}" for i in range(len(texts))],
            "text": column(texts),
            **({"language": language} if language else {}),
            **columns,
        }
    )


def words(count, prefix="word"):
    """Different words, as numbers in letters."""
    letters = "abcdefghij"
    return [prefix + "".join(letters[int(digit)] for digit in str(i)) for i in range(count)]


def running(count):
    """Running text of different words with the two stop words that it needs."""
    return "The cause and " + " ".join(words(count)) + "."


def verdict(text, form="prose", **thresholds):
    _, dropped = clean_table(table(text), form=form, rules=Rules(**thresholds))
    return (dropped["reason"][0].as_py(), dropped["detail"][0].as_py()) if len(dropped) else ("", "")


def test_what_is_good_stays_in_order_with_its_columns():
    texts = [GOOD, "short", CHINESE + "\r\n", GOOD + "\n上一篇：心\nAll rights reserved."]
    kept, dropped = clean_table(
        table(*texts, language=["", "en", None, "fr"], score=[1, 2, 3, 4]), form="prose", rules=Rules()
    )
    assert kept.column_names == ["id", "text", "language", "score", "quality", "cut_lines"]
    assert kept["id"].to_pylist() == ["d/0", "d/2", "d/3"] and kept["score"].to_pylist() == [1, 3, 4]
    assert kept["text"].to_pylist() == [GOOD, CHINESE, GOOD]
    assert kept["language"].to_pylist() == ["en", "zh", "fr"]  # what is declared is believed
    assert kept["cut_lines"].to_pylist() == [0, 0, 2]
    assert all(0 < score <= 1 for score in kept["quality"].to_pylist())
    assert dropped.to_pylist() == [
        {"id": "d/1", "reason": "too short", "detail": "5 characters, at least 40", "text": "short"}
    ]


LAX = Rules(
    shortest=0, longest=10**9, replaced=10**9, mojibake=10**9, repeated_lines=1, fewest_words=0, most_words=10**9,
    shortest_mean_word=0, longest_mean_word=10**9, stop_words=0, lettered_words=0, digits=1, hashes=9, ellipses=9,
    bullet_lines=1, ellipsis_lines=1, short_lines=1, ended_lines=0, code_lines=1, urls=1, repeated_line_characters=1,
    top_ngrams=(1, 1, 1), repeated_ngrams=(1,) * 6, repeated_ngrams_zh=(1,) * 6, boilerplate=1, adverts=99,
)  # fmt: skip
"""Drops nothing but placeholder text."""


def lined(pattern):
    return "\n".join(pattern.format(word) for word in words(12))


@pytest.mark.parametrize(
    ("rule", "text", "reason"),
    [
        ("shortest", "Fever for three days now, and a cough.", "too short"),
        ("fewest_words", "Erythrocytosis notwithstanding, hospitalization.", "too short"),
        ("most_words", running(100_000), "too long"),
        ("longest", "a" * 1_000_001, "too long"),
        ("longest", "心" * 1_000_001, "too long"),
        ("mojibake", GOOD + " Ã© Ã©", "broken encoding"),
        ("mojibake", GOOD + " Ã\x83 Ã\x84", "broken encoding"),
        ("mojibake", GOOD + "锟斤拷锟斤拷", "broken encoding"),
        ("replaced", GOOD + " \ufffd", "broken encoding"),
        ("boilerplate", f"{GOOD[:75]}\nAll rights reserved by {GOOD[:60]}", "boilerplate"),
        ("adverts", "Buy now with free shipping! Add to cart. The cure for all that is known.", "advertisement"),
        ("adverts", "祖传秘方，药到病除，永不复发，加微信免费咨询，本品由名医研制而成，请放心使用。", "advertisement"),
        ("longest_mean_word", " ".join(words(12, "pneumonoultramicroscopic")), "word length"),
        ("shortest_mean_word", "a b c d e f g h i j k l", "word length"),
        ("stop_words", lined("Heart failure makes {} swell badly. Lungs fill, ankles swell, breath stops."),
         "not running text"),
        ("lettered_words", "The 3 5 " * 12 + "and 5.", "symbols"),
        ("digits", "The number 1234567890 of 1234567890 and 5.", "symbols"),
        ("hashes", running(40) + " #" * 12, "symbols"),
        ("ellipses", running(40) + "a ... b … c .... d …… e 。。。 f ...", "symbols"),
        ("urls", running(10) + " https://" + "x" * 80, "symbols"),
        ("bullet_lines", lined("• the line of {} and more"), "not running text"),
        ("ellipsis_lines", lined("The line of {} and more of it..."), "not running text"),
        ("short_lines", lined("{} is a word."), "not running text"),
        ("short_lines", lined("心肌{}"), "not running text"),
        ("ended_lines", lined("The line about {} goes on and on"), "not running text"),
        ("code_lines", lined("if (x) {{ {} = 1;"), "not running text"),
        ("repeated_lines", "One line.\nOne line.\nAnother line.", "repetition"),
        ("repeated_line_characters", running(30) + ("\n" + running(12)) * 2, "repetition"),
        ("top_ngrams", running(90) + " the fever" * 20, "repetition"),
        ("repeated_ngrams", running(90) + " " + running(30), "repetition"),
        ("repeated_ngrams_zh", CHINESE * 3, "repetition"),
    ],
)  # fmt: skip
def test_each_rule_drops_with_its_reason_and_alone(rule, text, reason):
    alone = dataclasses.replace(LAX, **{rule: getattr(Rules(), rule)})
    _, dropped = clean_table(table(GOOD, text, CHINESE), form="prose", rules=alone)
    assert dropped["id"].to_pylist() == ["d/1"] and dropped["reason"].to_pylist() == [reason]
    assert dropped["detail"][0].as_py()
    assert len(clean_table(table(text), form="prose", rules=LAX)[0]) == 1
    if rule not in ("shortest", "longest", "mojibake", "replaced"):
        for form in ("listing", "code") if rule != "repeated_lines" else ("code",):
            assert len(clean_table(table(text), form=form, rules=alone)[0]) == 1, form


def test_rules_that_need_length_leave_short_texts_alone():
    for rule, text in (
        ("stop_words", "Heart failure makes ankles swell badly."),
        ("top_ngrams", "the fever " * 40),
        ("repeated_ngrams", "the fever and cough " * 20),
        ("short_lines", "Fever.\nCough."),
        ("ended_lines", "Fever\nCough"),
    ):
        alone = dataclasses.replace(LAX, **{rule: getattr(Rules(), rule)})
        assert len(clean_table(table(text), form="prose", rules=alone)[0]) == 1, rule


def test_placeholder_text_is_dropped_and_a_long_article_on_advertising_is_not():
    assert verdict("Lorem ipsum dolor sit amet. " + GOOD)[0] == "placeholder"
    slogans = "Slogans such as buy now, add to cart and free shipping are studied. "
    assert verdict(slogans + GOOD)[0] == "advertisement"
    assert verdict(slogans + running(300), longest_mean_word=99, stop_words=0)[0] == ""


def test_details_carry_the_number_and_the_limit():
    assert verdict(GOOD, most_words=10) == ("too long", "60 words, at most 10")
    assert verdict(running(70) + " " + running(30))[1] == "30% in repeated 5-grams, at most 0.15"


def test_languages_wanted():
    both = GOOD[:75] + CHINESE[:30]
    texts = table(
        GOOD,
        CHINESE,
        both,
        "Der Patient wurde mit Fieber und Husten aufgenommen und die Lunge war entzündet.",
    )
    for wanted, left in (
        (("en", "zh"), ["en", "zh", "en-zh"]),
        (("zh",), ["zh"]),
        (("de", "en"), ["en", "de"]),
        ((), ["en", "zh", "en-zh", "de"]),
    ):
        kept, dropped = clean_table(texts, form="prose", rules=Rules(languages=wanted))
        assert kept["language"].to_pylist() == left
        assert set(dropped["reason"].to_pylist()) <= {"language"}
    assert (
        clean_table(texts, form="code", rules=Rules(languages=("zh",)))[0]["language"].to_pylist()
        == ["code"] * 4
    )


def test_boilerplate_is_cut_from_prose_only():
    text = f"Skip to main content\n{GOOD}\nShare on Facebook"
    for form, expected in (("prose", GOOD), ("listing", text), ("code", text)):
        assert clean_table(table(text), form=form, rules=Rules())[0]["text"].to_pylist() == [expected]


def test_medicine_that_looks_like_boilerplate_stays():
    lines = (
        "来源：本品为豆科植物甘草的干燥根和根茎。", "ICP证实升高后行去骨瓣减压术。", "根治术后无复发。",
        "A loading dose is followed by a maintenance dose; about 20% off-label use was seen.",
        "The choice between them is shared, and patients who share a room with others are screened.",
    )  # fmt: skip
    text = "\n".join((GOOD, *lines))
    assert clean_table(table(text), form="prose", rules=Rules())[0]["text"].to_pylist() == [text]


snippets = st.sampled_from(
    [
        GOOD,
        GOOD[:80],
        CHINESE,
        "Share on Facebook",
        "\r\n",
        "\n",
        " \n\n\n\n",
        "\x00",
        "é",
        "Buy now! ",
        "# ",
        "...",
        "",
        "12 ",
    ]
)
documents = st.lists(st.lists(snippets, max_size=8).map("".join), max_size=6)


@given(documents, st.sampled_from(["prose", "listing", "code"]))
@settings(deadline=None, max_examples=60)
def test_every_document_is_in_one_place_and_what_is_clean_stays_so(texts, form):
    given_ = table(*texts, language=[""] * len(texts))
    kept, dropped = clean_table(given_, form=form, rules=Rules())
    assert sorted(kept["id"].to_pylist() + dropped["id"].to_pylist()) == given_["id"].to_pylist()
    before = dict(zip(given_["id"].to_pylist(), texts, strict=True))
    assert [before[i] for i in dropped["id"].to_pylist()] == dropped["text"].to_pylist()
    again, gone = clean_table(kept.drop_columns(["quality", "cut_lines"]), form=form, rules=Rules())
    assert not len(gone) and again.drop_columns(["cut_lines"]).equals(kept.drop_columns(["cut_lines"]))
    assert not any(again["cut_lines"].to_pylist())
    # one by one, in chunks, or as a slice of something else: the same
    parts = [clean_table(given_.slice(i, 1), form=form, rules=Rules()) for i in range(len(texts))]
    if parts:
        assert pa.concat_tables([part[0] for part in parts]).equals(kept)
        assert pa.concat_tables([part[1] for part in parts]).equals(dropped)
        chunked = pa.concat_tables([given_.slice(i, 1) for i in range(len(texts))])
        assert clean_table(chunked, form=form, rules=Rules())[0].equals(kept)


@given(
    st.lists(snippets, min_size=1, max_size=6).map("".join),
    st.sampled_from(["wikipedia", "hpo", "python-code"]),
)
@settings(deadline=None, max_examples=60)
def test_one_document_of_the_starter_is_a_batch_of_one(text, source):
    form, label = SOURCES[source].form, room.language(text)
    kept, dropped = clean_table(table(text, language=[label]), form=form, rules=room.STARTER)
    document = Document(
        id="d/0", text=text, source=source, licence="", language="", category="", department="x"
    )
    cleaned, reason, detail = room.clean(document)
    if cleaned is None:
        assert dropped.to_pylist() == [{"id": "d/0", "reason": reason, "detail": detail, "text": text}]
    else:
        row = kept.to_pylist()[0]
        assert (cleaned.text, cleaned.language, cleaned.quality) == (
            row["text"],
            row["language"],
            row["quality"],
        )
        assert room.quality(cleaned.text, form) == cleaned.quality
        assert room.defect(cleaned.text, form) == ("", "")


def test_nulls_strings_and_nothing_at_all():
    texts = pa.table({"id": ["a", "b"], "text": pa.array([None, GOOD], type=pa.string())})
    kept, dropped = clean_table(texts, form="prose", rules=Rules())
    assert kept["id"].to_pylist() == ["b"] and dropped["id"].to_pylist() == ["a"]
    kept, dropped = clean_table(texts.slice(0, 0), form="prose", rules=Rules())
    assert len(kept) == len(dropped) == 0 and "language" in kept.column_names


# ---------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"digits": 1.5}, r"rules\.digits: 1\.5 is not in \[0, 1\]"),
        ({"shortest": -1}, r"rules\.shortest: -1 is not 0 or more"),
        ({"shortest": 10, "longest": 5}, "shortest 10 is above longest 5"),
        ({"shortest_mean_word": 11}, "shortest_mean_word 11 is above longest_mean_word 10"),
        ({"top_ngrams": (0.2,)}, "1 shares given, 3 are needed"),
        ({"repeated_ngrams": (0.2, 0.2, 0.2, 0.2, 0.2, 2)}, r"repeated_ngrams: 2 is not in \[0, 1\]"),
        ({"languages": ("en-zh",)}, "en-zh is not a language"),
    ],
)
def test_contradictions_are_refused(given_, message):
    with pytest.raises(UserError, match=message):
        Rules(**given_)


def test_every_rule_says_where_it_comes_from_and_is_in_the_docs():
    source = Path(room.__file__).with_name("rules.py").read_text()
    docs = Path(__file__).parents[2].joinpath("docs/corpus-cleaning.md").read_text()
    for field in dataclasses.fields(Rules):
        doc = source.split(f"    {field.name}: ")[1].split('"""')[1]
        assert any(
            word in doc
            for word in ("Gopher", "C4", "FineWeb", "MAP-CC", "Ours", "ours", "The same", "wanted")
        ), field.name
        assert f"`{field.name}`" in docs, field.name
