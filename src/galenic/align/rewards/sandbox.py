"""Runs an answer's code against tests in a process that can touch nothing.

Each run is a fresh Python (`jail.py`), without site packages and with an empty environment. The kernel holds it:
Landlock and seccomp leave it the Python library to read and its own memory to compute in. There are no threads, no
other processes, no sockets, no files to write, and the user's own cannot be read. Processor time and memory are
limited, and what only waits is ended by the clock.

What this cannot see: tests share a process with the code they test, here as elsewhere. Leaving early, printing or
writing a verdict does not pass; but code that is made to fool its tests (a result that equals everything, a name put in
the place of one that tests use) or that searches the frames of this very harness can. Rewards on code want tests that
look closely.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from galenic.runtime import UserError

Reason = Literal["passed", "error", "tests", "memory", "time", "stopped"]
_JAIL = Path(__file__).with_name("jail.py")
_WAIT = 5
"""Seconds by the clock for each of processor time; and as many to start."""
_LANDLOCK = True
"""Use it where the kernel has it."""
_MODULES = (
    "abc array bisect calendar cmath collections.abc contextlib copy dataclasses datetime decimal enum fractions "
    "functools hashlib heapq io itertools math numbers operator random re statistics string struct textwrap time "
    "typing unicodedata unittest _strptime"
).split()
"""What code can import where it may open nothing, and what has to be there everywhere."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How code did in its tests."""

    passed: bool
    reason: Reason
    """`error`: the code itself failed; `tests`: a test did; `stopped`: it ended without coming to an end."""


def run_tests(code: str, tests: str, *, seconds: float, memory_mb: int) -> Verdict:
    """Runs code, then tests in the same module; they pass if neither raises anything.

    Args:
        code: of the answer.
        tests: Python that sees all names of the code; `assert`s as a rule.
        seconds: processor time at most, rounded up to whole seconds.
        memory_mb: memory at most, that of Python itself (about 30) included.

    Raises:
        UserError: this machine cannot isolate code.
    """
    if sys.platform != "linux":
        raise UserError(
            "rule 'code': only Linux can isolate code (seccomp); leave out the tasks with tests here"
        )
    secret = secrets.token_hex(16)
    request = {
        "code": code,
        "tests": tests,
        "secret": secret,
        "parent": os.getpid(),
        "seconds": seconds,
        "memory_mb": memory_mb,
        "landlock": _LANDLOCK,
        "modules": _MODULES,
    }
    reader, writer = os.pipe()
    process = None
    try:
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(request).encode())
            file.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-sPSB", str(_JAIL), str(writer)],
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PYTHONHASHSEED": "0"},  # the order of sets must not decide
                pass_fds=(writer,),
                start_new_session=True,
            )
        os.close(writer)
        writer = -1
        said = _hear(reader, _WAIT * (seconds + 1))
        return _verdict(said, secret, process)
    finally:
        if process is not None:
            process.kill()
            process.wait()
        for descriptor in (reader, writer):
            if descriptor >= 0:
                os.close(descriptor)


def _hear(reader: int, seconds: float) -> bytes | None:
    """Reads what the process says until it ends; None if it does not in time. No more than a verdict can be."""
    said, end = b"", time.monotonic() + seconds
    poll = select.poll()
    poll.register(reader)
    while len(said) < 1024:
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            return None
        part = os.read(reader, 1024)
        if not part:
            break
        said += part
    return said


def _verdict(said: bytes | None, secret: str, process: subprocess.Popen) -> Verdict:
    """Believes what was said with the secret, and nothing else."""
    if said is None:
        return Verdict(passed=False, reason="time")
    given, _, outcome = said.decode(errors="replace").partition(" ")
    if secrets.compare_digest(given.encode(), secret.encode()):
        if outcome.startswith("cannot: "):
            raise UserError(
                f"rule 'code': this machine cannot isolate code ({outcome.removeprefix('cannot: ')}); it takes Linux "
                "with seccomp on x86-64 or ARM64; leave out the tasks with tests here"
            )
        if outcome in get_args(Reason):
            return Verdict(passed=outcome == "passed", reason=cast(Reason, outcome))
    try:
        killed = process.wait(timeout=1) in (-signal.SIGKILL, -signal.SIGXCPU)
    except subprocess.TimeoutExpired:
        killed = False
    return Verdict(passed=False, reason="time" if killed else "stopped")


def require(*, seconds: float, memory_mb: int) -> None:
    """Looks whether code can be run here within these limits.

    Raises:
        UserError: it cannot.
    """
    usual = "\n".join(f"import {name}" for name in _MODULES)
    verdict = run_tests(usual, "pass", seconds=seconds, memory_mb=memory_mb)
    if not verdict.passed:
        raise UserError(
            f"rule 'code': not even a program that imports the usual modules passes ({verdict.reason}); raise "
            f"rewards.code_memory_mb {memory_mb} or rewards.code_seconds {seconds:g}, or use another Python"
        )
