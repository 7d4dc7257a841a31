"""A merge killed with SIGKILL anywhere goes on, and ends with the bytes of one that was not."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from galenic.merge import merge, writer
from galenic.merge.statistics import CHUNK

# Counts what the process tells the system to do with files, and kills the process just before or after one of it.
DRIVER = """
import json, os, signal, sys
from galenic.merge import merge, writer
recipe, out, stop, when = json.loads(sys.argv[1])
writer.SPAN = 1
count = 0
def counted(function):
    def call(*arguments, **named):
        global count
        count += 1
        mine = count
        if mine == stop and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if mine == stop and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
# Notes are waited for, so that there is one for every block; else it depends on the disk how many there are.
finished = writer.Writer.finished
def noted(self, blocks):
    finished(self, blocks)
    self._note.result()
writer.Writer.finished = noted
for name in ("pwrite", "fdatasync", "fsync", "posix_fallocate", "replace"):
    setattr(os, name, counted(getattr(os, name)))
merge(recipe, out)
print(count)
"""


def write_models(folder):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (3 * CHUNK + 5,), "norm": (7,), "layers.0.w": (1000, 700)}
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    states = [base] + [
        {n: (t + 0.01 * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
        for _ in range(2)
    ]
    for name, state in zip(("base", "a", "b"), states, strict=True):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    return {
        "merge_method": "metagpt",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "a")}, {"model": str(folder / "b")}],
    }


def run(recipe, out, stop, when):
    arguments = [sys.executable, "-c", DRIVER, json.dumps([recipe, str(out), stop, when])]
    return subprocess.run(arguments, capture_output=True, text=True)


def contents(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def survives(tmp_path, recipe, expected, stop, when):
    """Kills at one point; returns the blocks the next run did not have to write again, None if all was over before."""
    out = tmp_path / f"out-{stop}-{when}"
    killed = run(recipe, out, stop, when)
    if killed.returncode == 0:  # notes are left out while one is being made, so the number of calls varies
        assert contents(out) == expected["out"]
        return None
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    visible = contents(out / "model") if (out / "model").exists() else None
    assert visible is None or visible == expected["model"]
    journal = out / ".model.partial/.journal/0"
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    merge(recipe, out)
    assert contents(out) == expected["out"]
    return int(lines[-1]) if lines else 0


@pytest.fixture
def recipe(tmp_path):
    return write_models(tmp_path)


@pytest.fixture
def expected(tmp_path, recipe):
    merge(recipe, tmp_path / "whole")
    assert not (tmp_path / "whole/.model.partial").exists()
    return {"model": contents(tmp_path / "whole/model"), "out": contents(tmp_path / "whole")}


def killed_in_the_middle(tmp_path, recipe):
    """Kills merges ever later until one has noted blocks; returns its folder. (When notes are made varies.)"""
    for stop in range(6, 30):
        out = tmp_path / f"middle-{stop}"
        assert run(recipe, out, stop, "before").returncode == -signal.SIGKILL
        journal = out / ".model.partial/.journal/0"
        if journal.exists() and journal.read_text():
            return out
    raise AssertionError("no merge noted its blocks")


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_merge_killed_goes_on(tmp_path, recipe, expected, stop):
    survives(tmp_path, recipe, expected, stop, "before")


@pytest.mark.slow
def test_a_merge_killed_at_every_system_call_goes_on(tmp_path, recipe, expected):
    calls = int(run(recipe, tmp_path / "counted", 0, "").stdout)
    assert calls > 20
    kept = [
        survives(tmp_path, recipe, expected, stop, when)
        for stop in range(1, calls + 1)
        for when in ("before", "after")
    ]
    kept = [k for k in kept if k is not None]
    print(f"{len(kept)} kill points, {sum(k > 0 for k in kept)} of them went on in the middle of the weights")
    assert len(kept) > 30
    assert sum(k > 0 for k in kept) > 10


def test_another_recipe_does_not_go_on_with_what_is_there(tmp_path, recipe):
    out = killed_in_the_middle(tmp_path, recipe)
    other = recipe | {"merge_method": "linear"}
    merge(other, out)
    merge(other, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_is_noted_is_not_computed_again(tmp_path, recipe, expected, monkeypatch):
    out = killed_in_the_middle(tmp_path, recipe)
    noted = int((out / ".model.partial/.journal/0").read_text().split("\n")[-2])
    written = []
    real = writer.Writer.write
    monkeypatch.setattr(writer.Writer, "write", lambda *a: (written.append(a[1:3]), real(*a)))
    merge(recipe, tmp_path / "counted")
    every, written[:] = len(written), []
    merge(recipe, out)
    assert noted > 0 and every >= 6 and len(written) == every - noted
    assert contents(out) == expected["out"]


def test_an_error_in_the_inputs_leaves_nothing(tmp_path, recipe):
    recipe = recipe | {"dtype": "float16"}
    state = {
        "embed": torch.full((3 * CHUNK + 5,), 1e6),
        "norm": torch.ones(7),
        "layers.0.w": torch.ones(1000, 700),
    }
    for name in ("a", "b"):
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit"):
        merge(recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
