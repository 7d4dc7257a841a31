"""OBO flat files (format 1.4), and the Human Phenotype Ontology in them.

Source: the OBO Flat File Format specification, 1.4. Only what a terminology needs is interpreted (`id`, `name`,
`def`, `comment`, `synonym`, `alt_id`, `is_a`, `is_obsolete`); other tags are kept as text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import decode
from galenic.corpus.readers.departments import GENERAL, HPO_BRANCHES
from galenic.corpus.readers.files import File, Note, Unreadable
from galenic.corpus.readers.lines import lines
from galenic.corpus.readers.tables import Record
from galenic.corpus.records import Entity
from galenic.corpus.starter.render import Family, render
from galenic.runtime import UserError

_TAG = re.compile(r"[A-Za-z_][\w-]*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_TRAILING_MODIFIER = re.compile(r"(?<!\\)\s\{[^{}]*\}$")
_COMMENT = re.compile(r"\s!\s.*$")
_PHENOTYPES = "HP:0000118"


@dataclass
class Stanza:
    """One `[Term]`, `[Typedef]` ... block: its kind, first line and tags in file order."""

    kind: str
    line: int
    tags: dict[str, list[str]] = field(default_factory=dict)

    def one(self, tag: str) -> str:
        """Returns the first value of a tag, or an empty string."""
        return self.tags.get(tag, [""])[0]


def stanzas(text: str, name: str) -> Iterator[Stanza]:
    """Yields the stanzas of an OBO file.

    Args:
        text: the whole file.
        name: what to call it in errors.

    Raises:
        UserError: a line that is neither a stanza header nor `tag: value`, or a stanza without an id (file and
            line named), or no header line `format-version` at the start.
    """
    if not text.lstrip("\ufeff\n ").startswith("format-version:"):
        raise UserError(f"{name}:1: not an OBO file: it must begin with 'format-version:'")
    stanza: Stanza | None = None
    known: set[str] = set()  # tags that are well-formed names: they recur a quarter of a million times
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("!"):
            continue
        if line.startswith("["):
            if not line.endswith("]"):
                raise UserError(f"{name}:{number}: malformed stanza header {line!r}, expected e.g. '[Term]'")
            if stanza is not None:
                yield _checked(stanza, name)
            stanza = Stanza(kind=line[1:-1], line=number)
            continue
        tag, colon, value = line.partition(":")
        if not colon or (tag not in known and not _TAG.fullmatch(tag)):
            raise UserError(f"{name}:{number}: malformed line {line[:60]!r}, expected 'tag: value'")
        known.add(tag)
        if stanza is not None:
            stanza.tags.setdefault(tag, []).append(value.strip())
    if stanza is not None:
        yield _checked(stanza, name)


def _checked(stanza: Stanza, name: str) -> Stanza:
    if not stanza.one("id"):
        raise UserError(f"{name}:{stanza.line}: [{stanza.kind}] stanza without an id")
    return stanza


def quoted(value: str) -> str | None:
    """Returns the text of the leading quoted string of a tag value, escapes undone; None without one."""
    match = _QUOTED.match(value)
    if match is None:
        return None
    return _ESCAPE.sub(lambda m: {"n": "\n", "t": "\t", "W": " "}.get(m[1], m[1]), match[1])


def reference(value: str) -> str:
    """Returns the identifier of an `is_a` value, without trailing modifiers and comment."""
    return _TRAILING_MODIFIER.sub("", _COMMENT.sub("", value)).strip()


def hpo_entities(data: bytes, name: str, drop: Drop) -> list[Entity]:
    """Reads the phenotypic abnormalities of the Human Phenotype Ontology.

    Obsolete terms and terms outside `Phenotypic abnormality` (modes of inheritance, modifiers, frequencies) are
    left out; a term with a malformed definition or synonym is dropped.

    Raises:
        UserError: the file is not UTF-8 or not OBO.
    """
    text = decode(data, name)
    terms = [s for s in stanzas(text, name) if s.kind == "Term" and s.one("is_obsolete") != "true"]
    parents = {s.one("id"): tuple(reference(v) for v in s.tags.get("is_a", [])) for s in terms}
    ancestors: dict[str, frozenset[str]] = {}
    entities = []
    for stanza in terms:
        key = stanza.one("id")
        lineage = _lineage(key, parents, ancestors, name, stanza.line)
        if _PHENOTYPES not in lineage or key == _PHENOTYPES:
            continue
        problem = _problem(stanza)
        if problem:
            drop(
                f"hpo/{key}",
                "hpo",
                "malformed record",
                f"{name}:{stanza.line}: {problem}",
                stanza.one("name"),
            )
            continue
        entities.append(_entity(stanza, lineage, parents[key]))
    return entities


def _lineage(
    key: str, parents: dict[str, tuple[str, ...]], known: dict[str, frozenset[str]], name: str, line: int
) -> frozenset[str]:
    """Returns the term and all its ancestors; refuses a cycle."""
    stack, path = [key], {key}
    while stack:
        top = stack[-1]
        missing = [p for p in parents.get(top, ()) if p not in known]
        if top in known or not missing:
            inherited = (known[p] for p in parents.get(top, ()))
            known.setdefault(top, frozenset({top}).union(*inherited))
            path.discard(stack.pop())
        elif missing[0] in path:
            raise UserError(f"{name}:{line}: the is_a links of {missing[0]} form a cycle")
        else:
            stack.append(missing[0])
            path.add(missing[0])
    return known[key]


def _problem(stanza: Stanza) -> str:
    if not stanza.one("name"):
        return "no name"
    if "def" in stanza.tags and quoted(stanza.one("def")) is None:
        return "definition is not a quoted string"
    if any(quoted(value) is None for value in stanza.tags.get("synonym", [])):
        return "synonym is not a quoted string"
    return ""


def _synonyms(stanza: Stanza) -> tuple[list[str], list[str]]:
    """Returns the exact synonyms: (those of professionals, those of laypeople)."""
    synonyms: list[str] = []
    lay: list[str] = []
    for value in stanza.tags.get("synonym", []):
        text, modifiers = (quoted(value) or "").strip(), _QUOTED.sub("", value, count=1)
        # BROAD and RELATED names mean something else or more, and would make wrong statements.
        if text and "EXACT" in modifiers and "obsolete" not in modifiers:
            (lay if "layperson" in modifiers else synonyms).append(text)
    return synonyms, lay


def _entity(stanza: Stanza, lineage: frozenset[str], parents: tuple[str, ...]) -> Entity:
    synonyms, lay = _synonyms(stanza)
    return Entity(
        id=stanza.one("id"),
        source="hpo",
        name=stanza.one("name"),
        kind="phenotypic abnormality",
        department=next((d for branch, d in HPO_BRANCHES.items() if branch in lineage), GENERAL),
        definition=(quoted(stanza.one("def")) or "").strip(),
        synonyms=tuple(dict.fromkeys(synonyms + lay)),
        codes=(stanza.one("id"), *stanza.tags.get("alt_id", [])),
        parents=tuple(p for p in parents if p != _PHENOTYPES),
        related=tuple(("lay term", term) for term in dict.fromkeys(lay)),
        comment=stanza.one("comment"),
    )


# ---------------------------------------------------------------------------- any ontology


def obo_records(file: File, note: Note) -> Iterator[Record]:
    """Yields the terms of any OBO ontology (HPO, MONDO, DOID ...) as rendered text, in file order.

    Two passes: the first keeps names and parents, so that relatives can be named, the second renders a term at a
    time. The key is the term's id, the category its namespace in words. Obsolete terms are left out; a stanza that is
    malformed, or has no name, is dropped.

    Raises:
        Unreadable: the file is not OBO.
    """
    known = []
    for stanza, _, problem in _terms(file, lambda *_: None):
        if not problem:
            known.append(_relative(stanza, "", ""))
    family = Family(known)
    for stanza, namespace, problem in _terms(file, note):
        key = stanza.one("id") or f"{file.name}:{stanza.line}"
        if problem:
            note(key, "malformed record", f"{file.name}:{stanza.line}: {problem}", stanza.one("name"))
            continue
        kind = stanza.one("namespace") or namespace
        synonyms, lay = _synonyms(stanza)
        entity = replace(
            _relative(stanza, kind.replace("_", " ").strip(), (quoted(stanza.one("def")) or "").strip()),
            synonyms=tuple(dict.fromkeys(synonyms + lay)),
            related=tuple(("lay term", term) for term in dict.fromkeys(lay)),
            comment=stanza.one("comment"),
        )
        yield Record(key, render(entity, family), "", entity.kind)


def _relative(stanza: Stanza, kind: str, definition: str) -> Entity:
    key = stanza.one("id")
    return Entity(
        id=key,
        source="",
        name=stanza.one("name"),
        kind=kind or "term",
        department="",
        definition=definition,
        codes=(key,),
        parents=tuple(reference(value) for value in stanza.tags.get("is_a", [])),
    )


def _terms(file: File, note: Note) -> Iterator[tuple[Stanza, str, str]]:
    """Yields (term that is not obsolete, the ontology's own namespace, what is wrong with the term)."""
    header = Stanza(kind="", line=1)
    stanza, problem, started = header, "", False
    with file.open_stream() as stream:
        for number, line in lines(stream, file.name, note):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip()
            if not started and not text.startswith("!"):
                if not text.startswith("format-version:"):
                    raise Unreadable("not an OBO file: it must begin with 'format-version:'")
                started = True
            if text.startswith("["):
                if _is_term(stanza):
                    yield (
                        stanza,
                        header.one("default-namespace") or header.one("ontology"),
                        problem or _fault(stanza),
                    )
                stanza, problem = Stanza(kind=text[1:].removesuffix("]"), line=number), ""
            elif not text.startswith("!"):
                tag, colon, value = text.partition(":")
                if "\ufffd" in text and not _is_utf8(line):
                    problem = problem or f"{tag}: not UTF-8"
                elif not colon or not _TAG.fullmatch(tag):
                    problem = problem or f"{text[:60]!r} is not 'tag: value'"
                else:
                    stanza.tags.setdefault(tag, []).append(value.strip())
    if not started:
        raise Unreadable("not an OBO file: it is empty")
    if _is_term(stanza):
        yield stanza, header.one("default-namespace") or header.one("ontology"), problem or _fault(stanza)


def _is_term(stanza: Stanza) -> bool:
    return stanza.kind == "Term" and stanza.one("is_obsolete") != "true"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
        return True
    except UnicodeDecodeError:
        return False


def _fault(stanza: Stanza) -> str:
    return "no id" if not stanza.one("id") else _problem(stanza)
