r"""What an answer in free text says, and whether it is right: pure functions, English and Chinese.

    option     the letter behind "the answer is", "答案", in \boxed{}, alone on a line, in bold, or the option's text
    label      one of a few words (yes / no / maybe, entailment ..., a department)
    number     behind "the final answer is"; inside [low, high]
    date       a day, in any usual writing; US order where only numbers stand there
    weeks      weeks and days
    diagnosis  one of the first five of a list has one of the accepted names (the disease, a synonym, a superordinate)

An answer that says nothing, or two different things, is **unanswered**: it counts as wrong, and is told apart. A text
whose analysis goes through all options is read at its markers only, so that "A is wrong" is no answer.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from galenic.align.rewards.rules import normal, option, same_diagnosis
from galenic.align.rewards.units import quantities, unified

TOP = 5
"""Diagnoses of a list that count."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was made of an answer."""

    right: float
    """Share of the points, in [0, 1]."""
    read: str = ""
    """What the text was taken to say."""
    problem: Literal["", "none", "several"] = ""
    """Why it is unanswered: it says nothing that was asked for, or more than one thing."""


def verdict(found: Sequence[str], right: bool, most: int = 1) -> Verdict:
    """Judges what was read: nothing, or more than `most` different things, is unanswered."""
    problem = "none" if not found else "several" if len(set(found)) > most else ""
    return Verdict(right=float(right and not problem), read=", ".join(found), problem=problem)


# ---------------------------------------------------------------------------- markers

_IS = r"(?:\s*\([^()\n]*\))?\s*(?:(?:is|are|would be|should be|must be)\b\s*:?|[:=])"
_ANSWER = re.compile(
    rf"\\boxed\s*\{{|\banswers?\b{_IS}|\bcorrect\s+(?:option|choice|letter|diagnosis|label)s?\b{_IS}"
    r"|[\"'](?:answer|select)[\"']\s*:|\b(?:I|we)\s+(?:would\s+)?(?:choose|pick|select)\b"
    r"|(?:答案|正确选项)\s*】?\s*(?:应该|应当|应|就)?\s*(?:是|为|选)?\s*:?|(?:故|应|因此|所以|本题|应该|应当|我)选择?(?!项)\s*:?"
    r"|(?:关系|科室|诊断)\s*(?:是|为)?\s*:",
    re.IGNORECASE,
)
_FINAL = re.compile(
    r"\\boxed\s*\{|\bfinal answer\b\s*(?:is\b)?\s*:?|最终答案\s*(?:是|为)?\s*:?", re.IGNORECASE
)


def _plain(text: str) -> str:
    """Returns a text in one writing, without marks of emphasis."""
    return re.sub(r"[*_`$]+", "", unified(text))


def marked(text: str, markers: re.Pattern[str] = _ANSWER) -> list[str]:
    """Returns what stands behind each marker of an answer, to the end of its line (or the next line that has text)."""
    found = []
    for match in markers.finditer(text):
        rest = text[match.end() :].lstrip(" \t:\n")
        part = rest.split("}")[0] if match[0].startswith("\\") else rest.split("\n")[0]
        found.append(part.strip())
    return found


# ---------------------------------------------------------------------------- options

_JOIN = r"(?:\s*[)\]}]?\s*(?:[,、/&+]|and\b|or\b|和|或|及|与)?\s*(?:and\b|or\b)?\s*[(\[{]?\s*)"
_CLOSE = "A?B?C?D?E?F?G?H?I?J?(?=\\s*(?:$|[.,;:)\\]}。，；\"'\\n]|[\u4e00-\u9fff]))"  # "ABD", but no "ACE inhibitor"
_RUN = (
    rf"(?:(?=[A-J]{{2}}){_CLOSE}"
    rf"|[A-J](?:{_JOIN}[A-J](?![A-Za-z'])(?!\s*(?:is|are|was|does|错|不|是|项)))*(?![A-Za-z']))"
)
_OPENING = r"[\s\"'“(\[{]*(?:(?:option|choice|letter)\b|选项|选择|选)?\s*[:(\[{]?\s*"
_NAMED = re.compile(rf"{_OPENING}({_RUN})")
_SMALL = re.compile(rf"{_OPENING}([a-j])\s*(?:[)\]}}.:,]|$)")
_LINE = re.compile(rf"^{_OPENING}({_RUN})\s*(?:[)\]}}.:、,，]|$)", re.MULTILINE)
_BOLD = re.compile(rf"(?:\*\*|__)[(\[]?({_RUN})[)\].:]?(?:\*\*|__)")
_STATED = re.compile(
    r"(?<![A-Za-z])([A-J])[)\]]?\s*(?:is|are)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best|true)\b"
    r"|(?<![A-Za-z])([A-J])\s*(?:选项|项)?\s*(?:是|为|最)?正确"
)


