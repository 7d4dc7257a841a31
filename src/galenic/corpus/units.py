"""Units of work: which part of which file a worker reads, and the reading of it.

    sources --plan_units--> units (JSON) --read_unit--> tables: id, text, language, category, department
                                             |
                                             +--> drop(id, reason, detail, text): every record that is not in a table

The plan is the same for the same files and the same `unit_bytes`; ids do not depend on it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from galenic.corpus.config import SourceConfig
from galenic.corpus.engine import Unit
from galenic.corpus.readers import fhir, umls
from galenic.corpus.readers.archives import members
from galenic.corpus.readers.files import (
    COMPRESSIONS,
    File,
    Note,
    Unreadable,
    is_archive,
    listing,
    plain,
    reason_of,
    relative_name,
)
from galenic.corpus.readers.icd10cm import icd10cm_records
from galenic.corpus.readers.jsonl import check_fields, jsonl_tables
from galenic.corpus.readers.medline import medline_records
from galenic.corpus.readers.obo import obo_records
from galenic.corpus.readers.pages import page_records
from galenic.corpus.readers.tables import Record, parquet_tables, record_tables, row_group_sizes
from galenic.runtime import UserError

Slice = tuple[list[File], int, int]

_MOST_FILES = 10_000  # of a unit: it travels as JSON
_UNPACKED = 5  # how many bytes of text one packed byte is taken for, in planning
_LEDGER_TEXT = 2000  # characters


# ---------------------------------------------------------------------------- plan


def plan_units(sources: Sequence[SourceConfig], unit_bytes: int) -> list[Unit]:
    """Cuts the sources into units of about `unit_bytes` of content, in the order of sources and file names.

    A unit is {"number", "source": name, "files": [uri, ...], "start", "stop"}. Start and stop count row groups of
    Parquet, bytes of JSON lines, CUI numbers of UMLS; a negative stop is the end.

    Raises:
        UserError: a path matches nothing, files are of another format, or lack the named columns.
    """
    if unit_bytes < 1:
        raise UserError(f"unit_bytes: {unit_bytes} is below 1")
    units: list[Unit] = []
    for source in sources:
        for files, start, stop in _slices(source, unit_bytes):
            uris = [file.uri for file in files]
            units.append(
                {"number": len(units), "source": source.name, "files": uris, "start": start, "stop": stop}
            )
    return units


def _slices(source: SourceConfig, unit_bytes: int) -> Iterator[Slice]:
    files = listing(source.path, source.format)
    if source.format == "umls":
        tables = umls.tables_of(files, source.path)
        for start, stop in umls.cut(tables[0], unit_bytes):
            yield tables, start, stop
        return
    if source.format == "fhir":
        yield from _exports(files)
        files = [file for file in files if is_archive(file.name) or not fhir.is_lines(file.name)]
    if source.format == "jsonl":
        first = next((file for file in files if not is_archive(file.name)), None)
        if first:
            check_fields(first, source)
    with ThreadPoolExecutor(16) as pool:  # the ends of Parquet files, which may lie far away
        cuts = list(pool.map(lambda file: _ranges(file, source, unit_bytes), files))
    group: list[File] = []
    size = 0
    for file, ranges in zip(files, cuts, strict=True):
        weight = _weight(file)
        alone = bool(ranges) or is_archive(file.name)
        if group and (alone or size + weight > unit_bytes or len(group) == _MOST_FILES):
            yield group, 0, -1
            group, size = [], 0
        for start, stop in ranges:
            yield [file], start, stop
        if not ranges:
            group.append(file)
            size += weight
        if group and is_archive(file.name):
            yield group, 0, -1
            group, size = [], 0
    if group:
        yield group, 0, -1


def _weight(file: File) -> int:
    packed = file.name.lower().endswith(tuple(COMPRESSIONS))
    return file.size * (_UNPACKED if packed else 1)


def _ranges(file: File, source: SourceConfig, unit_bytes: int) -> list[tuple[int, int]]:
    """Cuts a large file of a format that can be cut; an empty list for a file that is read whole."""
    if is_archive(file.name):
        return []
    if source.format == "parquet":
        sizes = row_group_sizes(file, source)
        if sum(sizes) <= unit_bytes:
            return []
        cuts, size = [0], 0
        for group, more in enumerate(sizes):
            if size and size + more > unit_bytes:
                cuts.append(group)
                size = 0
            size += more
        return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))
    if (
        source.format == "jsonl"
        and file.size > unit_bytes
        and not file.name.lower().endswith(tuple(COMPRESSIONS))
    ):
        count = -(-file.size // unit_bytes)
        bounds = [part * file.size // count for part in range(count + 1)]
        return list(pairwise(bounds))
    return []


def _exports(files: Iterable[File]) -> Iterator[Slice]:
    """FHIR bulk exports: a folder of NDJSON files belongs together, for what is coded of one encounter lies in many."""
    folders: dict[str, list[File]] = {}
    for file in files:
        if fhir.is_lines(file.name) and not is_archive(file.name):
            folders.setdefault(file.uri.rpartition("/")[0], []).append(file)
    for group in folders.values():
        yield group, 0, -1


# ---------------------------------------------------------------------------- read


def read_unit(unit: Unit, source: SourceConfig, drop: Callable[[str, str, str, str], None]) -> Iterator[Any]:
    """Reads a unit as tables of at most 2000 rows and 16 MiB of text, in bounded memory.

    Columns are id, text, language, category, department, all `large_string`; what is not known is an empty string.

    Args:
        unit: of `plan_units`.
        source: the source that the unit names.
        drop: `drop(id, reason, detail, text)` receives every record that is left out, and files that cannot be read.

    Raises:
        UserError: a file that lies elsewhere cannot be had now.
    """

    def note(key: str, reason: str, detail: str, text: str) -> None:
        drop(f"{source.name}/{plain(key)}", reason, plain(detail), plain(text[:_LEDGER_TEXT]))

    files = [File(relative_name(uri, source.path), uri) for uri in unit["files"]]
    start, stop = unit["start"], unit["stop"]
    if source.format == "parquet":
        yield from _each(files, source, note, lambda file: parquet_tables(file, source, start, stop, note))
    elif source.format == "jsonl":
        yield from _each(files, source, note, lambda file: jsonl_tables(file, source, start, stop, note))
    else:
        yield from record_tables(_records(files, source, start, stop, note), source, note)


def _records(files: list[File], source: SourceConfig, start: int, stop: int, note: Note) -> Iterator[Record]:
    if source.format == "umls":
        return _guarded(files[0], lambda _: umls.umls_records(files, start, stop, note), note)
    if source.format == "fhir" and fhir.is_lines(files[0].name) and not is_archive(files[0].name):
        return fhir.fhir_records(files, note)  # joined; a Bundle is whole by itself
    return _each(files, source, note, lambda file: _records_of(file, source.format, note))


def _records_of(file: File, format: str, note: Note) -> Iterator[Record]:
    if format in ("text", "markdown", "html"):
        yield from page_records(file, format, note)
    elif format == "obo":
        yield from obo_records(file, note)
    elif format == "fhir":
        yield from fhir.fhir_records([file], note)
    else:
        reader = medline_records if format == "medline" else icd10cm_records
        with file.open_stream() as stream:
            yield from reader(stream, note)


Read = Callable[[File], Iterator[Any]]


def _each(files: list[File], source: SourceConfig, note: Note, read: Read) -> Iterator[Any]:
    """Reads files, and the members of those that are archives."""

    def inside(archive: File) -> Iterator[Any]:
        for member in members(archive, source.format, note):
            yield from _guarded(member, read, note)

    for file in files:
        yield from _guarded(file, inside if is_archive(file.name) else read, note)


def _guarded(file: File, read: Read, note: Note) -> Iterator[Any]:
    """Reads a file as far as it can be read; the rest of it is one line of the ledger."""
    import pyarrow

    try:
        yield from read(file)
    except Unreadable as error:
        note(file.name, "unreadable file", str(error), "")
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        file.check_connection()
        note(file.name, "unreadable file", reason_of(error), "")
