"""Duplicates of a whole corpus, from the signature files of its units: bytes a document, never a text.

    stage 1, for each unit:   sign(ids, texts) --> write_signatures(UNIT)
    ids, exact                tasks that read one column of every file --> pairs of equal hashes
    band 0 ... band b - 1     the same among distinct texts, pairs whose sketches agree
    here                      union-find over all pairs --> OUT/<unit>.npy: the verdict on each row

A task is a column and a range of hashes: so large a part of the corpus that its keys fit in memory. Tasks run in any
order, anywhere; they write what connects their rows by name, whole or not at all.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from galenic.corpus.duplicates import minhash
from galenic.corpus.duplicates.dedup import as_bytes, best, cluster, matches, roots, settle, unite
from galenic.corpus.engine import Unit, map_units
from galenic.runtime import atomic_path, remove

RANGE = 1 << 23
"""Rows of a task, on average: about 40 bytes each."""
FEW = 1 << 22
"""Rows below which this process is done before workers would be worth their start."""


class Columns(NamedTuple):
    """What is kept of the n documents of a unit: 292 bytes each with 16 bands."""

    ids: np.ndarray
    """(n, 2) uint64: 128-bit hash of the id."""
    exact: np.ndarray
    """(n, 2) uint64: 128-bit hash of the words."""
    bands: np.ndarray
    """(bands, n) uint64."""
    characters: np.ndarray
    """(n,) int32: length of the text."""
    sketches: np.ndarray
    """(n, permutations) uint8."""


NOTHING = Columns(
    ids=np.zeros((0, 2), np.uint64),
    exact=np.zeros((0, 2), np.uint64),
    bands=np.zeros((0, 0), np.uint64),
    characters=np.zeros(0, np.int32),
    sketches=np.zeros((0, 0), np.uint8),
)


def sign(ids: Any, texts: Any, *, threshold: float, seed: int) -> Columns:
    """Returns what documents are compared by.

    Args:
        ids: `pyarrow.LargeStringArray`, which rows of one id are found by.
        texts: of the same length.
        threshold: that `find_duplicates` will be called with; it decides on the number of bands.
        seed: of the hash functions, the same for the whole corpus.
    """
    signed = minhash.signatures(texts, seed=seed)
    return Columns(
        ids=minhash.hashed(ids),
        exact=signed.exact,
        bands=minhash.bands(signed.hashes, minhash.bands_for(threshold)),
        characters=signed.characters,
        sketches=minhash.sketches(signed.hashes),
    )


def write_signatures(path: Path, parts: Sequence[Columns]) -> None:
    """Writes the columns of a unit, one part after another, into one .npy file whose columns can be mapped.

    A unit without parts is one without rows.
    """
    parts = parts or [NOTHING]
    joined = Columns(
        *(
            np.concatenate(column, axis=1 if name == "bands" else 0)
            for name, column in zip(Columns._fields, zip(*parts, strict=True), strict=True)
        )
    )
    fields = [(name, column.dtype, column.shape) for name, column in joined._asdict().items()]
    record = np.empty(1, fields)
    for name, column in joined._asdict().items():
        record[name][0] = column
    _save(path, record)


def read_signatures(path: Path) -> Columns:
    """Returns the columns of a unit, mapped: what is not looked at is not read."""
    record = np.load(path, mmap_mode="r", allow_pickle=False)
    return Columns(*(record[name][0] for name in Columns._fields))


def first_rows(files: Iterable[Path]) -> np.ndarray:
    """Returns the number that the first row of each file has in the corpus, and at the end how many rows there are."""
    return np.cumsum([0, *(len(read_signatures(file).characters) for file in files)])


def find_duplicates(
    files: Sequence[Path], out: Path, *, threshold: float, workers: int, address: str = ""
) -> None:
    """Writes for each signature file `out/<its stem>.npy`: a VERDICT on each row, the rows of all files counted on.

    Of rows with one id all but the first go. Of each set of duplicates the longest text stays, of equally long ones
    the first. The bytes do not depend on workers, order or kills; a killed call goes on when it is made again. All
    that lies in `out` must be of the same files and threshold.

    Args:
        files: of `write_signatures`, in the order of the corpus.
        out: folder for the verdicts.
        threshold: least estimated Jaccard similarity of near duplicates.
        workers: processes.
        address: of a Ray cluster; this machine if empty.
    """
    outputs = [out / f"{file.stem}.npy" for file in files]
    if len(set(outputs)) < len(outputs):
        raise ValueError("two signature files have one name")
    edges = out / "edges"
    if all(output.exists() for output in outputs):
        remove(edges)
        return
    starts = first_rows(files)
    rows = np.arange(starts[-1])

    common: Unit = {"files": [str(file) for file in files], "edges": str(edges)}
    characters = _joined([read_signatures(file).characters for file in files], np.int32)

    # ids and whole texts take a fraction of a second a million rows: no workers
    same_id = _connected({**common, "least": 16}, ["ids"], len(rows))
    eligible = same_id == rows
    first = best(_connected({**common, "least": 16}, ["exact"], len(rows)), characters, eligible)
    first[~eligible] = -1
    _save(edges / "distinct.npy", first == rows)

    # of one shape in every unit with rows
    shapes = read_signatures(files[int(np.diff(starts).argmax())])
    common["least"] = minhash.least_agreement(threshold, shapes.sketches.shape[1])
    bands = [f"bands {band}" for band in range(len(shapes.bands))]
    if len(rows) < FEW:
        workers, address = 1, ""
    near = _connected(common, bands, len(rows), workers=workers, address=address)

    verdict = settle(first, near, characters)
    verdict["keeper"][~eligible] = same_id[~eligible]
    for output, begin, end in zip(outputs, starts, starts[1:], strict=False):
        if not output.exists():
            _save(output, verdict[begin:end])
    remove(edges)


def _connected(
    common: Unit, columns: Sequence[str], rows: int, *, workers: int = 1, address: str = ""
) -> np.ndarray:
    """Returns for each row the smallest one it is connected with by the tasks of the columns; runs those not done."""
    ranges = 1 << (max(1, -(-rows // RANGE)) - 1).bit_length()
    tasks = [
        {**common, "column": column, "range": part, "ranges": ranges}
        for column in columns
        for part in range(ranges)
    ]
    missing = [task for task in tasks if not _edge_file(task).exists()]
    for _ in map_units(connect, missing, workers=workers, address=address):
        pass
    root = np.arange(rows)
    for task in tasks:
        unite(root, np.load(_edge_file(task), allow_pickle=False))
    return roots(root)


# ---------------------------------------------------------------------------- a task


def connect(task: Unit) -> Unit:
    """Writes which rows of a column and a range of hashes belong together: pairs (m, 2), a row and its set's first."""
    files = [Path(file) for file in task["files"]]
    starts = first_rows(files)
    keys, rows = _keys(task, files, starts)

    def items(local: np.ndarray) -> np.ndarray:
        return _gathered(files, starts, task["column"], rows[local])

    found = [np.zeros((0, 2), np.int64)]
    for pairs in matches(keys, items, task["least"]):
        members, place = np.unique(pairs, return_inverse=True)
        root = cluster(place.reshape(-1, 2), len(members))
        tied = np.flatnonzero(root != np.arange(len(members)))
        found.append(rows[np.stack([members[tied], members[root[tied]]], axis=1)])
    _save(_edge_file(task), np.concatenate(found))
    return {}


