"""Every number of `measure` against a plain count of it, and `tidy` against regular expressions."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from galenic.corpus.cleaning import characters as c
from galenic.corpus.cleaning import counting as k
from galenic.corpus.cleaning import measure as m
from galenic.corpus.cleaning import phrases
from galenic.corpus.cleaning.tidy import FORBIDDEN, tidy
from galenic.corpus.texts import buffers, column

HAN = r"(?:(?=[^\W\d_])[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af])"
OTHER = rf"(?:(?!{HAN})[^\W_])"
WORD = re.compile(rf"{HAN}|{OTHER}+(?:['’-]{OTHER}+)*")
LETTER = re.compile(r"[^\W\d_]")
URL = re.compile(r"(?<![^\W_])(?:https?://|www\.)[!#-;=?-~]*")
_CONTINUES = f"[{c.CONTINUING}]"
MOJIBAKE = re.compile(
    f"[\xc2\xc3][\x80-\xbf]|\xe2\u20ac{_CONTINUES}|[\xe5-\xe8]{_CONTINUES}{{2}}|\u9286|锟斤拷"
)

TOKENS = (
    "the of and With cell fever 39.5 5-year don't x 心 心肌梗死 的 発熱 カナ 열 жар π ğ ﬁ é e\u0301 Ⅷ ² ٣ 𠀀 ䷀ 😀 _ # "
    "... … …… 。。。 .. "
    "' ’ - -- • * 。 ！ ? ; { } http://a.b/c https:// www.x ahttp://y http Ã© â€œ å¿ƒ 锟斤拷 銆 \ufffd \u3000 \xa0 "
    "a b c d e f g h i j"
).split(" ")
texts = st.lists(
    st.sampled_from(TOKENS) | st.sampled_from([" ", " ", " ", "\n", "\n", "\t", ""]) | st.text(max_size=3),
    max_size=60,
).map("".join)


def oracle(text: str) -> dict[str, int | list[int]]:
    words = WORD.findall(text)
    lower = [word.lower() for word in words]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeats = [line for i, line in enumerate(lines) if line in lines[:i]]

    def top(n: int) -> int:
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        return max((count * sum(map(len, gram)) for gram, count in counts.items() if count > 1), default=0)

    def repeated(n: int) -> int:
        seen, covered = set(), set()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            covered |= set(range(i, i + n)) if gram in seen else set()
            seen.add(gram)
        return sum(len(words[i]) for i in covered)

    return {
        "characters": len(text),
        "words": len(words),
        "word_characters": sum(map(len, words)),
        "lettered_words": sum(LETTER.search(word) is not None for word in words),
        "letters": len(LETTER.findall(text)),
        "digits": len(re.findall(r"\d", text)),
        "replaced": text.count("\ufffd"),
        "mojibake": len(MOJIBAKE.findall(text)),
        "stop_words": len(set(lower) & set(c.STOP_WORDS)),
        "stop_word_uses": sum(word in c.STOP_WORDS for word in lower),
        "lines": len(lines),
        "line_characters": sum(map(len, lines)),
        "repeated_lines": len(repeats),
        "repeated_line_characters": sum(map(len, repeats)),
        "short_lines": sum(len(line.encode()) <= k.SHORT_LINE for line in lines),
        "ellipsis_lines": sum(line.endswith(("...", "。。。", "…")) for line in lines),
        "bullet_lines": sum(line[0] in c.BULLETS for line in lines),
        "ended_lines": sum(line[-1] in c.ENDING for line in lines),
        "code_lines": sum(line[-1] in "{};" for line in lines),
        "hashes": text.count("#"),
        "ellipses": len(re.findall(r"\.{3,}|。{3,}|…+", text)),
        "url_characters": sum(map(len, URL.findall(text))),
        "han": len(re.findall(HAN, text)),
        "top": [top(n) for n in (2, 3, 4)],
        "repeated": [repeated(n) for n in range(5, 11)],
    }


def found(texts: list[str], **words):
    rows = m.measure(*buffers(column(texts)), **words)
    return [
        {
            name: row["scripts"][k.HAN] if name == "han" else row[name].tolist()
            for name in [*oracle(""), *(["scripts"] if words else [])]
        }
        for row in rows
    ]


@given(st.lists(texts, min_size=1, max_size=3))
@example(
    [
        "a a a a a a a a a a a a",
        "the cat sat on the mat and the cat sat on the mat",
        "心心心心心心心心心心心心",
    ]
)
@example(["a b c d e f g h i j k l m n o p a b c d e f g h i j k x b c d e f g h i j k l m"])
@example([""])
@settings(deadline=None, max_examples=400)
def test_every_number_is_what_a_plain_count_says(several):
    assert found(several) == [oracle(text) for text in several]


@given(texts)
@settings(deadline=None, max_examples=100)
def test_letters_are_counted_for_one_script_each(text):
    row = m.measure(*buffers(column([text])))[0]
    assert row["scripts"].sum() == row["letters"] and row["scripts"][0] == 0


def test_every_code_point_is_classed_as_python_does():
    kinds = c.tables().kinds
    for point in [*range(0x3100), *range(0xF900, 0x10600), 0x1D7D8, 0x20000, 0xE0001, 0x10FFFF]:
        if not 0xD800 <= point < 0xE000:
            character = chr(point)
            assert bool(kinds[point] & k.WORD) == character.isalnum(), hex(point)
            assert bool(kinds[point] & k.DIGIT) == character.isdecimal()
            assert bool(kinds[point] & k.SPACE) == character.isspace()
            assert bool(kinds[point] & 15) == (character.isalnum() and not character.isdecimal())


def test_scripts():
    names = (
        "latin",
        "han",
        "kana",
        "hangul",
        "cyrillic",
        "greek",
        "arabic",
        "hebrew",
        "indic",
        "thai",
        "other",
    )
    text = "aé 心 カの 열 жЖ πά ع א अ ก አ"
    row = m.measure(*buffers(column([text])))[0]
    assert k.SCRIPTS == names
    assert row["scripts"].tolist() == [0, 2, 1, 2, 1, 2, 2, 1, 1, 1, 1, 1]


def test_slices_of_a_column_and_long_texts():
    whole = column(["first", "心脏 second text", "the third is a long text " * 9, ""])
    rows = m.measure(*buffers(whole[1:]))
    assert rows["characters"].tolist() == [14, 225, 0] and rows["words"].tolist() == [4, 54, 0]
    rows = m.measure(*buffers(whole[1:]), longest=30)
    assert rows["characters"].tolist() == [14, 225, 0] and rows["words"].tolist() == [4, 0, 0]


# ---------------------------------------------------------------------------- tidy


def mended(text: str) -> str:
    """Line ends, controls and trailing blanks; no line goes yet."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    return re.sub(r"[ \t]+$", "", re.sub(f"[{FORBIDDEN}]", "", text), flags=re.MULTILINE)


