"""A drawing with the numbers it was made of: as a table to read, and as a file to take along."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

MOST_ROWS, MOST_SHOWN = 1000, 24
"""Of a file inside the page, and of a table on it."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes words that begin with these for a formula."""

Row = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing and its numbers."""

    svg: Markup
    columns: tuple[str, ...]
    """Names with units."""
    rows: Sequence[Row]
    """Words, numbers and None, one entry a column."""

    @property
    def shown(self) -> list[list[str]]:
        """Rows of the table: all, or some spread evenly with both ends."""
        return [[cell(value) for value in row] for row in spread(self.rows, MOST_SHOWN)]

    @property
    def note(self) -> str:
        """How much of it the file holds, where that is not all."""
        return f"{MOST_ROWS:,} of {len(self.rows):,} rows" if len(self.rows) > MOST_ROWS else ""

    @property
    def uri(self) -> str:
        """The numbers as a CSV file inside a link."""
        return csv_uri(self.columns, spread(self.rows, MOST_ROWS))


def csv_uri(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Returns a table as a CSV file inside a link, which no network is needed for."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(value) for value in row] for row in rows)
    return "data:text/csv;charset=utf-8," + quote(text.getvalue(), safe=",.:;()/")


def slug(words: str) -> str:
    """Returns words as a file's name: 'Loss by source' -> 'loss-by-source'."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "data"


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """Returns at most so many rows, evenly spread, both ends included."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def cell(value: Any) -> str:
    """Formats one entry for reading: numbers to four digits, a dash for none."""
    if value is None:
        return "\u2013"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}".replace("-", "\u2212")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return value
