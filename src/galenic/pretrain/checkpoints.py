"""The newest state of a run, so that it can continue."""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from galenic.pretrain.config import CheckpointConfig
from galenic.runtime import atomic_path, read_json, remove, write_json


class Checkpoints:
    """Folders `checkpoint-<step>` with `state.safetensors` and `state.json`; the newest stays."""

    def __init__(self, out: Path, config: CheckpointConfig, *, run: dict[str, Any]) -> None:
        self.out, self.config, self.run = out, config, run
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one; the same on all ranks."""
        return time.monotonic() - self.saved_at >= self.config.seconds

    def save(
        self,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        schedule: dict[str, Any],
        reader: dict[str, Any],
        run: dict[str, Any],
        phase_end: str | None = None,
    ) -> None:
        """Writes a checkpoint, then removes older ones."""
        tensors = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensors[f"model.{name}"] = parameter.detach()
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value.contiguous()
        with atomic_path(self.out / f"checkpoint-{step:08d}") as folder:
            folder.mkdir()
            save_file(tensors, folder / "state.safetensors")
            write_json(folder / "state.json", {"schedule": schedule, "reader": reader, "run": run})
        for old in self._found()[:-1]:
            remove(old)
        self.saved_at = time.monotonic()

    def load(self, model: Any, optimizer: Any) -> dict[str, Any] | None:
        """Loads the newest checkpoint, if there is one."""
        found = self._found()
        if not found:
            return None
        tensors = load_file(found[-1] / "state.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[f"model.{name}"])
                    end = f".{name}"
                    state = {
                        key.removeprefix("optimizer.").removesuffix(end): value
                        for key, value in tensors.items()
                        if key.startswith("optimizer.") and key.endswith(end)
                    }
                    optimizer.state[parameter] = {k: v for k, v in state.items() if "." not in k}
        return read_json(found[-1] / "state.json")

    def _found(self) -> list[Path]:
        return sorted(self.out.glob("checkpoint-*"))

    def wait(self) -> None:
        """Waits until what is being written is there."""

    def finish(self) -> None:
        """Removes the checkpoints of a run that is complete."""
        for folder in self._found():
            remove(folder)
