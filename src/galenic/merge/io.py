"""Reading safetensors folders: headers first, then fixed blocks.

A safetensors file is `u64 header length | JSON header | tensors`. Headers say names, types, shapes and byte
ranges, so everything that can be wrong with a merge is found before a weight is read. Blocks are read with `pread`
into fresh buffers: memory is bounded whatever the model's size, and odd alignments are harmless. Nothing is
memory-mapped or unpickled.
"""

import json
import math
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from galenic.runtime import UserError, nearest

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WIDENED = {torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16}
"""Types that are read as another one, which holds all their values; nothing is computed or written in them."""

MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library: a longer header is an attack or an accident."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class Weights(Protocol):
    """Named tensors that can be read in parts: a folder on disk or a state dict in memory."""

    label: str
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor, in its own dtype."""
        ...


class OnDisk(Weights, Protocol):
    """Weights that lie in files."""

    folder: Path

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that reading all of them takes."""
        ...


class StateDict:
    """A state dict in memory, read in parts like a folder."""

    def __init__(self, state: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self.state = {name: tensor.detach() for name, tensor in state.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for name, t in self.state.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor."""
        return self.state[name].reshape(-1)[start:stop]


class Mended:
    """An expert whose weights that are NaN or infinite are the base's."""

    def __init__(self, expert: Weights, base: Weights) -> None:
        self.label = expert.label
        self.tensors: Mapping[str, TensorInfo] = expert.tensors
        self._expert, self._base = expert, base

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor."""
        block = self._expert.read(name, start, stop)
        if not block.is_floating_point() or all_finite(block):
            return block
        return block.where(block.isfinite(), self._base.read(name, start, stop).to(block.dtype))


def all_finite(block: Tensor) -> bool:
    """Whether a block holds neither NaN nor infinity. A finite sum says so, far cheaper than looking at each."""
    return bool(torch.isfinite(block.sum(dtype=torch.float32))) or bool(torch.isfinite(block).all())


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class _Place:
    file: Path
    offset: int
    dtype: torch.dtype


class Checkpoint:
    """A model folder's safetensors, one file or shards with an index; a context manager that closes its files.

    Only headers are read on opening.

    Raises:
        UserError: no folder, no safetensors, a missing shard, a truncated file, a header that contradicts the file
            or the index, a shard outside the folder, or a data type that cannot be merged.
    """

    def __init__(self, folder: str | Path, label: str) -> None:
        self.folder = Path(folder)
        self.label = label
        found: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        index = _read_index(self.folder)
        for file in sorted(set(index.values())) if index else [_single_file(self.folder)]:
            for name, info, offset in read_header(self.folder / file):
                if index and index.get(name) != file:
                    raise UserError(
                        f"{self.folder / file}: holds '{name}', which {INDEX} does not place there"
                    )
                found[name] = replace(info, dtype=WIDENED.get(info.dtype, info.dtype))
                self._places[name] = _Place(file=self.folder / file, offset=offset, dtype=info.dtype)
        self.tensors: Mapping[str, TensorInfo] = found
        absent = sorted(set(index) - set(found))
        if absent:
            raise UserError(
                f"{self.folder / index[absent[0]]}: lacks '{absent[0]}', which {INDEX} places there"
            )

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({place.file for place in self._places.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.numel * self._places[name].dtype.itemsize for name, info in self.tensors.items())

    def leave_out(self, names: Iterable[str]) -> None:
        """Forgets tensors, as if the files did not hold them."""
        self.tensors = {name: info for name, info in self.tensors.items() if name not in set(names)}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor; 8-bit floats come as bfloat16."""
        return self.read_into(torch.empty(stop - start, dtype=self.tensors[name].dtype), name, start)

    def read_into(self, row: Tensor, name: str, start: int) -> Tensor:
        """Fills a contiguous `row` with the flattened elements from `start` on, in the row's own dtype."""
        place = self._places[name]
        stored = row if row.dtype == place.dtype else torch.empty(len(row), dtype=place.dtype)
        view = stored.view(torch.uint8).numpy().data
        offset, done = place.offset + start * place.dtype.itemsize, 0
        while done < len(view):
            got = os.preadv(self._descriptor(place.file), [view[done:]], offset + done)
            if got == 0:
                raise UserError(f"{place.file}: ends inside '{name}'; the file changed while it was read")
            done += got
        return row if stored is row else row.copy_(stored)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


def is_there(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        UserError: the name is taken by something else: a link that leads nowhere or in a circle, a folder, a pipe; or
            the system cannot tell.
    """
    try:
        if path.is_file():
            return True
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if os.path.lexists(path):
        what = "a link that leads to no file" if path.is_symlink() else "not a file"
        raise UserError(f"{path}: {what}; restore the file or remove the name")
    return False


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which takes the last of two equal keys without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _read_index(folder: Path) -> dict[str, str]:
    """Returns tensor name -> file name of a sharded folder, or an empty mapping."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name the folder of the model")
    if not folder.is_dir():
        looped = " (the link leads nowhere)" if folder.is_symlink() else ""
        raise UserError(f"{folder}: no such model folder{looped}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: permission denied")
    path = folder / INDEX
    if not is_there(path):
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path}: has no weight_map")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{path}: '{name}' is placed in {file!r}, which is not a safetensors file of the folder"
            )
        if not is_there(folder / file):
            raise UserError(f"{folder / file}: missing, but {INDEX} places '{name}' there")
    _refuse_forgotten_shards(path, set(places.values()))
    return places


