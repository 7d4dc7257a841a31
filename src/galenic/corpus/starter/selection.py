"""Which documents are kept, which are held out, and how often an epoch repeats them."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from galenic.corpus.config import StarterConfig
from galenic.corpus.readers import Line
from galenic.corpus.records import Document, Entity
from galenic.corpus.starter.holdout import stable_key

LINES_PER_DOCUMENT = {"hsk": (8, "\n\n"), "cedict": (8, "\n")}
"""Source -> (dictionary entries or sentences in one document, what stands between them)."""


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


def limit_lines(lines: list[Line], config: StarterConfig, seed: int, ledger: Ledger) -> list[Line]:
    """Keeps as many dictionary lines as the limits can use (some go to questions): medical ones first."""
    kept = []
    for source, (per_document, _) in LINES_PER_DOCUMENT.items():
        group = [line for line in lines if line.pair.source == source]
        most = math.ceil(config.limits.get(source, len(group)) * per_document / (1 - config.pair_share))
        chosen = sorted(
            group, key=lambda line: (not line.pair.department, stable_key(seed, "line", line.pair.id))
        )
        if len(group) > most:
            detail = f"{len(group) - most} of {len(group)} entries, one row for all"
            ledger.drop(f"{source}/entries", source, "over the limit", detail, "")
        kept += sorted(chosen[:most], key=lambda line: line.pair.id)
    return kept


def limit_documents(
    documents: list[Document], config: StarterConfig, seed: int, ledger: Ledger
) -> list[Document]:
    """Keeps at most the configured number of documents of a source: medical ones first, then at random."""
    kept = []
    for source, group in by_source(documents).items():
        group.sort(key=lambda d: (not d.department, stable_key(seed, "limit", d.id)))
        limit = config.limits.get(source, len(group))
        kept += group[:limit]
        for document in group[limit:]:
            ledger.drop(document.id, source, "over the limit", f"{source}: {limit} documents", document.text)
    return kept


def limit_entities(entities: list[Entity], config: StarterConfig, seed: int, ledger: Ledger) -> list[Entity]:
    """Keeps at most the configured number of entities of a source, whole families: a parent with its children.

    Families about which the terminology says most come first, loners (nothing to tell them from) a step behind
    their merit; among equals a stable random order decides.
    """
    kept = []
    for source, group in by_source(entities).items():
        limit = config.limits.get(source, len(group))
        chosen = {
            entity.id for entity in (_richest_families(group, seed) if limit < len(group) else group)[:limit]
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


# ---------------------------------------------------------------------------- split


def together(id: str, source: str) -> str:
    """What a document must not be separated from: functions of a module, sections of a text."""
    if source == "python-code":
        return id.split(":")[0]
    if source in ("guidelines", "python-docs"):
        return id.rpartition("/")[0]
    return id


def heldout_groups(groups: np.ndarray, share: float) -> np.ndarray:
    """Chooses which documents of a source are set aside for losses: whole groups, at least one if there are two.

    Args:
        groups: (documents,) uint64, a random number that the documents of a group share.
        share: of the documents wanted.

    Returns:
        (documents,) bool. The groups of the smallest numbers, so that a document's place does not depend on its
        neighbours in the file.
    """
    keys, sizes = np.unique(groups, return_counts=True)
    wanted = max(share * len(groups), min(4, len(groups) // 5))
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    taken = keys[(before < wanted) & (np.arange(len(keys)) < len(keys) - 1)]
    return np.isin(groups, taken)
