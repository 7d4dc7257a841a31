"""Finds the steps of a run folder, as `galenic build` writes it, by the verbs in their names."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galenic.runtime import UserError, read_json

NAME = re.compile(r"\d\d-([a-z]+)(?:-([a-z0-9-]+))?")
"""Of a step's folder: its verb and its label."""
STAGES = ("sft", "elo", "tdpo", "reward", "ppo")
"""Verbs of alignment; an `sft` that a merge read is an expert."""
FILES = (
    *("recipe.json", "done.json", "metrics.jsonl", "sources.json", "stats.json"),
    *("merge.json", "flatten.json", "results.json", "compare.json"),
)
"""That a page is made of; what else it reads changes only with these."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Step folders of a run, under the names that `ReportConfig` gives them."""

    corpus: str | None = None
    tokenizer: str | None = None
    pretrain: str | None = None
    experts: dict[str, str] = field(default_factory=dict)
    merges: dict[str, str] = field(default_factory=dict)
    alignment: dict[str, str] = field(default_factory=dict)
    flatten: str | None = None
    evaluate: str | None = None
    others: list[str] = field(default_factory=list)
    comparisons: list[str] = field(default_factory=list)


def find(run: str) -> Found:
    """Sorts the steps of a run folder; of several that there is one place for, the last.

    Raises:
        UserError: no such folder, or no step in it.
    """
    steps = step_folders(run)
    read = {name for _, verb, folder in steps if verb == "merge" for name in _inputs(folder)}
    found: dict[str, Any] = {"experts": {}, "merges": {}, "alignment": {}, "others": [], "comparisons": []}
    for label, verb, folder in steps:
        if verb in ("corpus", "tokenizer", "pretrain", "flatten", "evaluate"):
            found[verb] = str(folder)
        elif verb == "merge":
            found["merges"][label] = str(folder)
        elif verb == "sft" and folder.name in read:
            found["experts"][label] = str(folder)
        elif verb in STAGES:
            found["alignment"][verb if label == verb else f"{verb}-{label}"] = str(folder)
        elif verb == "compare":
            found["comparisons"].append(str(folder))
        elif verb != "report":
            found["others"].append(str(folder))
    return Found(**found)


def step_folders(run: str) -> list[tuple[str, str, Path]]:
    """Returns (label, or the verb where there is none; verb; folder) of a run's steps, in their order.

    Raises:
        UserError: see `find`.
    """
    if not Path(run).is_dir():
        raise UserError(f"runs: {run} is not a folder; name run folders, as `galenic build` writes them")
    found = [
        (match[2] or match[1], match[1], folder)
        for folder in sorted(Path(run).iterdir())
        if folder.is_dir() and (match := NAME.fullmatch(folder.name))
    ]
    if not found:
        raise UserError(f"runs: {run} holds no NN-verb step folder; name a folder that `galenic build` wrote")
    return found


def read_files(run: str) -> list[str]:
    """Returns the files of a run that a page may be made of, without opening any."""
    folders = [Path(run), *(folder for _, verb, folder in step_folders(run) if verb != "report")]
    return [str(folder / name) for folder in folders for name in FILES if (folder / name).is_file()]


def title(run: str) -> str:
    """Returns what a run is called: its recipe, else its folder."""
    file = Path(run) / "recipe.json"
    values: Any = read_json(file) if file.is_file() else {}
    name = values.get("recipe") if isinstance(values, dict) else None
    return f"Galenic {name or Path(run).resolve().name}"


def run_of(folder: str | Path) -> str | None:
    """Returns the run folder that a step's or a model's folder lies in, if it lies in one."""
    for above in Path(folder).resolve().parents:
        if (above / "recipe.json").is_file():
            return str(above)
    return None


def ancestors(folder: Path) -> list[Path]:
    """Returns the step that a model's folder lies in and all that it comes from, in the order of their names."""
    run = run_of(folder)
    if run is None:
        return []
    known = {step.name: step for _, _, step in step_folders(run)}
    own = Path(folder).resolve().relative_to(run).parts[0]
    found: set[str] = set()
    todo = [own]
    while todo:
        name = todo.pop()
        if name in known and name not in found:
            found.add(name)
            todo += _inputs(known[name])
    return [known[name] for name in sorted(found)]


def _inputs(step: Path) -> set[str]:
    """Names of the steps that a step read, by its provenance."""
    file = step / "provenance.json"
    values: Any = read_json(file) if file.is_file() else {}
    paths = values.get("inputs", {}) if isinstance(values, dict) else {}
    return {part for path in paths for part in Path(path).parts if NAME.fullmatch(part)}
