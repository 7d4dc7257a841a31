"""De-identification: names, dates, places and numbers of patients become tags such as `[NAME]`. An optional step.

    text --rules of identifiers.py, own names--> spans --names found are looked for everywhere--> joined --> tags

It lowers the risk of training on what identifies a person. It misses some (docs/corpus-deidentification.md says how
many), so it is one layer: it does not make a text anonymous, and it is no determination under 45 CFR 164.514.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from galenic.corpus.privacy.identifiers import ANY, HAN
from galenic.corpus.privacy.identifiers_en import ENGLISH, EPONYM, NOT_NAMES
from galenic.corpus.privacy.identifiers_zh import CHINESE, SURNAME
from galenic.corpus.texts import column
from galenic.runtime import UserError

CATEGORIES = (
    "NAME", "DATE", "AGE", "PHONE", "EMAIL", "URL", "IP", "ADDRESS", "HOSPITAL", "ID", "DEVICE", "VEHICLE",
)  # fmt: skip
"""What is replaced, in the order in which the first of two equally long finds names a span."""
_BIRTH = re.compile(r"(?i)(?:\bDOB|\bborn|birth\w*|出生\w*|生日|生于)\W*(?:on|于|date)?\W*$")
_FOUR_DIGITS = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")
_PART = re.compile(r"[A-Za-zÀ-ÿ][\w'’-]{2,}")


@dataclass(frozen=True, kw_only=True)
class Deidentification:
    """What is replaced and by what."""

    dates: Literal["tag", "year"] = "tag"
    """`tag` writes `[DATE]`; `year` keeps a year of four digits, `[DATE 2021]`, except in dates of birth."""
    names: tuple[str, ...] = ()
    """Text files with one name a line (patients, staff, towns), replaced wherever they stand: the best help."""
    models: tuple[str, ...] = ()
    """spaCy pipelines (installed packages or folders, such as `en_core_web_sm`) and `jieba`, whose names and places are
    added: they find what no label or title announces."""
    keep: tuple[str, ...] = ()
    """Categories left as they are."""

    def __post_init__(self) -> None:
        if self.dates not in ("tag", "year"):
            raise UserError(f"dates: '{self.dates}' is neither 'tag' nor 'year'")
        for category in self.keep:
            if category not in CATEGORIES:
                raise UserError(f"keep: unknown category '{category}'; they are {', '.join(CATEGORIES)}")


@dataclass(frozen=True)
class Find:
    """An identifier in a text, in characters."""

    start: int
    stop: int
    category: str


class Deidentifier:
    """Finds and replaces identifiers; the same text always gives the same result."""

    def __init__(self, config: Deidentification | None = None) -> None:
        """Reads the lists of names.

        Raises:
            UserError: a list is missing, not UTF-8 or empty; a model is not installed.
        """
        self.config = config or Deidentification()
        self._known = _Known(name for file in self.config.names for name in _read_names(file))
        self._models = [_jieba() if name == "jieba" else _spacy(name) for name in self.config.models]

    def find(self, text: str) -> list[Find]:
        """Returns what identifies somebody, in order, not overlapping."""
        rules = [*ANY, *ENGLISH, *CHINESE] if HAN.search(text) else [*ANY, *ENGLISH]
        finds = []
        for category, pattern, test in rules:
            group = "x" if "x" in pattern.groupindex else 0
            for match in pattern.finditer(text):
                if match.group(group) and (test is None or test(match.group(group))):
                    finds.append(Find(match.start(group), match.end(group), category))
        finds.extend(self._known.find(text))
        for model in self._models:
            finds.extend(model(text))
        names = {text[find.start : find.stop] for find in finds if find.category == "NAME"}
        finds.extend(_again(text, names))
        return _joined([find for find in finds if find.category not in self.config.keep])

    def replace(self, text: str) -> tuple[str, Counter[str]]:
        """Returns the text with tags in place of identifiers, and how many of each category there were."""
        pieces, last, counts = [], 0, Counter[str]()
        for find in self.find(text):
            pieces += [text[last : find.start], self._tag(text, find)]
            last = find.stop
            counts[find.category] += 1
        return "".join([*pieces, text[last:]]), counts

    def _tag(self, text: str, find: Find) -> str:
        if find.category == "DATE" and self.config.dates == "year":
            year = _FOUR_DIGITS.search(text[find.start : find.stop])
            if year and not _BIRTH.search(text[max(0, find.start - 40) : find.start]):
                return f"[DATE {year.group()}]"
        return "[AGE OVER 89]" if find.category == "AGE" else f"[{find.category}]"


def deidentify_table(table: Any, deidentifier: Deidentifier) -> tuple[Any, dict[str, int]]:
    """Replaces identifiers in the column `text` of a `pyarrow.Table`.

    Returns:
        (the table with new texts, category -> how many were replaced).
    """
    counts: Counter[str] = Counter()
    texts = []
    for text in table.column("text").to_pylist():
        replaced, found = deidentifier.replace(text)
        texts.append(replaced)
        counts.update(found)
    place = table.schema.get_field_index("text")
    return table.set_column(place, "text", column(texts)), {c: counts[c] for c in CATEGORIES if counts[c]}


# ---------------------------------------------------------------------------- models

_PERSON = frozenset(["nr", "nrt", "nrfg"])
_GIVEN = _PERSON | {"nz", "ns"}
"""Jieba's tags of persons; and those of given names that it takes for brands and places (永福, 建国)."""
_LABELS = {"PERSON": "NAME", "GPE": "ADDRESS", "LOC": "ADDRESS", "FAC": "ADDRESS"}