def _refuse_forgotten_shards(index: Path, shards: set[str]) -> None:
    """Refuses an index without one of the numbered shards that lie beside it: its tensors would be left out."""
    number = re.compile(r"(.*)-\d+-of-(\d+)\.safetensors")
    series = {found.groups() for file in shards if (found := number.fullmatch(file))}
    for path in sorted(index.parent.glob("*.safetensors")):
        found = number.fullmatch(path.name)
        if found and found.groups() in series and path.name not in shards:
            raise UserError(
                f"{path}: {INDEX} places nothing in this shard; mend the index or remove the file"
            )


def _single_file(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors") if not path.is_dir())
    if "model.safetensors" in files:
        return "model.safetensors"
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files but no model.safetensors and no {INDEX}")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UserError(
            f"{folder}: only pickled weights, which are never loaded; save the model with safe_serialization first"
        )
    raise UserError(f"{folder}: no model.safetensors in it")


def read_header(path: Path) -> list[tuple[str, TensorInfo, int]]:
    """Reads a safetensors header: name, info and absolute byte offset of each tensor, in file order.

    Raises:
        UserError: the file is truncated, or its header is not valid, overlaps, leaves gaps, or disagrees with shapes.
    """
    is_there(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path}: truncated or not safetensors (header of {length} bytes in {size})")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_no_key_twice)
        if not isinstance(header.pop("__metadata__", {}), dict):
            raise ValueError("__metadata__ is not a mapping")
        for name in header:
            name.encode()  # half a surrogate pair is no name that could be written again
        entries = [(name, _entry(entry)) for name, entry in header.items()]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: malformed safetensors header ({error})") from None
    entries.sort(key=lambda item: (item[1][2], item[1][3]))
    found, end = [], 0
    for name, (kind, shape, begin, stop) in entries:
        if kind not in DTYPES:
            raise UserError(f"{path}: '{name}' is {kind}, which cannot be merged; known: {', '.join(DTYPES)}")
        info = TensorInfo(dtype=DTYPES[kind], shape=shape)
        if begin != end or stop - begin != info.nbytes:
            raise UserError(f"{path}: '{name}' of shape {list(shape)} cannot lie in bytes {begin} to {stop}")
        found.append((name, info, 8 + length + begin))
        end = stop
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "longer than its header says"
        raise UserError(f"{path}: {state} ({size} bytes, header says {8 + length + end})")
    return found


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    kind, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, stop]
    if not isinstance(kind, str) or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise ValueError("a dtype, shape or offset is not what it should be")
    return kind, tuple(shape), begin, stop


def check_same_tensors(base: Weights, experts: Iterable[Weights]) -> None:
    """Checks from headers alone that all models hold the same tensors.

    Raises:
        UserError: a missing or extra tensor, another shape, or a buffer of another type; the model is named. Or there
            is nothing to merge.
    """
    if not any(info.numel and info.dtype.is_floating_point for info in base.tensors.values()):
        raise UserError(f"{base.label}: holds no floating-point weights: there is nothing to merge")
    for expert in experts:
        missing = sorted(set(base.tensors) - set(expert.tensors))
        extra = sorted(set(expert.tensors) - set(base.tensors))
        if missing or extra:
            hint = nearest(missing[0], extra) if missing else ""
            parts = [f"lacks {_some(missing)}{hint}"] if missing else []
            parts += [f"has in addition {_some(extra)}"] if extra else []
            raise UserError(f"{expert.label}: not the tensors of {base.label}: {'; '.join(parts)}")
        for name, info in base.tensors.items():
            other = expert.tensors[name]
            if other.shape != info.shape:
                raise UserError(
                    f"{expert.label}: '{name}' has shape {list(other.shape)}, in {base.label} {list(info.shape)}; "
                    "only models of one shape can be merged"
                )
            if other.dtype != info.dtype and not (
                other.dtype.is_floating_point and info.dtype.is_floating_point
            ):
                raise UserError(f"{expert.label}: '{name}' is {other.dtype}, in {base.label} {info.dtype}")


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
