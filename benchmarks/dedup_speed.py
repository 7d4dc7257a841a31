"""Duplicates: how fast texts are signed, how exact the estimates are, what is found, what a large corpus costs.

python benchmarks/dedup_speed.py signatures --documents documents.parquet     MB/s; bias and spread of two schemes
python benchmarks/dedup_speed.py recall --documents documents.parquet         pairs of known similarity that are found
python benchmarks/dedup_speed.py corpus [--rows 100000 1000000 3000000]       seconds and memory of find_duplicates

`documents` is what `galenic corpus` writes. Memory is the largest sum over this process and its workers, sampled
every 20 ms: resident, and proportional (pages of files that several processes map count once).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from timing import conditions

from galenic.compiled import compiled
from galenic.corpus.duplicates import files as dedup_files
from galenic.corpus.duplicates import minhash
from galenic.corpus.duplicates.dedup import near_pairs
from galenic.corpus.duplicates.files import Columns, find_duplicates, write_signatures
from galenic.corpus.texts import column

UNIT = 1 << 16
THRESHOLD = 0.85


def texts_of(path: str) -> list[str]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()


# ---------------------------------------------------------------------------- signatures


def speed(texts: list[str], ngram: int = 5) -> None:
    """Processor time of signing, of classic permutations and of one permutation with densified bins."""
    texts = texts * (1 + 30_000_000 // sum(len(t.encode()) for t in texts))
    batch = column(texts)
    size = sum(len(t.encode()) for t in texts) / 1e6
    for name, permutations in (("128 permutations", 128), ("1 permutation: parsing only", 1)):
        seconds = []
        minhash.signatures(batch[:1], permutations=permutations, seed=1)
        for _ in range(5):
            begin = time.process_time()
            minhash.signatures(batch, permutations=permutations, seed=1)
            seconds.append(time.process_time() - begin)
        print(
            f"{name}: {size / np.median(seconds):.0f} MB/s of processor time ({len(texts)} texts, {size:.0f} MB)"
        )
    signed = minhash.signatures(batch, seed=1)
    begin = time.process_time()
    minhash.bands(signed.hashes, 16), minhash.sketches(signed.hashes)
    print(f"bands and sketches: {(time.process_time() - begin) / len(texts) * 1e9:.0f} ns a text")


@compiled
def classic(shingles, multipliers, masks, minima):
    minima[:] = np.uint32(0xFFFFFFFF)
    for x in shingles:
        high, low = np.uint32(x >> np.uint64(32)), np.uint32(x & np.uint64(0xFFFFFFFF))
        for i in range(minima.size):
            minima[i] = min(minima[i], np.uint32(np.uint32(multipliers[i] * high) + (low ^ masks[i])))


def one_permutation(shingles: np.ndarray, key: int, count: int = 128) -> np.ndarray:
    """One permutation, `count` bins; an empty bin takes a random full one, the same for all (Shrivastava 2017)."""
    minima = np.full(count, 1 << 63, np.uint64)
    mixed = shingles * np.uint64(2 * key + 1)
    np.minimum.at(minima, (mixed >> np.uint64(57)).astype(int), mixed & np.uint64((1 << 57) - 1))
    full, source = minima < 1 << 63, np.arange(count)
    choose, need = np.random.default_rng(key), ~full
    while need.any():
        candidate = choose.integers(0, count, count)
        taken = need & full[candidate]
        source[taken] = candidate[taken]
        need &= ~taken
    return minima[source]


def accuracy(trials: int = 2000) -> None:
    """Bias and spread of the estimated Jaccard similarity of random sets."""
    rng = np.random.default_rng(0)
    print("| shingles | J | scheme | bias | its standard error | spread / sqrt(J (1 - J) / 128) |")
    print("|---|---|---|---|---|---|")
    for size in (10, 30, 150, 1000):
        for wanted in (0.5, 0.8, 0.9):
            shared = round(2 * size * wanted / (1 + wanted))
            true = shared / (2 * size - shared)
            estimates: dict[str, list[float]] = {
                "128 permutations": [],
                "their last bytes": [],
                "one permutation": [],
            }
            for trial in range(trials):
                union = rng.integers(0, 1 << 64, 2 * size - shared, dtype=np.uint64)
                sets = union[:size], union[size - shared :]
                multipliers, masks = rng.integers(0, 1 << 32, (2, 128), dtype=np.uint32)
                minima = np.empty((2, 128), np.uint32)
                for one, values in zip(minima, sets, strict=True):
                    classic(values, multipliers | np.uint32(1), masks, one)
                estimates["128 permutations"].append((minima[0] == minima[1]).mean())
                sketch = minhash.sketches(minima)
                estimates["their last bytes"].append(
                    ((sketch[0] == sketch[1]).mean() - 1 / 256) / (1 - 1 / 256)
                )
                bins = [one_permutation(values, trial) for values in sets]
                estimates["one permutation"].append((bins[0] == bins[1]).mean())
            for name, values in estimates.items():
                spread, ideal = np.std(values), (true * (1 - true) / 128) ** 0.5
                print(
                    f"| {size} | {true:.3f} | {name} | {np.mean(values) - true:+.4f} | {spread / trials**0.5:.4f} "
                    f"| {spread / ideal:.2f} |"
                )


# ---------------------------------------------------------------------------- recall


def shingles(text: str) -> set[tuple[str, ...]]:
    """Word 5-grams by the definition, for texts that are written with spaces."""
    words = text.casefold().split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def edited(text: str, share: float, rng: random.Random) -> str:
    """Replaces, drops or doubles words here and there."""
    words = []
    for word in text.split():
        change = rng.random() / share if share else 1
        words += (
            [word] if change >= 1 else (["other"] if change < 1 / 3 else [] if change < 2 / 3 else [word] * 2)
        )
    return " ".join(words)


def recall(texts: list[str], pairs: int = 4000) -> None:
    """Share of pairs of texts found to be near duplicates, by exact similarity; and what all-pairs search says."""
    rng = random.Random(0)
    plain = [t for t in texts if t.isascii() and len(t.split()) >= 30]
    print(f"{len(plain)} texts of at least 30 words")
    found: dict[int, list[int]] = {}
    for _ in range(pairs):
        text = rng.choice(plain)
        other = edited(text, rng.random() * 0.12, rng)
        similarity = jaccard(shingles(text), shingles(other))
        hashes = minhash.signatures(column([text, other]), seed=rng.randrange(1 << 30)).hashes
        found.setdefault(int(similarity * 20), []).append(bool(near_pairs(hashes, threshold=THRESHOLD)))
    print("| exact Jaccard | pairs | found |\n|---|---|---|")
    for step, hits in sorted(found.items()):
        if step >= 10:
            print(f"| {step / 20:.2f} to {(step + 1) / 20:.2f} | {len(hits)} | {np.mean(hits):.3f} |")

    some = rng.sample(plain, min(300, len(plain)))
    some += [edited(rng.choice(some), rng.random() * 0.06, rng) for _ in range(300)]
    sets = [shingles(t) for t in some]
    exact = {(i, j): jaccard(sets[i], sets[j]) for i in range(len(some)) for j in range(i + 1, len(some))}
    ours = set(near_pairs(minhash.signatures(column(some), seed=1).hashes, threshold=THRESHOLD))
    for margin in (0.0, 0.05):
        right = {p for p, j in exact.items() if j >= THRESHOLD + margin}
        wrong = {p for p in ours if exact[p] < THRESHOLD - margin}
        print(
            f"all pairs of {len(some)} texts, margin {margin}: recall {len(right & ours)}/{len(right)}, "
            f"precision {len(ours) - len(wrong)}/{len(ours)}"
        )
    print(f"lowest similarity of a pair found: {min(exact[p] for p in ours):.3f}")


# ---------------------------------------------------------------------------- corpus


def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * minhash.MIX_1
    x = (x ^ (x >> np.uint64(27))) * minhash.MIX_2
    return x ^ (x >> np.uint64(31))


def synthetic(first: int, rows: int, total: int) -> Columns:
    """Signatures as of texts of which a tenth are exact copies, 30% near duplicates in sets of 2 to 10,000."""
    rng = np.random.default_rng(first)
    number = np.arange(first, first + rows, dtype=np.uint64)
    kind = rng.random(rows)
    sizes = np.where(rng.random(rows) < 0.9, 3, np.where(rng.random(rows) < 0.9, 100, 10_000))
    family = (
        rng.integers(0, 1 << 62, rows) % np.maximum(1, total // 5 // sizes) + sizes.astype(np.int64) * total
    )
    family = np.where(kind < 0.3, family.astype(np.uint64), mixed(number + np.uint64(1 << 40)))
    places = np.arange(128, dtype=np.uint64)
    hashes = mixed(family[:, None] * np.uint64(128) + places)
    noise = rng.random((rows, 128)) < np.where(kind < 0.3, rng.random(rows) * 0.15, 0)[:, None]
    hashes = np.where(noise, mixed(hashes + number[:, None]), hashes).astype(np.uint32)
    exact = np.stack([mixed(number), number], axis=1)
    source = np.flatnonzero(kind >= 0.9)
    copied = rng.integers(0, max(1, rows // 2), len(source))
    exact[source], hashes[source] = exact[copied], hashes[copied]
    return Columns(
        ids=np.stack([mixed(number + np.uint64(1 << 50)), number], axis=1),
        exact=exact,
        bands=minhash.bands(hashes, 16),
        characters=rng.integers(200, 2000, rows, dtype=np.int32),
        sketches=minhash.sketches(hashes),
    )


class Memory(threading.Thread):
    """Samples the memory of this process and all below it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks, self.going = {"Rss": 0, "Pss": 0}, True

    def run(self) -> None:
        while self.going:
            now = {"Rss": 0, "Pss": 0}
            for process in self.family(os.getpid()):
                try:
                    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                        name = line.split(":")[0]
                        if name in now:
                            now[name] += int(line.split()[1]) * 1024
                except (OSError, IndexError):
                    pass
            self.peaks = {name: max(self.peaks[name], value) for name, value in now.items()}
            time.sleep(0.02)

    def family(self, process: int) -> list[int]:
        found = [process]
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                for child in (task / "children").read_text().split():
                    found += self.family(int(child))
        except OSError:
            pass
        return found


