"""Reads a run's step folders. What is not there is None; what is there but broken is the user's to know."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from galenic.runtime import UserError, load_yaml, read_json, read_jsonl

from .config import TITLE, ReportConfig
from .steps import find, step_folders, title

Rows = list[dict[str, Any]]


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
    others: list[Step] = field(default_factory=list)
    """Steps of which only the cost is told."""
    items: dict[str, Rows] = field(default_factory=dict)
    """Model -> what it answered to each question, where the evaluation kept it."""
    questions: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """(kind, id) -> question, with its options."""
    comparisons: Rows = field(default_factory=list)
    """What `galenic evaluate --compare` found."""

    def steps(self) -> list[Step]:
        """All steps that left something, in the pipeline's order."""
        steps = [
            *(self.corpus, self.tokenizer, self.pretrain, *self.experts.values(), *self.merges.values()),
            *(*self.alignment.values(), self.flatten, self.evaluate, *self.others),
        ]
        return [step for step in steps if step.state != "not run"]


def resolve(config: ReportConfig) -> ReportConfig:
    """Returns the config with the step folders of its one run named; what the user named stays.

    Raises:
        UserError: see `steps.find`.
    """
    if not config.runs or config.compare:
        return config
    (run,) = config.runs
    found: dict[str, Any] = asdict(find(run))
    found = {key: value for key, value in found.items() if value and not getattr(config, key)}
    named = title(run) if config.title == TITLE else config.title
    return replace(config, title=named, **found)


def read_run(config: ReportConfig) -> Run:
    """Reads every step the config names.

    Raises:
        UserError: see `read_step`.
    """
    config = resolve(config)
    evaluate = read_step(config.evaluate, ("results.json",))
    items = _items(config.evaluate, evaluate)
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
        evaluate=evaluate,
        recipe=_recipe(config.recipe) or [row for run in config.runs for row in _settings(run)],
        others=[read_step(path) for path in config.others],
        items=items,
        questions=_questions(config) if items else {},
        comparisons=[read_json(Path(folder) / "compare.json") for folder in config.comparisons],
    )


def read_runs(config: ReportConfig) -> dict[str, Run]:
    """Reads every run to compare, under its folder's name, with its parent's before it where names recur.

    Raises:
        UserError: see `read_run`; also a run named twice.
    """
    folders = [Path(run).resolve() for run in config.runs]
    if twice := [str(folder) for folder, times in Counter(folders).items() if times > 1]:
        raise UserError(f"runs: {twice[0]} is named twice")
    times = Counter(folder.name for folder in folders)
    names = ["/".join(folder.parts[-2:]) if times[folder.name] > 1 else folder.name for folder in folders]
    return {
        name: read_run(replace(config, runs=[run], compare=False, models=[], comparisons=[]))
        for name, run in zip(names, config.runs, strict=True)
    }


def _items(path: str | None, step: Step) -> dict[str, Rows]:
    """What each model of the results answered, where it was kept."""
    results = step.get("results.json")
    if path is None or not isinstance(results, dict):
        return {}
    files = {name: Path(path) / "items" / f"{name}.jsonl" for name in results.get("models", {})}
    return {name: list(read_jsonl(file)) for name, file in files.items() if file.is_file()}


def _questions(config: ReportConfig) -> dict[tuple[str, str], dict[str, Any]]:
    """The questions that an evaluation asked: where it says they are, or with the corpus of a run that moved."""
    file = Path(config.evaluate or "") / "config.yaml"
    asked = (load_yaml(file.read_text(encoding="utf-8")) or {}).get("questions") if file.is_file() else None
    for folder in (asked, f"{config.corpus}/questions" if config.corpus else None):
        if folder and Path(folder).is_dir():
            files = sorted(Path(folder).glob("*.jsonl"))
            return {(f.stem, row["id"]): row for f in files for row in read_jsonl(f) if "id" in row}
    return {}


def _settings(run: str) -> list[tuple[str, str]]:
    """The settings that each step of a run wrote down, without where on this machine it lies."""
    found = []
    for _, _, folder in step_folders(run):
        file = folder / "config.yaml"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            out = (load_yaml(text) or {}).get("out", "")
            text = text.replace(f"{Path(out).parent}/", "RUN/") if Path(out).name == folder.name else text
            found.append((f"{folder.name}.yaml", text))
    return found


def _recipe(path: str | None) -> list[tuple[str, str]]:
    if path is None or not Path(path).is_dir():
        return []
    try:
        return [(file.name, file.read_text(encoding="utf-8")) for file in sorted(Path(path).glob("*.yaml"))]
    except UnicodeDecodeError as error:
        raise UserError(f"recipe: a YAML file in {path} is not UTF-8 ({error})") from None
