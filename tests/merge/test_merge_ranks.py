"""Several processes under torchrun share a merge: the same bytes as one, one voice, and no half results."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from galenic.merge import merge
from galenic.merge.blocks import CHUNK
from galenic.ranks import share

METHODS = [
    {"merge_method": "metagpt"},
    {"merge_method": "breadcrumbs"},
    {"merge_method": "metagpt", "parameters": {"trim": "ties", "norms": "after_trim", "scope": "layer"}},
    *(
        pytest.param(recipe, marks=pytest.mark.slow)
        for recipe in (
            {"merge_method": "ties"},
            {"merge_method": "dare_ties"},
            {"merge_method": "sce", "parameters": {"select_topk": 0.4}},
            {"merge_method": "tsv"},
        )
    ),
]


def launch(count, *words, **environment):
    """Starts `galenic merge` under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [*launcher, "-m", "galenic.cli", "merge", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )


@pytest.fixture
def models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (CHUNK + 5, 2), "layers.0.w": (300, 200), "layers.1.w": (200, 300), "norm": (7,)}
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    base["steps"] = torch.arange(3)
    for name in ("base", "a", "b"):
        state = dict(base)
        if name != "base":
            for n in shapes:
                state[n] = (base[n] + 0.01 * torch.randn(shapes[n], generator=generator)).bfloat16()
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    return {
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a")}, {"model": str(tmp_path / "b")}],
    }


def written(folder: Path, recipe):
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return file


def contents(folder: Path):
    """Every file but what tells of the run itself."""
    own = ("provenance.json", "done.json", "config.yaml")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in own
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m['merge_method']}{len(m)}")
def test_two_processes_give_the_bytes_of_one(tmp_path, models, method):
    recipe = models | method
    merge(recipe, tmp_path / "one")
    shutil.rmtree(Path(os.environ["GALENIC_CACHE"]), ignore_errors=True)  # the ranks measure for themselves
    done = launch(2, "--config", written(tmp_path, recipe), "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": done") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    again = launch(2, "--config", written(tmp_path, recipe), "--out", tmp_path / "two")
    assert again.returncode == 0 and again.stdout.count("already done") == 1


def test_a_mistake_is_told_once_and_leaves_nothing(tmp_path, models):
    state = {"w": torch.tensor([1.0, float("nan")])}
    for name in ("base", "a", "b"):
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    done = launch(2, "--config", written(tmp_path, models), "--out", tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("holds NaN or infinity") == 1
    assert not (tmp_path / "out/model").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/other").write_text("")
    done = launch(2, "--config", written(tmp_path, models), "--out", tmp_path / "full")
    assert done.returncode != 0 and done.stderr.count("holds other files") == 1
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("torch/distributed")[0]


def test_a_killed_rank_ends_all_and_the_next_run_goes_on(tmp_path, models):
    recipe = models | {"merge_method": "linear"}
    merge(recipe, tmp_path / "one")
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, signal, sys\n"
        "from galenic import cli\n"
        "from galenic.merge import writer\n"
        "writer.SPAN = 1\n"
        "real = writer.Writer._flush\n"
        "def flush(self, blocks):\n"
        "    real(self, blocks)\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "writer.Writer._flush = flush\n"
        "sys.exit(cli.main())\n"
    )
    words = ["merge", "--config", str(written(tmp_path, recipe)), "--out", str(tmp_path / "two")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killed = subprocess.run([*launcher, str(driver), *words], capture_output=True, text=True, timeout=200)
    assert killed.returncode != 0 and not (tmp_path / "two/model").exists()
    assert (tmp_path / "two/.model.partial/.journal/1").read_text().strip()
    done = launch(2, *words[1:])
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_shares_are_whole_apart_and_balanced(monkeypatch):
    sizes = {f"t{i}": (i * 37) % 23 for i in range(40)}
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found.append(share(sizes))
    assert set.union(*found) == set(sizes) and sum(map(len, found)) == len(sizes)
    loads = [sum(sizes[name] for name in own) for own in found]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_other_verbs_refuse_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    from galenic.cli import main

    assert main(["tokenizer", "--corpus", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
