"""The documents of a corpus in units: slices of its Parquet files that a worker reads and encodes, one after another.

    documents.parquet (a file, or a folder of them) --> units of about 64 MB --> measure / sample / encode

Only a batch of a unit's texts is in memory; what has been encoded is held until the unit is written.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.tokens.shards import SCORES, write_shard
from galenic.runtime import UserError, atomic_path

UNIT_BYTES = 64 * 10**6
"""Of Parquet data before compression; about as much as a unit's texts."""
BATCH = 1000
"""Documents read and encoded at a time."""
COLUMNS = ("text", "source", "split", "weight")
SPLITS = ("train", "heldout")

Unit = dict[str, Any]
"""`number`, `file`, its row groups `first` to `last` (exclusive); JSON values."""
Counts = dict[str, dict[str, list[int]]]
"""source -> split -> [documents, characters]"""


def plan_units(path: Path) -> list[Unit]:
    """Divides `documents.parquet` into units, in the order of its files and rows.

    Raises:
        UserError: no such file, an empty folder, a file that is no Parquet, or one without a column needed.
    """
    from pyarrow import parquet

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no *.parquet files in this folder; run the corpus step first")
    units: list[Unit] = []
    for file in files:
        try:
            metadata = parquet.read_metadata(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; run the corpus step first") from None
        except Exception as error:
            raise UserError(f"{file}: not a readable documents file ({error})") from None
        missing = sorted(set(COLUMNS) - set(metadata.schema.names))
        if missing:
            raise UserError(f"{file}: not a documents file, it has no column {', '.join(missing)}")
        place = str(file.absolute())  # a worker of a cluster may stand in another folder
        first, size = 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= UNIT_BYTES or group + 1 == metadata.num_row_groups:
                units.append({"number": len(units), "file": place, "first": first, "last": group + 1})
                first, size = group + 1, 0
    return units


def batches(unit: Unit, columns: tuple[str, ...] = COLUMNS) -> Iterator[Any]:
    """Reads a unit as record batches."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(unit["file"]) as file:
            groups = list(range(unit["first"], unit["last"]))
            yield from file.iter_batches(batch_size=BATCH, row_groups=groups, columns=list(columns))
    except OSError as error:
        raise UserError(f"{unit['file']}: not a readable documents file ({error})") from None


def measure(unit: Unit) -> Unit:
    """Counts a unit's documents and characters; returns {"number", "counts": Counts}."""
    import pyarrow
    from pyarrow import compute

    counts: Counts = {}
    for batch in batches(unit, ("text", "source", "split")):
        lengths = compute.call_function("utf8_length", [batch["text"]])
        table = pyarrow.table({"source": batch["source"], "split": batch["split"], "length": lengths})
        for row in (
            table.group_by(["source", "split"]).aggregate([("length", "sum"), ([], "count_all")]).to_pylist()
        ):
            if row["split"] not in SPLITS:
                raise UserError(f"{unit['file']}: split '{row['split']}' is neither train nor heldout")
            entry = counts.setdefault(row["source"], {}).setdefault(row["split"], [0, 0])
            entry[0] += row["count_all"]
            entry[1] += row["length_sum"]
    return {"number": unit["number"], "counts": counts}


# ---------------------------------------------------------------------------- sample


def sample(units: list[Unit], counts: list[Counts], characters: int) -> list[str]:
    """Draws training text evenly over the sources: small ones whole, large ones thinned at a fixed stride.

    Args:
        units: in order.
        counts: of each unit.
        characters: to draw, about.

    Returns:
        Texts, source after source in alphabetical order, each in the order of its documents.
    """
    sizes: dict[str, int] = {}
    for count in counts:
        for source, splits in count.items():
            if "train" in splits:
                sizes[source] = sizes.get(source, 0) + splits["train"][1]
    keep = {source: share / max(sizes[source], 1) for source, share in shares(sizes, characters).items()}
    texts: dict[str, list[str]] = {source: [] for source in sorted(sizes)}
    seen = dict.fromkeys(sizes, 0)  # training documents of the source before here
    for unit, count in zip(units, counts, strict=True):
        inside = {source: splits["train"][0] for source, splits in count.items() if "train" in splits}
        wanted = {s for s, n in inside.items() if int((seen[s] + n) * keep[s]) > int(seen[s] * keep[s])}
        place = {source: seen[source] for source in wanted}
        for batch in batches(unit) if wanted else ():
            for source in sorted(wanted & set(batch["source"].to_pylist())):
                rows = _rows(batch, source, "train")
                # Bresenham's stride: row i is taken when floor(i * keep) steps up.
                steps = np.floor(np.arange(place[source], place[source] + len(rows) + 1) * keep[source])
                texts[source] += rows["text"].filter(steps[1:] > steps[:-1]).to_pylist()
                place[source] += len(rows)
        for source, number in inside.items():
            seen[source] += number
    return [text for source in texts for text in texts[source]]


def shares(sizes: dict[str, int], characters: int) -> dict[str, float]:
    """Divides a budget by water-filling: every source an equal share, and what small ones leave goes to the others."""
    filled: dict[str, float] = {}
    left, waiting = float(characters), sorted(sizes, key=lambda source: (sizes[source], source))
    while waiting:
        share = left / len(waiting)
        source = waiting.pop(0)
        filled[source] = min(sizes[source], share)
        left -= filled[source]
    return filled


def _rows(batch: Any, source: str, split: str) -> Any:
    """Returns the rows of a batch that are of a source and split."""
    sources, splits = (batch[name].to_numpy(zero_copy_only=False) for name in ("source", "split"))
    return batch.filter((sources == source) & (splits == split))


# ---------------------------------------------------------------------------- encode


def encode(unit: Unit) -> Unit:
    """Encodes a unit and writes its shards as a folder of their own, whole or not at all.

    Args:
        unit: with `tokenizer` (path of a tokenizer.json), `key` (of the run), `begin` and `end` (ids around each
            text), `dtype`, `out`, and `threads`: whether to use all cores.

    Returns:
        {"characters": encoded}.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if unit["threads"] else "false"
    tokenizer = _tokenizer(unit["tokenizer"], unit["key"])
    found: dict[tuple[str, str], list[tuple[np.ndarray, int, float]]] = {}
    scored = _scored(unit)
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    characters = 0
    for batch in batches(unit, (*COLUMNS, *scored)):
        texts = batch["text"].to_pylist()
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        columns = (batch[name].to_pylist() for name in ("source", "split", "weight"))
        places = list(zip(*(batch[name].to_pylist() for name in ("source", "split")), strict=True))
        for text, encoding, source, split, weight in zip(texts, encodings, *columns, strict=True):
            ids = np.array([unit["begin"], *encoding.ids, unit["end"]], dtype=unit["dtype"])
            found.setdefault((source, split), []).append((ids, len(text.encode()), weight))
        for name in scored:
            values = batch[name].to_numpy(zero_copy_only=False).astype(np.float64)  # nothing becomes NaN
            for place, value in zip(places, values.tolist(), strict=True):
                scores.setdefault(place, {}).setdefault(name, []).append(value)
        characters += sum(map(len, texts))
    with atomic_path(unit["out"]) as folder:
        folder.mkdir()
        for (source, split), documents in found.items():
            write_shard(folder, source, split, documents, unit["dtype"], scores.get((source, split)))
    return {"characters": characters}


def _scored(unit: Unit) -> list[str]:
    """Returns the scores that a unit's documents have."""
    from pyarrow import parquet, types

    schema = parquet.read_schema(unit["file"])
    return [name for name in SCORES if name in schema.names and types.is_floating(schema.field(name).type)]


@lru_cache(maxsize=1)
def _tokenizer(path: str, key: str) -> Any:
    """Loads a tokenizer once for all units of a run; `key` tells one run from the next."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True  # a marker written in a document is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
