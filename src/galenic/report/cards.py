"""The card of a model folder, completed from the run it lies in: evaluation, texts, and the steps that made it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from galenic.runtime import UserError, folder_name, read_json

from . import steps
from .config import ReportConfig
from .inputs import read_step, resolve
from .model_card import Card, render, with_evaluation
from .sections import spell


def card(config: ReportConfig) -> str:
    """Returns the whole card of `config.card`, which is left as it is.

    The run is the one named, else the one that the folder lies in; evaluation and corpus of it, or those named.

    Raises:
        UserError: it is no model folder, or the evaluation named has not this model in it.
    """
    folder = Path(config.card or "").resolve()
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"card: {folder} holds no config.json, so it is not a model folder")
    inside = steps.run_of(folder)
    runs = config.runs[:1] or ([inside] if inside else [])
    found = resolve(replace(config, runs=runs, compare=False, models=[]))
    results = read_step(found.evaluate, ("results.json",)).get("results.json") or {"models": {}}
    numbers = _numbers(results["models"], folder)
    if numbers is None and config.evaluate:
        there = ", ".join(f"{name} ({model['path']})" for name, model in results["models"].items())
        raise UserError(
            f"evaluate: {config.evaluate} has no model {folder_name(str(folder))}; it has {there}"
        )
    return with_evaluation(
        _written(folder),
        folder.parent.name if folder.name == "model" else folder.name,
        numbers,
        results.get("protocol", {}),
        sources=read_step(found.corpus, ("sources.json",)).get("sources.json"),
        made_by=[_told(step) for step in steps.ancestors(folder)] if inside else [],
    )


def _numbers(models: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The numbers of the model that was evaluated at this place, adapters by their own."""
    names = folder_name(str(folder))
    return next((model for model in models.values() if model["path"].split("+")[-1] == names), None)


def _written(folder: Path) -> str:
    """The card that lies with the model, or a small one."""
    file = folder / "README.md"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    about = "A language model. What it was made of was not written down."
    return render(Card(title=folder.name, description=about, tags=["galenic"]))


def _told(step: Path) -> str:
    done = read_json(step / "done.json") if (step / "done.json").is_file() else {}
    return f"`{step.name}`" + (f": {spell(done['seconds'])}" if "seconds" in done else ": not finished")
