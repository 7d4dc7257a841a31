"""XML as a stream of records, safely: no entity of the file's own is expanded, nothing outside is fetched."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element
from xml.parsers import expat

from galenic.corpus.readers.files import Unreadable

_CHUNK = 2**16
_LONGEST_PROLOG = 2**20
_LONGEST_RECORD = 64 * 2**20


def xml_records(stream: Any, tags: frozenset[str], roots: frozenset[str]) -> Iterator[Element]:
    """Yields the elements named in `tags`, each cleared away when the next is asked for.

    Args:
        stream: binary.
        tags: none of them lies in another.
        roots: what the outermost element may be.

    Raises:
        Unreadable: malformed (line and column named), another outermost element, entities declared by the file, or
            a record of more than 64 MiB. What was yielded before stands.
    """
    data = _prolog(stream)
    parser = ElementTree.XMLPullParser(("start", "end"))
    root: Element | None = None
    fed = 0
    try:
        while data:
            parser.feed(data)
            fed += len(data)
            events: Any = parser.read_events()
            for event, element in events:
                if root is None:
                    root = element
                    if element.tag not in roots:
                        wanted = " or ".join(sorted(roots))
                        raise Unreadable(f"expected the element {wanted} at the top, got {element.tag[:100]}")
                elif event == "end" and element.tag in tags:
                    yield element
                    root.clear()  # what is finished is not needed again: memory stays flat
                    fed = 0
            if fed > _LONGEST_RECORD:
                raise Unreadable(f"a record of more than {_LONGEST_RECORD} bytes")
            data = stream.read(_CHUNK)
        parser.close()
        for _ in parser.read_events():
            pass
    except ElementTree.ParseError as error:
        line, column = error.position
        message = str(error).partition(":")[0]
        raise Unreadable(f"malformed XML at line {line}, column {column} ({message})") from None


def _prolog(stream: Any) -> bytes:
    """Reads up to the first element and looks at what is declared before it; returns the bytes read."""
    parser = expat.ParserCreate()
    started = False

    def begin(*_: Any) -> None:
        nonlocal started
        started = True

    def refuse(name: str, *_: Any) -> None:
        raise Unreadable(f"declares the entity '{name[:60]}' of its own, which is refused")

    parser.StartElementHandler = begin
    parser.EntityDeclHandler = refuse
    data = b""
    try:
        while not started and len(data) < _LONGEST_PROLOG and (more := stream.read(_CHUNK)):
            data += more
            parser.Parse(more, False)
    except expat.ExpatError as error:
        if not started:
            message = expat.errors.messages[error.code]
            place = f"line {error.lineno}, column {error.offset}"
            raise Unreadable(f"malformed XML at {place} ({message})") from None
    if not started:
        raise Unreadable(
            "no XML element" if len(data) < _LONGEST_PROLOG else "no XML element in its first MiB"
        )
    return data


def words(element: Element | None) -> str:
    """Returns the text of an element and of all in it, blanks joined; an empty string for None."""
    return "" if element is None else " ".join("".join(element.itertext()).split())