def stacked(text: str) -> str:
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def is_boilerplate(line: str) -> bool:
    seen = line.lstrip(" \t").encode().lower()
    return (
        len(seen) <= phrases.LONGEST_CONTAINING
        and any(phrase.encode() in seen for phrase in phrases.ANYWHERE)
    ) or (
        len(seen) <= phrases.LONGEST_BEGINNING
        and any(seen.startswith(phrase.encode()) for phrase in phrases.AT_THE_START)
    )


untidy = st.lists(
    st.sampled_from(
        [
            *"ab \t\n\r\x00\x85\u2028\u2029\u200b\ufeff\uffff心，é",
            "\r\n",
            "\n\n\n",
            "Ã\x83",
            "\u2027",
            "\u202f",
        ]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)
lines = st.lists(
    st.sampled_from(
        [
            "Fever for 3 days.", "", "  ", "\tWe use COOKIES to improve", "Share on", "they share on the ward",
            "上一篇：心", "心脏病", "责任编辑：心", "lorem ipsum dolor", "Buy now! buy now", "立即购买，包邮",
            "x" * 250 + " cookie policy", "share one", "home > x" + "y" * 90, "© 2024", "a© 2024",
        ]
    ),
    max_size=12,
).map("\n".join)  # fmt: skip


def tidied(texts: list[str], cut: bool):
    data, starts, rows = tidy(*buffers(column(texts)), cut=cut)
    return [bytes(data[a:b]).decode() for a, b in pairwise(starts)], rows


@given(st.lists(untidy, min_size=1, max_size=3))
@example(["\u2029\u2029\u2029a \r\r\n\x00\r\n\n\n\nb\u202d \t", "\n\n", " \x00\t"])
@settings(deadline=None, max_examples=400)
def test_repair_is_what_regular_expressions_do(several):
    assert tidied(several, cut=False)[0] == [stacked(mended(text)) for text in several]


@given(st.lists(lines, min_size=1, max_size=3))
@example(["Fever.\n\n\nShare on\n\n\nCough."])
@settings(deadline=None, max_examples=300)
def test_lines_of_boilerplate_go_and_are_counted(several):
    left, rows = tidied(several, cut=True)
    for text, result, row in zip(several, left, rows, strict=True):
        all_lines = mended(text).split("\n")
        gone = [line for line in all_lines if is_boilerplate(line)]
        assert result == stacked("\n".join(line for line in all_lines if not is_boilerplate(line)))
        assert row["cut_lines"] == len(gone) and row["cut_characters"] == sum(map(len, gone))
        assert row["placeholders"] == text.count("lorem ipsum")
        assert row["adverts"] == sum(phrase in text.lower() for phrase in phrases.ADVERTS)
        assert tidied([result], cut=True)[0] == [result]


def test_a_sequence_counts_whatever_stands_before_it():
    several = ["å0銆", "Ã銆", "â€銆", "å锟斤拷", "Â锟斤拷"]
    assert [row["mojibake"] for row in found(several)] == [1, 1, 1, 1, 1]
    assert found(several) == [oracle(text) for text in several]


def test_a_sequence_that_lost_its_control_character_is_remembered():
    assert tidied(["CafÃ\x83 Â\x92 Ã© \x92 a\x85"], cut=False)[1]["lost_mojibake"].tolist() == [2]


@pytest.mark.parametrize("name", ["ANYWHERE", "AT_THE_START", "PLACEHOLDERS", "ADVERTS"])
def test_phrases_are_in_lower_case_and_once(name):
    listed = getattr(phrases, name)
    assert len(set(listed)) == len(listed)
    assert [phrase.encode().lower().decode() for phrase in listed] == list(listed)
    assert name != "ADVERTS" or len(listed) <= 64


@given(st.text(alphabet="abuy nowshrek立即购买", max_size=30), st.sampled_from(phrases.ADVERTS))
@settings(deadline=None, max_examples=100)
def test_the_automaton_finds_what_a_search_finds(text, phrase):
    text = text[: len(text) // 2] + phrase + text[len(text) // 2 :]
    automaton = phrases.automaton()
    row, seen = 0, np.uint64(0)
    for byte in text.encode():
        row = int(automaton.move[row + int(automaton.symbol[byte])]) >> 1
        seen |= automaton.adverts[row // automaton.symbols]
    assert [bool(int(seen) >> i & 1) for i in range(len(phrases.ADVERTS))] == [
        p in text for p in phrases.ADVERTS
    ]
