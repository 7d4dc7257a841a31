"""Token shards: one flat memory-mapped array per source and split, with document boundaries.

    tokens/<source>.<split>.tokens.npy    uint16 or uint32, all documents one after another
    tokens/<source>.<split>.offsets.npy   int64, documents + 1: where each one starts
    tokens/<source>.<split>.bytes.npy     int64, UTF-8 bytes of each document's text
    tokens/<source>.<split>.weights.npy   float32, repeats of each document per epoch
    tokens/<source>.<split>.quality.npy   float32, the corpus' column of the name, if it has one; NaN where unknown
    tokens/<source>.<split>.difficulty.npy  the same of its bits per byte under an earlier model
    tokens/meta.json                      dtype, vocabulary, ids around a text, counts per source and split, and the
                                          size and SHA-256 of each file (`integrity.py`)

Each document is `<s>` + text + `</s>`; with another model's tokenizer, what stands there in place of them.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.tokens.chat_format import BOS, EOS, PAD
from galenic.corpus.tokens.integrity import check_size
from galenic.runtime import UserError, nearest, read_json, write_json

PARTS = ("tokens", "offsets", "bytes", "weights")
SCORES = ("quality", "difficulty")
"""Parts that a shard may have, by which documents are put in order."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The documents of one source and split, memory-mapped."""

    tokens: np.ndarray
    """(tokens,) uint16 or uint32."""
    offsets: np.ndarray
    """(documents + 1,) int64."""
    bytes: np.ndarray
    """(documents,) int64."""
    weights: np.ndarray
    """(documents,) float32."""
    quality: np.ndarray | None = None
    """(documents,) float32, NaN where unknown; None if the corpus did not have it."""
    difficulty: np.ndarray | None = None
    """(documents,) float32, bits per byte under an earlier model; as `quality`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, int64."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)


def write_shard(
    folder: Path,
    source: str,
    split: str,
    documents: Iterable[tuple[Any, int, float]],
    dtype: str,
    scores: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, int]:
    """Writes a shard.

    Args:
        folder: where its files go.
        source: whose documents they are.
        split: `train` or `heldout`.
        documents: (token ids, bytes, weight) of each.
        dtype: of the tokens.
        scores: name of `SCORES` -> value of each document.

    Returns:
        {"documents", "tokens", "bytes"}.
    """
    ids: list[np.ndarray] = []
    sizes, weights = [], []
    for tokens, size, weight in documents:
        ids.append(np.asarray(tokens, dtype=dtype))
        sizes.append(size)
        weights.append(weight)
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    arrays = {
        "tokens": np.concatenate(ids) if ids else np.zeros(0, dtype=dtype),
        "offsets": np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)]),
        "bytes": np.array(sizes, dtype=np.int64),
        "weights": np.array(weights, dtype=np.float32),
    }
    arrays |= {part: np.array(values, dtype=np.float32) for part, values in (scores or {}).items()}
    for part, array in arrays.items():
        np.save(folder / f"{source}.{split}.{part}.npy", array, allow_pickle=False)
    return {"documents": len(ids), "tokens": int(lengths.sum()), "bytes": int(sum(sizes))}


def join_shards(parts: Sequence[Path], folder: Path, source: str, split: str, dtype: str) -> dict[str, int]:
    """Joins the shards of one source and split that stand in several folders, in their order.

    The files are those that `write_shard` would write of all the documents at once, but only a buffer of them is
    ever in memory. Folders without the shard are passed over. Scores that only some of them have are unknown (NaN)
    in the others.

    Returns:
        {"documents", "tokens", "bytes"}.
    """
    stem = f"{source}.{split}"
    found = [part for part in parts if (part / f"{stem}.offsets.npy").exists()]
    if not found:
        return write_shard(folder, source, split, [], dtype)
    for part in ("tokens", "bytes", "weights"):
        _join([place / f"{stem}.{part}.npy" for place in found], folder / f"{stem}.{part}.npy")
    offsets = [np.load(place / f"{stem}.offsets.npy", mmap_mode="r") for place in found]
    lengths = [len(own) - 1 for own in offsets]
    for part in SCORES:
        files = [place / f"{stem}.{part}.npy" for place in found]
        if any(file.exists() for file in files):
            _join_scores(files, lengths, folder / f"{stem}.{part}.npy")
    documents, tokens, size = sum(lengths), 0, 0
    with open(folder / f"{stem}.offsets.npy", "wb") as file:
        _write_header(file, np.dtype(np.int64), documents + 1)
        file.write(np.zeros(1, dtype=np.int64).tobytes())
        for place, own in zip(found, offsets, strict=True):
            file.write((tokens + own[1:]).tobytes())
            tokens += int(own[-1])
            size += int(np.load(place / f"{stem}.bytes.npy").sum())
    return {"documents": documents, "tokens": tokens, "bytes": size}


def _join(files: list[Path], out: Path) -> None:
    """Writes the one-dimensional arrays of files of one type one after another into one `.npy` file."""
    headers = [_read_header(file) for file in files]
    with open(out, "wb") as joined:
        _write_header(joined, headers[0][0], sum(length for _, length, _ in headers))
        for file, (_, _, start) in zip(files, headers, strict=True):
            with open(file, "rb") as part:
                part.seek(start)
                shutil.copyfileobj(part, joined, 2**20)


def _join_scores(files: list[Path], lengths: list[int], out: Path) -> None:
    """Joins files of scores; one that is missing stands for NaN."""
    with open(out, "wb") as joined:
        _write_header(joined, np.dtype(np.float32), sum(lengths))
        for file, length in zip(files, lengths, strict=True):
            values = (
                np.load(file, allow_pickle=False) if file.exists() else np.full(length, np.nan, np.float32)
            )
            joined.write(values.tobytes())


def _read_header(file: Path) -> tuple[np.dtype, int, int]:
    """Returns (type, length, where the data begins) of a one-dimensional `.npy` file."""
    with open(file, "rb") as opened:
        np.lib.format.read_magic(opened)
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
        return dtype, shape[0], opened.tell()


def _write_header(file: Any, dtype: np.dtype, length: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes `meta.json`."""
    write_json(folder / "meta.json", meta)


