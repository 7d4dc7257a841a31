"""A process that dies or hangs: every other one says so in a line, within its patience."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from kill_helpers import steps, words, write_config

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


# ---------------------------------------------------------------------------- the verb itself

PRETRAIN = "import sys\nfrom galenic import cli\nsys.exit(cli.entry())\n"


def pretrain_words(folder, tokenizer_step, out, **changes):
    """Writes the configuration of a small run of two ranks; returns the words that start it."""
    phases = [
        {"name": name, "tokens": 1600, "mixture": {source: 1}, "context": 32, "rows": 2}
        for name, source in (("one", "general"), ("two", "medical"))
    ]
    return words(write_config(folder / "pretrain.yaml", tokenizer_step, phases=phases, **changes), out)


def finish(processes):
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), ends


@pytest.mark.slow
@pytest.mark.parametrize(("blow", "patience"), [(signal.SIGKILL, 120.0), (signal.SIGSTOP, 5.0)])
def test_training_loses_a_rank_and_ends_with_the_same_bytes(tmp_path, tokenizer_step, blow, patience):
    finish(start(2, *pretrain_words(tmp_path, tokenizer_step, tmp_path / "whole"), code=PRETRAIN))
    out = tmp_path / "out"
    started_by = pretrain_words(tmp_path, tokenizer_step, out, parallel={"timeout_seconds": patience})
    for victim, after in ((1, 6), (0, 30)):
        processes = start(2, *started_by, code=PRETRAIN)
        try:
            while steps(out) < after and processes[0].poll() is None:
                time.sleep(0.01)
            processes[victim].send_signal(blow)
            _, errors = processes[1 - victim].communicate(timeout=patience + 60)
            assert processes[1 - victim].returncode == 2, errors
            lines = [line for line in errors.splitlines() if line.startswith("galenic: error: ")]
            assert len(lines) == 1 and f"process {1 - victim} of 2: another one has" in lines[0], errors
            assert "Traceback" not in errors
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        assert steps(out) < 50
    finish(start(2, *started_by, code=PRETRAIN))
    for phase in ("one", "two"):
        ours, whole = (
            (folder / phase / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")
        )
        assert ours == whole


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run --nproc-per-node 2", "accelerate"])
def test_launchers_start_it(tmp_path, tokenizer_step, launcher):
    started_by = pretrain_words(tmp_path, tokenizer_step, tmp_path / "out")
    if launcher == "accelerate":
        launcher = "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
        launcher += " --dynamo_backend no --module"
    else:
        launcher += " --module"
    command = [sys.executable, "-m", *launcher.split(), "galenic.cli", *started_by]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "two" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_fewer_devices_than_asked(tmp_path, tokenizer_step):
    started_by = pretrain_words(tmp_path, tokenizer_step, tmp_path / "out", parallel={"shard": 4})
    done = subprocess.run(
        [sys.executable, "-c", PRETRAIN, *started_by], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "needs 4 devices, there are 1" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
