"""FHIR (R4 and R5): notes as documents, and what is coded of one encounter as one document.

    Bundle (JSON), NDJSON of a bulk export --resources--+--> DocumentReference, DiagnosticReport: notes, as they come
                                                        +--> Condition, Observation, MedicationRequest ...: lines of
                                                             their encounter, in a temporary database, then text

The database is SQLite's nameless one: it stays in memory while it is small and goes to disk as it grows. Resources of
other types (Patient, Practitioner ...) are no documents and are passed over.
"""

import base64
import binascii
import codecs
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from galenic.corpus.readers.files import File, Note, Unreadable
from galenic.corpus.readers.lines import lines
from galenic.corpus.readers.pages import decoded, text_of_html
from galenic.corpus.readers.tables import Record

Resource = dict[str, Any]

_HAN = re.compile("[\u3400-\u9fff]")
_CODED = {
    "Encounter": ("Encounter", "就诊"),
    "Condition": ("Problems", "诊断"),
    "Observation": ("Observations", "检查"),
    "MedicationRequest": ("Medications", "用药"),
    "Procedure": ("Procedures", "操作"),
    "AllergyIntolerance": ("Allergies", "过敏"),
}
_ORDER = list(_CODED)
_TEXTS = ("text/plain", "text/markdown", "text/html", "application/xhtml+xml")
_UNTRUE = ("entered-in-error", "refuted", "cancelled", "not-done")
_LONGEST_RESOURCE = 64 * 2**20
_CHUNK = 2**20


def is_lines(name: str) -> bool:
    """Tells whether a file holds a resource a line (a bulk export)."""
    return ".ndjson" in name.lower() or ".jsonl" in name.lower()


def fhir_records(files: Iterable[File], note: Note) -> Iterator[Record]:
    """Yields the notes of some files, then a document for each encounter in them.

    Keys are `DocumentReference/id`, `DiagnosticReport/id` (with the attachment's number if there are several),
    `Encounter/id`, and `Patient/id` for what names no encounter.

    A file that cannot be read on is dropped, what came before it stands.
    """
    database = sqlite3.connect("")
    try:
        database.execute("CREATE TABLE line (key TEXT, kind INTEGER, place INTEGER PRIMARY KEY, text TEXT)")
        for file in files:
            try:
                for place, resource in _resources(file, note):
                    yield from _resource(resource, place, database, note)
            except (Unreadable, OSError) as error:
                file.check_connection()
                note(file.name, "unreadable file", str(error), "")
        yield from _encounters(database)
    finally:
        database.close()


def _resource(resource: Resource, place: str, database: sqlite3.Connection, note: Note) -> Iterator[Record]:
    kind = resource.get("resourceType")
    if not isinstance(kind, str):
        note(place, "malformed record", "no resourceType", json.dumps(resource, ensure_ascii=False)[:2000])
    elif kind == "Bundle":
        for entry in _list(resource, "entry"):
            if isinstance(entry.get("resource"), dict):
                yield from _resource(entry["resource"], place, database, note)
    elif kind in ("DocumentReference", "DiagnosticReport"):
        yield from _notes(resource, place, note)
    elif kind in _CODED:
        said = [
            resource.get("status"),
            *(c.get("code") for c in _list(_dict(resource, "verificationStatus"), "coding")),
        ]
        untrue = next((word for word in _UNTRUE if word in said), "")
        text = _coded(resource)
        key = f"{kind}/{resource.get('id') or place}"
        if untrue:
            note(key, untrue.replace("-", " "), "not so, by its status", text)
        elif text:
            values = (_group(resource, key), _ORDER.index(kind), text)
            try:
                database.execute("INSERT INTO line (key, kind, text) VALUES (?, ?, ?)", values)
            except UnicodeEncodeError:
                note(key, "broken encoding", "lone surrogate", text)
        elif kind != "Encounter":
            note(key, "empty", "nothing coded", "")


def _group(resource: Resource, key: str) -> str:
    """Returns the key of the document that a coded resource belongs to."""
    if resource["resourceType"] == "Encounter":
        return key
    for field, kind in (("encounter", "Encounter"), ("subject", "Patient"), ("patient", "Patient")):
        reference = _dict(resource, field).get("reference")
        if isinstance(reference, str) and reference:
            return f"{kind}/{re.split('[/:]', reference)[-1]}"
    return key


def _encounters(database: sqlite3.Connection) -> Iterator[Record]:
    rows = database.execute("SELECT key, kind, text FROM line ORDER BY key, kind, place")
    current, found = "", {}
    for key, kind, text in rows:
        if key != current and found:
            yield Record(current, _rendered(found), category="patient record")
            found = {}
        current = key
        found.setdefault(kind, {})[text] = None  # the same line twice says nothing new
    if found:
        yield Record(current, _rendered(found), category="patient record")