def read_meta(tokenizer_folder: str | Path) -> dict[str, Any]:
    """Reads `tokens/meta.json` of a tokenizer step's folder.

    Raises:
        UserError: the folder holds no token shards.
    """
    path = Path(tokenizer_folder) / "tokens" / "meta.json"
    if not path.exists():
        raise UserError(
            f"{tokenizer_folder}: no token shards (tokens/meta.json); run the tokenizer step first"
        )
    return read_json(path)


def special_tokens(meta: dict[str, Any]) -> dict[str, int]:
    """Returns the ids that begin a text, end it and fill a row: {"bos", "eos", "pad"}."""
    return meta.get("special", {"bos": BOS, "eos": EOS, "pad": PAD})


def read_shard(tokenizer_folder: str | Path, source: str, split: str) -> Shard:
    """Opens one source's shard without reading it into memory.

    Raises:
        UserError: unknown source, or a shard file that is missing or damaged.
    """
    meta = read_meta(tokenizer_folder)
    known = meta["sources"]
    if source not in known:
        raise UserError(
            f"'{source}' is not a source of {tokenizer_folder}{nearest(source, known)}; known: {', '.join(known)}"
        )
    arrays: dict[str, Any] = {}
    for part in (*PARTS, *SCORES):
        path = Path(tokenizer_folder) / "tokens" / f"{source}.{split}.{part}.npy"
        check_size(path, meta)
        if part in SCORES and not path.exists():
            continue
        arrays[part] = _open(path, empty=known[source].get(split, {}).get("tokens") == 0)
    shard = Shard(**arrays)
    lengths = {len(arrays[part]) for part in arrays if part not in ("tokens", "offsets")}
    if len(shard.tokens) != int(shard.offsets[-1]) or lengths != {len(shard)}:
        raise UserError(
            f"{source}.{split} in {tokenizer_folder}: shard files disagree; run the tokenizer step again"
        )
    return shard


def _open(path: Path, *, empty: bool) -> np.ndarray:
    try:
        # An empty array cannot be mapped.
        return np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such shard file; run the tokenizer step again") from None
    except Exception as error:  # NumPy reads a garbled header as Python and fails in as many ways
        told = " ".join(str(error).split())
        raise UserError(f"{path}: damaged shard ({told}); run the tokenizer step again") from None
