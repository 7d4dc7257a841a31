"""Radiology: concepts, findings, signs, syndromes as entities; differentials, scores, mnemonics as documents."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import parse_json, text, texts
from galenic.corpus.readers.departments import of_text
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document, Entity

Record = dict[str, Any]

_SYSTEMS: dict[str, str] = {
    "breast": "obstetrics and gynecology",
    "cardiac": "cardiology",
    "chest": "pulmonology",
    "endocrine": "endocrinology",
    "gastrointestinal": "gastroenterology",
    "gi": "gastroenterology",
    "gu": "nephrology and urology",
    "gu organs": "nephrology and urology",
    "msk": "orthopedics and rheumatology",
    "neuro": "neurology",
    "pediatric": "neonatology",
    "thoracic": "pulmonology",
    "vascular": "cardiology",
}


def _department(record: Record, words: str) -> str:
    """Returns the department of a record's body system, else of its words, else radiology."""
    for key in ("body_system", "body_region", "anatomy"):
        if text(record, key).lower() in _SYSTEMS:
            return _SYSTEMS[text(record, key).lower()]
    found = of_text(words)
    return "radiology" if found == "general medicine" else found


def radiology_entities(files: Mapping[str, bytes], drop: Drop) -> list[Entity]:
    """Reads concepts with the imaging findings and associations of each, and imaging signs.

    Args:
        files: the JSON files by name without ending; `medical_concepts`, `imaging_findings`,
            `syndrome_associations` and `imaging_signs` are used.
        drop: receives records without a name.

    Raises:
        UserError: a file is not JSON, or not of the expected outermost type.
    """
    related: dict[str, list[tuple[str, str]]] = defaultdict(list)
    names: dict[str, str] = {}
    for record in _records(files, "imaging_findings", ("name", "pathology_name"), drop):
        owner = text(record, "pathology_name")
        names.setdefault(owner.lower(), owner)
        modality = text(record, "modality")
        finding, description = text(record, "name"), text(record, "description")
        words = f"{finding}: {description}" if description and description != finding else finding
        related[owner.lower()].append((f"finding on {modality}" if modality else "finding", words))
    for record in _records(files, "syndrome_associations", ("syndrome_name", "associated_finding"), drop):
        owner = text(record, "syndrome_name")
        names.setdefault(owner.lower(), owner)
        frequency = f" ({text(record, 'frequency')})" if text(record, "frequency") else ""
        words = ". ".join(
            [text(record, "associated_finding") + frequency, *texts([record.get("clinical_notes")])]
        )
        related[owner.lower()].append(("associated finding", words))

    entities: dict[str, Entity] = {}
    for record in _records(files, "medical_concepts", ("name",), drop):
        name = text(record, "name")
        if name.lower() in entities:
            drop(f"radiology/RAD:{name}", "radiology", "malformed record", "the same concept twice", name)
            continue
        entities[name.lower()] = _entity(
            record, name, text(record, "concept_type"), related.pop(name.lower(), [])
        )
    for key, relations in sorted(related.items()):
        entities[key] = _entity({}, names[key], "pathology", relations)
    for record in _records(files, "imaging_signs", ("name", "description"), drop):
        name = text(record, "name")
        facts = [(words, text(record, field)) for words, field in _SIGN_FACTS if text(record, field)]
        facts += [("differential diagnosis", item) for item in texts(record.get("differential"))]
        entities.setdefault(name.lower(), _entity(record, name, "imaging sign", facts))
    return list(entities.values())


_SIGN_FACTS = (("anatomy", "anatomy"), ("indicates", "indicates"), ("key feature", "key_feature"))


def _entity(record: Record, name: str, kind: str, related: Iterable[tuple[str, str]]) -> Entity:
    definition = text(record, "definition") or text(record, "description")
    relations = tuple(dict.fromkeys(related))
    return Entity(
        id=f"RAD:{name.lower()}",
        source="radiology",
        name=name,
        kind=kind or "concept",
        department=_department(record, " ".join([name, definition, *(words for _, words in relations[:8])])),
        definition=definition,
        synonyms=tuple(dict.fromkeys(s for s in texts(record.get("synonyms")) if s.lower() != name.lower())),
        related=relations,
    )


