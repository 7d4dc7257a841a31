"""Checkpoints of training: five named states in a folder that appears at once, from any number of processes.

    checkpoint-00001200/
      model/        safetensors of every rank's own part of the weights (torch.distributed.checkpoint)
      optimizer/    the same of the optimizer's state, entries named `exp_avg.<parameter>`
      schedule.json reader.json
      run.json      step, the run's state, what must match to continue, size and SHA-256 of every other file

Every rank writes its own part into `.checkpoint-00001200.partial/`. When all are on disk, rank 0 adds `run.json`,
renames the folder and only then removes older ones: killed anywhere, the newest whole checkpoint is there. The step in
its name says which is newest, no clock. Several machines need a file system they share. Nothing on disk is unpickled.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from galenic.pretrain.checkpoints.checkpoint_folder import (
    as_text,
    damage,
    differences,
    empty_state,
    ends_phase,
    fill,
    moves,
    one_line,
    optimizer_state,
    read_about,
    read_tensors,
    replaced,
    reshard,
    step_of,
    tensor_degree,
    tensors_there,
    trained,
    write_tensors,
)
from galenic.pretrain.config import CheckpointConfig
from galenic.pretrain.parallelism.tensor_parallel import official_rows, regrouped_rows
from galenic.ranks import gathered, lost, rank, ranks
from galenic.runtime import UserError, fsync, read_json, remove, sha256_file

T = TypeVar("T")
NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """Writes and reads the checkpoints of a run; every method is called by all ranks together.

    Asynchronous: `save` copies this rank's part of the state to the CPU (12 bytes for each parameter it holds, with
    AdamW) and returns; a thread writes the copy. There is one copy, used again for each save, so that a save first
    waits for the one before; the writer needs twice `FILE_BYTES` beside it, or twice the largest tensor of
    this rank. Synchronous: no copy. What the threads tell each other goes through a process group of their own, which
    ends only after them: collectives of two threads in one group would mix.

    Use it as a context manager, or call `close`: a process that ends while its thread waits for others is aborted.

    Args:
        out: folder of the run.
        config: when, how many, and whether in the background.
        run: what must be the same for a run to continue (JSON values): architecture, optimizer, phases, seed, digest of
            the data, precision.
        timeout: seconds after which a rank gives up waiting for another.
    """

    def __init__(
        self,
        out: str | Path,
        config: CheckpointConfig,
        *,
        run: Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.out, self.config = Path(out), config
        self.matches = json.loads(json.dumps(run or {}))  # as it will be read back
        self.timeout = timedelta(seconds=timeout)
        self.group: Any = None  # of the thread
        self.asking: Any = None  # of `due`
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.stager: DefaultStager | None = None
        self.writing: Future[None] | None = None
        self.newest: int | None = None
        """Step of the newest whole checkpoint."""
        self._restart_clock()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else the first error counts
                raise
        finally:
            self.close()

    def _connect(self) -> None:
        """Makes the process groups, where processes are connected at all."""
        if self.group is None and distributed.is_initialized():
            self.group, self.asking = (
                distributed.new_group(backend="gloo", timeout=self.timeout) for _ in range(2)
            )

    # ------------------------------------------------------------------------ save

    def due(self) -> bool:
        """Whether it is time for a checkpoint, the same on all ranks; called once a step.

        Rank 0's monotonic clock decides. It is not asked at every step: when it is, it tells how many more steps the
        rest of the time will take; half of them pass, and no more than have passed, before it is asked again.
        """
        self.steps += 1
        if self.steps < self.ask_at:
            return False
        elapsed = time.monotonic() - self.saved_at
        left = max(0.0, self.config.seconds - elapsed) * self.steps / max(elapsed, 1e-9) / 2
        answer = torch.tensor(
            [elapsed >= self.config.seconds, 1 + int(min(left, self.steps))], dtype=torch.int64
        )
        if self.asking is not None:
            distributed.broadcast(answer, src=0, group=self.asking)
        due, wait = answer.tolist()
        self.ask_at = self.steps + wait
        return bool(due)

    def _restart_clock(self) -> None:
        self.saved_at, self.steps, self.ask_at = time.monotonic(), 0, 1

    def save(
        self,
        step: int,
        *,
        model: torch.nn.Module,
        optimizer: Any,
        schedule: dict[str, Any],
        reader: dict[str, Any],
        run: dict[str, Any],
        phase_end: str | None = None,
    ) -> None:
        """Writes a checkpoint, then removes older ones.

        Args:
            step: of the run.
            model: what is trained of it (requires_grad) is saved.
            optimizer: anything with `.state`.
            schedule: state of the learning rate's schedule (JSON values).
            reader: state of the data reader (JSON values).
            run: state of the run: tokens, guard (JSON values).
            phase_end: name of the phase that ends here.

        Raises:
            UserError: the checkpoint before, or without `asynchronous` this one, could not be written.
        """
        self.wait()
        self._connect()
        reshard(model)
        state: dict[str, Any] = {
            "model": {name: parameter.detach() for name, parameter in trained(model)},
            "optimizer": optimizer_state(model, optimizer),
        }
        # Written out now: they may change while the thread works.
        texts = {"schedule.json": as_text(schedule), "reader.json": as_text(reader)}
        about = {
            "step": step,
            "phase_end": phase_end,
            "run": json.loads(as_text(run)),
            "ranks": ranks(),
            "tensor": tensor_degree(model),
            "matches": self.matches,
        }
        if self.config.asynchronous:
            self.stager = self.stager or DefaultStager(
                StagingOptions(
                    use_pinned_memory=torch.cuda.is_available(),
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            )
            staged: Any = self.stager.stage(state)
            self.writing = self.thread.submit(self._write, step, staged, texts, about)
        else:
            self._write(step, state, texts, about)
        self._restart_clock()

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written; the one before is kept. The same on every rank.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, state: dict[str, Any], texts: dict[str, str], about: dict[str, Any]) -> None:
        folder = self.out / f"checkpoint-{step:08d}"
        partial = folder.with_name(f".{folder.name}.partial")

        def begin() -> None:
            if rank() == 0:
                remove(partial)
                partial.mkdir(parents=True)
                for name, text in texts.items():
                    (partial / name).write_text(text, encoding="utf-8")

        def see() -> None:
            if not partial.is_dir():
                raise UserError(
                    f"{self.out}: rank {rank()} does not see what rank 0 writes; the folder must be shared"
                )

        def tensors() -> dict[str, list[Any]]:
            for name, values in state.items():
                write_tensors(partial / name, values, self.group)
            own = [path for name in state for path in (partial / name).glob(f"shard-{rank() + 1:05d}-*")]
            own += [partial / name for name in texts] if rank() == 0 else []
            for path in own:
                fsync(path)
            return {str(path.relative_to(partial)): [path.stat().st_size, sha256_file(path)] for path in own}

        def publish(files: dict[str, list[Any]]) -> None:
            if rank() > 0:
                return
            about["files"] = dict(sorted(files.items()))
            (partial / "run.json").write_text(as_text(about), encoding="utf-8")
            for path in (partial / "run.json", *(partial / name for name in state), partial):
                fsync(path)
            if folder.exists():  # the same step again; `_clean` puts it back after a kill between the two
                os.replace(folder, replaced(folder))
            os.replace(partial, folder)
            fsync(self.out)
            remove(replaced(folder))
            self._remove_older(step)

        try:
            self._together(begin)
            self._together(see)
            files = {name: entry for part in self._together(tensors) for name, entry in part.items()}
            self._together(lambda: publish(files))
        except UserError as error:
            if rank() == 0:
                with suppress(OSError):
                    remove(partial)
            before = (
                "there is none before it" if self.newest is None else f"that of step {self.newest} is kept"
            )
            raise UserError(f"{folder}: not written, {before}: {error}") from error.__cause__
        self.newest = step

    def _remove_older(self, step: int) -> None:
        """Removes what need not stay beside the checkpoint of `step`; rank 0."""
        older = [folder for folder in self._folders() if step_of(folder) < step]
        for old in older[: max(0, len(older) + 1 - self.config.keep)]:
            if not (self.config.keep_phase_ends and ends_phase(old)):
                self._take_away(old)

    def _take_away(self, folder: Path) -> None:
        """Removes a checkpoint such that none is ever seen in part."""
        hidden = folder.with_name(f".{folder.name}.partial")
        remove(hidden)
        os.replace(folder, hidden)
        remove(hidden)

    # ------------------------------------------------------------------------ load

    def load(self, model: torch.nn.Module, optimizer: Any) -> dict[str, Any] | None:
        """Continues from the newest whole checkpoint, whatever ranks wrote it.

        Args:
            model: receives the weights, in place, in the sharding it has.
            optimizer: its `.state` is replaced.

        Returns:
            {"step", "schedule", "reader", "run", "phase_end"}, or None where there is no checkpoint.

        Raises:
            UserError: the checkpoint is of another configuration, or every one is damaged.
        """
        self._connect()
        reshard(model)
        self._together(self._clean)
        found = self._newest_whole()
        if found is None:
            return None
        folder, about = found
        weights = {name: parameter.detach() for name, parameter in trained(model)}
        state = empty_state(folder / "optimizer", model)
        self._read(folder / "model", weights, model, about["tensor"])
        self._read(folder / "optimizer", state, model, about["tensor"])
        parameters = dict(trained(model))
        optimizer.state.clear()
        for entry, value in state.items():
            key, name = entry.split(".", 1)
            optimizer.state.setdefault(parameters[name], {})[key] = value
        self.newest = about["step"]
        self._restart_clock()
        notes = {name: read_json(folder / f"{name}.json") for name in ("schedule", "reader")}
        return {name: about[name] for name in ("step", "run", "phase_end")} | notes

    def _clean(self) -> None:
        """Removes what a killed run left half-done; rank 0."""
        if rank() > 0:
            return
        for old in self.out.glob("checkpoint-*.replaced"):
            whole = old.with_name(old.name.removesuffix(".replaced"))
            if whole.exists():
                remove(old)
            else:
                os.replace(old, whole)
        for partial in self.out.glob(".checkpoint-*.partial"):
            remove(partial)

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """Returns the newest checkpoint that is whole and what its run.json says; sets newer ones aside.

        Raises:
            UserError: it is of another configuration, or all are damaged.
        """
        folders = self._together(lambda: [str(folder) for folder in reversed(self._folders())])[0]
        problems: dict[Path, str] = {}
        for folder in map(Path, folders):
            about = self._together(lambda folder=folder: read_about(folder) if rank() == 0 else {})[0]
            if "problem" not in about:
                if differing := differences(about["matches"], self.matches):
                    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
                    raise UserError(
                        f"{folder}: made with another configuration: {'; '.join(differing[:5])}{more}; "
                        "give what it was made with, or another `out`"
                    )
                found = self._together(
                    lambda folder=folder, about=about: damage(folder, about["files"], rank(), ranks())
                )
                if problem := next(filter(None, found), None):
                    about["problem"] = problem
            if "problem" not in about:
                self._together(lambda folder=folder: self._set_aside(problems, folder))
                return folder, about
            problems[folder] = about["problem"]
        for folder, problem in problems.items():
            raise UserError(
                f"{problem}, and there is no older whole checkpoint; remove {folder} to start from the beginning"
            )
        return None

    def _set_aside(self, problems: Mapping[Path, str], folder: Path) -> None:
        """Renames the damaged checkpoints that are newer than the one in use; rank 0."""
        if rank() == 0:
            for bad, problem in problems.items():
                aside = bad.with_name(f"{bad.name}.damaged")
                remove(aside)
                os.replace(bad, aside)
                print(f"galenic: warning: {problem}; continuing from {folder}", file=sys.stderr, flush=True)

    def _read(self, folder: Path, values: dict[str, torch.Tensor], model: Any, saved: int) -> None:
        """Fills tensors from a folder; where `saved` devices grouped their rows in another way, one after the other."""
        there = tensors_there(folder)
        if missing := sorted(values.keys() ^ there.keys()):
            raise UserError(f"{folder}: holds other tensors than this run's, {missing[0]} first")
        now = tensor_degree(model)
        moved = {name for name, value in values.items() if moves(name, value, model, saved, now)}
        self._load({name: value for name, value in values.items() if name not in moved}, folder)
        for name in sorted(moved):
            whole = torch.empty(values[name].shape, dtype=values[name].dtype)
            self._load({name: whole}, folder)
            official = official_rows(name, whole, model.config, saved)
            fill(values[name], regrouped_rows(name, official, model.config, now))

    def _load(self, values: dict[str, torch.Tensor], folder: Path) -> None:
        self._together(lambda: read_tensors(folder, values, self.group))

    # ------------------------------------------------------------------------ end

    def finish(self) -> None:
        """Removes the checkpoints of a run that is complete; those of phase ends stay where they are wanted."""
        self.wait()

        def tidy() -> None:
            if rank() == 0:
                self._clean()
                for folder in self._folders():
                    if not (self.config.keep_phase_ends and ends_phase(folder)):
                        self._take_away(folder)
                for folder in self.out.glob("checkpoint-*.damaged"):
                    remove(folder)

        self._together(tidy)
        self.close()

    def close(self) -> None:
        """Ends the thread, then its process group."""
        self.thread.shutdown(wait=True)
        if self.stager is not None:
            self.stager.close()
        groups, self.group, self.asking, self.stager = [self.group, self.asking], None, None, None
        for group in groups:
            if group is not None and distributed.is_initialized():
                distributed.destroy_process_group(group)

    def _folders(self) -> list[Path]:
        """Whole checkpoints, oldest first, by step."""
        return sorted(
            (path for path in self.out.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of
        )

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Does the work on every rank and returns the JSON value of each; what fails on one, fails on all alike."""
        value, error, own = None, None, None
        try:
            value = work()
        except (Exception, CheckpointException) as caught:  # which is no Exception
            own, error = caught, one_line(caught)
        told: list[Any] = [(value, error)]
        if self.group is not None:
            try:
                told = gathered((value, error), self.group)
            except RuntimeError as gone:
                raise UserError(lost(gone, self.timeout.total_seconds()) or error or one_line(gone)) from own
        for _, error in told:
            if error is not None:
                raise UserError(error) from own
        return [value for value, _ in told]
