"""Decontamination: how long runs must be, what edits hide, how fast the search is.

    python benchmarks/decontamination.py CORPUS/documents.parquet

Prints three tables in Markdown. Everything is drawn with a fixed seed; times are CPU seconds of one core.
"""

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as parquet

from galenic.corpus.contamination.decontaminate import Decontamination, Evaluations, find_spans
from galenic.corpus.texts import column

PROSE = ("wikipedia", "wikipedia-health", "guidelines", "radiology")


def evaluations(texts: list[str], folder: Path, **rules) -> Evaluations:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Evaluations.read([str(path)], Decontamination(**rules))


def sentences(texts: list[str], least: int, most: int) -> list[str]:
    """Sentences of so many words (a Han character is one)."""
    found = []
    for text in texts:
        for part in re.split(r"\n+|(?<=[.。!?！？])\s*(?=\S)", text):
            if least <= len(re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", part)) <= most:
                found.append(part)
    return found


def shared_runs(sources: dict[str, list[str]], folder: Path) -> None:
    """Every second document against the others: runs that unrelated texts share."""
    print("| source | run | items with a hit | of | examples |\n|---|--:|--:|--:|---|")
    for name, lengths in (
        ("wikipedia", (8, 10, 13)),
        ("wikipedia-health", (8, 10, 13)),
        ("hsk", (8, 10, 13, 16, 20)),
    ):
        texts = sources.get(name, [])
        han = name == "hsk"
        if han:  # Chinese only: the translations between them would share runs of their own
            texts = ["".join(re.findall(r"[\u3400-\u9fff]+", text)) for text in texts]
            items = texts[::2]
        else:
            items = sentences(texts[::2], 13, 60)
        other = column(texts[1::2])
        for length in lengths:
            rules = {"han_ngram" if han else "ngram": length, "near_copy": 2.0, "stock": 10**9}
            index = evaluations(items, folder, **rules)
            found = find_spans(other, index)
            pieces = {
                span.piece: other[row].as_py()[span.start : span.stop]
                for row, spans in found.items()
                for span in spans
            }
            some = "; ".join(
                " ".join(text[:70].split()) for text in list(pieces.values())[:: max(1, len(pieces) // 4)][:4]
            )
            print(f"| {name} | {length} | {len(pieces)} | {len(items)} | {some} |", flush=True)


def edited(text: str, rate: float, words: list[str], rng: random.Random) -> str:
    """Replaces 70%, deletes 15% and inserts beside 15% of the words that `rate` picks."""
    out = []
    for word in text.split():
        draw = rng.random() / rate if rate else 1
        out += (
            [rng.choice(words)]
            if draw < 0.7
            else []
            if draw < 0.85
            else [word, rng.choice(words)]
            if draw < 1
            else [word]
        )
    return " ".join(out)


def near_copies(texts: list[str], clean: list[str], folder: Path) -> None:
    rng = random.Random(0)
    items = sentences(texts, 20, 60)
    rng.shuffle(items)
    items = items[:1000]
    words = sorted({word for text in texts[:3000] for word in text.split() if word.isalpha()})
    rates = (0.05, 0.1, 0.15, 0.2, 0.3)
    copies = {
        rate: column([f"{clean[0]}\n{edited(t, rate, words, rng)}\n{clean[1]}" for t in items])
        for rate in rates
    }
    print(
        "\n| shingle | similarity | "
        + " | ".join(f"{rate:.0%} edited" for rate in rates)
        + " | clean documents hit |"
    )
    print("|--:|--:|" + "--:|" * (len(rates) + 1))
    for shingle, least in ((5, 2.0), (5, 0.8), (5, 0.5), (3, 0.8), (3, 0.6), (3, 0.5), (3, 0.4), (2, 0.5)):
        index = evaluations(items, folder, shingle=shingle, near_copy=least)
        shares = [len(find_spans(copies[rate], index)) / len(items) for rate in rates]
        hit = len(find_spans(column(clean), index))
        label = "only 13-grams | " if least > 1 else f"{shingle} | {least}"
        print(
            f"| {label} | " + " | ".join(f"{s:.0%}" for s in shares) + f" | {hit} of {len(clean)} |",
            flush=True,
        )


def speed(sources: dict[str, list[str]], folder: Path) -> None:
    rng = random.Random(0)
    words = [word for name in PROSE for text in sources.get(name, []) for word in text.split()]
    print("\n| items | texts | MB | CPU s | MB/s |\n|--:|---|--:|--:|--:|")
    for count in (1000, 100_000):
        items = []
        for _ in range(
            count
        ):  # runs of four words of the corpus itself: as alike as unrelated texts could be
            starts = [rng.randrange(len(words) - 4) for _ in range(10)]
            items.append(" ".join(" ".join(words[start : start + 4]) for start in starts))
        started = time.process_time()
        index = evaluations(items, folder)
        built = time.process_time() - started
        for name, texts in (
            ("English prose", [t for s in PROSE for t in sources.get(s, [])]),
            ("Chinese", sources["hsk"]),
        ):
            if name == "Chinese":
                texts = ["".join(re.findall(r"[\u3400-\u9fff，。！？]+", text)) for text in texts]
            texts = texts * (1 + int(30e6 / sum(len(text.encode()) for text in texts)))
            batch = column(texts)
            find_spans(batch[:10], index)  # compiles
            started = time.process_time()
            find_spans(batch, index)
            spent = time.process_time() - started
            size = sum(len(text.encode()) for text in texts) / 1e6
            print(
                f"| {count} (built in {built:.1f} s) | {name} | {size:.0f} | {spent:.2f} | {size / spent:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents")
    table = parquet.read_table(parser.parse_args().documents, columns=["source", "text"])
    sources: dict[str, list[str]] = {}
    for name, text in zip(table["source"].to_pylist(), table["text"].to_pylist(), strict=True):
        sources.setdefault(name, []).append(text)
    with tempfile.TemporaryDirectory() as folder:
        shared_runs(sources, Path(folder))
        prose = [text for name in PROSE for text in sources.get(name, [])]
        clean = [
            text
            for name in ("hpo", "icd10cm", "mesh", "drugs", "python-docs")
            for text in sources.get(name, [])
        ]
        near_copies(prose, clean, Path(folder))
        speed(sources, Path(folder))


if __name__ == "__main__":
    main()
