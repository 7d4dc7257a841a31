"""The training loop that pre-training and fine-tuning share: what happens in one step, and in which order.

    micro-batches --forward, backward--> gradients --norm--> finite? --guard--> clip --> optimizer --> row, checkpoint

How the work is spread over devices (`parallel.py`), what a checkpoint is (`checkpoints.py`) and who is told what
(`watch.py`) come from outside; one process on its own needs nothing of it. A step draws no random number, so a
resumed run repeats the uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from galenic.model import BaichuanM1ForCausalLM
from galenic.model.foreign import plain
from galenic.pretrain.checkpoints.checkpoints import Checkpoints
from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig
from galenic.pretrain.data.collate import IGNORE
from galenic.pretrain.guard import GradientGuard
from galenic.pretrain.optimizers import make_optimizer
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.pretrain.watching.watch import Watch
from galenic.ranks import rank
from galenic.runtime import Bar, UserError, device, progress

NAMED = 8
"""Documents that an error names; the metrics row names all."""


class Batches(Protocol):
    """The batches of a phase, each a function of its step."""

    steps: int
    """How many there are."""
    rows: int
    """Rows of a whole batch, of all ranks together."""
    context: int
    """Tokens in a row."""
    domains: list[str]
    """Names of what `domains` in a batch points to; empty: the batches have no such tensor."""

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns rows of a batch: `input_ids`, `labels`, ... (rows, context) int64, on the CPU.

        `domains`, of the same shape, is each token's domain, negative for none. No label stands on the first token of
        a document.
        """
        ...

    def documents(self, step: int) -> list[str]:
        """Names the documents of a batch."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """Where the reader stands before a step, in a few numbers."""
        ...


class Objective(Protocol):
    """What is minimised instead of the language model's loss: a mean over the units of a batch (pairs, questions ...).

    It is given a batch in parts, one after the other and on several processes, and must not depend on how it is cut.
    """

    measures: Sequence[str]
    """Names of what it tells about a batch beside its loss."""

    def units(self, part: Mapping[str, torch.Tensor]) -> float:
        """Counts the units in a part of a batch."""
        ...

    def __call__(
        self, model: Any, part: Mapping[str, torch.Tensor], units: float
    ) -> tuple[torch.Tensor, Mapping[str, tuple[float, float]]]:
        """Computes the loss of a part.

        Args:
            model: being trained.
            part: of a batch, on the device.
            units: of the whole batch, at least 1.

        Returns:
            Sum of the losses of the part's units divided by `units`, a scalar with gradient, also of a part without
            units; and for each measure its sum over the part and the number it is a mean over.
        """
        ...


class Trainer:
    """A model, its optimizer and guard, and where they are in the run.

    Args:
        model: causal language model that returns `.loss`; already applied to `parallel`.
        optim: optimizer settings.
        guard: gradient guard settings.
        out: folder of `metrics.jsonl` and the checkpoints.
        parallel: how the work is spread; not given: one process.
        checkpoints: where and when the run is written down.
        watch: who is told.
        micro_rows: rows computed at a time; 0: all of this rank's at once.
        objective: what is minimised; not given: the language model's loss of the labels.
    """

    def __init__(
        self,
        model: Any,
        optim: OptimConfig,
        guard: GuardConfig,
        out: Path,
        *,
        parallel: Parallel | None = None,
        checkpoints: Checkpoints | None = None,
        watch: Watch | None = None,
        micro_rows: int = 0,
        objective: Objective | None = None,
    ) -> None:
        self.device = device()
        self.parallel = parallel or Parallel(device=self.device)
        self.model, self.optim, self.guard_config, self.out = model.to(self.device), optim, guard, out
        self.checkpoints = checkpoints or Checkpoints(out, CheckpointConfig())
        self.watch = watch or Watch(out, device=self.device)
        self.micro_rows, self.objective = micro_rows, objective
        # Our network can do without holding the logits; others have no such argument.
        self.ours = isinstance(plain(model), BaichuanM1ForCausalLM)
        self.optimizer = make_optimizer(model, optim)
        self.guard = self._make_guard()
        self.step = 0
        self.tokens = 0
        self.read: dict[str, int] = {}
        self.schedule: dict[str, Any] = {}
        self.reader: dict[str, Any] = {}

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

    def train_step(self, batches: Batches, index: int, lr: float, **extra: Any) -> dict[str, Any]:
        """Takes one step and returns its row of the metrics.

        Args:
            batches: where the batch comes from.
            index: of the batch.
            lr: learning rate.
            extra: columns of the row.

        Raises:
            UserError: the loss or the gradient is not finite; weights, optimizer and the last checkpoint are as before.
        """
        started = time.monotonic()
        parts = self._micro_batches(batches, index)
        domains = batches.domains

        # ---- what all ranks' batches hold: targets (or units), and each domain's targets and tokens
        counts = torch.zeros(1 + 2 * len(domains), dtype=torch.float64)
        for part in parts:
            if self.objective is not None:
                counts[0] += self.objective.units(part)
                continue
            wanted = _wanted(part)
            counts[0] += wanted.sum()
            if domains:
                of = part["domains"]
                counts[1:] += torch.cat([_per_domain(x, of, len(domains)) for x in (wanted, of >= 0)])
        targets, *rest = self.parallel.added(counts).tolist()
        targets_of, read = rest[: len(domains)], rest[len(domains) :]

        # ---- gradients
        told = len(domains) if self.objective is None else 2 * len(self.objective.measures)
        sums = torch.zeros(1 + told, dtype=torch.float64, device=self.device)
        for number, part in enumerate(parts, start=1):
            self.parallel.between_copies(self.model, number == len(parts))
            sums += self._backward(part, targets, len(domains))
        value, *losses = self.parallel.added(sums).tolist()
        norm = self.parallel.norm(self.model.parameters())
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._stop(value, norm, batches.documents(index), **extra)

        # ---- the update; the guard looks at the norm before clipping: afterwards it could never exceed the clip
        accepted = self.guard.accept(norm)
        if accepted:
            self._clip(norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        # ---- what is told
        count = batches.rows * batches.context
        self.step += 1
        self.tokens += count
        for name, tokens in zip(domains, read, strict=True):
            self.read[name] = self.read.get(name, 0) + int(tokens)
        seconds = time.monotonic() - started
        row: dict[str, Any] = {
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
        if self.objective is not None:
            each = zip(self.objective.measures, losses[::2], losses[1::2], strict=True)
            row |= {name: total / count for name, total, count in each if count}
        elif any(losses):  # a model that is not ours does not tell
            row["domains"] = {n: s / c for n, s, c in zip(domains, losses, targets_of, strict=True) if c}
        if not accepted:
            row["documents"] = batches.documents(index)
        return row

    def _micro_batches(self, batches: Batches, index: int) -> list[dict[str, torch.Tensor]]:
        """Returns this rank's part of a batch, `micro_rows` at a time."""
        rows = self.parallel.rows(batches.rows)
        size = self.micro_rows or len(rows)
        return [
            self.parallel.local(batches.batch(index, rows[first : first + size]))
            for first in range(0, len(rows), size)
        ]

    def _backward(self, part: dict[str, torch.Tensor], targets: float, domains: int) -> torch.Tensor:
        """Adds a micro-batch's gradients.

        Returns:
            (1 + domains,) float64: its share of the mean loss over all targets, and each domain's summed losses; or,
            with an objective, (1 + 2 x measures,): sum and count of each.
        """
        if self.objective is not None:
            return self._objective_backward(self.objective, part, targets)
        own = int(_wanted(part).sum())
        part = {name: tensor.to(self.device) for name, tensor in part.items()}
        of = part.pop("domains", None)
        sums = torch.zeros(1 + domains, dtype=torch.float64, device=self.device)
        scale = self.parallel.loss_scale
        if self.ours:
            divisor = max(targets, 1) / scale
            output = self.model(**part, num_items_in_batch=divisor, skip_logits=True, use_cache=False)
            output.loss.backward()
            sums[0] = output.loss.detach().double() / scale
            if output.token_losses is not None and of is not None:
                sums[1:] = _per_domain(output.token_losses.detach(), of, domains)
        elif own or self.parallel.sharded:
            if own:
                loss = self.model(**part, use_cache=False).loss * (own / targets)
            else:  # the mean of nothing is not a number, but the others wait for this process's gradients
                del part["labels"]
                loss = self.model(**part, use_cache=False).logits.sum() * 0
            (loss * scale).backward()
            sums[0] = loss.detach()
        return sums

    def _objective_backward(
        self, objective: Objective, part: dict[str, torch.Tensor], units: float
    ) -> torch.Tensor:
        part = {name: tensor.to(self.device) for name, tensor in part.items()}
        loss, told = objective(self.model, part, max(units, 1))
        (loss * self.parallel.loss_scale).backward()
        pairs = [number for name in objective.measures for number in told.get(name, (0.0, 0.0))]
        return torch.tensor([float(loss.detach()), *pairs], dtype=torch.float64, device=self.device)

    def _clip(self, norm: float) -> None:
        """Scales the gradients down to the largest norm that is allowed."""
        scale = self.optim.clip / (norm + 1e-6)
        if scale < 1:
            for parameter in self.model.parameters():
                if (gradient := parameter.grad) is not None:
                    (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)

    def _stop(self, loss: float, norm: float, documents: list[str], **extra: Any) -> None:
        """Ends the run before the optimizer has seen what is not finite; the last row names all documents."""
        self.checkpoints.wait()
        self.optimizer.zero_grad(set_to_none=True)
        step = self.step + 1
        found = {"loss": str(loss), "grad_norm": str(norm), "documents": documents}
        self.watch.row({"kind": "stopped", **extra, "step": step, **found})
        more = f" and {len(documents) - NAMED} more in metrics.jsonl" if len(documents) > NAMED else ""
        raise UserError(
            f"step {step}: loss {loss} or gradient norm {norm} is not finite; look at its documents "
            f"({', '.join(documents[:NAMED])}{more}), or lower optim.lr "
            f"(the last checkpoint in {self.out} is kept)"
        )

    def train(
        self,
        batches: Batches,
        *,
        first: int,
        last: int,
        lr: Callable[[int], float],
        bar: Bar,
        after: Callable[[int], None] | None = None,
        sizes: Mapping[str, int] | None = None,
        check: Callable[[Mapping[str, Any]], None] | None = None,
        together: int = 1,
        **extra: Any,
    ) -> None:
        """Takes the steps from where the run is up to `last`.

        Args:
            batches: by step, counted from `first`.
            first: the run's step at which these batches begin.
            last: the run's step at which to stop.
            lr: step (counted from `first`) -> learning rate.
            bar: progress in tokens.
            after: called with the run's step after each, before its checkpoint; what it changes must follow from
                the step and what a checkpoint holds.
            sizes: domain -> tokens there are, to tell how often they have been read.
            check: called with each row, on every process; may end the run.
            together: steps that share what is not in a checkpoint, counted from `first`: none falls between them.
            extra: columns added to each metrics row, such as the phase.
        """
        while self.step < last:
            if not self.model.training:  # at the start, or `after` has scored it
                self.model.train()
            index = self.step - first
            row = self.train_step(batches, index, lr(index), **extra)
            if sizes and self.read:
                row["repeats"] = {n: round(t / sizes[n], 4) for n, t in self.read.items() if sizes.get(n)}
            row = self.watch.row(row)
            if check is not None:
                check(row)
            bar.update(batches.rows * batches.context, self.watch.note(row))
            self.schedule = {"step": self.step, "lr": row["lr"], **extra}
            self.reader = batches.state(index + 1)
            if after is not None:
                after(self.step)
            if self.checkpoints.due() and self.step < last and (self.step - first) % together == 0:
                self.save()

    # ------------------------------------------------------------------------ checkpoints

    def save(self, phase_end: str | None = None) -> None:
        """Writes a checkpoint."""
        self.checkpoints.save(
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            reader=self.reader,
            run={
                "step": self.step,
                "tokens": self.tokens,
                "read": self.read,
                "guard": self.guard.state(),
            },
            phase_end=phase_end,
        )

    def resume(self) -> bool:
        """Continues from the newest checkpoint, if there is one; later rows of `metrics.jsonl` are cut off."""
        found = self.checkpoints.load(self.model, self.optimizer)
        if found:
            self.schedule, self.reader, run = found["schedule"], found["reader"], found["run"]
            self.step, self.tokens, self.read = run["step"], run["tokens"], dict(run["read"])
            self.guard = self._make_guard(**run["guard"])
        self.watch.resume(self.step)
        return bool(found)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl` so far; a last line cut short by a kill is dropped."""
        return self.watch.rows()

    def finish(self) -> None:
        """Removes the checkpoints of a run that is complete."""
        self.watch.close()
        self.checkpoints.finish()


def _wanted(part: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where a token's successor is predicted, (rows, context) bool."""
    if "shift_labels" in part:
        return part["shift_labels"] != IGNORE
    return torch.nn.functional.pad(part["labels"][:, 1:] != IGNORE, (0, 1))


def _per_domain(values: torch.Tensor, domains: torch.Tensor, count: int) -> torch.Tensor:
    """Sums (rows, context) values by domain, (count,) float64; tokens of no domain do not count."""
    places = torch.where(domains < 0, count, domains).flatten()
    sums = torch.zeros(count + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, places, values.flatten().double())[:count]


class Silent:
    """No progress bar: of a process or a run that others tell of."""

    def update(self, n: float = 1, note: str = "") -> None:
        """Shows nothing."""


@contextmanager
def shown(total: float, label: str, unit: str) -> Iterator[Bar]:
    """Shows the progress of a run, on one of its processes."""
    if rank() > 0:
        yield Silent()
        return
    with progress(total, label, unit) as bar:
        yield bar
