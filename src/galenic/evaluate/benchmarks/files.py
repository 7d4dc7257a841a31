"""Reads the rows of a data set: JSON lines, JSON, CSV, TSV or Parquet, a folder of such files, or a Hub data set.

Every row knows where it stands, so that what is wrong with it can be told by file and line.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from galenic.runtime import UserError, numbered_jsonl

HUB = "hub:"
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Doc(NamedTuple):
    """One row of a data set."""

    where: str
    """`file:line`, or what comes nearest."""
    row: dict[str, Any]
    folder: Path | None
    """Of its file."""


def read(place: str, key: str, header: Sequence[str] | None = None) -> list[Doc]:
    """Reads a file, all files of a folder (in the order of their names), or `hub:OWNER/NAME[:CONFIG[:SPLIT]]`.

    Args:
        place: what to read.
        key: of the config, for messages.
        header: names of the columns of a CSV file that has none.

    Raises:
        UserError: it is missing, empty or cannot be read; file and line named.
    """
    if place.startswith(HUB):
        docs = list(_hub(place, key))
    else:
        path = Path(place)
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
        if not files or not files[0].is_file():
            raise UserError(f"{key}: {place} is no file and no folder of {', '.join(ENDINGS)} files")
        docs = [doc for file in files for doc in _file(file, key, header)]
    if not docs:
        raise UserError(f"{key}: there are no items in {place}")
    return docs


def _file(path: Path, key: str, header: Sequence[str] | None) -> Iterator[Doc]:
    if path.suffix in (".csv", ".tsv"):
        yield from _table(path, header)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from _json(path)
    else:
        raise UserError(f"{key}: {path} does not end in {', '.join(ENDINGS)}")


def _json(path: Path) -> Iterator[Doc]:
    """Reads JSON lines, or one value: a list of rows, a row, or an object of id -> row."""
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError):
            value = None  # some call JSON lines .json; what is wrong is told by its line
        if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            value = [{"id": name, **row} for name, row in value.items()]
        if isinstance(value, dict):
            value = [value]
        if value is not None:
            for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
                if not isinstance(row, dict):
                    raise UserError(f"{path}: item {number} is no JSON object but a {type(row).__name__}")
                yield Doc(f"{path}: item {number}", row, path.parent)
            return
    for number, row in numbered_jsonl(path):
        if isinstance(row, UserError):
            raise row
        yield Doc(f"{path}:{number}", row, path.parent)


def _table(path: Path, header: Sequence[str] | None) -> Iterator[Doc]:
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            names, begin = list(header) if header else next(reader, []), reader.line_num + 1
            for cells in reader:
                where, begin = f"{path}:{begin}", reader.line_num + 1
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(names):
                    raise UserError(f"{where}: {len(cells)} columns, not {len(names)}: {', '.join(names)}")
                yield Doc(where, dict(zip(names, cells, strict=True)), path.parent)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error})") from None


def _parquet(path: Path) -> Iterator[Doc]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's
        raise UserError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:200]})") from None
    for number, row in enumerate(rows, start=1):
        yield Doc(f"{path}: row {number}", row, path.parent)


def _hub(place: str, key: str) -> Iterator[Doc]:
    try:
        from datasets import load_dataset  # pyrefly: ignore[missing-import]
    except ImportError:
        raise UserError(f"{key}: {place} needs the datasets library: pip install 'galenic[eval]'") from None
    name, *rest = place.removeprefix(HUB).split(":")
    config, split = rest[0] if rest and rest[0] else None, rest[1] if len(rest) > 1 else "test"
    try:
        found = load_dataset(name, config, split=split)
    except Exception as error:  # of many kinds: no network, no such name, no such split
        raise UserError(
            f"{key}: {place} cannot be loaded ({' '.join(str(error).split())[:300]}); write "
            f"{HUB}OWNER/NAME:CONFIG:SPLIT, or give a file"
        ) from None
    for number, row in enumerate(found, start=1):
        yield Doc(f"{place}: row {number}", dict(row), None)
