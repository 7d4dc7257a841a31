"""The corpus and the tokenizer on a Ray cluster of two workers: the same documents and the same tokens."""

import json
import os
import subprocess

import pytest
from parity_helpers import DRIVERS, ROOT, executable

parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.parity
PORT = 6411


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two Ray nodes of one core each; yields the environment in which verbs find it."""
    ray = str(executable("ray", "ray"))
    folder = tmp_path_factory.mktemp("ray")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{DRIVERS}",
        "PATH": f"{executable('ray').parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
    }
    common = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir=/tmp/ray-{os.getpid()}"]
    start = {"env": environment, "check": True, "capture_output": True, "timeout": 120}
    subprocess.run([ray, "start", *head, *common], **start)
    try:
        subprocess.run([ray, "start", f"--address=127.0.0.1:{PORT}", *common], **start)
        yield environment
    finally:
        subprocess.run([ray, "stop", "--force"], env=environment, check=False, capture_output=True)


def run(environment, *words):
    done = subprocess.run(
        [str(executable("ray")), "-m", "galenic.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def content(out):
    """Bytes of everything but what names the folder, the machine or the time."""
    marks = ("config.yaml", "provenance.json", "done.json")
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in marks]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_units_are_worked_on_both_nodes(cluster):
    words = [str(executable("ray")), str(DRIVERS / "ray_nodes.py"), f"127.0.0.1:{PORT}"]
    done = subprocess.run(words, env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "2"


def test_the_unit_of_a_killed_worker_is_done_again(cluster, tmp_path):
    words = [str(executable("ray")), str(DRIVERS / "ray_killed.py"), f"127.0.0.1:{PORT}", str(tmp_path)]
    done = subprocess.run(words, env=cluster, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "[0, 1, 2, 3]" in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "killed").exists()


def test_a_cluster_gives_the_same_documents_and_tokens(cluster, tmp_path):
    rows = [
        {
            "text": f"The {n} patients of ward {n % 7} have a fever, and that is to be treated with {n * 3} mg of it."
        }
        for n in range(12_000)
    ]
    rows += rows[:1000]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "notes", "path": str(tmp_path / "notes.jsonl"), "format": "jsonl", "licence": "ours"}
    # distinct numbers alone would make them near duplicates
    config = {"sources": [source], "unit_bytes": 300_000 * 4, "near_duplicate": 1.0, "workers": 2}
    (tmp_path / "corpus.yaml").write_text(json.dumps(config))
    here, there = tmp_path / "here", tmp_path / "there"
    words = ["corpus", "--config", str(tmp_path / "corpus.yaml")]
    run(cluster, *words, "--out", str(here / "corpus"))
    run(cluster, *words, "--out", str(there / "corpus"), "--address", f"127.0.0.1:{PORT}")
    ours, theirs = content(here / "corpus"), content(there / "corpus")
    assert [path for path in ours if ours[path] != theirs.get(path)] == [] and ours.keys() == theirs.keys()
    assert parquet.read_table(there / "corpus" / "documents.parquet").num_rows > 10_000

    for place, address in ((here, []), (there, ["--address", f"127.0.0.1:{PORT}"])):
        words = ["tokenizer", "--corpus", str(place / "corpus"), "--out", str(place / "tokens")]
        run(cluster, *words, "--vocab_size", "600", *address)
    ours, theirs = content(here / "tokens"), content(there / "tokens")
    assert ours == theirs and "tokens/notes.train.tokens.npy" in ours
