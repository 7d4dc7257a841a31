"""Configuration of the scorer verb; torch-free."""

from dataclasses import dataclass, field
from pathlib import Path

from galenic.corpus.scores.taxonomy import HEADS
from galenic.corpus.synthesis.synthesise_config import BudgetConfig, EndpointConfig
from galenic.runtime import UserError, nearest

LABELS, LEDGER = "teacher/labels.jsonl", "teacher/ledger.jsonl"
"""In OUT: what the teacher says, and what of it was no use."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A language model that labels documents, for the scorer to learn from."""

    endpoint: EndpointConfig
    """Who labels."""
    corpus: str = ""
    """Folder with documents.parquet (a file, or a folder of parts); held-out documents are left out."""
    documents: list[str] = field(default_factory=list)
    """Instead, or besides: Parquet or JSONL files with columns id, text, source."""
    count: int = 2000
    """Documents to label, evenly from all sources."""
    seed: int = 1
    """Of which documents are drawn; a larger count keeps those of a smaller one."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What may be spent; when it is, the scorer learns from what was labelled."""
    cache: str = ""
    """Folder of answers, so that nothing is paid twice; by default OUT.cache, beside OUT, which `build` may empty."""
    failed_share: float = 0.5
    """Stop when requests for more than this share of the documents have failed for good, of 20 at least."""

    def __post_init__(self) -> None:
        if not self.corpus and not self.documents:
            raise UserError("teacher: nothing to label: give a `corpus` folder, or files as `documents`")
        if self.count < 1:
            raise UserError(f"teacher.count: {self.count} is below 1")
        if not 0 <= self.failed_share <= 1:
            raise UserError(f"teacher.failed_share: {self.failed_share} is not in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Train the small network that scores and classifies documents, calibrate it, and check it on held-out labels."""

    out: str
    """Folder for the scorer (`scorer.safetensors`, `scorer.json`)."""
    labels: list[str] = field(default_factory=list)
    """JSON-lines or Parquet files with a field `text`, any of the scores and classes, and perhaps `group`."""
    wheels: str = ""
    """Folder with the data wheels, to learn from the starter's own labels too; not if empty."""
    requirements: str = ""
    """Requirements file that pins the wheels; needed with `wheels`."""
    teacher: TeacherConfig | None = None
    """A language model to ask for labels first; they are written to OUT/teacher."""
    per_source: int = 9000
    """Most texts of each of the starter's sources."""
    code_modules: int | None = None
    """Modules of the Python library to read; all by default."""
    bits: int = 16
    """N-grams are hashed to 2**bits vectors, 128 bytes each; 8 to 22."""
    epochs: int = 12
    """Walks over the labels."""
    rate: float = 0.07
    """Adagrad's rate at the start; falls to 0."""
    dropped: float = 0.5
    """Share of a text's n-grams left out each time it is seen, in [0, 1)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Score or class -> weight in the loss; 1 by default."""
    seed: int = 1
    """Of the split into train, calibration and held-out groups, and of the training."""

    def __post_init__(self) -> None:
        if bool(self.wheels) != bool(self.requirements):
            given, missing = ("wheels", "requirements") if self.wheels else ("requirements", "wheels")
            raise UserError(
                f"{given} is given without {missing}: set both to learn from the starter, or neither"
            )
        if not self.labels and not self.wheels and self.teacher is None:
            raise UserError(
                "nothing to learn from: give `labels` files, a `teacher`, or `wheels` and `requirements`"
            )
        own = (Path(self.out) / LABELS).resolve()
        if self.teacher is not None and own in (Path(path).resolve() for path in self.labels):
            raise UserError(
                f"labels: {own} is what the teacher writes and is learned from anyway; leave it out"
            )
        for name, low, high in (("bits", 8, 22), ("epochs", 1, 1000)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}: {getattr(self, name)} is not in [{low}, {high}]")
        if self.per_source < 1:
            raise UserError(f"per_source: {self.per_source} is below 1")
        if not 0 <= self.dropped < 1:
            raise UserError(f"dropped: {self.dropped} is not in [0, 1)")
        if not 0 < self.rate <= 10:
            raise UserError(f"rate: {self.rate} is not in (0, 10]")
        for name, weight in self.weights.items():
            if name not in HEADS:
                hint = f"{nearest(name, HEADS)}; they are {', '.join(HEADS)}"
                raise UserError(f"weights: no score or class '{name}'{hint}")
            if weight < 0:
                raise UserError(f"weights.{name}: {weight} is negative")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        taught = [self.teacher.corpus, *self.teacher.documents] if self.teacher else []
        return [*self.labels, *(path for path in (self.requirements, self.wheels, *taught) if path)]

    @property
    def cache_folder(self) -> str:
        """Where the teacher's answers are kept."""
        return (self.teacher.cache if self.teacher else "") or f"{self.out.rstrip('/')}.cache"
