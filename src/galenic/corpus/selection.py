"""Which documents are kept, which are held out, and how often an epoch repeats them."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from galenic.corpus.config import CorpusConfig
from galenic.corpus.holdout import stable_key
from galenic.corpus.readers import Line
from galenic.corpus.records import Document, Entity

LINES_PER_DOCUMENT = {"hsk": (8, "\n\n"), "cedict": (20, "\n")}
"""Source -> (dictionary entries or sentences in one document, what stands between them)."""

_MOST_REPEATED = 10.0  # the report's cap on repetitions (section 2.1.2)


@dataclass
class Ledger:
    """Every dropped document with its reason."""

    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def drop(self, id: str, source: str, reason: str, detail: str, text: str) -> None:
        """Notes one dropped document."""
        self.rows.append((id, source, reason, detail, text))


def document_id(entity: Entity) -> str:
    """Returns the id of the document an entity is rendered into."""
    return f"{entity.source}/{entity.id}"


def by_source(records: Iterable[Any]) -> dict[str, list[Any]]:
    """Groups documents or entities by source, in the order of first appearance."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for record in records:
        groups[record.source].append(record)
    return groups


# ---------------------------------------------------------------------------- limits


def limit_lines(lines: list[Line], config: CorpusConfig, ledger: Ledger) -> list[Line]:
    """Keeps as many dictionary lines as the limits can use (some go to questions): medical ones first."""
    kept = []
    for source, (per_document, _) in LINES_PER_DOCUMENT.items():
        group = [line for line in lines if line.pair.source == source]
        most = math.ceil(config.limits.get(source, len(group)) * per_document / (1 - config.pair_share))
        chosen = sorted(
            group, key=lambda line: (not line.pair.department, stable_key(config.seed, "line", line.pair.id))
        )
        if len(group) > most:
            detail = f"{len(group) - most} of {len(group)} entries, one row for all"
            ledger.drop(f"{source}/entries", source, "over the limit", detail, "")
        kept += sorted(chosen[:most], key=lambda line: line.pair.id)
    return kept


def limit_documents(documents: list[Document], config: CorpusConfig, ledger: Ledger) -> list[Document]:
    """Keeps at most the configured number of documents of a source: medical ones first, then at random."""
    kept = []
    for source, group in by_source(documents).items():
        group.sort(key=lambda d: (not d.department, stable_key(config.seed, "limit", d.id)))
        limit = config.limits.get(source, len(group))
        kept += group[:limit]
        for document in group[limit:]:
            ledger.drop(document.id, source, "over the limit", f"{source}: {limit} documents", document.text)
    return kept


def limit_entities(entities: list[Entity], config: CorpusConfig, ledger: Ledger) -> list[Entity]:
    """Keeps at most the configured number of entities of a source, whole families: a parent with its children.

    Families about which the terminology says most come first, loners (nothing to tell them from) a step behind
    their merit; among equals a stable random order decides.
    """
    kept = []
    for source, group in by_source(entities).items():
        limit = config.limits.get(source, len(group))
        chosen = {
            entity.id
            for entity in (_richest_families(group, config.seed) if limit < len(group) else group)[:limit]
        }
        for entity in group:
            if entity.id in chosen:
                kept.append(entity)
            else:
                detail = f"{source}: {limit} entities"
                ledger.drop(document_id(entity), source, "over the limit", detail, entity.name)
    return kept


def _richest_families(entities: list[Entity], seed: int) -> list[Entity]:
    known = {entity.id: entity for entity in entities}
    families: dict[str, list[Entity]] = defaultdict(list)
    for entity in entities:
        families[(entity.parents or (entity.id,))[0]].append(entity)

    def order(parent: str) -> tuple[int, int]:
        size = len(families[parent])
        richness = round(sum(map(_richness, families[parent])) / size) - (size < 3)
        return -richness, stable_key(seed, "limit", parent)

    ordered = [e for key in sorted(families, key=order) for e in (known.get(key), *families[key]) if e]
    return list({entity.id: entity for entity in ordered}.values())


def _richness(entity: Entity) -> int:
    """Counts what there is to learn of an entity, 0 to 4; medicines in use count most among substances."""
    facts = (entity.definition, entity.synonyms, entity.related, entity.kind == "medicine")
    return sum(bool(fact) for fact in facts)


# ---------------------------------------------------------------------------- split and weight


def together(document: Document) -> str:
    """What a document must not be separated from: functions of a module, sections of a text."""
    if document.source == "python-code":
        return document.id.split(":")[0]
    if document.source in ("guidelines", "python-docs"):
        return document.id.rpartition("/")[0]
    return document.id


def split_documents(documents: list[Document], config: CorpusConfig) -> list[Document]:
    """Sets a share of each source aside for losses (at least one group, if there are two)."""
    heldout: set[str] = set()
    for group in by_source(documents).values():
        sizes = Counter(together(document) for document in group)
        wanted = max(config.heldout_share * len(group), min(4, len(group) // 5))
        taken = 0
        for key in sorted(sizes, key=lambda k: (stable_key(config.seed, "heldout", k), k))[: len(sizes) - 1]:
            if taken >= wanted:
                break
            heldout.add(key)
            taken += sizes[key]
    return [
        replace(document, split="heldout" if together(document) in heldout else "train")
        for document in documents
    ]


def weighted(documents: list[Document], config: CorpusConfig) -> list[Document]:
    """Sets the weights: a source's own, more for what was found more than once (the mapping is ours)."""
    return [
        replace(
            document,
            weight=round(
                config.weights.get(document.source, 1.0)
                * min(_MOST_REPEATED, 1 + math.log2(document.duplicates)),
                4,
            ),
        )
        for document in documents
    ]
