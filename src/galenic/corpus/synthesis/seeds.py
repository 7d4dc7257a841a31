"""Which documents become seeds: those of the training split, chosen by a stable shuffle, in the order of their ids."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from galenic.corpus.starter.facts import Tree
from galenic.corpus.starter.holdout import stable_key, stable_shuffle
from galenic.corpus.synthesis.checks import language_of
from galenic.corpus.synthesis.knowledge_graph import tree_of
from galenic.corpus.synthesis.steps import Seed
from galenic.corpus.synthesis.synthesise_config import PipelineConfig, SynthesiseConfig
from galenic.runtime import UserError, read_jsonl

REQUIRED = ("id", "text", "source", "licence")
OPTIONAL = ("language", "category", "department", "value")
SPLIT_PASSAGES = ("encyclopaedia",)
"""Pipelines whose documents may be cut into passages."""

MOST_AROUND = 2000
"""Texts that stand around those of long contexts, by turns."""
_PASSAGE = re.compile(r"#\d+\Z")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What one pipeline works on."""

    pipeline: PipelineConfig
    seeds: list[Seed]
    too_long: list[Seed]
    """Documents that no request could hold."""
    tree: Tree | None
    """Of a knowledge graph: every entity of its sources."""
    others: list[Seed] = field(default_factory=list)
    """Of long contexts: texts that stand around the seeds."""


def select(config: SynthesiseConfig) -> list[Selection]:
    """Chooses the seeds of every pipeline.

    Raises:
        UserError: a file is missing or lacks a column; nothing fits a pipeline; an id stands twice.
    """
    datasets = open_documents(config.corpus, config.documents)
    special = {"safety": _no_documents, "long-context": _select_texts}
    return [special.get(p.name, _select)(config, p, datasets) for p in config.pipelines]


def open_documents(
    corpus: str, documents: Sequence[str], required: Sequence[str] = REQUIRED
) -> list[tuple[str, Any]]:
    """Opens a corpus folder, if one is named, and files of documents: (path, dataset) each.

    Raises:
        UserError: one is missing, is none, or lacks a required column.
    """
    from pyarrow import ArrowException, dataset

    paths = [str(Path(corpus) / "documents.parquet")] if corpus else []
    found = []
    for path in [*paths, *documents]:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder")
        kind = "json" if Path(path).suffix in (".jsonl", ".json") else "parquet"
        try:
            one = dataset.dataset(path, format=kind)
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: no {kind} documents ({' '.join(str(error).split())[:200]})") from None
        missing = [name for name in required if name not in one.schema.names]
        if missing:
            raise UserError(f"{path}: lacks {', '.join(missing)}; documents need {', '.join(required)}")
        found.append((path, one))
    return found


def read_training(
    datasets: list[tuple[str, Any]], columns: Iterable[str], keep: Any, ids: list[str] | None
) -> list[Row]:
    """Reads training rows that `keep` is true of, or those with the ids; texts only if asked for."""
    from pyarrow import ArrowException, array, compute

    rows: list[Row] = []
    for path, one in datasets:
        names = [name for name in columns if name in one.schema.names]
        wanted = compute.field("split") == "train" if "split" in one.schema.names else None
        if ids is not None:
            chosen = compute.field("id").isin(array(ids, one.schema.field("id").type))
            wanted = chosen if wanted is None else wanted & chosen
        try:
            for batch in one.to_batches(columns=names, filter=wanted):
                rows += [row for row in batch.to_pylist() if keep(row)]
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    return rows


def _select(config: SynthesiseConfig, pipeline: PipelineConfig, datasets: list[tuple[str, Any]]) -> Selection:
    keep = _keeper(pipeline)
    light, whole = ("id", "source", "category"), (*REQUIRED, *OPTIONAL)
    tree = None
    if pipeline.name == "knowledge-graph":
        # Siblings count too: the whole graph is read.
        rows = {row["id"]: row for row in unique(read_training(datasets, whole, keep, None))}
        tree = tree_of(rows.values())
        chosen = _choose(list(tree.entities), pipeline, config.seed)
        documents = [rows[key] for key in chosen]
    else:
        found = unique(read_training(datasets, light, keep, None))
        chosen = _choose([row["id"] for row in found], pipeline, config.seed)
        by_id = {row["id"]: row for row in read_training(datasets, whole, keep, chosen)}
        documents = [by_id[key] for key in chosen]
    if not documents:
        raise _nothing(pipeline, "entities" if tree else "documents")
    seeds, too_long = [], []
    left = pipeline.limit
    for document in documents:
        seed = _seed(document)
        passages = [seed]
        if len(seed.text) > config.passage and not pipeline.offline:
            if pipeline.name not in SPLIT_PASSAGES:
                too_long.append(seed)
                continue
            cut = passages_of(seed.text, config.passage)
            passages = [replace(seed, id=f"{seed.id}#{i}", text=text) for i, text in enumerate(cut, start=1)]
        for passage in passages:
            most = pipeline.per_seed if pipeline.offline else min(pipeline.per_seed, left)
            if most > 0:
                seeds.append(replace(passage, most=most))
                left -= most
    seeds.sort(key=lambda seed: seed.id)
    return Selection(pipeline=pipeline, seeds=seeds, too_long=sorted(too_long, key=lambda s: s.id), tree=tree)


