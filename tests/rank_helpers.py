"""Real processes for tests of several ranks, started from one that has imported what they need.

Run as a script it is that process: it reads jobs, a JSON line each, forks the ranks and tells their ids and how they
ended. Importing PyTorch takes seconds, which each rank would need again.
"""

import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """Ranks at work, which can be killed by their ids."""

    server: "Ranks"
    pids: list[int]
    errors: list[Path]
    codes: list[int] | None = None

    def wait(self) -> list[int]:
        """Returns how each rank ended: 0, an exit code, or minus the signal."""
        if self.codes is None:
            self.codes = json.loads(self.server.answer())
            self.server.job = None
        return self.codes

    def ended(self) -> bool:
        """Whether all ranks have ended; it does not wait."""
        if self.codes is None and select.select([self.server.process.stdout], [], [], 0)[0]:
            self.wait()
        return self.codes is not None

    def stderr(self) -> str:
        """What the ranks wrote there, one after the other."""
        return "".join(path.read_text() for path in self.errors)


class Ranks:
    """Starts jobs, one after the other.

    Args:
        modules: imported once; those of `folder` as well.
        folder: of tests, where such modules lie.
        prefix: command that runs the command of the process.
    """

    def __init__(self, *modules: str, folder: str = "pretrain", prefix: Sequence[str] = ()) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.job: Job | None = None
        places = [str(Path(__file__).parent / folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, count: int, call: str, *arguments: Any) -> Job:
        """Starts `count` ranks of `module:function` with JSON arguments."""
        assert self.job is None, "one job at a time"
        errors = [Path(self.folder.name) / f"stderr-{rank}" for rank in range(count)]
        job = {"count": count, "call": call, "arguments": arguments, "errors": [str(p) for p in errors]}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.job = Job(self, json.loads(self.answer()), errors)
        return self.job

    def run(self, count: int, call: str, *arguments: Any) -> tuple[list[int], str]:
        """Runs a job to its end; returns how each rank ended and what they wrote to stderr."""
        job = self.start(count, call, *arguments)
        codes = job.wait()
        return codes, job.stderr()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that starts ranks has ended"
        return line

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Does a rank's work and ends its process as the command line does."""
    errors = os.open(job["errors"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    if job["count"] > 1:
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": job["count"],
            "LOCAL_WORLD_SIZE": job["count"],
        }
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
    module, name = job["call"].split(":")
    from galenic.ranks import leave

    try:
        code = getattr(importlib.import_module(module), name)(*job["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code if isinstance(code, int) else 0)


def _serve(modules: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or the end of each rank copies the pages of all that was imported
    for line in iter(sys.stdin.readline, ""):
        job, port, pids = json.loads(line), _free_port(), []
        for rank in range(job["count"]):
            pid = os.fork()
            if pid == 0:
                _rank(job, rank, port)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