def _edge_file(task: Unit) -> Path:
    return Path(task["edges"]) / f"{task['column'].replace(' ', '-')}-{task['range']}-of-{task['ranges']}.npy"


def _keys(task: Unit, files: Sequence[Path], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys in the task's range and their rows; of bands, of distinct texts only."""
    name, _, band = task["column"].partition(" ")
    distinct = np.load(Path(task["edges"]) / "distinct.npy", allow_pickle=False) if band else None
    shift = np.uint64(65 - task["ranges"].bit_length())
    keys, rows = [], []
    for file, begin, end in zip(files, starts, starts[1:], strict=False):
        if begin == end:
            continue
        columns = read_signatures(file)
        column = columns.bands[int(band)] if band else getattr(columns, name)[:, 0]
        chosen = np.ones(end - begin, bool) if distinct is None else distinct[begin:end]
        if task["ranges"] > 1:
            chosen = chosen & (column >> shift == task["range"])
        place = np.flatnonzero(chosen)
        keys.append(column[place])
        rows.append(place + begin)
    return _joined(keys, np.uint64), _joined(rows, np.int64)


def _gathered(files: Sequence[Path], starts: np.ndarray, column: str, rows: np.ndarray) -> np.ndarray:
    """Returns the bytes that rows are compared by: (m, width) uint8; one file at a time is mapped."""
    order = np.argsort(rows)
    ordered = rows[order]
    cuts = np.searchsorted(ordered, starts)
    found = []
    for file, start, begin, end in zip(files, starts, cuts, cuts[1:], strict=False):
        if begin < end:
            columns = read_signatures(file)
            table = columns.sketches if column.startswith("bands") else getattr(columns, column)
            part = table[ordered[begin:end] - start]
            found.append(part if part.dtype == np.uint8 else as_bytes(part))
    result = np.empty((len(rows), found[0].shape[1]), np.uint8)
    result[order] = np.concatenate(found)
    return result


def _joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *parts])


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
