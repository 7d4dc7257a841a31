"""Records as Arrow tables, and the two formats that are tables already: Parquet and JSON lines.

Parquet, JSON lines --blocks of rows--+
every other reader  --Record----------+--> tables: empty and endless texts dropped, small tables of five columns
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from galenic.corpus.config import SourceConfig
from galenic.corpus.readers.files import File, Note, Unreadable, reason_of
from galenic.corpus.readers.lines import LONGEST
from galenic.runtime import UserError, nearest

MOST_ROWS = 2000
"""Rows of a table; its texts have `LONGEST` bytes together at most."""


_BUFFER = 8 * 2**20


class Record(NamedTuple):
    """What a reader finds: a text and what its format says about it."""

    key: str
    """Identifies it in its source."""
    text: str
    language: str = ""
    category: str = ""
    department: str = ""


# ---------------------------------------------------------------------------- tables


def record_tables(records: Iterable[Record], source: SourceConfig, note: Note) -> Iterator[Any]:
    """Gathers records into tables; a record that UTF-8 cannot hold is dropped."""
    rows: list[Record] = []
    size = 0
    for record in records:
        try:
            size += len("".join((record.text, record.key, *record[2:])).encode())
        except UnicodeEncodeError as error:
            note(record.key, "broken encoding", f"lone surrogate at character {error.start}", record.text)
            continue
        rows.append(record)
        if len(rows) == MOST_ROWS or size >= LONGEST:
            yield from _record_tables(rows, source, note)
            rows, size = [], 0
    yield from _record_tables(rows, source, note)


def _record_tables(rows: list[Record], source: SourceConfig, note: Note) -> Iterator[Any]:
    import pyarrow

    if rows:
        kind = pyarrow.large_string()
        keys, texts, *hints = (pyarrow.array(column, kind) for column in zip(*rows, strict=True))
        yield from tables(source, keys, texts, note, hints)


def tables(
    source: SourceConfig, keys: Any, texts: Any, note: Note, hints: Iterable[Any] = ()
) -> Iterator[Any]:
    """Yields tables of the columns id, text, language, category, department.

    Args:
        source: its name begins the ids; what it says of language, category and department goes before `hints`.
        keys: large_string (n,).
        texts: large_string (n,), valid UTF-8; nulls are empty.
        note: receives empty texts and those of more than `LONGEST` bytes.
        hints: language, category and department of each row, large_string (n,) each; none are known by default.
    """
    import pyarrow
    from pyarrow.compute import call_function

    sizes = call_function("binary_length", [texts]).fill_null(0).to_numpy(zero_copy_only=False)
    spaces = call_function("utf8_is_space", [texts]).fill_null(True).to_numpy(zero_copy_only=False)
    blank = spaces | (sizes == 0)
    gone = blank | (sizes > LONGEST)
    hints = list(hints)
    for row in np.flatnonzero(gone):
        key = keys[int(row)].as_py()
        if blank[row]:
            note(key, "empty", "no text", "")
        else:
            start = texts[int(row)].as_buffer()[:8000].to_pybytes().decode("utf-8", "ignore")
            note(key, "too long", f"{sizes[row]} bytes, at most {LONGEST}", start)
    if gone.any():
        kept = pyarrow.array(~gone)
        keys, texts = keys.filter(kept), texts.filter(kept)
        hints = [hint.filter(kept) for hint in hints]
        sizes = sizes[~gone]
    if not len(keys):
        return
    kind = pyarrow.large_string()
    columns = {"id": _joined(source.name, keys, "/"), "text": texts}
    known = (source.language, source.category, source.department)
    for place, (name, value) in enumerate(zip(("language", "category", "department"), known, strict=True)):
        constant = value or not hints
        columns[name] = pyarrow.repeat(pyarrow.scalar(value, kind), len(keys)) if constant else hints[place]
    table = pyarrow.table(columns)
    ends = np.cumsum(sizes, dtype=np.int64)
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = min(first + MOST_ROWS, int(np.searchsorted(ends, before + LONGEST, "right")))
        yield table.slice(first, last - first)
        first = last


def places(name: str, numbers: np.ndarray) -> Any:
    """Returns the keys `name:number`."""
    import pyarrow

    return _joined(name, pyarrow.array(numbers, pyarrow.int64()).cast(pyarrow.large_string()), ":")


def _joined(name: str, keys: Any, mark: str) -> Any:
    import pyarrow
    from pyarrow.compute import call_function

    kind = pyarrow.large_string()
    return call_function(
        "binary_join_element_wise", [pyarrow.scalar(name, kind), keys, pyarrow.scalar(mark, kind)]
    )


# ---------------------------------------------------------------------------- Parquet


def row_group_sizes(file: File, source: SourceConfig) -> list[int]:
    """Returns the bytes of each row group when unpacked; none if the file is no whole Parquet file.

    Raises:
        UserError: the file has no column for the text or the id, or one of a wrong type.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with file.open_raw() as raw:
            found = parquet.ParquetFile(raw)
            schema, metadata = found.schema_arrow, found.metadata
    except (pyarrow.ArrowException, OSError):
        file.check_connection()
        return []
    _check_columns(schema, source, file)
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _check_columns(schema: Any, source: SourceConfig, file: File) -> None:
    import pyarrow

    for field, column in (("text_column", source.text_column), ("id_column", source.id_column)):
        if not column:
            continue
        if column not in schema.names:
            hint = f"{nearest(column, schema.names)}; its columns are {', '.join(schema.names)}"
            raise UserError(f"sources: '{source.name}': no {field} '{column}' in {file.uri}{hint}")
        kind = schema.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not _textual(kind) and not (field == "id_column" and pyarrow.types.is_integer(kind)):
            raise UserError(f"sources: '{source.name}': {field} '{column}' of {file.uri} is {kind}, not text")


