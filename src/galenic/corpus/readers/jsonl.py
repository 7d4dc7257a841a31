"""JSON lines, a part of a file at a time.

bytes start to stop --blocks of whole lines--+--> Arrow reads the block (fast)
                                             +--> line by line, if anything in it is odd: each fault by its line
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from galenic.corpus.config import SourceConfig
from galenic.corpus.readers.files import File, Note, Unreadable
from galenic.corpus.readers.lines import BLOCK, LONGEST, line_blocks
from galenic.corpus.readers.tables import Record, places, record_tables, tables
from galenic.runtime import UserError, nearest


def check_fields(file: File, source: SourceConfig) -> None:
    """Looks at the first lines of a file, so that a misspelt field does not drop everything.

    Raises:
        UserError: none of them has the field for the text, or the one for the id; or they are one list.
    """
    try:
        with file.open_stream() as stream:
            head = stream.read(2**18)
    except (OSError, Unreadable):
        return
    rows = [row for line in head.split(b"\n")[:20] if isinstance(row := _parsed(line), dict)]
    if not rows and head.lstrip().startswith(b"["):
        raise UserError(f"{file.uri}: one JSON list, not JSON lines; `jq -c '.[]'` makes lines of it")
    for field, name in (("text_column", source.text_column), ("id_column", source.id_column)):
        if name and rows and not any(name in row for row in rows):
            hint = f"{nearest(name, rows[0])}; the first record has {', '.join(map(str, rows[0]))}"
            raise UserError(f"sources: '{source.name}': no {field} '{name}' in {file.uri}{hint}")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def jsonl_tables(file: File, source: SourceConfig, start: int, stop: int, note: Note) -> Iterator[Any]:
    """Reads the JSON lines that begin at bytes `start` to `stop` (to the last if negative) of a file.

    The key is `id_column`, or `file:offset`, where the line begins in the (unpacked) file.

    Raises:
        Unreadable: the file is UTF-16, or ends in the middle of its compression.
    """
    with file.open_stream() as stream:
        begin = start
        if start:
            with file.open_raw() as raw:
                head = raw.read(3)
            stream.seek(start - 1)
        else:
            head = stream.read(3)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            if start:  # told by the reader of the first part
                return
            raise Unreadable("JSON lines in UTF-16; UTF-8 is wanted")
        if start:  # the line that is cut belongs to the part before
            begin, head = _next_line(stream, start)
        elif head == b"\xef\xbb\xbf":
            begin, head = 3, b""
            stop = stop if stop < 0 else max(stop, 4)  # the first line belongs to the first part
        for offset, block in line_blocks(_Pushed(stream, head), file.name, begin, stop, note):
            yield from _json_block(block, offset, file.name, source, note)


class _Pushed:
    """A stream with some bytes put back in front."""

    def __init__(self, stream: Any, head: bytes) -> None:
        self.stream, self.head = stream, head

    def read(self, count: int) -> bytes:
        head, self.head = self.head, b""
        return head + self.stream.read(count)


def _next_line(stream: Any, start: int) -> tuple[int, bytes]:
    """Returns where the first line from `start` begins, and what was read of it; the stream stands at `start - 1`."""
    position = start - 1
    while data := stream.read(BLOCK):
        end = data.find(b"\n")
        if end >= 0:
            return position + end + 1, data[end + 1 :]
        position += len(data)
    return position, b""


def _json_block(block: bytes, offset: int, name: str, source: SourceConfig, note: Note) -> Iterator[Any]:
    """Arrow reads the block as a whole; if anything in it is odd, it is read line by line."""
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == 10)
    if not len(ends) or ends[-1] != len(data) - 1:
        ends = np.append(ends, len(data))
    begins = np.concatenate([[0], ends[:-1] + 1])
    ends = ends - ((ends > begins) & (data[ends - 1] == 13))  # without the carriage return
    filled = ends > begins
    begins, ends = begins[filled], ends[filled]
    if not len(begins):
        return
    found = None
    # One object a line, surely: none can go on over a line end between `}` and `{`.
    if (data[begins] == 123).all() and (data[ends - 1] == 125).all() and (ends - begins).max() <= LONGEST:
        found = _json_whole(block, len(begins), source)
    keys = places(name, begins + offset)
    if found is None:
        yield from _json_lines(block, begins, ends, keys, source, note)
        return
    import pyarrow
    from pyarrow.compute import call_function

    texts, ids = found
    if ids is not None:
        keys = call_function("coalesce", [ids.cast(pyarrow.large_string()), keys])
    yield from tables(source, keys, texts, note)


def _json_whole(block: bytes, count: int, source: SourceConfig) -> tuple[Any, Any] | None:
    """Returns (texts, ids or None), or None if Arrow finds fault with the block or sees other lines than we do."""
    import pyarrow
    from pyarrow import json as arrow_json

    try:
        block.decode()
    except UnicodeDecodeError:
        return None
    whole = arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    for kind in (pyarrow.large_string(), pyarrow.int64()) if source.id_column else (None,):
        fields = [(source.text_column, pyarrow.large_string())]
        if kind is not None and source.id_column != source.text_column:
            fields.append((source.id_column, kind))
        wanted = arrow_json.ParseOptions(
            explicit_schema=pyarrow.schema(fields), unexpected_field_behavior="ignore"
        )
        try:
            table = arrow_json.read_json(pyarrow.BufferReader(block), whole, wanted)
        except pyarrow.ArrowException:
            continue
        texts = table.column(source.text_column)
        if table.num_rows != count or texts.null_count:
            return None
        ids = table.column(source.id_column).combine_chunks() if kind is not None else None
        return texts.combine_chunks(), ids
    return None


def _json_lines(
    block: bytes, begins: np.ndarray, ends: np.ndarray, keys: Any, source: SourceConfig, note: Note
) -> Iterator[Any]:
    records: list[Record] = []
    for begin, end, key in zip(begins.tolist(), ends.tolist(), keys.to_pylist(), strict=True):
        line = block[begin:end]
        if line.isspace():
            continue
        row, reason, detail = _json_line(line, source.text_column)
        if row is None:
            note(key, reason, detail, line[:8000].decode("utf-8", "replace"))
            continue
        value = row.get(source.id_column) if source.id_column else None
        if isinstance(value, str | int) and not isinstance(value, bool):
            key = str(value).encode("utf-8", "backslashreplace").decode()
        records.append(Record(key, row[source.text_column]))
    yield from record_tables(records, source, note)


def _json_line(line: bytes, column: str) -> tuple[dict[str, Any] | None, str, str]:
    if len(line) > LONGEST:
        return None, "too long", f"a line of {len(line)} bytes, at most {LONGEST}"
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, "broken encoding", f"not UTF-8 at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        return None, "malformed record", f"not valid JSON ({error.msg} at character {error.pos})"
    except (ValueError, RecursionError):
        return None, "malformed record", "JSON with a number too long or nested too deeply"
    if not isinstance(row, dict):
        return None, "malformed record", f"expected a JSON object, got {type(row).__name__}"
    if column not in row:
        return None, "malformed record", f"no field '{column}'"
    if row[column] is None:
        row[column] = ""
    if not isinstance(row[column], str):
        return None, "malformed record", f"field '{column}' is {type(row[column]).__name__}, not text"
    return row, "", ""
