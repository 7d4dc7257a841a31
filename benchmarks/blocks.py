"""Drawing and packing in blocks: time to the first step, memory, and bytes a document, for large sources.

    .venv/bin/python benchmarks/blocks.py --documents 1000000 100000000

The documents are lengths only (log-normal, mean about 600 tokens), in files that are mapped as shards are.
"""

import argparse
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from galenic.corpus.tokens.shards import Shard
from galenic.pretrain.config import PhaseConfig
from galenic.pretrain.data.curriculum import Curriculum, Place

CHUNK = 2**20


def shard_of(documents: int, folder: Path, seed: int) -> Shard:
    """Writes offsets and weights chunk by chunk and maps them; there are no tokens behind them."""
    shape = (documents + 1,)
    offsets = np.lib.format.open_memmap(folder / "offsets.npy", mode="w+", dtype=np.int64, shape=shape)
    weights = np.lib.format.open_memmap(
        folder / "weights.npy", mode="w+", dtype=np.float32, shape=(documents,)
    )
    generator, total = np.random.default_rng(seed), 0
    for first in range(0, documents, CHUNK):
        count = min(CHUNK, documents - first)
        lengths = generator.lognormal(6, 0.9, count).clip(8, 50_000).astype(np.int64)
        offsets[first + 1 : first + 1 + count] = total + np.cumsum(lengths)
        weights[first : first + count] = 1.0
        total = int(offsets[first + count])
    offsets.flush()
    mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "weights")}
    nothing = np.broadcast_to(np.uint16(0), (total,))
    return Shard(tokens=nothing, bytes=nothing[:documents], **mapped)


def main() -> None:
    """Prints a table row for each number of documents."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 100_000_000])
    parser.add_argument("--rows", type=int, default=2**18)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(
        "| documents | tokens | s to the first block | s to the next | s to resume there | pieces | MB of a block "
        "| MB at most |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for documents in given.documents:
        with tempfile.TemporaryDirectory() as folder:
            shard = shard_of(documents, Path(folder), given.seed)
            tokens = 3 * len(shard.tokens)
            phase = PhaseConfig(name="p", tokens=tokens, mixture={"a": 1}, context=given.context, rows=8)
            times, place = [], Place()
            curriculum = Curriculum(phase, {"a": shard}, given.seed, given.rows)
            for _ in range(2):
                started = time.monotonic()
                rows, after = curriculum.block(place)
                times.append(time.monotonic() - started)
                place, later = after, place
            started = time.monotonic()
            Curriculum(phase, {"a": shard}, given.seed, given.rows).block(later)
            times.append(time.monotonic() - started)
            tracemalloc.start()
            Curriculum(phase, {"a": shard}, given.seed, given.rows).block(later)
            peak = tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
            arrays = (rows.source, rows.document, rows.start, rows.length, rows.whole, rows.bounds)
            size = sum(array.nbytes for array in arrays) / 1e6
            told = " | ".join(f"{seconds:.1f}" for seconds in times)
            print(
                f"| {documents:,} | {tokens:.3g} | {told} | {len(rows.length):,} | {size:.0f} | {peak:.0f} |"
            )


if __name__ == "__main__":
    main()