def _no_documents(config: SynthesiseConfig, pipeline: PipelineConfig, datasets: Any) -> Selection:
    return Selection(pipeline=pipeline, seeds=[], too_long=[], tree=None)


def _select_texts(
    config: SynthesiseConfig, pipeline: PipelineConfig, datasets: list[tuple[str, Any]]
) -> Selection:
    """Chooses main texts, or takes those that conversations are about, and texts to stand around them."""
    keep = _keeper(pipeline)
    ids = [row["id"] for row in unique(read_training(datasets, ("id", "source", "category"), keep, None))]
    around = stable_shuffle(ids, str, config.seed, "around")[:MOST_AROUND]
    if pipeline.conversations:
        known = set(ids)
        named = dict.fromkeys(str(row.get("document") or "") for row in read_jsonl(pipeline.conversations))
        chosen = [name for name in named if name in known or _PASSAGE.sub("", name) in known]
    else:  # of some, templates find nothing to ask
        chosen = stable_shuffle(ids, str, config.seed, "seeds", pipeline.name)[: 4 * pipeline.limit]
    if not chosen:
        raise _nothing(pipeline, "documents")
    wanted = {*around, *chosen, *(_PASSAGE.sub("", name) for name in chosen)}
    rows = read_training(datasets, (*REQUIRED, *OPTIONAL), keep, sorted(wanted))
    whole = {row["id"]: _seed(row) for row in rows}

    def passage(name: str) -> Seed | None:
        seed = whole.get(name) or whole[_PASSAGE.sub("", name)]
        cut = passages_of(seed.text, config.passage)
        number = stable_key(config.seed, name, "passage") % len(cut) if cut else 0
        if name != seed.id:
            number = int(name.rpartition("#")[2]) - 1
        if not 0 <= number < len(cut):
            return None
        return replace(seed, id=name, text=cut[number].strip())

    seeds, others = ([p for p in map(passage, names) if p is not None] for names in (chosen, around))
    return Selection(pipeline=pipeline, seeds=seeds, too_long=[], tree=None, others=others)


def _keeper(pipeline: PipelineConfig) -> Callable[[Row], bool]:
    def keep(row: Row) -> bool:
        own = row["source"] in pipeline.sources if pipeline.sources else not _synthetic(row["source"])
        return own and (not pipeline.categories or row.get("category") in pipeline.categories)

    return keep


def _nothing(pipeline: PipelineConfig, kind: str) -> UserError:
    what = ", ".join([*pipeline.sources, *pipeline.categories]) or "the training split"
    return UserError(
        f"pipelines: '{pipeline.name}' finds no {kind} in {what}; see its sources and categories"
    )


def _choose(ids: list[str], pipeline: PipelineConfig, seed: int) -> list[str]:
    """Takes as many as the limit needs, in shuffled order; all where templates may find most unfit."""
    shuffled = stable_shuffle(ids, str, seed, "seeds", pipeline.name)
    return shuffled if pipeline.offline else shuffled[: math.ceil(pipeline.limit / pipeline.per_seed)]


def _synthetic(source: str) -> bool:
    return source.startswith("synthetic-")


def unique(rows: list[Row]) -> list[Row]:
    """Returns the rows; no id may stand twice."""
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise UserError(f"documents: the id '{row['id']}' stands twice")
        seen.add(row["id"])
    return rows


def _seed(row: Row) -> Seed:
    text = row["text"] or ""
    language = row.get("language")
    return Seed(
        id=row["id"],
        text=text,
        source=row["source"],
        licence=row["licence"] or "unknown",
        language=language if language in ("en", "zh") else language_of(text),
        category=row.get("category") or "",
        department=row.get("department") or "",
        value=float(row.get("value") or 0.0),
        most=1,
    )


def passages_of(text: str, most: int) -> list[str]:
    """Cuts a text into passages of at most `most` characters: between paragraphs, else lines, sentences, anywhere."""
    return [passage for passage in _cut(text, most, ["\n\n", "\n", "。", ". "]) if passage.strip()]


def _cut(text: str, most: int, marks: list[str]) -> list[str]:
    if len(text) <= most:
        return [text]
    if not marks:
        return [text[i : i + most] for i in range(0, len(text), most)]
    mark, *finer = marks
    passages: list[str] = [""]
    parts = text.split(mark)
    for part in [*(part + mark for part in parts[:-1]), parts[-1]]:
        if len(passages[-1]) + len(part) <= most:
            passages[-1] += part
        else:
            passages += _cut(part, most, finer)
    return passages
