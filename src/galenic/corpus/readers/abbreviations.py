"""Medical abbreviations: gzip JSON from abbreviation to its meanings."""

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import gunzip, parse_json, texts
from galenic.corpus.readers.departments import GENERAL
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document

ENTRIES = 12
"""Abbreviations in one document."""


def abbreviation_documents(data: bytes, name: str, drop: Drop) -> list[Document]:
    """Reads abbreviations, several a document, in the file's (alphabetical) order.

    Raises:
        UserError: the file is not gzip or not a JSON object.
    """
    entries: list[tuple[str, list[str]]] = []
    for key, value in parse_json(gunzip(data, name), name, dict).items():
        if key.startswith("_"):  # the list's own version
            continue
        meanings = texts(value)
        if not meanings:
            detail = f"{name}: no meaning"
            drop(f"abbreviations/{key}", "abbreviations", "malformed record", detail, str(value))
            continue
        entries.append((key, meanings))
    return [
        Document(
            id=f"abbreviations/{start // ENTRIES:04d}",
            text="\n".join(
                f"{key} stands for {' or '.join(meanings)}."
                for key, meanings in entries[start : start + ENTRIES]
            ),
            source="abbreviations",
            licence=SOURCES["abbreviations"].licence,
            language="en",
            category="abbreviations",
            department=GENERAL,
        )
        for start in range(0, len(entries), ENTRIES)
    ]
