"""Cleaning: light repair, rules that drop a document with a reason, first-form scores of quality and value.

The rules for running text are those of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1 and table A1), as far
as they fit texts this short; listings (dictionary and terminology text) and code are only checked for length,
encoding and repeated lines. Nothing is normalised: the tokenizer does not, either.
"""

import re
from collections import Counter
from dataclasses import replace
from typing import Literal

from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document

SHORTEST = 40
"""Characters; less carries no statement."""
LONGEST = 20_000
"""Characters; more is a table or a dump."""

# C0 and C1 controls except tab and newline, zero-width and direction marks, BOM, noncharacters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060\ufeff\ufffe\uffff]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")
_SURROGATE = re.compile("[\ud800-\udfff]")
# UTF-8 read as Latin-1 or Windows-1252: the lead byte of a two- or three-byte sequence, then a continuation byte.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac[\u0080-\u00bf\u2018-\u203a\u0153\u2122\u02dc]"
)
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:['’-][^\W_\u3400-\u9fff]+)*")
_STOP_WORDS = frozenset("the be to of and that have with is are in a as for".split())


def repair(text: str) -> str:
    r"""Mends what is never meant: control characters, foreign line ends, trailing blanks, heaps of blank lines.

    >>> repair("a\r\nb \x00\n\n\n\n\nc")
    'a\nb\n\n\nc'
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    text = _TRAILING.sub("", _CONTROLS.sub("", text))
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n")


def han_share(text: str) -> float:
    """Returns the share of letters that are Han characters, in [0, 1]."""
    letters = len(_LETTER.findall(text))
    return len(_HAN.findall(text)) / letters if letters else 0.0


def language(text: str) -> str:
    """Labels a text by script: `zh` above 60% Han letters, `en` below 5%, `en-zh` between.

    Short Chinese texts keep Latin letters (units, drug names) and bilingual lists have two to five Latin letters for
    each Han character, hence the wide middle.
    """
    share = han_share(text)
    return "zh" if share > 0.6 else "en" if share < 0.05 else "en-zh"


def broken_encoding(text: str) -> str:
    """Returns what is wrong with the encoding, or an empty string."""
    if _SURROGATE.search(text):
        return "lone surrogate"
    replaced = text.count("\ufffd")
    if replaced:
        return f"{replaced} replacement characters"
    mojibake = len(_MOJIBAKE.findall(text))
    return f"{mojibake} sequences of UTF-8 read as Latin-1" if mojibake >= 2 else ""


def repeated_line_share(text: str) -> float:
    """Returns the share of non-blank lines that already occurred."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def top_ngram_share(words: list[str], n: int) -> float:
    """Returns the share of the words' characters covered by the most frequent n-gram (counted if it repeats)."""
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not grams:
        return 0.0
    gram, count = max(grams.items(), key=lambda item: (item[1] * sum(map(len, item[0])), item[0]))
    total = sum(map(len, words))
    return min(1.0, count * sum(map(len, gram)) / total) if count > 1 and total else 0.0


def defect(text: str, form: Literal["prose", "listing", "code"]) -> tuple[str, str]:
    """Returns (reason, detail) of the first rule a repaired text breaks, or two empty strings."""
    if len(text) < SHORTEST:
        return "too short", f"{len(text)} characters, at least {SHORTEST}"
    if len(text) > LONGEST:
        return "too long", f"{len(text)} characters, at most {LONGEST}"
    broken = broken_encoding(text)
    if broken:
        return "broken encoding", broken
    if form == "code":
        return "", ""
    if repeated_line_share(text) > 0.3:
        return "repetition", f"{repeated_line_share(text):.0%} of the lines repeat, at most 30%"
    return _prose_defect(text) if form == "prose" else ("", "")


def _prose_defect(text: str) -> tuple[str, str]:
    words = _WORD.findall(text)
    if len(words) < 8:
        return "too short", f"{len(words)} words, at least 8"
    if han_share(text) < 0.05:
        mean = sum(map(len, words)) / len(words)
        if not 3 <= mean <= 10:
            return "word length", f"mean word length {mean:.1f}, 3 to 10"
        stops = len(_STOP_WORDS.intersection(word.lower() for word in words))
        if stops < 2 and len(words) >= 30:  # a sentence may do without
            return "not running text", f"{stops} different stop words, at least 2"
    alphabetic = sum(_LETTER.search(word) is not None for word in words) / len(words)
    if alphabetic < 0.7:
        return "symbols", f"{alphabetic:.0%} of the words have a letter, at least 70%"
    # An n-gram of a short text is a large share of it by arithmetic, not by fault.
    if len(words) >= 100:
        for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
            share = top_ngram_share(words, n)
            if share > limit:
                return "repetition", f"top {n}-gram covers {share:.0%}, at most {limit:.0%}"
    return "", ""


def quality(text: str, form: Literal["prose", "listing", "code"]) -> float:
    """Scores a kept text in [0, 1] by how far it stays from the rules: length, repeated lines, words with letters.

    A first form: the mean of three margins. It ranks stubs below full paragraphs and says nothing about truth.
    """
    words = _WORD.findall(text)
    length = min(1.0, len(text) / 400)
    fresh = 1.0 if form == "code" else max(0.0, 1 - repeated_line_share(text) / 0.3)
    alphabetic = sum(_LETTER.search(word) is not None for word in words) / len(words) if words else 0.0
    return round((length + fresh + alphabetic) / 3, 4)


def clean(document: Document) -> tuple[Document | None, str, str]:
    """Repairs, checks, labels and scores a document.

    Returns:
        (document, "", "") if it is kept, (None, reason, detail) if not. `value` is how far its source is trusted in
        medicine.
    """
    source = SOURCES[document.source]
    text = repair(document.text)
    reason, detail = defect(text, source.form)
    if reason:
        return None, reason, detail
    label = "code" if source.form == "code" else language(text)
    value = source.trust if document.department else 0.0
    kept = replace(document, text=text, language=label, quality=quality(text, source.form), value=value)
    return kept, "", ""
