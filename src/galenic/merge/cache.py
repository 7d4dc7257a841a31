"""What the statistics pass found, remembered by the identity of the files it read.

A sweep over `norm_power`, `scope` or `max_coefficient`, and a merge that goes on after a kill, then read no weight a
second time before they write. A few kilobytes a family of models: inner products, thresholds and names of tensors.
They lie in `$GALENIC_CACHE`, else `$XDG_CACHE_HOME/galenic`, else `~/.cache/galenic`, and may be removed at any time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from galenic.merge.io import OnDisk
from galenic.ranks import gathered, rank
from galenic.runtime import UserError, read_json, write_json

FORMAT = 2
"""Of what is remembered: another one when its shape or the way it is computed changes."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Pieces of a file that identify it besides size, time and header: times alone are equal in some archives."""


def statistics_file(models: Sequence[OnDisk], how: str = "") -> Path:
    """Returns where the statistics of a base and its experts (in this order) are remembered.

    Args:
        models: base and experts.
        how: says in which way they are seen, if not as they are stored.
    """
    digest = hashlib.sha256(f"{FORMAT} {how}".encode())
    for model in models:
        digest.update(b"model\0")
        for file in model.files:
            digest.update(json.dumps([file.name, file.stat().st_mtime_ns, identity(file)]).encode())
    return cache_folder() / f"statistics-{digest.hexdigest()[:32]}.json"


def cache_folder() -> Path:
    """Returns where things lie that can be made again."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("GALENIC_CACHE") or os.path.join(user, "galenic"))


def identity(file: Path) -> str:
    """Returns a SHA-256 of a safetensors file's size, header and samples spread over it.

    To read the whole file would take as long as the merge. Files of one header that differ in a few tensors only may
    have the same identity.
    """
    status = file.stat()
    digest = hashlib.sha256(str(status.st_size).encode())
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        digest.update(opened.read(min(length, status.st_size)))
        for i in range(SAMPLES):
            opened.seek(max(0, status.st_size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def remembered(file: Path | None, name: str, compute: Callable[[], Any]) -> Any:
    """Returns the JSON value remembered under `name`, or computes it and remembers it.

    A file that is damaged or cannot be written is as good as none.

    Args:
        file: of `statistics_file`; None computes always.
        name: what it is, with all that it depends on besides the models.
        compute: returns a JSON value.
    """
    known: dict[str, Any] = {}
    if file is not None and file.exists() and rank() == 0:
        try:
            found = read_json(file)
            known = found if isinstance(found, dict) else {}
        except (UserError, OSError):
            pass
    # What process 0 remembers counts for all, wherever they run: all compute, or none.
    there, value = gathered([name in known, known.get(name)])[0]
    if there:
        return value
    known[name] = compute()
    if file is not None and rank() == 0:
        try:
            write_json(file, known)
        except OSError:  # a full or read-only disk: the next run computes again
            pass
    return known[name]
