"""Answers on disk: one append-only JSONL file, so that a kill loses at most the requests under way."""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from galenic.runtime import UserError


def digest(model: str, messages: list[dict[str, str]], settings: dict[str, Any], key: str) -> str:
    """Returns the hex SHA-256 of everything an answer depends on; the endpoint's address is not part of it."""
    parts = json.dumps([model, messages, settings, key], sort_keys=True, default=str)
    return hashlib.sha256(parts.encode()).hexdigest()


class Cache:
    """Rows by digest. Only places are held in memory; the folder appears with the first row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests = self.tokens = 0
        self.money = 0.0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file: int | None = None
        if path.exists():
            self._open()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, name: str) -> dict[str, Any] | None:
        """Returns the row of a digest, or None."""
        place = self._places.get(bytes.fromhex(name))
        if place is None or self._file is None:
            return None
        return json.loads(os.pread(self._file, place[1], place[0]))

    def put(self, name: str, row: dict[str, Any]) -> None:
        """Appends a row."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        assert self._file is not None
        line = json.dumps({"name": name, **row}, ensure_ascii=False).encode() + b"\n"
        start = os.lseek(self._file, 0, os.SEEK_END)
        left = memoryview(line)
        while left:
            left = left[os.write(self._file, left) :]
        self._places[bytes.fromhex(name)] = (start, len(line))

    def close(self) -> None:
        """Flushes to disk."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            self._file = None
            raise UserError(f"{self.path}: another run is using this cache; give this one its own") from None
        start = whole = 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    whole = start + len(line)
                    self._note(line, start)
                start += len(line)
        if start > whole:  # half a line of a killed run; the next row must not be glued to it
            os.ftruncate(self._file, whole)

    def _note(self, line: bytes, start: int) -> None:
        try:
            row = json.loads(line)
            name = bytes.fromhex(row["name"])
            if not isinstance(row["text"], str) or not isinstance(row["finish"], str):
                return
            self.tokens += row["prompt_tokens"] + row["completion_tokens"]
            self.money += row["money"]
        except (ValueError, KeyError, TypeError):
            return  # damaged: asked again
        self.requests += 1
        self._places[name] = (start, len(line))
