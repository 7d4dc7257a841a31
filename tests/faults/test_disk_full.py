"""A full disk: one clear line, exit code 2, nothing half-written, and the same command continues."""

import subprocess
import sys

import pytest

NAMESPACE = ["unshare", "-Urm"]
CAN_MOUNT = subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode == 0

pytestmark = pytest.mark.skipif(not CAN_MOUNT, reason="needs user namespaces to mount a small disk")


def run_on_small_disk(tmp_path, kilobytes, words):
    """Runs galenic with a disk of so many kB at tmp_path/disk; returns the result and what the disk held."""
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    script = (
        f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk} && "
        f"{sys.executable} -m galenic.cli {' '.join(words)}; code=$?; find {disk} -type f; exit $code"
    )
    return subprocess.run([*NAMESPACE, "sh", "-c", script], capture_output=True, text=True)


def assert_clear(done):
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("galenic: error: ")]
    assert len(errors) == 1
    assert "no space left on device" in errors[0]
    assert "Traceback" not in done.stderr
    assert "done.json" not in done.stdout
    assert ".partial" not in done.stdout


def test_tokenizer(tmp_path, tokenizer_step):
    corpus = tokenizer_step.parent / "10-corpus"
    words = ["tokenizer", "--corpus", str(corpus), "--out", f"{tmp_path}/disk/out", "--vocab_size", "512"]
    assert_clear(run_on_small_disk(tmp_path, 24, words))


def test_pretrain(tmp_path, tokenizer_step):
    config = tmp_path / "pretrain.yaml"
    config.write_text(
        f"tokenizer: {tokenizer_step}\n"
        "architecture: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2}\n"
        "phases: [{name: p, tokens: 2048, mixture: {general: 1.0}, context: 64, rows: 2}]\n"
    )
    words = ["pretrain", "--config", str(config), "--out", f"{tmp_path}/disk/out"]
    assert_clear(run_on_small_disk(tmp_path, 200, words))
