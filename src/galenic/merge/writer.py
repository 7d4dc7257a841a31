"""Writing safetensors folders in blocks: header first, then every block at its place.

Shapes are known before the first block is computed, so the whole layout is too: blocks may arrive in any order, and
memory stays bounded.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galenic.merge.io import DTYPES, INDEX, TensorInfo
from galenic.runtime import write_json

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5_000_000_000
"""Hugging Face's usual shard size."""


class Writer:
    """Writes blocks at their place in files whose headers are already there."""

    def __init__(self, places: dict[str, tuple[int, int]]) -> None:
        self._places = places

    def write(self, name: str, start: int, block: Tensor) -> None:
        """Writes flattened elements from `start` on; `block` has the tensor's output dtype."""
        descriptor, offset = self._places[name]
        data = block.contiguous().view(torch.uint8).numpy().data
        offset += start * block.dtype.itemsize
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written


@contextmanager
def safetensors_writer(
    folder: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[Writer]:
    """Lays out a sharded safetensors model in `folder` (header first) and yields its writer.

    Args:
        folder: exists; receives `model.safetensors`, or shards with their index.
        tensors: what will be written.
        max_shard_bytes: a larger model is sharded; a tensor is never split.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    # Widest types first, then by name, as the safetensors library orders them: every tensor starts aligned.
    for name, info in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(info.nbytes for info in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    descriptors: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    try:
        for file, names in zip(files, shards, strict=True):
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            descriptors.append(descriptor)
            header, offsets = _header({name: tensors[name] for name in names})
            os.pwrite(descriptor, header, 0)
            places |= {name: (descriptor, offset) for name, offset in offsets.items()}
            size = len(header) + sum(tensors[name].nbytes for name in names)
            os.posix_fallocate(descriptor, 0, size)  # a full disk is found now, not after an hour
        yield Writer(places)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """Returns the header bytes of one file and the absolute offset of each tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, info in tensors.items():
        end = begin + info.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned, as readers that map the file like it
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + entries[name]["data_offsets"][0] for name in tensors}
