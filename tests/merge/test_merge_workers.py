"""Workers: the same results in processes and threads, and what happens when one fails or is killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from galenic.merge.workers import in_order
from galenic.runtime import UserError


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_items(forks, workers, count):
    big = "x" * 10_000  # more than a pipe holds, all together
    found = list(in_order(lambda i: (i * i, big, torch.get_num_threads()), range(count), workers, forks))
    assert found == [(i * i, big, 1) for i in range(count)]


def test_forks_are_other_processes_and_gone_at_the_end():
    pids = set(in_order(lambda _: os.getpid(), range(6), 2))
    assert len(pids) == 2 and os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize(
    "error", [UserError("no"), OSError(28, "No space left on device"), ValueError("odd")]
)
def test_the_first_failure_in_order_is_raised(forks, error):
    def one(i):
        if i >= 3:
            raise error if i == 3 else KeyError(i)
        return i

    taken = []
    with pytest.raises(type(error), match=str(error.args[-1])):
        for result in in_order(one, range(9), 2, forks):
            taken.append(result)
    assert taken == [0, 1, 2]


def test_a_killed_worker_is_told():
    def one(i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with pytest.raises(UserError, match=r"-9.*memory"):
        list(in_order(one, range(8), 2))


def test_a_consumer_that_stops_leaves_no_process():
    found = in_order(lambda i: os.getpid(), range(100), 2)
    pids = {next(found), next(found)}
    found.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_of_a_killed_parent_end(tmp_path):
    script = """
import os, sys, time
from galenic.merge.workers import in_order

def one(i):
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    time.sleep(0.01)
    return i

for i in in_order(one, range(10**6), 2):
    pass
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    while any(_runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid):
    """Whether a process is there and is not just waiting to be reaped by init."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
