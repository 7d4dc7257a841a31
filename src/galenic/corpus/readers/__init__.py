"""Readers: one file per format, from bytes to records.

    wheel member --bytes--> reader --> Document, Entity, Pair, Line, Dialogue
                               |
                               +-- one bad record --> drop(...)    --> ledger
                               +-- a bad file     --> UserError

A reader knows its format and its medicine (which department a record belongs to) and nothing else: it opens no
archive, keeps no state and leaves cleaning, splitting and rendering to the rest of the room.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document
from galenic.corpus.starter.holdout import Pair

Drop = Callable[[str, str, str, str, str], None]
"""`drop(id, source, reason, detail, text)`: puts one malformed record into the ledger."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """An entry of a dictionary or sentence list: several of one group make a document."""

    pair: Pair
    text: str
    """How the entry is written in a document."""
    group: str
    """Category of the document; lines of different groups never share one."""


def documents_of_lines(lines: Iterable[Line], *, per_document: int, separator: str) -> list[Document]:
    """Joins lines into documents, group by group, in the order given.

    Pairs are split into training and held-out ones before this, so that no document mixes them.
    """
    documents = []
    ordered = sorted(lines, key=lambda line: line.group)  # stable: the order within a group stays
    for group, members in groupby(ordered, key=lambda line: line.group):
        rows = list(members)
        for start in range(0, len(rows), per_document):
            part = rows[start : start + per_document]
            source = part[0].pair.source
            documents.append(
                Document(
                    id=f"{source}/{group}/{start // per_document:05d}",
                    text=separator.join(line.text for line in part),
                    source=source,
                    licence=SOURCES[source].licence,
                    language=SOURCES[source].language,
                    category=group,
                    department=part[0].pair.department,
                )
            )
    return documents
