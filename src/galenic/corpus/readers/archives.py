"""Archives: the members of `.zip` and `.tar` files, one after the other, without extracting anything.

    archive --members--> File, whose bytes lie in a nameless temporary file until the next one comes

A member's name is only a label, so a path in it leads nowhere. All that an archive unpacks to, archives in it
included, is bounded by its size: a bomb is refused before it fills the disk.
"""

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any

from galenic.corpus.readers.files import (
    File,
    Note,
    Unreadable,
    allowance,
    fits,
    is_archive,
    is_hidden,
    plain,
    reason_of,
)
from galenic.runtime import UserError

_CHUNK = 2**20
_IN_MEMORY = 16 * 2**20  # a larger member goes to disk

# What the two libraries raise for damaged, locked or unknown content.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
)


class _Allowance:
    """How many bytes an archive and all in it may still unpack to."""

    def __init__(self, packed: int) -> None:
        self.left = allowance(packed)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Unreadable("unpacks to far more than its size explains: refused as a bomb")


def members(archive: File, format: str, note: Note) -> Iterator[File]:
    """Yields the members whose endings fit the format, in the archive's own order, each valid until the next.

    Archives in the archive are opened; archives in those are dropped by name, as are damaged members.

    Raises:
        Unreadable: it is no archive, damaged from here on, or unpacks to far too much.
    """
    yield from _members(archive, format, note, _Allowance(archive.size), nested=False)


def _members(archive: File, format: str, note: Note, left: _Allowance, *, nested: bool) -> Iterator[File]:
    entries = _zip_entries if archive.name.lower().endswith(".zip") else _tar_entries
    for name, opener in entries(archive, left):
        name = f"{archive.name}/{plain(name)}"
        inner = is_archive(name)
        if inner and nested:
            note(name, "nested archive", "an archive in an archive in an archive is not opened", "")
            continue
        if (not inner and not fits(name, format)) or is_hidden(name.removeprefix(archive.name + "/")):
            continue
        with SpooledTemporaryFile(max_size=_IN_MEMORY) as spool:
            try:
                size = _copy(opener, spool, left)
            except UserError:
                raise
            except _DAMAGE as error:
                archive.check_connection()
                note(name, "unreadable file", reason_of(error), "")
                continue
            member = File(name, archive.uri, size, opener=lambda spool=spool: _Kept(spool))
            if not inner:
                yield member
                continue
            try:
                yield from _members(member, format, note, left, nested=True)
            except Unreadable as error:
                if left.left < 0:
                    raise
                note(name, "unreadable file", str(error), "")


def _copy(opener: Any, spool: Any, left: _Allowance) -> int:
    size = 0
    with opener() as content:
        while data := content.read(_CHUNK):
            left.spend(len(data))
            size += len(data)
            try:
                spool.write(data)
            except OSError as error:  # our disk is full: no fault of the archive
                raise UserError(f"{gettempdir()}: {error.strerror}; let TMPDIR name a larger disk") from None
    return size


class _Kept:
    """A temporary file, from its beginning; closing it does not throw it away."""

    def __init__(self, spool: Any) -> None:
        self.spool = spool
        spool.seek(0)
        self.closed = False

    def read(self, count: int = -1) -> bytes:
        return self.spool.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.spool.seek(offset, whence)

    def tell(self) -> int:
        return self.spool.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _zip_entries(archive: File, left: _Allowance) -> Iterator[tuple[str, Any]]:
    with archive.open_raw() as raw:
        try:
            found = zipfile.ZipFile(raw)
        except _DAMAGE as error:
            archive.check_connection()
            raise Unreadable(f"no whole zip archive ({reason_of(error)})") from None
        for entry in found.infolist():
            if not entry.is_dir():
                yield entry.filename, lambda entry=entry: found.open(entry)


class _Counted:
    """A stream that counts against the allowance, so that not even headers can swell."""

    def __init__(self, stream: Any, left: _Allowance) -> None:
        self.stream, self.left = stream, left

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.left.spend(len(data))
        return data


def _tar_entries(archive: File, left: _Allowance) -> Iterator[tuple[str, Any]]:
    import pyarrow

    name = archive.name.lower()
    with archive.open_raw() as raw:
        codec = "gzip" if name.endswith((".gz", ".tgz")) else "zstd" if name.endswith(".zst") else ""
        stream = pyarrow.CompressedInputStream(raw, codec) if codec else raw
        try:
            counted: Any = _Counted(stream, left)
            found = tarfile.open(fileobj=counted, mode="r|")
            for entry in found:
                if entry.isfile():
                    yield entry.name, lambda entry=entry: found.extractfile(entry)
        except _DAMAGE as error:
            archive.check_connection()
            raise Unreadable(f"no whole tar archive ({reason_of(error)})") from None
