"""Measurements on a machine that is lent for minutes: whatever fails, the others still come out.

A parent without torch starts a worker, which takes one case after another and writes down what it found after each.
An error is a row like any other; a worker that crashed, hangs or cannot free its memory is started anew and goes on
with the next case. `results.json` and `results.md` in the output folder are whole at any time.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

START = 90.0
"""Seconds that a worker may take to its first case."""
AGAIN, UNCONNECTED = 75, 76
"""What a worker exits with: to be started anew; because process groups do not work."""
UNTRIED = "GALENIC_CUDA_UNTRIED"
"""Set: the worker does not try its process group, one process may do without."""
LEFT_OVER = 2e9
"""Bytes on the GPU that a case may leave behind, before the worker is started anew."""

Row = dict[str, Any]


# ---------------------------------------------------------------------------- the parent


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what all such benchmarks are told."""
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and results.md")
    parser.add_argument(
        "--limit", type=float, default=150, help="seconds of one case, after which it is given up"
    )
    parser.add_argument("--seconds", type=float, default=300, help="no case begins after so long")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # the time when the parent began


def supervise(given: argparse.Namespace) -> int:
    """Keeps a worker running until all cases are done; the parent's whole work."""
    given.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "results.md", "errors.txt"):
        (given.out / name).unlink(missing_ok=True)
    began, variables, starts = time.time(), dict(os.environ), 0
    remedies = [{"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}, {UNTRIED: "1"}]
    while starts < 12:
        starts += 1
        words = [sys.executable, "-u", *sys.argv, "--worker", str(began)]
        worker, last, running = subprocess.Popen(words, env=variables), time.time(), None
        while worker.poll() is None:
            time.sleep(0.5)
            running = next((row for row in read(given.out) if row["status"] == "running"), None)
            last = running["began"] if running else max(last, written(given.out))
            if time.time() - last < (given.limit if running else min(given.limit, START)):
                continue
            worker.send_signal(signal.SIGUSR1)  # tells where it stands
            time.sleep(2)
            worker.kill()
            worker.wait()
        if worker.returncode == 0:
            break
        hung = worker.returncode < 0 and running is None  # before its first case, or between two
        if worker.returncode == UNCONNECTED or hung:
            if not remedies:
                break
            variables |= (remedy := remedies.pop(0))
            print(f"once more with {remedy}", flush=True)
        failed(given.out, f"the process ended with code {worker.returncode}")
    print(tables(read(given.out)), flush=True)
    return 0


def written(out: Path) -> float:
    """When rows were last written."""
    path = out / "results.json"
    return path.stat().st_mtime if path.exists() else 0.0


def failed(out: Path, why: str) -> None:
    """Marks the case that was running."""
    rows = read(out)
    for row in rows:
        if row["status"] == "running":
            row |= {"status": "failed", "error": why}
    if rows:
        write(out, rows)


# ---------------------------------------------------------------------------- what was found


def read(out: Path) -> list[Row]:
    """Returns the rows so far."""
    try:
        return json.loads((out / "results.json").read_text())
    except FileNotFoundError:
        return []


def write(out: Path, rows: list[Row]) -> None:
    """Replaces the rows and their tables."""
    for name, text in (("results.json", json.dumps(rows, indent=1)), ("results.md", tables(rows))):
        (out / f".{name}").write_text(text)
        (out / f".{name}").replace(out / name)


def tables(rows: Sequence[Row]) -> str:
    """A table for each kind of cases, its columns in the order in which they were first told."""
    lines: list[str] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        columns = list(dict.fromkeys(name for row in some for name in row.get("told", {})))
        lines += [f"\n{kind}\n", f"| case | {' | '.join([*columns, 'error'])} |"]
        lines.append("|---" * (len(columns) + 2) + "|")
        for row in some:
            cells = [str(row.get("told", {}).get(name, "")) for name in columns]
            error = row.get("error", "") or ("" if row["status"] == "done" else row["status"])
            lines.append(f"| {row['case']} | {' | '.join(cells)} | {error.replace('|', '/')[:400]} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------- the worker


def short(error: BaseException, frames: int = 4) -> str:
    """An error in one line, with where it came from."""
    text = " ".join(str(error).split())[:300]
    where = [
        f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__}: {text} [{' > '.join(where[-frames:])}]"


class Cases:
    """The cases of a worker; those that an earlier worker took are not taken again."""

    def __init__(self, given: argparse.Namespace) -> None:
        import faulthandler

        faulthandler.register(signal.SIGUSR1, all_threads=True)
        self.out, self.until = given.out, given.worker + given.seconds
        self.rows = read(self.out)

    def take(self, kind: str, case: str, measure: Callable[[], dict[str, Any]]) -> str:
        """Measures a case, unless it was; returns what became of it: `done`, `failed`, `memory` or `late`."""
        for row in self.rows:
            if (row["kind"], row["case"]) == (kind, case):
                return row["status"]
        row: Row = {"kind": kind, "case": case, "status": "running", "began": time.time()}
        self.rows.append(row)
        if time.time() > self.until:
            row |= {"status": "late"}
            write(self.out, self.rows)
            return "late"
        write(self.out, self.rows)
        held = allocated()
        try:
            row |= {"status": "done", "told": measure()}
        except Exception as error:
            memory = "OutOfMemory" in type(error).__name__ or "out of memory" in str(error)
            row |= {"status": "memory" if memory else "failed", "error": short(error)}
            with open(self.out / "errors.txt", "a") as file:
                file.write(f"\n---- {kind}: {case}\n{''.join(traceback.format_exception(error))[-20000:]}")
        row["seconds"] = round(time.time() - row["began"], 1)
        row["held_before_gb"] = round(held / 1e9, 2)
        write(self.out, self.rows)
        print(f"{kind}: {case}: {json.dumps({k: v for k, v in row.items() if k not in ('kind', 'case')})}")
        self._clean()
        return row["status"]

    def _clean(self) -> None:
        """Frees what a case held; a worker that cannot is started anew."""
        import torch

        torch._dynamo.reset()  # compiled code, and what it was compiled for
        gc.collect()
        if not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:  # the device's context is broken for good
            print(f"CUDA no longer answers: {short(error)}")
            os._exit(AGAIN)
        if allocated() > LEFT_OVER:
            print(f"{allocated() / 1e9:.1f} GB were left behind: a new process goes on")
            os._exit(AGAIN)


def allocated() -> int:
    """Bytes of tensors on the GPU."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def synchronise() -> None:
    """Waits for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peak:
    """The most memory from its making on."""

    def __init__(self) -> None:
        import torch

        synchronise()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def told(self) -> dict[str, str]:
        """Returns allocated and reserved bytes."""
        import torch

        if not torch.cuda.is_available():
            return {"peak GB": "-", "reserved GB": "-"}
        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {name: f"{n / 1e9:.2f}" for name, n in zip(("peak GB", "reserved GB"), most, strict=True)}


@contextlib.contextmanager
def timed(owner: Any, name: str, told: Callable[[float, Any], None]) -> Iterator[None]:
    """Times each call of a method, the GPU's work included; `told` is given the seconds and what the call returned."""
    plain = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        synchronise()
        began = time.perf_counter()
        found = plain(*args, **kwargs)
        synchronise()
        told(time.perf_counter() - began, found)
        return found

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, plain)
