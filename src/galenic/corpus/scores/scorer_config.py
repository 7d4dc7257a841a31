"""Configuration of the scorer verb; torch-free."""

from dataclasses import dataclass, field

from galenic.corpus.scores.taxonomy import HEADS
from galenic.runtime import UserError, nearest


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
        if not self.labels and not self.wheels:
            raise UserError("nothing to learn from: give `labels` files, or `wheels` and `requirements`")
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
        return [*self.labels, *(path for path in (self.requirements, self.wheels) if path)]
