"""A full disk: one clear line, exit code 2, nothing half-written, and the same command continues."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def merge_words(tmp_path, count=2**17):
    """Writes a base and an expert of half a MiB, and returns the words that merge them onto the disk."""
    for place, name in enumerate(("base", "a")):
        (tmp_path / name).mkdir()
        save_file({"w": torch.arange(count) / 7 + place}, tmp_path / name / "model.safetensors")
    recipe = f"base_model: {tmp_path}/base\nmodels: [{{model: {tmp_path}/a}}]\n"
    (tmp_path / "merge.yaml").write_text(recipe)
    return ["merge", "--config", str(tmp_path / "merge.yaml"), "--out", f"{tmp_path}/disk/out"]


def test_merge_knows_before_it_reads(tmp_path):
    done = run_on_small_disk(tmp_path, 200, merge_words(tmp_path))
    assert_clear(done)
    assert "more are needed for the merged model" in done.stderr and not done.stdout


def test_merge_that_just_does_not_fit(tmp_path):
    # The weights alone would fit, but not what stands beside them.
    done = run_on_small_disk(tmp_path, 524, merge_words(tmp_path))
    assert_clear(done)
    assert "more are needed" not in done.stderr and "model.safetensors" not in done.stdout


def test_merge_that_fits(tmp_path):
    done = run_on_small_disk(tmp_path, 2000, merge_words(tmp_path))
    assert done.returncode == 0 and "out/model/model.safetensors" in done.stdout


def test_merge_of_a_file_that_may_not_grow(tmp_path):
    words = merge_words(tmp_path)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    limited += "from galenic.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", limited, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "disk").rglob("*.safetensors"))
    again = subprocess.run([sys.executable, "-m", "galenic.cli", *words], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    merged = load_file(tmp_path / "disk/out/model/model.safetensors")
    assert torch.equal(merged["w"], load_file(tmp_path / "a/model.safetensors")["w"])


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
