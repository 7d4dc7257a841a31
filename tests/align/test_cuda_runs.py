"""What measurements on a lent machine leave behind when some of them fail (benchmarks/cuda_runs.py)."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cuda_runs


def out_of_memory():
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def broken():
    raise ValueError("two\nlines | of an error")


@pytest.fixture
def given(tmp_path):
    return Namespace(out=tmp_path, worker=time.time(), seconds=60.0)


def test_an_error_is_a_row_and_the_others_go_on(given):
    cases = cuda_runs.Cases(given)
    measures = {"a": lambda: {"s": 1}, "b": broken, "c": out_of_memory, "d": lambda: {"s": 2}}
    found = [cases.take("kind", name, measure) for name, measure in measures.items()]
    assert found == ["done", "failed", "memory", "done"]
    rows = json.loads((given.out / "results.json").read_text())
    assert [row.get("told") for row in rows] == [{"s": 1}, None, None, {"s": 2}]
    assert rows[1]["error"].startswith("ValueError: two lines") and "broken" in rows[1]["error"]
    lines = (given.out / "results.md").read_text().splitlines()
    assert "| d | 2 |  |" in lines and len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "Traceback" in (given.out / "errors.txt").read_text()


def test_a_new_worker_goes_on_behind_what_the_old_one_took(given):
    cuda_runs.Cases(given).take("kind", "a", lambda: {"s": 1})
    cuda_runs.write(
        given.out, [*cuda_runs.read(given.out), {"kind": "kind", "case": "b", "status": "running"}]
    )
    cuda_runs.failed(given.out, "it died")
    cases = cuda_runs.Cases(given)
    assert cases.take("kind", "a", broken) == "done" and cases.take("kind", "b", broken) == "failed"
    assert cases.take("kind", "c", lambda: {"s": 3}) == "done"
    assert "it died" in (given.out / "results.md").read_text()


def test_no_case_begins_when_time_is_up(given):
    given.seconds = -1.0
    assert cuda_runs.Cases(given).take("kind", "a", broken) == "late"


def test_timed_methods_return_what_they_did_and_are_put_back():
    class Machine:
        def work(self, n):
            return 2 * n

    plain, told = Machine.work, []
    with cuda_runs.timed(Machine, "work", lambda seconds, found: told.append((seconds >= 0, found))):
        assert Machine().work(4) == 8
    assert told == [(True, 8)] and Machine.work is plain
