"""What the verb `report` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from galenic.runtime import UserError

from .steps import read_files

TITLE = "Galenic run"
OF_CARDS = ("README.md", "config.json", "adapter_config.json", "galenic.json")
"""Files of a model's folder that its card is made of."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes one self-contained HTML page about a run, or one that compares several.

    `galenic report RUN` finds the steps of a run folder by their names, `galenic report RUN... --compare` sets the
    models of run folders side by side. Or each step folder is named by an option; those left out are shown as not run.
    """

    out: str = "report"
    """Output folder: report.html, or README.md of a model card. An older page there is written anew."""
    title: str = TITLE
    """Heading of the page."""
    runs: list[str] = field(default_factory=list)
    """Run folders, as `galenic build` writes them; on the command line the first words of `galenic report`."""
    compare: bool = False
    """Compare the models of all runs, instead of telling how one run went."""
    models: list[str] = field(default_factory=list)
    """Models to compare, by the names the page gives them; none: all of one run, of several each one's ends."""
    comparisons: list[str] = field(default_factory=list)
    """Folders that `galenic evaluate --compare` wrote, for differences on the same items."""
    corpus: str | None = None
    """Corpus step folder."""
    tokenizer: str | None = None
    """Tokenizer step folder."""
    pretrain: str | None = None
    """Pre-training step folder."""
    experts: dict[str, str] = field(default_factory=dict)
    """Expert's name -> SFT step folder."""
    merges: dict[str, str] = field(default_factory=dict)
    """Merge's name -> merge step folder."""
    alignment: dict[str, str] = field(default_factory=dict)
    """Stage's name -> step folder of `sft`, `elo`, `tdpo`, `reward` or `ppo`, in the order they were run."""
    flatten: str | None = None
    """Flattening step folder."""
    evaluate: str | None = None
    """Evaluation step folder."""
    others: list[str] = field(default_factory=list)
    """Other step folders, such as `scorer`'s: only what they took is told."""
    recipe: str | None = None
    """Recipe folder, whose YAML files are shown."""
    watts: float = 100.0
    """What the machine draws while it works, for the estimate of energy: a guess unless you measured it."""
    failures: int = 6
    """Questions shown that a model failed at, of each sort; 0 shows none."""
    card: str | None = None
    """Model folder to write a model card (README.md) for, instead of a page."""

    renewed: ClassVar[bool] = True
    """A page is made in seconds of what there is, and a run that goes on grows: an older page is no one's loss."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        single = (self.corpus, self.tokenizer, self.pretrain, self.flatten, self.evaluate, self.recipe)
        several = (self.experts, self.merges, self.alignment)
        paths = [path for folders in several for path in folders.values()]
        found = [file for run in self.runs for file in read_files(run)]
        folder = Path(self.card) if self.card else None
        card = [str(file) for file in sorted(folder.glob("*.*")) if file.name in OF_CARDS] if folder else []
        listed = [*self.others, *self.comparisons]
        return [*(path for path in single if path is not None), *paths, *listed, *found, *card]

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise UserError("title is empty; leave it out for the default")
        if not self.watts > 0:
            raise UserError(f"watts is {self.watts:g}; it must be above 0")
        if self.failures < 0:
            raise UserError(f"failures is {self.failures}; it must be at least 0")
        if self.compare and not self.runs:
            raise UserError("compare: name run folders, as in: galenic report RUN... --compare")
        if len(self.runs) > 1 and not (self.compare or self.card):
            raise UserError(f"{len(self.runs)} runs: add --compare to set them side by side, or name one")
        if self.models and not self.compare:
            raise UserError("models: only a comparison chooses models; add --compare")
        if not (self.runs or self.card or self.reads()):
            raise UserError(
                "nothing to report on: name a run folder, or at least one step folder, such as "
                "--evaluate RUN/70-evaluate"
            )
