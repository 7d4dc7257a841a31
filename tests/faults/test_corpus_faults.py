"""The corpus verb killed at any moment, on a full disk, and with input that nobody would wish for."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_disk_full import CAN_MOUNT, assert_clear, run_on_small_disk

parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("daft")
pa = pytest.importorskip("pyarrow")

WORDS = [
    f"{a}{b}" for a in ("ca", "be", "do", "fi", "gu", "ha") for b in ("rd", "rn", "st", "lt", "mp", "nk", "x")
]


def prose(rng, sentences=12):
    return " ".join(
        f"The {rng.choice(WORDS)} and the {rng.choice(WORDS)} have {rng.choice(WORDS)} with {rng.randrange(10**6)}."
        for _ in range(sentences)
    )


@pytest.fixture
def folder(tmp_path):
    """Two sources in several files, a tenth of the texts twice, and the words that build a corpus of them."""
    rng = random.Random(7)
    texts = [prose(rng) for _ in range(4000)]
    texts += texts[:400]
    (tmp_path / "notes").mkdir()
    for part in range(4):
        rows = (json.dumps({"text": text}) for text in texts[part::8])
        (tmp_path / "notes" / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    table = pa.table({"text": [text for part in range(4, 8) for text in texts[part::8]]})
    parquet.write_table(table, tmp_path / "papers.parquet", row_group_size=500)
    config = {
        "sources": [
            {"name": "notes", "path": str(tmp_path / "notes"), "format": "jsonl", "licence": "ours"},
            {
                "name": "papers",
                "path": str(tmp_path / "papers.parquet"),
                "format": "parquet",
                "licence": "ours",
            },
        ],
        "unit_bytes": 1_000_000,
        "workers": 2,
    }
    (tmp_path / "corpus.yaml").write_text(json.dumps(config))
    return tmp_path


def command(folder, out):
    return [
        sys.executable,
        "-m",
        "galenic.cli",
        "corpus",
        "--config",
        str(folder / "corpus.yaml"),
        "--out",
        str(out),
    ]


def files(out):
    """Everything but what names the folder or tells the time."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("done.json", "config.yaml", "provenance.json")
    }


STAGES = ("prepared", "clean", "results", "signatures", "duplicates", "decisions", "finished", "result")


def progress(out):
    """How many files of every stage there are, half-written ones too."""
    return sum(1 for stage in STAGES for path in (out / ".work" / stage).rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(folder):
    subprocess.run(command(folder, folder / "whole"), check=True, capture_output=True)
    whole = files(folder / "whole")
    assert sum(path.startswith("documents.parquet/") for path in whole) > 3
    kills = 0
    for wanted in (1, 3, 6, 9, 12, 16, 20, 24):
        process = subprocess.Popen(
            command(folder, folder / "cut"), stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and progress(folder / "cut") < wanted:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # workers too
            process.wait()
            kills += 1
    assert kills >= 6
    subprocess.run(command(folder, folder / "cut"), check=True, capture_output=True)
    cut = files(folder / "cut")
    assert cut.keys() == whole.keys()
    assert [path for path in whole if cut[path] != whole[path]] == []


@pytest.mark.skipif(not CAN_MOUNT, reason="needs user namespaces to mount a small disk")
def test_a_full_disk(folder):
    words = command(folder, folder / "disk/out")[3:]
    assert_clear(run_on_small_disk(folder, 2000, words))
    done = run_on_small_disk(folder, 60_000, words)
    assert done.returncode == 0 and "documents.parquet" in done.stdout and ".work" not in done.stdout


def test_bad_input_is_in_the_ledger_and_the_run_goes_on(folder):
    notes = folder / "notes"
    whole = (folder / "papers.parquet").read_bytes()
    (folder / "half").mkdir()
    (folder / "half" / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "half" / "whole.parquet").write_bytes(whole)
    (notes / "broken.jsonl").write_bytes(b'{"text": "not UTF-8: \xff\xfe"}\n{"text": 3}\n{"text"\n')
    (notes / "long.jsonl").write_bytes(b'{"text": "' + b"a" * 20_000_000 + b'"}\n')
    (notes / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"text": "cut off in the middle"}\n' * 900)[:60])
    config = json.loads((folder / "corpus.yaml").read_text())
    half = {"name": "half", "path": str(folder / "half"), "format": "parquet", "licence": "ours"}
    config["sources"].append(half)
    (folder / "corpus.yaml").write_text(json.dumps(config))
    subprocess.run(command(folder, folder / "out"), check=True, capture_output=True)
    ledger = parquet.read_table(folder / "out" / "ledger.parquet").to_pylist()
    bad = [(row["id"], row["reason"]) for row in ledger if "duplicate" not in row["reason"]]
    told = "\n".join(f"{id}: {reason}" for id, reason in bad)
    assert {reason for _, reason in bad} >= {"broken encoding", "malformed record", "unreadable file"}, told
    assert any("cut.parquet" in id for id, _ in bad) and any("long.jsonl" in id for id, _ in bad)
    stats = json.loads((folder / "out" / "stats.json").read_text())
    assert stats["documents_in"] == stats["kept"] + len(ledger)
    kept = parquet.read_table(folder / "out" / "documents.parquet", columns=["id", "duplicates"]).to_pylist()
    # every text of the Parquet file was read three times at least: as papers and as half
    assert sum(row["duplicates"] for row in kept) == stats["documents_in"] - len(bad)


def test_too_many_failures_stop_the_run_with_the_way_out(folder):
    rows = [
        "not json" if number % 10 == 0 else json.dumps({"text": prose(random.Random(number))})
        for number in range(3000)
    ]
    (folder / "notes" / "bad.jsonl").write_text("\n".join(rows))
    limits = ["--max_failures", "0.03"]
    done = subprocess.run([*command(folder, folder / "out"), *limits], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert "records could not be read, more than max_failures 3%" in error and "source 'notes'" in error
    # the same command says the same; with a higher share it is another configuration of the same folder
    again = subprocess.run([*command(folder, folder / "out"), *limits], capture_output=True, text=True)
    assert again.returncode == 2 and "max_failures" in again.stderr
    another = subprocess.run(
        [*command(folder, folder / "out"), "--max_failures", "0.5"], capture_output=True, text=True
    )
    assert another.returncode == 2 and "holds unfinished work of another configuration" in another.stderr
