"""Writing safetensors folders in blocks: header first, then every block at its place.

Shapes are known before the first block is computed, so the whole layout is too: blocks may arrive in any order, and
memory stays bounded. Where the system allows it, whole pages go to the disk directly: what is written is not read again
here, and to wait in the end for a page cache full of it can take longer than the merge.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galenic.merge.blocks import PAGE, Workspace
from galenic.merge.io import DTYPES, INDEX, TensorInfo
from galenic.ranks import rank
from galenic.runtime import write_json

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5_000_000_000
"""Hugging Face's usual shard size."""

_workspace = Workspace()

JOURNAL = ".journal"
"""Folder of a merge under way. It has a file for each process, lines with the number of its blocks that are safely on
disk, counted from the first."""
SPAN = 256
"""Blocks from one line of the journal to the next, and so about what a kill costs: 256 MiB of bfloat16."""


@dataclass(frozen=True)
class _File:
    """One file, open twice: for any bytes, and for whole pages past the page cache (None where that is impossible)."""

    buffered: int
    direct: int | None

    def write(self, data: Any, offset: int) -> None:
        """Writes an array of bytes at its place, whole pages directly."""
        first = -offset % PAGE
        last = first + (len(data) - first) // PAGE * PAGE
        if self.direct is None or last <= first:
            _pwrite(self.buffered, data, offset)
            return
        pages = data[first:last]
        if pages.ctypes.data % PAGE:  # the system takes them from whole pages of memory only
            pages = _workspace.buffer("pages", (len(pages),), torch.uint8).numpy()
            pages[:] = data[first:last]
        try:
            _pwrite(self.direct, pages, offset + first)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a disk with larger pages
                raise
            _pwrite(self.buffered, pages, offset + first)
        _pwrite(self.buffered, data[:first], offset)
        _pwrite(self.buffered, data[last:], offset + last)


def _pwrite(descriptor: int, data: Any, offset: int) -> None:
    view = data.data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


class Writer:
    """Writes blocks at their place in files whose headers are already there, and notes which are on disk."""

    def __init__(self, places: dict[str, tuple[_File, int]], sizes: Mapping[str, int], journal: Path) -> None:
        self._places, self._sizes = places, sizes  # where tensors begin, and bytes of their elements
        self._journal = journal
        self._descriptors = {file.buffered for file, _ in places.values()}
        self._noting = ThreadPoolExecutor(1)
        self._note: Future[None] | None = None
        self.done = _last_line(journal)
        """Blocks that an earlier run has written."""

    def lead(self, name: str) -> int:
        """Returns how many elements of a tensor lie before the first page of its file that is all its own.

        Blocks that begin there and have whole pages are written with the least ado.
        """
        return -self._places[name][1] % PAGE // self._sizes[name]

    def write(self, name: str, start: int, block: Tensor) -> None:
        """Writes flattened elements from `start` on; `block` has the tensor's output dtype. Thread-safe."""
        file, offset = self._places[name]
        file.write(block.contiguous().view(torch.uint8).numpy(), offset + start * block.dtype.itemsize)

    def finished(self, blocks: int) -> None:
        """Says that the first `blocks` blocks are written; sometimes that is noted."""
        if blocks % SPAN == 0 and (self._note is None or self._note.done()):
            if self._note is not None:
                self._note.result()  # a disk that failed is told here
            self._note = self._noting.submit(self._flush, blocks)

    def _flush(self, blocks: int) -> None:
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)
        self._journal.parent.mkdir(exist_ok=True)
        with open(self._journal, "a", encoding="ascii") as file:
            file.write(f"{blocks}\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Waits for a note that is being made."""
        self._noting.shutdown()


def _last_line(journal: Path) -> int:
    """Returns the number in the last whole line; a torn line is not one."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return int(lines[-1]) if lines else 0


@contextmanager
def safetensors_writer(
    folder: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[Writer]:
    """Lays out a sharded safetensors model in `folder` (header first) and yields its writer.

    A layout that an earlier run has left there is used again; its blocks keep what was written.

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
        if rank() == 0:
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    descriptors: list[int] = []
    places: dict[str, tuple[_File, int]] = {}
    try:
        for file, names in zip(files, shards, strict=True):
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
            descriptors.append(descriptor)
            header, offsets = _header({name: tensors[name] for name in names})
            os.pwrite(descriptor, header, 0)
            size = len(header) + sum(tensors[name].nbytes for name in names)
            os.posix_fallocate(descriptor, 0, size)  # a full disk is found now, not after an hour
            direct = _open_direct(folder / file)
            if direct is not None:
                descriptors.append(direct)
            opened = _File(descriptor, direct)
            places |= {name: (opened, offset) for name, offset in offsets.items()}
        sizes = {name: info.dtype.itemsize for name, info in tensors.items()}
        writer = Writer(places, sizes, folder / JOURNAL / str(rank()))
        try:
            yield writer
        finally:
            writer.close()
        for descriptor in descriptors:
            os.fdatasync(descriptor)  # what other machines cannot do for this one
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except (AttributeError, OSError):  # not on every system, not on every file system
        return None


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
