"""What the probes can be told. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from galenic.runtime import UserError

Language = Literal["en", "zh"]


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """A value said once in a long text and asked for at its end."""

    contexts: list[int] = field(default_factory=lambda: [256, 512])
    """Lengths of the whole prompt, in tokens; longer than the model reads counts as wrong, and is counted."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where the value is said: 0 at the beginning of the text, 1 at its end."""
    items: int = 8
    """Questions of each length, depth and language."""
    languages: list[Language] = field(default_factory=lambda: ["en", "zh"])
    """Of the sentence that is looked for and of the text made around it."""
    written_tokens: int = 0
    """Tokens at most of an answer that the model writes itself; 0 asks for none."""


@dataclass(frozen=True, kw_only=True)
class HopsConfig:
    """Facts scattered over a long text; the answer follows from one to four of them."""

    contexts: list[int] = field(default_factory=lambda: [512])
    """Lengths of the whole prompt, in tokens; longer than the model reads counts as wrong, and is counted."""
    hops: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """Facts that have to be joined, 1 to 4."""
    items: int = 20
    """Questions of each length, number of hops and language."""
    languages: list[Language] = field(default_factory=lambda: ["en", "zh"])
    """Of the facts and of the text made around them."""
    written_tokens: int = 0
    """Tokens at most of an answer that the model writes itself; 0 asks for none."""


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Whether harmful requests are refused and harmless ones answered."""

    languages: list[Language] = field(default_factory=lambda: ["en", "zh"])
    """Of the requests: 40 harmful and 40 harmless in each."""
    written_tokens: int = 48
    """Tokens at most of an answer; a refusal shows in its first sentences."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Whether the probabilities of the options are as often right as they say."""

    bins: int = 10
    """Bins of confidence."""


@dataclass(frozen=True, kw_only=True)
class PositionsConfig:
    """Whether options are chosen for their letter; each question is asked once for each place of its answer."""

    questions: int = 40
    """At most so many questions of each kind, sampled by the seed."""


@dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """Which of the questions stand in the training corpus."""

    corpus: str
    """Folder of the corpus step (documents.parquet); only its training documents are searched."""


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """Measures of our own; each is left out unless it is named, `{}` takes its defaults."""

    needle: NeedleConfig | None = None
    """Needle in a haystack."""
    hops: HopsConfig | None = None
    """Multi-hop retrieval."""
    safety: SafetyConfig | None = None
    """Refusal and over-refusal."""
    calibration: CalibrationConfig | None = None
    """Expected calibration error of the evaluation's questions."""
    positions: PositionsConfig | None = None
    """Position bias of options."""
    contamination: ContaminationConfig | None = None
    """Questions that the training corpus holds."""
    haystack: str | None = None
    """Held-out text around needles and facts: a .txt file, a .jsonl file of {"text"}, or a corpus step's folder, of
    which the held-out documents are taken. Without it: sentences made by templates."""
    seed: int = 0
    """Fixes the texts, the facts and the sample of questions."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        corpus = [self.contamination.corpus] if self.contamination else []
        return [*([self.haystack] if self.haystack else []), *corpus]

    def need_questions(self) -> list[str]:
        """Probes that work on the evaluation's own questions."""
        return [
            name for name in ("calibration", "positions", "contamination") if getattr(self, name) is not None
        ]

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in PROBES):
            raise UserError(f"probes names none; give one of {', '.join(PROBES)}, such as needle: {{}}")
        if self.haystack is not None and self.needle is None and self.hops is None:
            raise UserError("probes.haystack is used by needle and hops only; name one of them")
        for name, value, least in self._numbers():
            if value < least:
                raise UserError(f"probes.{name} is {value}; it must be at least {least}")
        if self.needle:
            for depth in self.needle.depths:
                if not 0 <= depth <= 1:
                    raise UserError(
                        f"probes.needle.depths: {depth} is not from 0 (the beginning) to 1 (the end)"
                    )
        if self.hops and max(self.hops.hops) > 4:
            raise UserError(f"probes.hops.hops: {max(self.hops.hops)} is more than the 4 there are facts for")

    def _numbers(self) -> Iterator[tuple[str, float, int]]:
        """Yields (name, value, least value), and refuses empty lists and what stands in one twice."""
        for probe in (self.needle, self.hops, self.safety):
            if probe is None:
                continue
            name = {NeedleConfig: "needle", HopsConfig: "hops", SafetyConfig: "safety"}[type(probe)]
            for key in ("contexts", "depths", "hops", "languages"):
                values = getattr(probe, key, None)
                if values is not None and (not values or len(set(values)) < len(values)):
                    raise UserError(f"probes.{name}.{key} is {values}; give at least one, each once")
            yield f"{name}.written_tokens", probe.written_tokens, 1 if name == "safety" else 0
            for key in ("contexts", "hops"):
                for value in getattr(probe, key, []):
                    yield f"{name}.{key}", value, 1
            if not isinstance(probe, SafetyConfig):
                yield f"{name}.items", probe.items, 1
        if self.calibration:
            yield "calibration.bins", self.calibration.bins, 1
        if self.positions:
            yield "positions.questions", self.positions.questions, 1


PROBES = ("needle", "hops", "safety", "calibration", "positions", "contamination")
"""In the order in which they are run."""
