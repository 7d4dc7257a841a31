"""A process that dies or hangs: every other one says so in a line, within its patience."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

DRIVER = """
import sys
from galenic import cli, ranks
def work(config):
    with ranks.process_group(float(sys.argv[1])):
        print("connected", flush=True)
        while True:
            ranks.gathered(ranks.rank())
cli.VERBS = {"work": ("galenic.merge.config:MergeConfig", "work", "")}
cli._run = lambda argv: work(None)
sys.exit(cli.entry())
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(count, *words, code=DRIVER, only=None):
    """Starts processes of a group of `count`, without a launcher that would stop all when one dies."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(count) if only is None else only)
    ]


@pytest.mark.parametrize(
    ("blow", "patience", "says"),
    [
        (signal.SIGKILL, 60.0, "another one has stopped"),
        (signal.SIGSTOP, 3.0, "another one has not answered for 3 seconds"),
    ],
)
def test_the_others_stop_with_a_line(blow, patience, says):
    processes = start(3, str(patience))
    try:
        assert [process.stdout.readline() for process in processes] == ["connected\n"] * 3
        processes[1].send_signal(blow)
        struck = time.monotonic()
        for rank in (0, 2):
            _, errors = processes[rank].communicate(timeout=40)
            lines = [line for line in errors.splitlines() if line.startswith("galenic: error: ")]
            assert processes[rank].returncode == 2, errors
            assert len(lines) == 1 and lines[0].startswith(f"galenic: error: process {rank} of 3: ")
            assert "The same command continues" in lines[0]
            assert "Traceback" not in errors
            # One of the two may notice first that the other one, which noticed the third, has stopped.
            assert says in errors or "another one has stopped" in errors
        assert time.monotonic() - struck < patience + 20
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("there", [0, 1])
def test_processes_that_never_come(there):
    (process,) = start(2, "2", only=[there])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert f"process {there} of 2: another one has not answered for 2 seconds" in errors
    assert "Traceback" not in errors
