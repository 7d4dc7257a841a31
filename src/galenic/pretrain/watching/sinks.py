"""TensorBoard, Weights & Biases and trackio: the rows of `metrics.jsonl` once more, for those who look there.

Nothing leaves the machine unless the user's own settings say so: W&B runs offline (`wandb sync` sends it later) and
trackio writes to its local store. A resumed run goes on in the same place and no row stands there twice.
"""

import importlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from galenic.pretrain.config import WatchConfig
from galenic.runtime import UserError, read_json, write_json


class Sink(Protocol):
    """Where rows go."""

    name: str
    again: bool
    """Whether rows that were cut off and are written again have to be told again."""

    def row(self, row: dict[str, Any]) -> None:
        """Tells a row."""

    def close(self) -> None:
        """Writes out what is left."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under `kind/column` or `kind/column/source`; words and lists are left out.

    Example:
        >>> scalars({"kind": "train", "step": 2, "loss": 1.5, "skipped": False, "domains": {"hpo": 2.0}})
        {'train/loss': 1.5, 'train/skipped': 0.0, 'train/domains/hpo': 2.0}
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        if key in ("kind", "step"):
            continue
        named = (
            {f"{key}/{name}": each for name, each in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        for name, each in named.items():
            if isinstance(each, int | float):
                found[f"{row['kind']}/{name}"] = float(each)
    return found


MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Sink -> what is imported for it."""


def _imported(name: str) -> Any:
    if name == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports go to a service of their own
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise UserError(
            f"watch.to: '{name}' needs the package {name} ({error}); run pip install 'galenic[watch]' or pip install "
            f"{name}, or take it out"
        ) from None


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    name, again = "tensorboard", True

    def __init__(self, package: Any, out: Path, step: int) -> None:
        # TensorBoard drops what an earlier run wrote from this step on.
        self.writer = package.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def row(self, row: dict[str, Any]) -> None:
        """Tells a row."""
        for tag, value in scalars(row).items():
            self.writer.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Writes out what is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases in `wandb/` of the run's folder; offline unless WANDB_MODE says otherwise."""

    name, again = "wandb", False

    def __init__(self, package: Any, out: Path, project: str, run: str) -> None:
        self.run = package.init(
            project=project,
            id=run,
            name=run,
            dir=str(out),
            resume="allow",
            settings=package.Settings(console="off", save_code=False, disable_git=True, disable_code=True),
        )

    def row(self, row: dict[str, Any]) -> None:
        """Tells a row."""
        self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """Writes out what is left."""
        self.run.finish()


class Trackio:
    """A run of trackio in its local store; elsewhere only where its own environment variables say so."""

    name, again = "trackio", False

    def __init__(self, package: Any, project: str, run: str) -> None:
        self.run = package.init(project=project, name=run, resume="allow", embed=False, auto_log_cpu=False)

    def row(self, row: dict[str, Any]) -> None:
        """Tells a row."""
        self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """Writes out what is left."""
        self.run.finish()


def open_sinks(config: WatchConfig, out: Path, step: int) -> list[Sink]:
    """Opens what `watch.to` names for a run that goes on after `step`.

    Raises:
        UserError: a package is missing.
    """
    packages = {name: _imported(name) for name in config.to}
    sinks: list[Sink] = []
    for name, package in packages.items():
        if name == "tensorboard":
            sinks.append(TensorBoard(package, out, step))
        elif name == "wandb":
            sinks.append(Wandb(package, out, config.project, run_name(out)))
        else:
            sinks.append(Trackio(package, config.project, run_name(out)))
    return sinks


def run_name(out: Path) -> str:
    """The run's name there, `<folder>-<eight digits>`: kept in `watch.json`, so that a resumed run is the same one."""
    path = out / "watch.json"
    if not path.exists():
        # Chance, not a seed: another run of the same recipe is another run.
        write_json(path, {"run": f"{out.name}-{uuid.uuid4().hex[:8]}"})
    return read_json(path)["run"]