def _rendered(found: dict[int, dict[str, None]]) -> str:
    """Returns the Markdown of one encounter, headings in the language of what is coded."""
    chinese = any(_HAN.search(text) for texts in found.values() for text in texts)
    blocks = []
    for kind, texts in found.items():
        heading = _CODED[_ORDER[kind]][chinese]
        if _ORDER[kind] == "Encounter":
            blocks.append(f"# {heading}{'：' if chinese else ': '}{'; '.join(texts)}")
        else:
            blocks.append(f"## {heading}\n\n" + "\n".join(f"- {text}" for text in texts))
    return "\n\n".join(blocks)


# ---------------------------------------------------------------------------- notes


def _notes(resource: Resource, place: str, note: Note) -> Iterator[Record]:
    kind = resource["resourceType"]
    key = f"{kind}/{resource.get('id') or place}"
    title = _concept(_dict(resource, "type" if kind == "DocumentReference" else "code"))
    status = [resource.get("status"), resource.get("docStatus")]
    if "entered-in-error" in status:
        note(key, "entered in error", "not so, by its status", title)
        return
    if kind == "DocumentReference":
        attachments = [_dict(content, "attachment") for content in _list(resource, "content")]
    else:
        attachments = _list(resource, "presentedForm")
    found: list[tuple[str, str]] = []
    faults: list[Any] = []
    for number, attachment in enumerate(attachments):
        part = key if len(attachments) == 1 else f"{key}/{number}"
        text = _attached(attachment, part, title, lambda *fault: faults.append(fault))
        if text:
            found.append((part, text))
    conclusion = resource.get("conclusion")
    if not found and isinstance(conclusion, str) and conclusion.strip():
        found, faults = [(key, conclusion.strip())], []  # the report is kept by what it concludes
    for fault in faults:
        note(*fault)
    if not attachments and not found:
        note(key, "empty", "no attachment and no conclusion", title)
    language = str(resource.get("language") or "").partition("-")[0].lower()
    for part, text in found:
        yield Record(part, f"# {title}\n\n{text}" if title else text, language, "clinical note")


def _attached(attachment: Resource, key: str, title: str, note: Note) -> str:
    """Returns the text of an attachment, or drops it and returns an empty string."""
    media, _, parameters = str(attachment.get("contentType") or "text/plain").lower().partition(";")
    media, data = media.strip(), attachment.get("data")
    if not isinstance(data, str) or not data:
        note(key, "empty", f"the attachment is elsewhere: {attachment.get('url') or 'no url'}", title)
        return ""
    if media not in _TEXTS:  # neither PDF nor RTF, nor a CDA document in XML
        note(key, "not text", f"an attachment of type {media}", title)
        return ""
    try:
        raw = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        note(key, "malformed record", f"attachment is not base64 ({error})", title)
        return ""
    charset = re.search(r"charset\s*=\s*\"?([\w.:-]+)", parameters)
    try:
        page = "html" in media
        text = raw.decode(codecs.lookup(charset[1]).name) if charset else decoded(raw, declared=page)
    except (UnicodeDecodeError, LookupError) as error:
        note(key, "broken encoding", f"attachment: {error}"[:200], raw[:8000].decode("utf-8", "replace"))
        return ""
    text = (text_of_html(text) if page else text).strip()
    if not text:
        note(key, "empty", "no text in the attachment", title)
    return text


# ---------------------------------------------------------------------------- what is coded


def _coded(resource: Resource) -> str:
    """Returns a line on a coded resource, without who and when."""
    kind = resource["resourceType"]
    if kind == "Encounter":
        reasons = [_concept(reason) for reason in _list(resource, "reasonCode")]
        named = [_concept(found) for found in _list(resource, "type")]
        return "; ".join(dict.fromkeys(filter(None, named + reasons)))
    if kind == "MedicationRequest":
        drug = _dict(resource, "medicationCodeableConcept") or _dict(_dict(resource, "medication"), "concept")
        name = _concept(drug) or str(_dict(resource, "medicationReference").get("display") or "")
        doses = [str(dose["text"]) for dose in _list(resource, "dosageInstruction") if dose.get("text")]
        return f"{name}: {'; '.join(doses)}" if name and doses else name
    name = _concept(_dict(resource, "code"))
    if kind != "Observation" or not name:
        return name
    values = [_value(resource)]
    for part in _list(resource, "component"):
        label, value = _concept(_dict(part, "code")), _value(part)
        values.append(f"{label} {value}" if label and value else "")
    value = "; ".join(filter(None, values))
    return f"{name}: {value}" if value else ""


