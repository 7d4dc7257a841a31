"""The UMLS Metathesaurus in Rich Release Format: concepts as text, joined from its sorted tables as a stream.

    MRCONSO (names) ------+
    MRDEF (definitions) --+--> one concept after the other --> Entity --> text
    MRSTY (types) --------+
    MRREL (relations) ----+

Source: UMLS Reference Manual, chapter 3 (Metathesaurus Rich Release Format). All tables are sorted by concept (CUI), so
a slice of them is a range of CUIs, found by bisection, and never more than one concept is held.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from galenic.corpus.readers.files import File, Note, Unreadable
from galenic.corpus.readers.lines import line_blocks
from galenic.corpus.readers.tables import Record
from galenic.corpus.records import Entity
from galenic.corpus.starter.render import Family, render
from galenic.runtime import UserError

NAMES, DEFINITIONS, TYPES, RELATIONS = "MRCONSO.RRF", "MRDEF.RRF", "MRSTY.RRF", "MRREL.RRF"
FIELDS = {NAMES: 18, DEFINITIONS: 8, TYPES: 6, RELATIONS: 16}
"""Table -> fields of a row; a row ends with a bar."""

_NEAR = 2**14  # bytes: bisection ends here, reading begins

# RELA of a row says what the *second* concept is to the first; these are the words the first one's text says it with.
_WORDS = {
    "may_treat": "may be treated with",
    "may_be_treated_by": "may treat",
    "may_prevent": "may be prevented with",
    "may_be_prevented_by": "may prevent",
    "finding_site_of": "site",
    "has_finding_site": "site of",
    "causative_agent_of": "caused by",
    "has_causative_agent": "causes",
    "contraindicated_with_disease": "contraindicated",
    "has_contraindicated_drug": "contraindicated in",
    "mechanism_of_action_of": "mechanism of action",
    "associated_morphology_of": "morphology",
}
_MOST_RELATIVES = 12


@dataclass(frozen=True)
class Row:
    """A row of a table, with where it stands."""

    place: int
    fields: list[str]

    @property
    def cui(self) -> str:
        """Its concept."""
        return self.fields[0]


def tables_of(files: Sequence[File], path: str) -> list[File]:
    """Returns the tables of one release that are read: the names first, then what there is of the others.

    Raises:
        UserError: there are no names, or those of two releases.
    """
    found = {name: [file for file in files if os.path.basename(file.uri) == name] for name in FIELDS}
    if len(found[NAMES]) != 1:
        how = "no" if not found[NAMES] else "more than one"
        raise UserError(f"{path}: {how} {NAMES}; name the folder META of one release, unpacked")
    folder = os.path.dirname(found[NAMES][0].uri)
    return [file for name in FIELDS for file in found[name] if os.path.dirname(file.uri) == folder]


def cut(names: File, unit_bytes: int) -> list[tuple[int, int]]:
    """Cuts a release into ranges of CUI numbers, by the size of its names; the last one is open (-1)."""
    count = max(1, -(-names.size // unit_bytes))
    starts = [0]
    with names.open_raw() as raw:
        for part in range(1, count):
            number = _number_after(raw, part * names.size // count)
            if number > starts[-1]:  # not at the end, nor within one large concept
                starts.append(number)
    return list(zip(starts, [*starts[1:], -1], strict=True))


def umls_records(files: Sequence[File], start: int, stop: int, note: Note) -> Iterator[Record]:
    """Yields the concepts whose CUI number is in [start, stop), as rendered text; the key is the CUI.

    English and Chinese names are taken, suppressed ones are not. A concept without any other name is passed over, a
    malformed row dropped. The category is the first semantic type.

    Raises:
        Unreadable: a table is not sorted by CUI.
    """
    tables = {os.path.basename(file.uri): file for file in files}
    joined = {
        name: _Groups(_rows(file, name, start, stop, note), file.name)
        for name, file in tables.items()
        if name != NAMES
    }
    with tables[NAMES].open_raw() as raw:

        @lru_cache(maxsize=100_000)
        def name_of(cui: str) -> str:
            return _preferred(_concept(raw, tables[NAMES].size, cui))

        names = _Groups(_rows(tables[NAMES], NAMES, start, stop, note), tables[NAMES].name)
        for cui, atoms in names:
            rest = {name: groups.of(cui) for name, groups in joined.items()}
            yield from _record(cui, atoms, rest, name_of)


def _record(cui: str, atoms: list[Row], rest: dict[str, list[Row]], name_of: Any) -> Iterator[Record]:
    shown = [atom.fields for atom in atoms if atom.fields[16] == "N"]
    english = [fields[14] for fields in sorted(shown, key=_rank) if fields[1] == "ENG"]
    chinese = [fields[14] for fields in sorted(shown, key=_rank) if fields[1] == "CHI"]
    if not english and not chinese:
        return
    types = [row.fields[3] for row in rest.get(TYPES, [])]
    spoken = {fields[7] for fields in shown if fields[1] in ("ENG", "CHI")}  # a definition belongs to an atom
    meant = [
        row.fields for row in rest.get(DEFINITIONS, []) if row.fields[6] == "N" and row.fields[1] in spoken
    ]
    definitions = [fields[5].strip() for fields in meant]
    name, *synonyms = dict.fromkeys(english or chinese)
    stubs, related = _relatives(cui, rest.get(RELATIONS, []), name_of)
    entity = Entity(
        id=cui,
        source="",
        name=name,
        kind="; ".join(types).lower() or "concept",
        department="",
        definition="\n\n".join(dict.fromkeys(filter(None, definitions))),
        synonyms=tuple(synonyms),
        codes=(cui,),
        parents=tuple(stub.id for stub in stubs if not stub.parents),
        related=tuple([("Chinese name", word) for word in dict.fromkeys(chinese) if english] + related),
    )
    language = "" if english and chinese else "en" if english else "zh"
    yield Record(cui, render(entity, Family([entity, *stubs])), language, types[0].lower() if types else "")


def _relatives(cui: str, rows: list[Row], name_of: Any) -> tuple[list[Entity], list[tuple[str, str]]]:
    """Returns (parents and children with nothing but names, (relation in words, name) pairs)."""
    stubs: dict[str, Entity] = {}
    related: dict[tuple[str, str], None] = {}
    counts: dict[str, int] = {}
    for row in rows:
        relation, other, special = row.fields[3], row.fields[4], row.fields[7]
        label = relation if relation in ("PAR", "CHD") else _WORDS.get(special, "")
        if row.fields[14] != "N" or not label or other == cui or counts.get(label, 0) >= _MOST_RELATIVES:
            continue
        name = name_of(other)
        if not name or other in stubs or (label, name) in related:
            continue
        counts[label] = counts.get(label, 0) + 1
        if label in ("PAR", "CHD"):
            parents = () if label == "PAR" else (cui,)
            stubs[other] = Entity(id=other, source="", name=name, kind="", department="", parents=parents)
        else:
            related[label, name] = None
    return list(stubs.values()), list(related)


def _rank(fields: list[str]) -> tuple[bool, bool, bool]:
    """Sorts the preferred name of a language first: TS = P, STT = PF, ISPREF = Y."""
    return fields[2] != "P", fields[4] != "PF", fields[6] != "Y"


def _preferred(atoms: list[list[str]]) -> str:
    shown = sorted((fields for fields in atoms if fields[16] == "N"), key=_rank)
    return next((f[14] for language in ("ENG", "CHI") for f in shown if f[1] == language), "")


# ---------------------------------------------------------------------------- sorted tables


class _Groups:
    """The rows of a table, concept by concept, asked for in rising order."""

    def __init__(self, rows: Iterator[Row], name: str) -> None:
        self.groups = groupby(rows, key=lambda row: row.cui)
        self.name = name
        self.last = ""
        self.waiting: tuple[str, list[Row]] | None = None

    def __iter__(self) -> Iterator[tuple[str, list[Row]]]:
        for cui, rows in self.groups:
            if cui <= self.last:
                raise Unreadable(f"{self.name} is not sorted: {cui} comes after {self.last}")
            self.last = cui
            yield cui, list(rows)

    def of(self, cui: str) -> list[Row]:
        """Returns the rows of a concept, none if it has none; what lies before is passed over."""
        while self.waiting is None or self.waiting[0] < cui:
            self.waiting = next(iter(self), ("~", []))  # behind every CUI
        return self.waiting[1] if self.waiting[0] == cui else []


def _rows(file: File, table: str, start: int, stop: int, note: Note) -> Iterator[Row]:
    """Yields the well-formed rows of a range of CUI numbers."""
    width = FIELDS[table]
    with file.open_raw() as raw:
        place = _find(raw, file.size, start) if start else 0
        raw.seek(place)
        for begin, block in line_blocks(raw, file.name, place, -1, note):
            for line in block.removesuffix(b"\n").split(b"\n"):
                key, begin = f"{file.name}:{begin}", begin + len(line) + 1
                if not line:
                    continue
                if 0 <= stop <= _number(line):
                    return
                try:
                    fields = line.decode().rstrip("\r").split("|")
                except UnicodeDecodeError as error:
                    text = line[:8000].decode("utf-8", "replace")
                    note(key, "broken encoding", f"not UTF-8 at byte {error.start} of the line", text)
                    continue
                if len(fields) != width + 1 or not (fields[0][:1] == "C" and fields[0][1:].isdecimal()):
                    detail = f"{len(fields) - 1} fields, {width} wanted, a CUI first"
                    note(key, "malformed record", detail, "|".join(fields))
                    continue
                yield Row(begin, fields)


def _number(head: bytes) -> int:
    """Returns the CUI number that a row begins with, -1 if it begins with something else."""
    return int(head[1:8]) if head[:1] == b"C" and head[1:8].isdigit() else -1


def _number_after(raw: Any, position: int) -> int:
    """Returns the CUI number of the first line that begins behind a position; -1 if there is none."""
    raw.seek(position)
    while more := raw.read(_NEAR):
        end = more.find(b"\n")
        if end >= 0:
            raw.seek(position + end + 1)
            return _number(raw.read(9))
        position += len(more)
    return -1


def _find(raw: Any, size: int, number: int) -> int:
    """Returns where the first line of a CUI number at or above `number` begins; the size of the table if none does."""
    low, high = 0, size
    while high - low > _NEAR:
        middle = (low + high) // 2
        if 0 <= _number_after(raw, middle) < number:
            low = middle
        else:
            high = middle
    raw.seek(low)
    begin = place = low
    head, cut = b"", low > 0  # the line that `low` cuts lies before
    while more := raw.read(_NEAR):
        parts = more.split(b"\n")
        for part in parts[:-1]:
            if not cut and _number((head + part)[:9]) >= number:
                return begin
            place += len(part) + 1
            begin, head, cut = place, b"", False
        head = (head + parts[-1])[:9]
        place += len(parts[-1])
    return begin if not cut and _number(head) >= number else size


def _read_line(raw: Any) -> bytes:
    data = b""
    while b"\n" not in data and (more := raw.read(4096)):
        data += more
    return data[: data.find(b"\n") + 1] if b"\n" in data else data


def _concept(raw: Any, size: int, cui: str) -> list[list[str]]:
    """Returns the rows of a concept in the table of names, found by bisection."""
    if not cui[1:].isdecimal():
        return []
    place, found = _find(raw, size, int(cui[1:])), []
    raw.seek(place)
    while (line := _read_line(raw)).startswith(cui.encode() + b"|"):
        fields = line.decode("utf-8", "replace").rstrip("\r\n").split("|")
        if len(fields) == FIELDS[NAMES] + 1:
            found.append(fields)
        place += len(line)
        raw.seek(place)
    return found
