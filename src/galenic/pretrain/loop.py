"""The training loop that pre-training and fine-tuning share: one step, its schedule, its checkpoint.

A checkpoint is a folder `checkpoint-<step>/` with `state.safetensors` (weights and optimizer moments) and
`state.json` (step, guard). It appears by rename, the older one goes only afterwards; nothing is pickled. A step
draws no random number, so a resumed run repeats the uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from galenic.model import BaichuanM1ForCausalLM
from galenic.pretrain.config import GuardConfig, OptimConfig
from galenic.pretrain.guard import GradientGuard
from galenic.runtime import (
    Bar,
    UserError,
    append_jsonl,
    atomic_path,
    device,
    human,
    read_json,
    read_jsonl,
    remove,
    write_json,
    write_jsonl,
)


def warmup_stable_decay(step: int, *, peak: float, warmup: int) -> float:
    """Learning rate of the stable part: linear warm-up over `warmup` steps, then `peak` (step counts from 0)."""
    return peak * min(1.0, (step + 1) / warmup) if warmup else peak


def cosine_decay(progress: float, *, start: float, end: float) -> float:
    """Learning rate on a half cosine from `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the layers' matrices; norms, convolution taps, embedding and head are spared.

    Only the direction of a NormHead row counts: decay would shrink the rows of rare words and so raise their
    gradients without end.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim != 2 or "embed_tokens" in name or "lm_head" in name
            (others if spared else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Trainer:
    """A model, its optimizer and guard, and where they are in the run.

    Args:
        model: causal language model that returns `.loss`.
        optim: optimizer settings.
        guard: gradient guard settings.
        out: folder for checkpoints and `metrics.jsonl`.
        checkpoint_seconds: seconds between checkpoints.
    """

    def __init__(
        self, model: Any, optim: OptimConfig, guard: GuardConfig, out: Path, checkpoint_seconds: float
    ) -> None:
        self.device = device()
        self.model, self.optim, self.guard_config, self.out = model.to(self.device), optim, guard, out
        # Our network can do without holding the logits; others have no such argument.
        self.forward_options = {"use_cache": False}
        if isinstance(model, BaichuanM1ForCausalLM):
            self.forward_options["skip_logits"] = True
        self.optimizer = make_optimizer(model, optim)
        self.guard = self._make_guard()
        self.step = 0
        self.tokens = 0
        self.checkpoint_seconds = checkpoint_seconds
        self.saved_at = time.monotonic()

    def _make_guard(self, **state: Any) -> GradientGuard:
        config = self.guard_config
        return GradientGuard(
            history=config.history,
            factor=config.factor,
            offset=config.offset,
            max_skips=config.max_skips,
            **state,
        )

    # ------------------------------------------------------------------------ the step

    def train_step(self, batch: dict[str, torch.Tensor], lr: float, **extra: Any) -> dict[str, Any]:
        """Takes one step and appends its row to `metrics.jsonl`.

        Raises:
            UserError: the loss or the gradient is not finite; the last checkpoint is kept.
        """
        started = time.monotonic()
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        loss = self.model(**batch, **self.forward_options).loss
        loss.backward()
        # The guard looks at the norm before clipping: afterwards it could never exceed the clip.
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip))
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise UserError(
                f"step {self.step}: loss {value} or gradient norm {norm} is not finite; lower optim.lr "
                f"(the last checkpoint in {self.out} is kept)"
            )
        accepted = self.guard.accept(norm)
        if accepted:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        count = batch["input_ids"].numel()
        self.step += 1
        self.tokens += count
        seconds = time.monotonic() - started
        row = {
            "kind": "train",
            **extra,
            "step": self.step,
            "tokens": self.tokens,
            "loss": value,
            "lr": lr,
            "grad_norm": norm,
            "skipped": not accepted,
            "tokens_per_second": round(count / seconds, 1),
            "seconds": round(seconds, 4),
        }
        append_jsonl(self.out / "metrics.jsonl", row)
        return row

    def train(
        self,
        batches: Callable[[int], dict[str, torch.Tensor]],
        *,
        first: int,
        last: int,
        lr: Callable[[int], float],
        bar: Bar,
        after: Callable[[int], None] | None = None,
        **extra: Any,
    ) -> None:
        """Takes the steps from where the run is up to `last`.

        Args:
            batches: step (counted from `first`) -> batch.
            first: the run's step at which these batches begin.
            last: the run's step at which to stop.
            lr: step (counted from `first`) -> learning rate.
            bar: progress in tokens.
            after: called with the run's step after each, before its checkpoint; what it changes must follow from
                the step and what a checkpoint holds.
            extra: columns added to each metrics row.
        """
        self.model.train()
        while self.step < last:
            index = self.step - first
            batch = batches(index)
            row = self.train_step(batch, lr(index), **extra)
            note = f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, {human(row['tokens_per_second'])} tok/s"
            bar.update(batch["input_ids"].numel(), note)
            if after is not None:
                after(self.step)
            if time.monotonic() - self.saved_at >= self.checkpoint_seconds and self.step < last:
                self.save()

    # ------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Writes a checkpoint, then removes older ones."""
        tensors = {}
        for name, parameter in self._trained():
            tensors[f"model.{name}"] = parameter.detach()
            state = self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                tensors[f"optimizer.{key}.{name}"] = value.contiguous()
        with atomic_path(self.out / f"checkpoint-{self.step:08d}") as folder:
            folder.mkdir()
            save_file(tensors, folder / "state.safetensors")
            state = {"step": self.step, "tokens": self.tokens, "guard": self.guard.state()}
            write_json(folder / "state.json", state)
        for old in self._checkpoints()[:-1]:
            remove(old)
        self.saved_at = time.monotonic()

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters that training changes: all, or an adapter's."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.out.glob("checkpoint-*"))

    def resume(self) -> bool:
        """Continues from the newest checkpoint, if there is one; later rows of `metrics.jsonl` are cut off."""
        found = self._checkpoints()
        if found:
            tensors = load_file(found[-1] / "state.safetensors")
            with torch.no_grad():
                for name, parameter in self._trained():
                    parameter.copy_(tensors[f"model.{name}"])
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer.{key}.{name}"]
                        for key in ("step", "exp_avg", "exp_avg_sq")
                        if f"optimizer.{key}.{name}" in tensors
                    }
            state = read_json(found[-1] / "state.json")
            self.step, self.tokens = state["step"], state["tokens"]
            self.guard = self._make_guard(**state["guard"])
        rows = self.rows()
        if rows:
            write_jsonl(self.out / "metrics.jsonl", [row for row in rows if row["step"] <= self.step])
        return bool(found)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl` so far; a last line cut short by a kill is dropped."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return []
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])
        return list(read_jsonl(path))

    def finish(self) -> None:
        """Removes the checkpoints of a run that is complete."""
        for folder in self._checkpoints():
            remove(folder)