def _value(observation: Resource) -> str:
    quantity = _dict(observation, "valueQuantity")
    if "value" in quantity:
        unit = quantity.get("unit") or quantity.get("code") or ""
        return f"{quantity.get('comparator', '')}{quantity['value']} {unit}".strip()
    if "valueCodeableConcept" in observation:
        return _concept(_dict(observation, "valueCodeableConcept"))
    for key in ("valueString", "valueInteger", "valueBoolean"):
        if isinstance(observation.get(key), str | int):
            return str(observation[key]).strip()
    return ""


def _concept(concept: Resource) -> str:
    """Returns a coded concept in words, with its first code."""
    codings = _list(concept, "coding")
    words = concept.get("text") or next(
        (coding["display"] for coding in codings if coding.get("display")), ""
    )
    code = next((coding["code"] for coding in codings if coding.get("code")), "")
    words, code = (" ".join(str(part).split()) for part in (words, code))
    return f"{words} ({code})" if words and code else words or code


def _dict(value: Resource, key: str) -> Resource:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _list(value: Resource, key: str) -> list[Resource]:
    found = value.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


# ---------------------------------------------------------------------------- streams of resources


def _resources(file: File, note: Note) -> Iterator[tuple[str, Resource]]:
    """Yields (place, resource): of a line each, or of the entries of a Bundle one by one."""
    if not is_lines(file.name):
        with file.open_stream() as stream:
            for number, resource in enumerate(_entries(stream)):
                yield f"{file.name}:{number}", resource
        return
    with file.open_stream() as stream:
        for number, line in lines(stream, file.name, note):
            place, text = f"{file.name}:{number}", line[:8000].decode("utf-8", "replace")
            try:
                resource = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                note(place, "broken encoding", f"not UTF-8 at byte {error.start} of the line", text)
            except (ValueError, RecursionError) as error:
                note(place, "malformed record", f"not valid JSON ({error})"[:200], text)
            else:
                if isinstance(resource, dict):
                    yield place, resource
                else:
                    note(place, "malformed record", "expected a JSON object", text)


class _Text:
    """JSON text that comes in pieces; `value` takes the next value off its front."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.ended = "", 0, False
        self.json = json.JSONDecoder()

    def more(self, count: int) -> bool:
        """Reads on; False at the end."""
        data = b"" if self.ended else self.stream.read(count)
        self.ended = not data
        try:
            self.text = self.text[self.place :] + self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise Unreadable(f"not UTF-8 ({error.reason})") from None
        self.place = 0
        return not self.ended

    def next(self) -> str:
        """Returns the next character that is not blank, without taking it; an empty string at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more(_CHUNK):
                return ""

    def take(self, wanted: str) -> str:
        """Takes one of the characters, or refuses the file."""
        found = self.next()
        if not found or found not in wanted:
            raise Unreadable(f"not valid JSON: expected one of {' '.join(wanted)}, got {found!r}")
        self.place += 1
        return found

    def value(self) -> Any:
        """Takes a whole value; what is cut reads on, twice as much each time."""
        count = _CHUNK
        while self.next():
            try:
                value, end = self.json.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.place > _LONGEST_RESOURCE:
                    raise Unreadable(f"not valid JSON, or cut short ({error.msg})") from None
                self.more(count)
                count *= 2
                continue
            except (ValueError, RecursionError):
                raise Unreadable("JSON with a number too long or nested too deeply") from None
            if end < len(self.text) or self.ended:
                self.place = end
                return value
            self.more(count)  # a number may go on
        raise Unreadable("not valid JSON, or cut short")


def _entries(stream: Any) -> Iterator[Resource]:
    """Yields the resources of a Bundle's entries one by one, or the one resource, or those of a list."""
    text = _Text(stream)
    if text.take("{[") == "[":
        yield from (value for value in _items(text) if isinstance(value, dict))
        return
    rest: Resource = {}
    streamed = False
    if text.next() == "}":
        raise Unreadable("an empty object")
    while True:
        key = text.value()
        text.take(":")
        if key == "entry" and text.next() == "[":
            text.take("[")
            streamed = True
            for entry in _items(text):
                if isinstance(entry, dict) and isinstance(entry.get("resource"), dict):
                    resource = entry["resource"]
                    if not resource.get("id") and isinstance(entry.get("fullUrl"), str):
                        resource["id"] = re.split("[/:]", entry["fullUrl"])[-1]
                    yield resource
        else:
            rest[str(key)] = text.value()
        if text.take(",}") == "}":
            break
    if text.next():
        raise Unreadable("not valid JSON: something follows the object")
    if not streamed:
        yield rest


def _items(text: _Text) -> Iterator[Any]:
    if text.next() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.take(",]") == "]":
            return
