"""Files of lines, in blocks of whole lines; a line without end is passed over without being held."""

from collections.abc import Iterator
from typing import Any

from galenic.corpus.readers.files import Note

LONGEST = 16 * 2**20
"""Bytes of a line, of a text, and of the texts of a table."""

BLOCK = 4 * 2**20
"""Bytes read at once."""


def line_blocks(stream: Any, name: str, start: int, stop: int, note: Note) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, whole lines) of a stream that stands at `start`, for the lines that begin before `stop`.

    A line of more than `LONGEST` bytes is dropped without being held. `stop` is the end of the file if negative.
    """
    begin, buffer = start, b""
    while stop < 0 or begin < stop:
        data = stream.read(BLOCK)
        if not data:
            if buffer:
                yield begin, buffer
            return
        buffer += data
        if 0 <= stop < begin + len(buffer):
            cut = buffer.find(b"\n", max(0, stop - 1 - begin)) + 1  # the last line that begins before `stop`
            if cut:
                yield begin, buffer[:cut]
                return
        cut = buffer.rfind(b"\n") + 1
        if cut:
            yield begin, buffer[:cut]
            begin, buffer = begin + cut, buffer[cut:]
        if len(buffer) > LONGEST:
            head, length = buffer[:8000], len(buffer)
            end = -1
            while end < 0 and (data := stream.read(BLOCK)):
                end = data.find(b"\n")
                length += len(data) if end < 0 else end
            _note_long(name, begin, length, head, note)
            begin, buffer = begin + length + 1, data[end + 1 :] if data else b""


def _note_long(name: str, offset: int, length: int, head: bytes, note: Note) -> None:
    """Drops a line of more than `LONGEST` bytes."""
    detail = f"a line of {length} bytes, at most {LONGEST}"
    note(f"{name}:{offset}", "too long", detail, head[:8000].decode("utf-8", "ignore"))


def lines(stream: Any, name: str, note: Note) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, line without its end) of the lines that are not blank."""
    number = 0
    for begin, block in line_blocks(stream, name, 0, -1, note):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            if len(line) > LONGEST:
                _note_long(name, begin, len(line), line, note)
            elif line and not line.isspace():
                yield number, line.removesuffix(b"\r")
            begin += len(line) + 1
