"""Bytes a second of a trained scorer, all scores and classes, on one core.

Usage: python benchmarks/scores_speed.py SCORER_FOLDER DOCUMENTS.parquet

Prints CPU time (what the work takes) and wall time (what it took on this machine just now), best of five.
"""

import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from galenic.corpus.scores.features import features
from galenic.corpus.scores.scoring import CHUNK, Scorer


def main() -> None:
    score = Scorer.load(Path(sys.argv[1]))
    table = parquet.read_table(sys.argv[2], columns=["text"])
    texts = table["text"].cast(pa.large_string()).combine_chunks()
    size = sum(len(text.encode()) for text in texts.to_pylist())
    score(texts[:10])

    def reading() -> None:
        for start in range(0, len(texts), CHUNK):
            features(texts[start : start + CHUNK], int(score.facts["bits"]))

    for name, work in (("n-grams alone", reading), ("all scores and classes", lambda: score(texts))):
        cpu, wall = [], []
        for _ in range(5):
            begun, began = time.process_time(), time.perf_counter()
            work()
            cpu.append(time.process_time() - begun)
            wall.append(time.perf_counter() - began)
        print(
            f"{name}: {len(texts)} texts, {size / 1e6:.1f} MB, {size / 1e6 / min(cpu):.0f} MB/s of CPU time "
            f"({size / 1e6 / max(cpu):.0f} worst), {size / 1e6 / min(wall):.0f} MB/s of wall time"
        )


if __name__ == "__main__":
    main()
