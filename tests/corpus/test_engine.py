"""The engine on this machine; tests/parity/test_ray.py has it on a cluster."""

import os
import signal
import sys
from pathlib import Path

import pytest

from galenic.corpus.engine import map_units
from galenic.runtime import UserError

pytest.importorskip("daft")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Workers import the functions of this file by its name."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


def squared(unit):
    Path(unit["folder"], f"{unit['number']}.{os.getpid()}").touch()
    return {"number": unit["number"], "square": unit["number"] ** 2}


def mistaken(unit):
    raise UserError(f"unit {unit['number']} names no file")


def broken(unit):
    raise KeyError(unit["number"])


def killed(unit):
    os.kill(os.getpid(), signal.SIGKILL)


def units(folder, count):
    return [{"number": number, "folder": str(folder)} for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_is_done_once(tmp_path, workers):
    results = sorted(r["square"] for r in map_units(squared, units(tmp_path, 9), workers=workers))
    assert results == [n**2 for n in range(9)]
    done = [path.name.split(".") for path in tmp_path.iterdir()]
    assert sorted(int(number) for number, _ in done) == list(range(9))
    assert len({pid for _, pid in done}) == workers and (workers == 1) == (str(os.getpid()) in done[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_mistake_stays_one(tmp_path, workers):
    with pytest.raises(UserError, match=r"^unit 0 names no file$"):
        list(map_units(mistaken, units(tmp_path, 1) * 3, workers=workers))


def test_a_defect_of_ours_brings_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match=r"a worker failed:\n(.*\n)+KeyError: 0"):
        list(map_units(broken, units(tmp_path, 1) * 3, workers=2))


def test_a_killed_worker_is_told_with_a_way_out(tmp_path):
    with pytest.raises(UserError, match=r"a worker process died.* unit_bytes.* continues"):
        list(map_units(killed, units(tmp_path, 3), workers=2))


def test_nothing_to_do_starts_nothing():
    assert list(map_units(squared, [], workers=2)) == []


def test_an_address_without_a_cluster_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="address: "):
        list(map_units(squared, units(tmp_path, 2), workers=2, address="127.0.0.1:1"))