def radiology_documents(files: Mapping[str, bytes], drop: Drop) -> list[Document]:
    """Reads differentials, classification categories, mnemonics, thresholds and workflow concepts.

    Raises:
        UserError: a file is not JSON, or not of the expected outermost type.
    """
    documents = []
    for file, required, write in _TEXTS:
        for index, record in enumerate(_records(files, file, required, drop)):
            body = write(record)
            documents.append(
                Document(
                    id=f"radiology/{file}/{index:04d}",
                    text=body,
                    source="radiology",
                    licence=SOURCES["radiology"].licence,
                    language="en",
                    category=file.replace("_", " "),
                    department=_department(record, body),
                )
            )
    return documents


def _records(files: Mapping[str, bytes], file: str, required: tuple[str, ...], drop: Drop) -> list[Record]:
    """Returns the records of a file that are objects and have the required texts; the others are dropped."""
    name = f"{file}.json"
    rows = parse_json(files[file], name, dict if file == "imaging_signs" else list)
    kept = []
    for index, row in enumerate(rows.values() if isinstance(rows, dict) else rows):
        missing = [key for key in required if not isinstance(row, dict) or not text(row, key)]
        if missing:
            detail = f"{name}: no {missing[0]}"
            drop(f"radiology/{file}/{index:04d}", "radiology", "malformed record", detail, str(row))
        else:
            kept.append(row)
    return kept


def _sentence(*parts: tuple[str, str]) -> str:
    return "\n".join(f"{label}: {value}" for label, value in parts if value)


def _differential(record: Record) -> str:
    items = "\n".join(f"- {item}" for item in texts(record.get("differentials")))
    where = ", ".join(texts([record.get("modality"), record.get("body_region")]))
    context = text(record, "clinical_context")
    title = f"# Differential diagnosis of {text(record, 'presentation')}{f' ({where})' if where else ''}"
    return "\n\n".join(part for part in (title, items, context) if part)


def _category(record: Record) -> str:
    full = text(record, "full_name")
    return f"# {text(record, 'name')} {text(record, 'category')}\n\n" + _sentence(
        ("System", full),
        ("Category", text(record, "category_name")),
        ("Meaning", text(record, "description")),
        ("Management", text(record, "management")),
        ("Risk of malignancy", text(record, "malignancy_risk")),
        ("Modality", text(record, "modality")),
    )


def _mnemonic(record: Record) -> str:
    return f"# {text(record, 'topic')}\n\nMnemonic {text(record, 'mnemonic')}: " + "\n\n".join(
        part for part in (text(record, "expansion"), text(record, "explanation")) if part
    )


def _threshold(record: Record) -> str:
    value = (
        f"{text(record, 'threshold_operator')} {record.get('threshold_value')} {text(record, 'unit')}".strip()
    )
    return f"# {text(record, 'name')}\n\n" + _sentence(
        ("Threshold", value),
        ("Meaning", text(record, "clinical_significance")),
        ("If met", text(record, "action_if_met")),
        ("If not met", text(record, "action_if_not_met")),
        ("Modality", text(record, "modality")),
    )


def _workflow(record: Record) -> str:
    return f"# {text(record, 'name')}\n\n{text(record, 'description')}\n\n" + _sentence(
        ("Also called", ", ".join(texts(record.get("synonyms")))),
        ("Related", ", ".join(texts(record.get("related_concepts")))),
    )


_TEXTS: tuple[tuple[str, tuple[str, ...], Callable[[Record], str]], ...] = (
    ("differential_groups", ("presentation",), _differential),
    ("classification_systems", ("name", "description"), _category),
    ("mnemonics", ("mnemonic", "expansion", "topic"), _mnemonic),
    ("measurement_thresholds", ("name", "clinical_significance"), _threshold),
    ("workflow_concepts", ("name", "description"), _workflow),
)

FILES: tuple[str, ...] = (
    "medical_concepts",
    "imaging_findings",
    "syndrome_associations",
    "imaging_signs",
    *(file for file, _, _ in _TEXTS),
)
"""Names of the JSON files that are read."""