def _spacy(name: str) -> Callable[[str], Iterator[Find]]:
    """Returns what finds persons and places by a spaCy pipeline."""
    try:
        nlp = import_module("spacy").load(
            name, exclude=["parser", "tagger", "attribute_ruler", "lemmatizer", "senter"]
        )
    except ImportError:
        raise UserError(f"models: '{name}' needs spaCy; pip install spacy, or leave it out") from None
    except OSError:
        raise UserError(
            f"models: spaCy knows no pipeline '{name}'; install it, name its folder, or leave it out"
        ) from None
    nlp.max_length = 10**9  # that limit guards the parser's memory

    def find(text: str) -> Iterator[Find]:
        han = len(HAN.findall(text))
        if han == 0 if nlp.lang == "zh" else 5 * han > len(text):
            return
        for entity in nlp(text).ents:
            category = _LABELS.get(entity.label_)
            words = {word.lower() for word in _PART.findall(entity.text)}
            eponym = category == "NAME" and EPONYM.match(text, entity.end_char)
            if category and not eponym and (nlp.lang == "zh" or not words <= NOT_NAMES):
                yield Find(entity.start_char, entity.end_char, category)

    return find


def _jieba() -> Callable[[str], Iterator[Find]]:
    """Returns what finds Chinese names by jieba's tagger."""
    try:
        jieba, tagger = import_module("jieba"), import_module("jieba.posseg")
    except ImportError:
        raise UserError("models: 'jieba' is not installed; pip install jieba, or leave it out") from None
    jieba.setLogLevel("ERROR")
    # By default it would read what somebody else may have put in /tmp/jieba.cache.
    with tempfile.TemporaryDirectory() as folder:
        jieba.dt.tmp_dir = folder
        jieba.initialize()

    def find(text: str) -> Iterator[Find]:
        yield from _tagged_names([tuple(pair) for pair in tagger.cut(text)] if HAN.search(text) else [])

    return find


def _tagged_names(words: list[tuple[str, str]]) -> Iterator[Find]:
    """Finds names in (word, part of speech) pairs: a word tagged as one, or a surname and what was split off it."""
    start = 0
    for place, (word, flag) in enumerate(words):
        # It takes much for a name that none is: 查体, 神清. They have no surname.
        if flag in _PERSON and len(word) > 1 and SURNAME.match(word):
            yield Find(start, start + len(word), "NAME")
        if SURNAME.fullmatch(word):
            given, flags = "", {flag}
            for following, tag in words[place + 1 : place + 3]:
                if len(given) + len(following) > 2 or not HAN.match(following):
                    break
                given, flags = given + following, flags | {tag}
            if given and (len(word) == 2 or flags & _GIVEN):
                yield Find(start, start + len(word) + len(given), "NAME")
        start += len(word)


# ---------------------------------------------------------------------------- names


def _again(text: str, names: set[str]) -> Iterator[Find]:
    """Finds other mentions of names: of an English one each capitalised part, of a Chinese one the whole."""
    parts: set[str] = set()
    for name in names:
        if HAN.search(name):
            parts.update([name] if len(name) >= 2 else [])
        else:
            parts.update(p for p in _PART.findall(name) if p[0].isupper() and p.lower() not in NOT_NAMES)
    if not parts:
        return
    words = "|".join(sorted(map(re.escape, parts | {p.upper() for p in parts}), key=lambda p: (-len(p), p)))
    for match in re.finditer(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])", text):
        yield Find(match.start(), match.end(), "NAME")


class _Known:
    """Names of a list, found by their first two characters; Latin ones as whole words, in any case."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_start: dict[str, list[str]] = {}
        for name in sorted({name.lower() for name in names}, key=lambda name: (-len(name), name)):
            self._by_start.setdefault(name[:2], []).append(name)

    def find(self, text: str) -> Iterator[Find]:
        if not self._by_start:
            return
        small = text.lower()
        if len(small) != len(text):  # a few letters change their length
            small = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        for place in range(len(small) - 1):
            for name in self._by_start.get(small[place : place + 2], ()):
                stop = place + len(name)
                if small.startswith(name, place) and _edge(small, place) and _edge(small, stop):
                    yield Find(place, stop, "NAME")
                    break


def _edge(text: str, place: int) -> bool:
    """True if no Latin word goes on across this place."""
    if not 0 < place < len(text):
        return True
    before, after = text[place - 1], text[place]
    return not (before.isalnum() and after.isalnum()) or bool(HAN.match(before) or HAN.match(after))


def _read_names(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    names = [line.strip() for line in lines if len(line.strip()) >= 2]
    if not names:
        raise UserError(f"{file}: no names; expected one a line, of at least two characters")
    return names


def _joined(finds: list[Find]) -> list[Find]:
    """Joins finds that overlap; the longest of them names the whole, then the order of `CATEGORIES`."""
    joined: list[Find] = []
    length = 0
    for find in sorted(finds, key=lambda f: (f.start, -f.stop, CATEGORIES.index(f.category))):
        if joined and find.start < joined[-1].stop:
            last = joined[-1]
            longer = find.stop - find.start > length
            length = max(length, find.stop - find.start)
            joined[-1] = Find(
                last.start, max(last.stop, find.stop), find.category if longer else last.category
            )
        else:
            joined.append(find)
            length = find.stop - find.start
    return joined
