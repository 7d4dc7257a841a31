"""Tokenise and pack: throughput, and what packing cuts and pads on a recipe's curriculum.

    galenic build recipes/starter --run-dir runs/starter     # or its first two steps
    python benchmarks/tokens.py runs/starter --recipe recipes/starter/30-pretrain.yaml

Throughput is told as MB of UTF-8 text a second, by the clock and by CPU time, which other work on the machine does not
stretch; tokenising reads the documents, encodes them with an existing tokenizer, and writes and flushes the shards.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from galenic.corpus.tokens import tokenizer
from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.corpus.tokens.tokenizer_config import TokenizerConfig
from galenic.pretrain.data.bins import fill_bins
from galenic.pretrain.data.packing import packing_report, phase_rows


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Returns (seconds by the clock, seconds of CPU, what it returned)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def tokenise(run: Path, copies: int) -> None:
    """Encodes the corpus, its documents several times over, with its own tokenizer."""
    from pyarrow import parquet

    with tempfile.TemporaryDirectory() as place:
        corpus, out = Path(place) / "corpus", Path(place) / "out"
        (corpus / "documents.parquet").mkdir(parents=True)
        table = parquet.read_table(run / "10-corpus" / "documents.parquet")
        for copy in range(copies):
            parquet.write_table(
                table, corpus / "documents.parquet" / f"{copy:03d}.parquet", compression="zstd"
            )
        (corpus / "sources.json").write_bytes((run / "10-corpus" / "sources.json").read_bytes())
        config = TokenizerConfig(corpus=str(corpus), out=str(out), tokenizer=str(run / "20-tokenizer"))
        wall, cpu, _ = timed(lambda: tokenizer.run(config))
        sources = read_meta(out)["sources"].values()
        size = sum(counts[split]["bytes"] for counts in sources for split in ("train", "heldout")) / 1e6
        print(f"tokenise: {size:.0f} MB of text, {size / wall:.1f} MB/s, {size / cpu:.1f} MB per CPU second")


def decreasing(lengths: np.ndarray, capacity: int) -> int:
    """Rows that best-fit decreasing needs: the longest piece first, each into the fullest row it fits."""
    free, rows = np.zeros(capacity + 1, dtype=np.int64), 0
    for length in -np.sort(-lengths):
        place = length + int(np.argmax(free[length:] > 0))
        if free[place]:
            free[place] -= 1
        else:
            rows, place = rows + 1, capacity
        free[place - length] += 1
    return rows


def pack(run: Path, phases: list[dict[str, Any]]) -> None:
    """Packs a curriculum's phases, and tells what best-fit decreasing would pad."""
    folder = run / "20-tokenizer"
    documents, split = 0, 0.0
    for phase in phases:
        shards = {source: read_shard(folder, source, "train") for source in phase["mixture"]}
        arguments = {"tokens": phase["tokens"], "context": phase["context"], "seed": 0, "name": phase["name"]}
        rows = phase_rows(shards, phase["mixture"], **arguments)
        before = decreasing(rows.length, phase["context"]) * phase["context"]
        report = packing_report(rows, phase["context"])
        print(
            f"{phase['name']}, rows of {phase['context']}: {report} (best-fit decreasing "
            f"{1 - report.tokens / before:.2%})"
        )
        documents += report.documents
        split += report.documents * report.split_documents
    print(f"all phases: split {split / documents:.2%} of {documents} documents drawn")


def lengths(run: Path) -> None:
    """Tells how long documents are and which row would hold 99 of 100."""
    folder = run / "20-tokenizer"
    print(
        "|source|documents|mean tokens|99 of 100 fit|longest|longer than 384|of tokens|longer than 768|of tokens|"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for source in read_meta(folder)["sources"]:
        sizes = np.sort(np.diff(read_shard(folder, source, "train").offsets))
        cells = [
            str(len(sizes)),
            f"{sizes.mean():.0f}",
            str(sizes[math.ceil(0.99 * len(sizes)) - 1]),
            str(sizes[-1]),
        ]
        for context in (384, 768):
            long = sizes > context
            cells += [f"{long.mean():.1%}", f"{sizes[long].sum() / sizes.sum():.1%}"]
        print("|".join(["", source, *cells, ""]))


def pack_many(pieces: int) -> None:
    """Packs web-like documents: lengths of a wide log-normal law."""
    fill_bins(np.array([1]), 1)  # compiled
    for context in (8192, 32768):
        drawn = np.random.default_rng(0).lognormal(6.5, 1.2, pieces).clip(10, context).astype(np.int64)
        wall, cpu, (_, bounds) = timed(lambda drawn=drawn, context=context: fill_bins(drawn, context))
        padding = 1 - drawn.sum() / (len(bounds) - 1) / context
        print(
            f"pack: {pieces} pieces of {drawn.sum() / 1e6:.0f}M tokens into rows of {context}: {wall:.2f} s, "
            f"{cpu:.2f} s of CPU, padding {padding:.4%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/starter/30-pretrain.yaml"))
    parser.add_argument("--copies", type=int, default=4, help="of the documents, to time tokenising")
    parser.add_argument("--pieces", type=int, default=1_000_000, help="to time packing")
    arguments = parser.parse_args()
    print(f"{date.today()}, {arguments.run}")
    tokenise(arguments.run, arguments.copies)
    pack(arguments.run, yaml.safe_load(arguments.recipe.read_text())["phases"])
    pack_many(arguments.pieces)
    lengths(arguments.run)


if __name__ == "__main__":
    main()
