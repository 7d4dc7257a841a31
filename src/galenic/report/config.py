"""What the verb `report` can be told."""

from dataclasses import dataclass, field

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes one self-contained HTML page about a run. Steps left out are shown as not run."""

    out: str
    """Output folder: report.html."""
    title: str = "Galenic run"
    """Heading of the page."""
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
    recipe: str | None = None
    """Recipe folder, whose YAML files are shown."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        single = (self.corpus, self.tokenizer, self.pretrain, self.flatten, self.evaluate, self.recipe)
        several = (self.experts, self.merges, self.alignment)
        paths = [path for folders in several for path in folders.values()]
        return [*(path for path in single if path is not None), *paths]

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise UserError("title is empty; leave it out for the default")
        if not self.reads():
            raise UserError(
                "nothing to report on: name at least one step folder, such as evaluate: RUN/70-evaluate"
            )
