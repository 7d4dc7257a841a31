"""Pre-training killed, or on a full disk: what was saved last is there, and the run ends with the same bytes."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from galenic.runtime import UserError
from kill_helpers import CALL, WHERE, kill_runs, losses, models, steps, words, write_config
from rank_helpers import Ranks

NAMESPACE = ["unshare", "-Urm"]
CAN_MOUNT = subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def ranks():
    modules = (
        "galenic.cli",
        "galenic.pretrain.loop",
        "galenic.pretrain.checkpoints.export",
        "test_pretrain_faults",
    )
    started = Ranks(*modules, folder="faults")
    yield started
    started.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer_step):
    return write_config(tmp_path_factory.mktemp("config") / "pretrain.yaml", tokenizer_step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ranks, config):
    """Processes -> the folder of a run that nobody disturbed."""
    made = {}

    def of(count):
        if count not in made:
            made[count] = tmp_path_factory.mktemp("whole") / "out"
            codes, told = ranks.run(count, CALL, words(config, made[count]))
            assert codes == [0] * count, told
        return made[count]

    return of


def assert_same(out, expected):
    assert len(models(out)) == 2 and models(out) == models(expected)
    assert losses(out) == losses(expected)
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".*"))


def survives(tmp_path, ranks, config, whole, count, kills, seed=0, wheres=WHERE):
    expected = whole(count)
    places, ends, outs = kill_runs(ranks, count, config, tmp_path, kills, seed, steps(expected), wheres)
    print(
        f"{sum(places.values())} kills of {count} processes: {dict(places)}; the others ended with {dict(ends)}"
    )
    for out in outs:
        assert_same(out, expected)
    assert set(ends) <= {0, 2}
    return sum(places.values())


def test_killed_inside_saves_and_at_a_phase_end_it_ends_with_the_same_bytes(tmp_path, ranks, config, whole):
    assert survives(tmp_path, ranks, config, whole, 1, 3, wheres=WHERE[1:4]) >= 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_many_times(tmp_path, ranks, config, whole):
    assert survives(tmp_path, ranks, config, whole, 1, 25, seed=1) >= 25


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_processes_killed_many_times(tmp_path, ranks, config, whole):
    assert survives(tmp_path, ranks, config, whole, 2, 15, seed=2) >= 15


def test_one_of_two_processes_killed_inside_a_save(tmp_path, ranks, config, whole):
    out = tmp_path / "out"
    job = ranks.start(2, CALL, words(config, out))
    while not (steps(out) >= 3 and any(out.glob(".checkpoint-*.partial"))):
        assert not job.ended(), job.stderr()
        time.sleep(0.0005)
    os.kill(job.pids[1], signal.SIGKILL)
    codes = job.wait()
    assert codes == [2, -signal.SIGKILL], job.stderr()
    told = [line for line in job.stderr().splitlines() if line.startswith("galenic: error: ")]
    assert len(told) == 1 and "Traceback" not in job.stderr()
    whole_ones = [path for path in out.glob("checkpoint-*") if (path / "run.json").exists()]
    assert whole_ones
    codes, stderr = ranks.run(2, CALL, words(config, out))
    assert codes == [0, 0], stderr
    assert_same(out, whole(2))


def run_anyway(arguments):
    """Runs the verb without what the command line looks at first."""
    from galenic.cli import parse_config
    from galenic.pretrain import pretrain

    try:
        pretrain.run(parse_config(arguments[0], arguments[1:])[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def test_another_seed_does_not_go_on_with_a_checkpoint(tmp_path, ranks, config):
    out = tmp_path / "out"
    job = ranks.start(1, CALL, words(config, out))
    while steps(out) < 4:
        assert not job.ended(), job.stderr()
        time.sleep(0.0005)
    os.kill(job.pids[0], signal.SIGKILL)
    job.wait()
    before = sorted(path.name for path in out.glob("checkpoint-*"))
    other = [*words(config, out), "--seed", "7", "--optim.lr", "0.02"]
    codes, told = ranks.run(1, CALL, other)
    assert codes == [2] and "unfinished work of another configuration" in told
    codes, told = ranks.run(
        1, "test_pretrain_faults:run_anyway", other
    )  # the checkpoint itself knows as well
    assert codes == [2], told
    assert "seed: 7 given, 0 found" in told and "optim.lr: 0.02 given, 0.01 found" in told
    assert before and sorted(path.name for path in out.glob("checkpoint-*")) == before


# ---------------------------------------------------------------------------- a full disk


def listing(disk):
    """Runs where the disk is mounted: tells what is on it."""
    for path in sorted(Path(disk).rglob("*")):
        print(path.relative_to(disk))


def grow(disk):
    """Runs where the disk is mounted: makes it large enough."""
    return subprocess.run(["mount", "-o", "remount,size=8000k", disk]).returncode


def digests(out):
    """Runs where the disk is mounted: tells the models."""
    for name, data in models(out).items():
        print(name, hashlib.sha256(data).hexdigest())


@pytest.mark.skipif(not CAN_MOUNT, reason="needs user namespaces to mount a small disk")
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_keeps_the_checkpoint_before(tmp_path, config, whole, count):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for what the first phase leaves and a checkpoint, but not for two.
    script = f'mount -t tmpfs -o size=1200k tmpfs {disk} && exec "$0" "$@"'
    modules = ("galenic.cli", "galenic.pretrain.loop", "test_pretrain_faults")
    small = Ranks(*modules, folder="faults", prefix=[*NAMESPACE, "sh", "-c", script])
    try:
        codes, told = small.run(count, CALL, words(config, disk / "out"))
        assert codes == [2] * count and "Traceback" not in told, told
        errors = [line for line in told.splitlines() if line.startswith("galenic: error: ")]
        assert len(errors) == count and len(set(errors)) == 1, told
        assert re.search(
            r"checkpoint-\d+: not written, that of step \d+ is kept: no space left on device", errors[0]
        )
        step = int(re.search(r"that of step (\d+)", errors[0])[1])
        held = small.run(1, "test_pretrain_faults:listing", str(disk))[1]
        assert ".partial" not in held and held.count("run.json") == 1
        assert f"checkpoint-{step:08d}/run.json" in held
        # With more room, the same command ends with the same bytes.
        assert small.run(1, "test_pretrain_faults:grow", str(disk))[0] == [0]
        codes, told = small.run(count, CALL, words(config, disk / "out"))
        assert codes == [0] * count, told
        found = small.run(1, "test_pretrain_faults:digests", str(disk / "out"))[1]
    finally:
        small.close()
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in models(whole(count)).items()}
    assert len(expected) == 2 and found == "".join(f"{name} {value}\n" for name, value in expected.items())
