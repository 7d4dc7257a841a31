"""Reads a run's step folders. What is not there is None; what is there but broken is the user's to know."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galenic.runtime import UserError, read_json, read_jsonl

from .config import ReportConfig


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step's folder and what it left behind."""

    name: str
    """Folder name, such as `30-pretrain`."""
    state: str
    """`done`, `unfinished` (no done.json) or `not run`."""
    done: dict[str, Any] = field(default_factory=dict)
    """done.json: fingerprint, seconds, peak_rss_bytes, versions."""
    files: dict[str, Any] = field(default_factory=dict)
    """File name -> its parsed contents; a file that is missing is missing here."""

    def get(self, file: str) -> Any:
        """Returns the contents of a file, or None."""
        return self.files.get(file)


def read_step(path: str | None, files: tuple[str, ...] = ()) -> Step:
    """Reads a step folder; no path, or no such folder, is a step that was not run.

    Raises:
        UserError: a file is not the JSON it should be.
    """
    if path is None or not Path(path).is_dir():
        return Step(name=Path(path).name if path else "", state="not run")
    folder = Path(path)
    finished = (folder / "done.json").is_file()
    return Step(
        name=folder.name,
        state="done" if finished else "unfinished",
        done=read_json(folder / "done.json") if finished else {},
        files={name: _read(folder / name) for name in files if (folder / name).is_file()},
    )


def _read(path: Path) -> Any:
    return list(read_jsonl(path, growing=True)) if path.suffix == ".jsonl" else read_json(path)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the page is made of."""

    corpus: Step
    tokenizer: Step
    pretrain: Step
    experts: dict[str, Step]
    merges: dict[str, Step]
    alignment: dict[str, Step]
    flatten: Step
    evaluate: Step
    recipe: list[tuple[str, str]]
    """(file name, text) of the recipe, in order."""

    def steps(self) -> list[Step]:
        """All steps that left something, in the pipeline's order."""
        steps = [
            *(self.corpus, self.tokenizer, self.pretrain, *self.experts.values(), *self.merges.values()),
            *(*self.alignment.values(), self.flatten, self.evaluate),
        ]
        return [step for step in steps if step.state != "not run"]


def read_run(config: ReportConfig) -> Run:
    """Reads every step the config names.

    Raises:
        UserError: see `read_step`.
    """
    return Run(
        corpus=read_step(config.corpus, ("sources.json", "stats.json")),
        tokenizer=read_step(config.tokenizer, ("tokens/meta.json",)),
        pretrain=read_step(config.pretrain, ("metrics.jsonl",)),
        experts={name: read_step(path, ("metrics.jsonl",)) for name, path in config.experts.items()},
        merges={name: read_step(path, ("merge.json",)) for name, path in config.merges.items()},
        alignment={
            name: read_step(path, ("metrics.jsonl", "model/galenic.json"))
            for name, path in config.alignment.items()
        },
        flatten=read_step(config.flatten, ("flatten.json",)),
        evaluate=read_step(config.evaluate, ("results.json",)),
        recipe=_recipe(config.recipe),
    )


def _recipe(path: str | None) -> list[tuple[str, str]]:
    if path is None or not Path(path).is_dir():
        return []
    try:
        return [(file.name, file.read_text(encoding="utf-8")) for file in sorted(Path(path).glob("*.yaml"))]
    except UnicodeDecodeError as error:
        raise UserError(f"recipe: a YAML file in {path} is not UTF-8 ({error})") from None
