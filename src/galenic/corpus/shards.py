"""Token shards: one flat memory-mapped array per source and split, with document boundaries.

    tokens/<source>.<split>.tokens.npy    uint16 or uint32, all documents one after another
    tokens/<source>.<split>.offsets.npy   int64, documents + 1: where each one starts
    tokens/<source>.<split>.bytes.npy     int64, UTF-8 bytes of each document's text
    tokens/<source>.<split>.weights.npy   float32, repeats of each document per epoch
    tokens/meta.json                      dtype, vocabulary, counts per source and split

Each document is `<s>` + text + `</s>`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galenic.runtime import UserError, nearest, read_json, write_json

PARTS = ("tokens", "offsets", "bytes", "weights")


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

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, int64."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)


def write_shard(
    folder: Path, source: str, split: str, documents: Iterable[tuple[list[int], int, float]], dtype: str
) -> dict[str, int]:
    """Writes (token ids, bytes, weight) documents; returns {"documents", "tokens", "bytes"}."""
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
    for part in PARTS:
        np.save(folder / f"{source}.{split}.{part}.npy", arrays[part], allow_pickle=False)
    return {"documents": len(ids), "tokens": int(lengths.sum()), "bytes": int(sum(sizes))}


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


def read_shard(tokenizer_folder: str | Path, source: str, split: str) -> Shard:
    """Opens one source's shard without reading it into memory.

    Raises:
        UserError: unknown source, or a shard file that is missing or damaged.
    """
    known = read_meta(tokenizer_folder)["sources"]
    if source not in known:
        raise UserError(
            f"'{source}' is not a source of {tokenizer_folder}{nearest(source, known)}; known: {', '.join(known)}"
        )
    arrays = {}
    for part in PARTS:
        path = Path(tokenizer_folder) / "tokens" / f"{source}.{split}.{part}.npy"
        try:
            arrays[part] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{path}: no such shard file; run the tokenizer step again") from None
        except ValueError as error:
            empty = known[source].get(split, {}).get("tokens") == 0
            if not empty:
                raise UserError(f"{path}: damaged shard ({error}); run the tokenizer step again") from None
            arrays[part] = np.load(path, allow_pickle=False)  # an empty array cannot be mapped
    shard = Shard(**arrays)
    if len(shard.tokens) != int(shard.offsets[-1]) or len(shard.bytes) != len(shard):
        raise UserError(
            f"{source}.{split} in {tokenizer_folder}: shard files disagree; run the tokenizer step again"
        )
    return shard