def chosen(text: str, options: Mapping[str, str]) -> list[str]:
    """Returns the letters of the options that a text gives as its answer, sorted; two mean that it gives two.

    Args:
        text: all that was said.
        options: letter -> text of the option.
    """
    emphasised, text = unified(text), _plain(text)
    found: set[str] = set()
    parts = marked(text)
    for part in parts:
        letters = _NAMED.match(part) or _SMALL.match(part)
        found |= set(re.findall("[A-J]", letters[1].upper())) if letters else _by_text(part, options)
    if found:
        return sorted(found & set(options))
    labels = {tuple(re.findall("[A-J]", match[1])) for match in _LINE.finditer(text)}
    found = (
        set(labels.pop()) if len(labels) == 1 else set()
    )  # more of them: the text goes through the options
    for match in _BOLD.finditer(emphasised):
        found |= set(re.findall("[A-J]", match[1]))
    found |= {letter for match in _STATED.finditer(text) for letter in match.groups() if letter}
    if not found and not labels:
        found = _by_text(text, options)
    return sorted(found & set(options))


def _by_text(text: str, options: Mapping[str, str]) -> set[str]:
    letters = list(options)
    index = option(text.strip(" .\"'"), list(options.values())) if text.strip() else None
    return set() if index is None else {letters[index]}


def score_option(text: str, options: Mapping[str, str], answer: Sequence[str]) -> Verdict:
    """Scores a multiple-choice answer; where several options are right, all of them and no others are needed."""
    found = chosen(text, options)
    return verdict(found, set(found) == set(answer), most=max(1, len(options) if len(answer) > 1 else 1))


# ---------------------------------------------------------------------------- labels


def named(text: str, labels: Sequence[str]) -> list[str]:
    """Returns the labels that a text gives as its answer.

    Those behind its markers; without any, those that it begins with or that are all of its last line; without any, and
    without a marker, all that are in it.
    """
    text = _plain(text)
    parts = [part for part in marked(text) if part]
    found = [label for part in parts for label in _labels(part, labels)]
    if not found:
        lines = [normal(line) for line in text.splitlines() if line.strip()]
        if lines:
            found = _leading(lines[0], labels)[0]
            last, rest = _leading(lines[-1], labels)
            found += [] if rest else last
    if not found and not parts:
        found = _labels(text, labels)
    return list(dict.fromkeys(found))


def _labels(text: str, labels: Sequence[str]) -> list[str]:
    """Returns the labels in a text, none that stands in a longer one only; what follows a first one explains it."""
    said = normal(text)
    if re.match(r"(?:not|isnt|neither)\b|不是|并非", said):
        return []
    found, rest = _leading(said, labels)
    if found:
        return found
    for label in sorted(labels, key=len, reverse=True):
        pattern = _word(label)
        if pattern.search(rest):
            found.append(label)
            rest = pattern.sub(" ", rest)
    return found


def _leading(said: str, labels: Sequence[str]) -> tuple[list[str], str]:
    """Returns the labels that a normal text begins with, and what is left behind them."""
    found, rest = [], said
    while True:
        label = next((one for one in sorted(labels, key=len, reverse=True) if _word(one).match(rest)), None)
        if label is None:
            return found, rest
        found.append(label)
        rest = re.sub(r"^\s*(?:(?:or|and)\b|或者?|和)?\s*", "", rest[len(normal(label)) :])


def _word(label: str) -> re.Pattern[str]:
    name = re.escape(normal(label))
    return re.compile(rf"\b{name}\b" if label.isascii() else name)


def score_label(text: str, labels: Sequence[str], answer: str) -> Verdict:
    """Scores an answer that is one of a few labels."""
    found = named(text, labels)
    return verdict(found, found == [answer])


# ---------------------------------------------------------------------------- numbers and dates

_BELOW = re.compile(r"(?:/|\bout of|\bper)\s*-?[\d.]+", re.IGNORECASE)


def _finals(text: str) -> list[str]:
    """Returns where a calculated answer is to be read: behind its markers, else the last line, else all."""
    text = _plain(text)
    for found in (marked(text, _FINAL), marked(text)):
        if found:
            return found
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1:]


def numbers(text: str) -> list[float]:
    """Returns the different numbers that a text gives as its answer.

    Units are passed over; so is what a number is out of ("3 out of 5", "72 mL/min/1.73 m^2") and all before the last
    "=" of a calculation.
    """
    found = []
    for part in _finals(text):
        part = _BELOW.sub(" ", part.rsplit("=", 1)[-1])
        found += [float(quantity.value) for quantity in quantities(part)]
    return list(dict.fromkeys(found))