def _textual(kind: Any) -> bool:
    from pyarrow import types

    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
    )
    return any(test(kind) for test in tests)


def parquet_tables(file: File, source: SourceConfig, start: int, stop: int, note: Note) -> Iterator[Any]:
    """Reads row groups `start` to `stop` (to the last if negative) of a Parquet file.

    The key is `id_column`, or `file:row`. A row group that cannot be unpacked is one line of the ledger.

    Raises:
        Unreadable: the file is no whole Parquet file.
        UserError: as for `row_group_sizes`, for members of archives.
    """
    import pyarrow
    from pyarrow import parquet

    with file.open_raw() as raw:
        try:
            found = parquet.ParquetFile(raw, buffer_size=_BUFFER)  # else it reads a row group whole
        except (pyarrow.ArrowException, OSError) as error:
            raise Unreadable(f"no whole Parquet file ({reason_of(error)})") from None
        _check_columns(found.schema_arrow, source, file)
        metadata = found.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        first = sum(group.num_rows for group in groups[:start])
        columns = [name for name in (source.text_column, source.id_column) if name]
        for number in range(start, len(groups) if stop < 0 else min(stop, len(groups))):
            rows = groups[number].num_rows
            # Texts of megabytes come a few at a time.
            size = max(1, min(MOST_ROWS, LONGEST * rows // max(1, groups[number].total_byte_size)))
            row = first
            try:
                for batch in found.iter_batches(
                    size, row_groups=[number], columns=list(dict.fromkeys(columns)), use_threads=False
                ):
                    yield from _parquet_batch(batch, file.name, source, row, note)
                    row += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                file.check_connection()
                detail = f"row group {number}, rows {row} to {first + rows - 1} ({reason_of(error)})"
                note(f"{file.name}:{row}", "unreadable file", detail, "")
            first += rows


def _parquet_batch(batch: Any, name: str, source: SourceConfig, row: int, note: Note) -> Iterator[Any]:
    import pyarrow
    from pyarrow.compute import call_function

    keys = places(name, np.arange(row, row + batch.num_rows))
    if source.id_column:
        ids = batch.column(source.id_column)
        ids = ids.cast(pyarrow.large_string()) if pyarrow.types.is_integer(ids.type) else _valid(ids)[0]
        keys = call_function("coalesce", [ids, keys])
    texts, broken = _valid(batch.column(source.text_column))
    if broken:
        for place, (offset, text) in broken.items():
            note(keys[place].as_py(), "broken encoding", f"not UTF-8 at byte {offset}", text)
        kept = np.ones(len(texts), dtype=bool)
        kept[list(broken)] = False
        keys, texts = keys.filter(pyarrow.array(kept)), texts.filter(pyarrow.array(kept))
    yield from tables(source, keys, texts, note)


def _valid(column: Any) -> tuple[Any, dict[int, tuple[int, str]]]:
    """Returns (large_string with nulls for what is not UTF-8, {row: (first bad byte, text without bad bytes)})."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    texts = column.cast(pyarrow.large_binary()).view(pyarrow.large_string())
    try:
        texts.validate(full=True)
        return texts, {}
    except pyarrow.ArrowInvalid:
        values, broken = [], {}
        for row, value in enumerate(texts.view(pyarrow.large_binary()).to_pylist()):
            try:
                values.append(None if value is None else value.decode())
            except UnicodeDecodeError as error:
                broken[row] = (error.start, value[:8000].decode("utf-8", "replace"))
                values.append(None)
        return pyarrow.array(values, pyarrow.large_string()), broken