def corpus(rows: int, workers: int, folder: Path) -> None:
    """Prints the cost of one corpus, as a JSON line; the parent makes a process of each size."""
    files = []
    for first in range(0, rows, UNIT):
        files.append(folder / f"unit-{first:09d}.npy")
        write_signatures(files[-1], [synthetic(first, min(UNIT, rows - first), rows)])
    size = sum(file.stat().st_size for file in files)
    memory = Memory()
    memory.start()
    begin, times = time.perf_counter(), os.times()
    find_duplicates(files, folder / "out", threshold=THRESHOLD, workers=workers)
    wall, after = time.perf_counter() - begin, os.times()
    memory.going = False
    memory.join()
    verdict = np.concatenate([np.load(folder / "out" / file.name) for file in files])
    cpu = sum(after[:4]) - sum(times[:4])
    print(
        json.dumps(
            {
                "rows": rows,
                "workers": workers,
                "signatures MB": round(size / 1e6),
                "wall s": round(wall, 2),
                "wall us a row": round(wall / rows * 1e6, 2),
                "processor us a row": round(cpu / rows * 1e6, 2),
                "resident MB": round(memory.peaks["Rss"] / 1e6),
                "proportional MB": round(memory.peaks["Pss"] / 1e6),
                "kept, exact, near": np.bincount(verdict["reason"], minlength=3)[:3].tolist(),
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["signatures", "recall", "corpus", "one"])
    parser.add_argument("--documents")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000, 3_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for signature files; a temporary one by default")
    parser.add_argument(
        "--always-workers", action="store_true", help="start workers however few rows there are"
    )
    args = parser.parse_args()
    if args.what == "one":
        dedup_files.FEW = 0 if args.always_workers else dedup_files.FEW
        corpus(args.rows[0], args.workers, args.folder)
        return
    print(conditions(1))
    if args.what in ("signatures", "recall") and not args.documents:
        parser.error(f"{args.what} needs --documents")
    if args.what == "signatures":
        speed(texts_of(args.documents))
        accuracy()
    elif args.what == "recall":
        recall(texts_of(args.documents))
    else:
        for rows in args.rows:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                command = [
                    sys.executable,
                    __file__,
                    "one",
                    "--rows",
                    str(rows),
                    "--workers",
                    str(args.workers),
                ]
                command += ["--folder", folder, *["--always-workers"] * args.always_workers]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
