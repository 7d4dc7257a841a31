"""CC-CEDICT: `Traditional Simplified [pin1 yin1] /sense/sense/`, one entry a line, gzip text."""

import re

from galenic.corpus.readers import Drop, Line
from galenic.corpus.readers.bytes import decode, gunzip
from galenic.corpus.readers.departments import GENERAL
from galenic.corpus.starter.holdout import Pair

_ENTRY = re.compile(r"(?P<traditional>\S+) (?P<simplified>\S+) \[(?P<pinyin>[^\]]*)\] /(?P<senses>.+)/\s*")
_MEDICAL = re.compile(
    r"\((?:medicine|TCM|med\.|anatomy|pharm|pathology|physiology)\b|\b(?:disease|syndrome|inflammation|cancer|tumor|"
    r"surgery|surgical|symptom|fever|therapy|vaccine|infection|hepatitis|diabetes|pneumonia|antibiotic|artery|vein|"
    r"kidney|liver|lung|stomach|intestine|clinic|patient|physician|nurse|drug|medicine|virus|bacteria)\b",
    re.IGNORECASE,
)
# Cross-references, names and vulgar words teach a model of this size nothing.
_SKIPPED = re.compile(
    r"variant of|^see |surname |abbr\. for|old name for|\((?:vulgar|slang|dialect)|used in "
)
_INLINE_PINYIN = re.compile(r"\[[^\]]*\]")
_OTHER_SCRIPT = re.compile(r"(\S+)\|(\S+)")


MEDICAL = "medical dictionary"
"""Group of the entries whose English is about medicine."""


def cedict_lines(data: bytes, name: str, drop: Drop) -> list[Line]:
    """Reads dictionary entries in the file's order, the medical ones in a group of their own.

    Raises:
        UserError: the file is not gzip or not UTF-8.
    """
    lines = []
    for number, line in enumerate(decode(gunzip(data, name), name).splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        match = _ENTRY.fullmatch(line)
        if match is None:
            drop(f"cedict/line {number}", "cedict", "malformed record", f"{name}:{number}: no entry", line)
            continue
        senses = [s for s in match["senses"].split("/") if s.strip() and not _SKIPPED.search(s)]
        if not senses:
            continue
        # A sense may cite a word as `traditional|simplified[pin1 yin1]`: the simplified form is enough.
        english = _OTHER_SCRIPT.sub(r"\2", _INLINE_PINYIN.sub("", "; ".join(senses[:4]))).strip()
        medical = _MEDICAL.search(english) is not None
        word = match["simplified"]
        lines.append(
            Line(
                pair=Pair(
                    id=f"cedict/{number:06d}",
                    source="cedict",
                    zh=word,
                    en=english,
                    department=GENERAL if medical else "",
                ),
                text=f"{word} [{match['pinyin']}]: {english}",
                group=MEDICAL if medical else "dictionary",
            )
        )
    return lines
