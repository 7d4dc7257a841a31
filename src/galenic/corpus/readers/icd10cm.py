"""The ICD-10-CM tabular list: chapters, sections and categories, read as a stream of XML elements.

Categories of up to five characters as written, such as `E11.9`, become entities; what follows mostly says side,
encounter or extent.
"""

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from galenic.corpus.readers import Drop
from galenic.corpus.readers.departments import of_icd
from galenic.corpus.readers.files import Note
from galenic.corpus.readers.tables import Record
from galenic.corpus.readers.xml_stream import xml_records
from galenic.corpus.records import Entity
from galenic.corpus.starter.render import Family, render
from galenic.runtime import UserError

LONGEST_CODE = 5
"""Characters of a category code, the dot counted."""

_NOTES: tuple[tuple[str, str], ...] = (
    ("includes", "includes"),
    ("excludes1", "excludes"),
    ("excludes2", "not included here"),
    ("codeFirst", "code first"),
    ("useAdditionalCode", "use additional code"),
    ("codeAlso", "code also"),
    ("notes", "note"),
)


def icd10cm_entities(data: bytes, name: str, drop: Drop) -> list[Entity]:
    """Reads chapters, sections and categories of the tabular list, in file order.

    Args:
        data: the XML file.
        name: what to call it in errors.
        drop: receives categories without a code or a description.

    Raises:
        UserError: malformed XML (line and column named), or XML that is not a tabular list.
    """
    entities: list[Entity] = []
    tag = ""
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(data), events=("end",)):
            tag = element.tag
            if tag == "chapter":
                entities.extend(_chapter(element, name, drop))
                element.clear()  # a finished chapter is not needed again: memory stays flat
    except ElementTree.ParseError as error:
        line, column = error.position
        message = str(error).partition(":")[0]
        raise UserError(f"{name}:{line}:{column}: malformed XML ({message})") from None
    if tag != "ICD10CM.tabular":
        raise UserError(f"{name}: expected the element 'ICD10CM.tabular' at the top, got '{tag}'")
    return entities


def icd10cm_records(stream: Any, note: Note) -> Iterator[Record]:
    """Yields chapters, sections and categories as rendered text, a chapter of the stream at a time.

    The key is `ICD10CM:code`. A category without a code or a description is dropped.

    Raises:
        Unreadable: see `xml_records`.
    """

    def drop(id: str, _: str, reason: str, detail: str, text: str) -> None:
        note(id.removeprefix("icd10cm/"), reason, detail, text)

    for chapter in xml_records(stream, frozenset(("chapter",)), frozenset(("ICD10CM.tabular",))):
        entities = list(_chapter(chapter, "tabular list", drop))
        family = Family(entities)  # relatives never lie in another chapter
        for entity in entities:
            yield Record(entity.id, render(entity, family), "en", entity.kind, entity.department)


def _chapter(element: Element, name: str, drop: Drop) -> Iterator[Entity]:
    chapter = f"ICD10CM:chapter {_child_text(element, 'name')}"
    yield _heading(chapter, "chapter", _child_text(element, "desc"), ())
    for section in element.iterfind("section"):
        key = f"ICD10CM:section {section.get('id', '')}"  # `B20` is a section and a category
        yield _heading(key, "section", _child_text(section, "desc"), (chapter,))
        for category in section.iterfind("diag"):
            yield from _category(category, key, name, drop)


def _heading(key: str, kind: str, description: str, parents: tuple[str, ...]) -> Entity:
    title, _, codes = description.rpartition(" (")
    codes = codes.rstrip(")")
    return Entity(
        id=key,
        source="icd10cm",
        name=title or description,
        kind=f"{kind} of the disease classification",
        department=of_icd(codes),
        codes=(codes,) if title else (),
        parents=parents,
    )


def _category(element: Element, parent: str, name: str, drop: Drop) -> Iterator[Entity]:
    code, description = _child_text(element, "name"), _child_text(element, "desc")
    length = len(code)
    if not code or not description:
        detail = f"{name}: category without a {'description' if code else 'code'}"
        drop(f"icd10cm/ICD10CM:{code or parent + ' ?'}", "icd10cm", "malformed record", detail, description)
        return
    if length > LONGEST_CODE:
        return
    key = f"ICD10CM:{code}"
    # A placeholder `X` only fills a position: it repeats its parent's description.
    if element.get("placeholder") != "true":
        yield _entity(element, key, code, description, parent)
    else:
        key = parent
    for child in element.iterfind("diag"):
        yield from _category(child, key, name, drop)


def _entity(element: Element, key: str, code: str, description: str, parent: str) -> Entity:
    terms = _notes(element, "inclusionTerm")
    related = [(words, note) for tag, words in _NOTES for note in _notes(element, tag)]
    # Below "other" and "unspecified" categories inclusion terms are examples, elsewhere they are other names.
    if description.lower().startswith(("other ", "unspecified ")):
        related = [("includes", term) for term in terms] + related
        terms = []
    deeper = [_words(child) for child in element.iterfind(".//diag/name")]
    return Entity(
        id=key,
        source="icd10cm",
        name=description,
        kind="disease category",
        department=of_icd(code),
        synonyms=tuple(dict.fromkeys(t for t in terms if t != description)),
        codes=(code, *(c for c in deeper if len(c) > LONGEST_CODE)),
        parents=(parent,),
        related=tuple(related),
    )


def _notes(element: Element, tag: str) -> list[str]:
    return [text for note in element.iterfind(f"{tag}/note") if (text := _words(note))]


def _child_text(element: Element, tag: str) -> str:
    child = element.find(tag)
    return "" if child is None else _words(child)


def _words(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())
