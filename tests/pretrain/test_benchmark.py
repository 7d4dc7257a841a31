"""The speed benchmark runs, and every contender starts from the same loss."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pretrain.py"


@pytest.mark.slow
def test_quick_run_prints_a_table():
    pytest.importorskip("accelerate")
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.split("|")[2].strip() for line in run.stdout.splitlines() if line.startswith("| tiny")]
    assert rows == ["Galenic", "Galenic, MKL", "HF Trainer", "HF Trainer, skip_logits", "plain Llama"]