def score_number(text: str, low: float, high: float) -> Verdict:
    """Scores a number: right inside [low, high], the ends included."""
    found = numbers(text)
    inside = len(found) == 1 and min(low, high) <= found[0] <= max(low, high)
    return verdict([f"{number:g}" for number in found], inside)


_MONTHS: list[str] = list("jan feb mar apr may jun jul aug sep oct nov dec".split())
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})[a-z]*"
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<!\d)(?P<y>\d{4})\s*[-/.年]\s*(?P<m>\d{1,2})\s*[-/.月]\s*(?P<d>\d{1,2})(?!\d)",
        r"(?<!\d)(?P<m>\d{1,2})\s*[-/.]\s*(?P<d>\d{1,2})\s*[-/.]\s*(?P<y>\d{4}|\d{2})(?!\d)",
        rf"\b{_MONTH}\.?\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<y>\d{{4}})",
        rf"(?<!\d)(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}\.?,?\s+(?P<y>\d{{4}})",
    )
)


def dates(text: str) -> list[datetime.date]:
    """Returns the different days in a text; one written in numbers that begin with no year has the month first."""
    found = []
    text = _plain(text)
    for pattern in _DATES:
        for match in pattern.finditer(text):
            parts = match.groupdict()
            month = _MONTHS.index(parts["month"].lower()) + 1 if parts.get("month") else int(parts["m"])
            year = int(parts["y"]) + (2000 if len(parts["y"]) == 2 else 0)
            try:
                found.append(datetime.date(year, month, int(parts["d"])))
            except ValueError:
                continue
        text = pattern.sub(" ", text)
    return list(dict.fromkeys(found))


def score_date(text: str, answer: datetime.date) -> Verdict:
    """Scores a date: the same day."""
    found = list(dict.fromkeys(day for part in _finals(text) for day in dates(part)))
    return verdict([day.isoformat() for day in found], found == [answer])


_WEEKS = re.compile(r"(\d+)\s*(?:weeks?|wks?|周)\W{0,6}(?:and\s+)?(\d+)\s*(?:days?|天|日)", re.IGNORECASE)


def weeks(text: str) -> list[tuple[int, int]]:
    """Returns the different spans of weeks and days in a text."""
    return list(dict.fromkeys((int(a), int(b)) for a, b in _WEEKS.findall(_plain(text))))


def score_weeks(text: str, answer: tuple[int, int]) -> Verdict:
    """Scores a span of weeks and days: the same one."""
    found = list(dict.fromkeys(span for part in _finals(text) for span in weeks(part)))
    return verdict([f"{a} weeks {b} days" for a, b in found], found == [answer])


# ---------------------------------------------------------------------------- diagnoses

_ENTRY = re.compile(r"^\s*(?:\(?\d{1,2}\s*[.):、]|[-•*]\s|第?[一二三四五]\s*[、.:])\s*(.+)$", re.MULTILINE)


def listed(text: str) -> list[str]:
    """Returns the entries of a list, at most the first five; of a text without a list, its lines."""
    text = unified(text)
    entries = _ENTRY.findall(text)
    if not entries:
        parts = marked(_plain(text)) or [text]
        entries = [entry for part in parts for entry in re.split(r"[\n;、]", part)]
    entries = [re.sub(r"[*_`]+", "", entry).strip(" \t;.。") for entry in entries]
    return [entry for entry in entries if entry][:TOP]


def names(entry: str) -> list[str]:
    """Returns what an entry may be the name of: all of it, without its explanation, without or only its brackets."""
    head = re.split(r"\s[-–—]\s|[:;。]|,\s*(?:because|due to|which|given|as)\b", entry)[0]
    inside = re.findall(r"\(([^()]+)\)", head)
    return [part.strip() for part in (entry, head, re.sub(r"\([^()]*\)", " ", head), *inside) if part.strip()]


def score_diagnosis(text: str, accepted: Sequence[str], most: int = TOP) -> Verdict:
    """Scores a list of diagnoses: right if one of the first ones has an accepted name.

    Strict: names are compared without case, articles and punctuation ("infarction, myocardial" too), not by meaning;
    what says the same in other words is for a judge.

    Args:
        text: all that was said.
        accepted: the disease, its synonyms, and superordinates that count.
        most: how many of the list count.
    """
    entries = listed(text)[:most]
    truth = "|".join(name.replace("|", " ") for name in accepted)
    right = any(same_diagnosis(name, truth) for entry in entries for name in names(entry))
    return verdict(entries, right, most=most)
