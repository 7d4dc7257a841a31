"""What the benchmarks of `evaluate` can be told. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from galenic.evaluate.judging.config import JudgeConfig
from galenic.runtime import UserError, nearest

from .rows import ROWS


@dataclass(frozen=True, kw_only=True)
class BenchmarksConfig:
    """Rows of the report's table, answered in free text, and tasks of lm-eval."""

    rows: dict[str, str] = field(default_factory=dict)
    """Row of the report -> its data: a file, a folder of files, or `hub:OWNER/NAME[:CONFIG[:SPLIT]]`. See
    docs/evaluation-benchmarks.md for the rows and their schemas."""
    tasks: list[str] = field(default_factory=list)
    """Tasks or groups of lm-eval, such as medqa_4options; they load their data from the Hub. Needs `galenic[eval]`."""
    task_folder: str | None = None
    """Folder of further task files in lm-eval's format. Their Python is run."""
    fewshot: int | None = None
    """Examples before each question of lm-eval's tasks; none leaves it to the task."""
    samples: int = 1000
    """At most so many items of each row and task, a sample fixed by the seed."""
    prompt: Literal["chat", "plain"] = "chat"
    """`chat`: the model's chat format; `plain`: Question: ... Answer:, for models that have not learned to chat."""
    system: str | None = None
    """System message of the chat prompt; none takes the chat format's own."""
    new_tokens: int = 1024
    """Tokens of an answer at most."""
    judge: JudgeConfig | None = None
    """Gives points for open answers and, in the place of the rule, for diagnoses. Default: rules only."""
    seed: int = 0
    """Fixes which items are sampled."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan: what lies here, not on the Hub."""
        folder = [] if self.task_folder is None else [self.task_folder]
        judge = [] if self.judge is None else self.judge.reads()
        return [*(place for place in self.rows.values() if not place.startswith("hub:")), *folder, *judge]

    def __post_init__(self) -> None:
        if not self.rows and not self.tasks:
            raise UserError("benchmarks: name rows of the report with their data, or tasks of lm-eval")
        for row in self.rows:
            if row not in ROWS:
                raise UserError(
                    f"benchmarks.rows: the report has no row '{row}'{nearest(row, ROWS)}; its rows are "
                    f"{', '.join(ROWS)}"
                )
        for row in self.rows:
            if ROWS[row].metric == "judge" and self.judge is None:
                raise UserError(
                    f"benchmarks.rows.{row}: its answers are open texts, which only a judge can score; give one in "
                    "benchmarks.judge, or leave the row out"
                )
        for name, value in (("samples", self.samples), ("new_tokens", self.new_tokens)):
            if value < 1:
                raise UserError(f"benchmarks.{name} is {value}; it must be at least 1")
        if self.fewshot is not None and self.fewshot < 0:
            raise UserError(f"benchmarks.fewshot is {self.fewshot}; it must be 0 or more")
        if self.system is not None and self.prompt != "chat":
            raise UserError(f"benchmarks.system is used by prompt=chat only; prompt is {self.prompt}")
