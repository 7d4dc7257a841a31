"""What is told about a run: a row for each step in `metrics.jsonl`, and where else it is asked for.

    train    phase, step, tokens, loss, lr, grad_norm, skipped, tokens_per_second, seconds      from the training loop
             domains {source: loss}, repeats {source: times read so far}, documents (skipped)  from the training loop
             mfu, memory_gb, eta_seconds                                                       added here
    heldout  phase, step, bits_per_byte {source: bits}                                         see `heldout`

What a resumed run has to know (steps scored, steps skipped) is read from the rows; rows after the checkpoint's step
are cut off, as those steps are taken again.
"""

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from galenic.pretrain.config import WatchConfig
from galenic.pretrain.watching.sinks import Sink, open_sinks
from galenic.ranks import gathered, rank
from galenic.runtime import human, peak_memory_bytes, read_jsonl, write_jsonl

WINDOW = 100
"""Steps over which the speed is averaged that the time left is told by."""
HEALTH = ("reward", "accuracy", "kl", "entropy", "length", "clipped", "unreadable")
"""Measures of alignment that the progress bar shows, where a row has them."""


# ---------------------------------------------------------------------------- numbers


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, *, devices: int, peak: float
) -> float:
    """Share of the devices' peak that the model's own operations take: computed again or padded counts for nothing.

    MFU = tokens/s x FLOPs/token / (devices x peak FLOP/s). Source: Chowdhery et al., arXiv 2204.02311, appendix B.
    """
    return tokens_per_second * flops_per_token / (devices * peak)


def seconds_left(left: Sequence[tuple[float, float]], flops_per_second: float) -> float:
    """Seconds to the end of the curriculum, if the machine keeps the FLOP/s it has now.

    A token of a phase with a longer context costs more.

    Args:
        left: (tokens still to train on, FLOPs of a token) of each phase.
        flops_per_second: that training has reached lately.
    """
    return sum(tokens * cost for tokens, cost in left) / flops_per_second


def matmul_peak(device: str, dtype: Any, *, size: int | None = None, repeats: int = 9) -> float:
    """Measures the FLOP/s of one device in a square matrix product; the median of several, after a warm-up.

    Args:
        device: `cpu` (with the threads torch uses now) or `cuda`.
        dtype: of the factors.
        size: rows and columns; not given: 8192 on CUDA, 768 elsewhere.
        repeats: products that are timed.
    """
    import torch

    size = size or (8192 if device.startswith("cuda") else 768)
    # Not drawn: the state of the random numbers stays as it is.
    one = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    other = one.t().contiguous()
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            wait()
            started = time.perf_counter()
            torch.mm(one, other)
            wait()
            times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[2:])


@cache
def _measured_peak(device: str) -> float:
    import torch

    return matmul_peak(device, torch.bfloat16 if device.startswith("cuda") else torch.float32)


