"""Columns of data files: Parquet, JSON lines, and plain text as a table of one row."""

import json
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from galenic.runtime import UserError, nearest, read_jsonl


def count_rows(file: str, columns: Sequence[str]) -> int:
    """Returns how many rows a file has, after a look whether it has the columns.

    Raises:
        UserError: the file is missing, damaged or empty, or lacks a column.
    """
    if Path(file).suffix.lower() != ".parquet":
        return len(read_columns(file, columns)[0])
    with _parquet(file, columns) as table:
        return table.metadata.num_rows


def read_columns(file: str, columns: Sequence[str]) -> list[list[Any]]:
    """Reads columns of a file, each as a list with an item a row. A `.txt` file has the first column only.

    Raises:
        UserError: the file is missing, damaged or empty, or lacks a column.
    """
    suffix = Path(file).suffix.lower()
    if suffix == ".parquet":
        with _parquet(file, columns) as table:
            read = table.read(columns=list(columns))
            return [read.column(name).to_pylist() for name in columns]
    try:
        if suffix == ".txt":
            text = Path(file).read_text(encoding="utf-8")
            if len(columns) > 1:
                raise UserError(f"{file}: a text has no column '{columns[1]}'; use Parquet or JSON lines")
            return [[text]]
        rows = []
        for number, row in enumerate(read_jsonl(file), start=1):
            if missing := [name for name in columns if name not in row]:
                raise UserError(_no_column(f"{file}: row {number}", missing[0], row))
            rows.append([row[name] for name in columns])
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not UTF-8 text ({error})") from None
    if not rows:
        raise UserError(f"{file}: is empty")
    return [list(column) for column in zip(*rows, strict=True)]


def read_some(file: str, column: str, rows: Sequence[int]) -> list[Any]:
    """Reads one column of a few rows of a Parquet file, in the order asked for, a row group at a time."""
    found: dict[int, Any] = {}
    wanted = set(rows)
    with _parquet(file, [column]) as table:
        start = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if chosen := [row for row in range(start, start + size) if row in wanted]:
                values = table.read_row_group(group, columns=[column]).column(column)
                found |= {row: values[row - start].as_py() for row in chosen}
            start += size
    return [found[row] for row in rows]


@contextmanager
def _parquet(file: str, columns: Sequence[str]) -> Any:
    """Yields an open Parquet file that has rows and the columns."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise UserError(_no_column(file, missing[0], names))
            if not table.metadata.num_rows:
                raise UserError(f"{file}: is empty")
            yield table
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({' '.join(str(error).split())})") from None


def _no_column(place: str, column: str, names: Any) -> str:
    return f"{place}: no column '{column}'{nearest(column, names)}; it has {', '.join(map(str, names)) or 'none'}"