def memory_gb(device: str) -> float:
    """Most memory this process has held, 10^9 bytes: tensors on CUDA, else the resident set."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    return peak_memory_bytes() / 1e9


# ---------------------------------------------------------------------------- the rows


class Watch:
    """Writes the rows of a run, with what they say of speed, memory, repeats and time left.

    All processes have one; process 0's writes.

    Args:
        out: folder of `metrics.jsonl`.
        config: where else rows go, what MFU is measured against.
        flops_per_token: phase -> of forward and backward pass, or one number for all; 0: not known, no MFU.
        tokens: phase -> tokens of all its steps, in order; without, no time left is told.
        devices: accelerators (or processes) in all.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        out: Path,
        config: WatchConfig | None = None,
        *,
        flops_per_token: Mapping[str, float] | float = 0.0,
        tokens: Mapping[str, int] | None = None,
        devices: int = 1,
        device: str = "cpu",
    ) -> None:
        self.out, self.config = out, config or WatchConfig()
        self.flops_per_token, self.phases = flops_per_token, dict(tokens or {})
        self.devices, self.device = devices, device
        self.scored: set[int] = set()
        """Steps after which the held-out documents were scored."""
        self.skips = 0
        """Steps skipped so far."""
        self._done: dict[str, int] = {}  # phase -> tokens trained on so far
        self._tokens = 0
        self._pace: deque[tuple[float, int]] = deque(
            maxlen=WINDOW + 1
        )  # (time, tokens) after each of the last steps
        self._paced = ""  # the phase they belong to
        self._peak: float | None = None
        self._file: TextIO | None = None
        self._sinks: list[Sink] | None = None
        self._told: set[tuple[str, int]] = (
            set()
        )  # (kind, step) of rows that were cut off: sinks have them already

    @property
    def path(self) -> Path:
        """Where the rows are."""
        return self.out / "metrics.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """Rows so far; a last line cut short by a kill is dropped."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            self._close_file()
            self.path.write_bytes(text[: text.rfind(b"\n") + 1])
        return list(read_jsonl(self.path))

    def resume(self, step: int) -> None:
        """Goes on after `step`: later rows are cut off. All processes call it, with 0 for a run that begins.

        Raises:
            UserError: a row is not JSON, or the package of one of `watch.to` is missing.
        """
        if rank() == 0:
            rows = self.rows()
            kept = [row for row in rows if row["step"] <= step]
            self._told = {(row["kind"], row["step"]) for row in rows if row["step"] > step}
            if len(kept) < len(rows):
                self._close_file()
                write_jsonl(self.path, kept)
            for row in kept:
                self._count(row)
            self._sinks = open_sinks(self.config, self.out, step)
        self.scored = set(gathered(sorted(self.scored))[0])

    def _count(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            phase = row.get("phase", "")
            self._done[phase] = self._done.get(phase, 0) + row["tokens"] - self._tokens
            self._tokens = row["tokens"]
            self.skips += row["skipped"]
        elif row["kind"] == "heldout":
            self.scored.add(row["step"])

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Adds what is known here to a row, writes it and returns it; only process 0 writes."""
        row = dict(row)
        self._count(row)
        if rank() != 0:
            return row
        if row["kind"] == "train":
            row |= self._measured(row)
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._sinks is None:
            self._sinks = open_sinks(self.config, self.out, 0)
        for sink in list(self._sinks):
            if sink.again or (row["kind"], row["step"]) not in self._told:
                try:
                    sink.row(row)
                except (
                    Exception
                ) as error:  # whatever a sink does, training goes on and the row is in the file
                    print(f"watch: no more rows go to {sink.name} ({error!r})", file=sys.stderr, flush=True)
                    self._sinks.remove(sink)
        return row

    def _flops(self, phase: str) -> float:
        known = self.flops_per_token
        return known.get(phase, 0.0) if isinstance(known, Mapping) else known

    def _measured(self, row: dict[str, Any]) -> dict[str, Any]:
        """MFU, memory and time left, where they are known."""
        phase, found = row.get("phase", ""), {}
        if cost := self._flops(phase):
            speed, peak = row["tokens_per_second"], self.peak()
            found["mfu"] = round(model_flops_utilisation(speed, cost, devices=self.devices, peak=peak), 4)
        found["memory_gb"] = round(memory_gb(self.device), 3)
        if phase in self.phases:
            found["eta_seconds"] = round(self._eta(phase, row), 1)
        return found

    def _eta(self, phase: str, row: dict[str, Any]) -> float:
        """Seconds to the curriculum's end, by the wall clock: held-out scores and checkpoints between steps count."""
        now = time.monotonic()
        if phase != self._paced:
            self._paced = phase
            self._pace.clear()
            self._pace.append((now - row["seconds"], row["tokens"] - self._step_tokens(row)))
        self._pace.append((now, row["tokens"]))
        (then, before), (now, after) = self._pace[0], self._pace[-1]
        names = list(self.phases)
        cost = {name: self._flops(name) or 1.0 for name in names}  # not known: all tokens cost the same
        left = [
            (max(0, self.phases[name] - self._done.get(name, 0)), cost[name])
            for name in names[names.index(phase) :]
        ]
        return seconds_left(left, cost[phase] * (after - before) / max(now - then, 1e-9))

    @staticmethod
    def _step_tokens(row: dict[str, Any]) -> int:
        return round(row["tokens_per_second"] * row["seconds"])

    def peak(self) -> float:
        """FLOP/s of one device: given, or measured once."""
        if self._peak is None:
            if self.config.peak_tflops is not None:
                self._peak = self.config.peak_tflops * 1e12
            else:
                self._peak = _measured_peak(self.device)
        return self._peak

    def note(self, row: dict[str, Any]) -> str:
        """What the progress bar says of a row."""
        parts = [f"loss {row['loss']:.3f}"]
        parts += [f"{name} {row[name]:.3g}" for name in HEALTH if name in row]
        parts.append(f"{human(row['tokens_per_second'])} tok/s")
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.0%}")
        if self.skips:
            parts.append(f"{self.skips} skipped")
        return ", ".join([*parts, f"lr {row['lr']:.1e}"])  # a narrow terminal cuts the end

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Closes the file and the sinks."""
        self._close_file()
        for sink in self._sinks or []:
            sink.close()
        self._sinks = []
