"""Where the files of a source lie and how they are opened: local paths and patterns, S3, the Hugging Face Hub.

    path of a source --listing--> File(name, uri, size), sorted --open_raw, open_stream--> bytes

One file system (`pyarrow.fs`) serves all three. The network is used for the very path that names it and for nothing
else. What a decompressed stream may grow to is bounded by the size of its file.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import Any

from galenic.runtime import UserError

ENDINGS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "text": (".txt", ".text"),
    "markdown": (".md", ".markdown"),
    "html": (".html", ".htm", ".xhtml"),
    "obo": (".obo",),
    "icd10cm": (".xml",),
    "umls": (".rrf",),
    "medline": (".xml",),
    "fhir": (".json", ".ndjson", ".jsonl"),
}
"""Format -> endings of its files, in lower case."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Ending -> codec of Arrow. Parquet compresses by itself, and the tables of UMLS are read by position."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst")

MOST_GROWTH = 200
"""How many times its size a file may unpack to: text packs 3 to 30 times, a bomb thousands of times."""

LEAST_GROWTH = 64 * 2**20
"""Bytes that any file may unpack to, however small it is."""

Note = Callable[[str, str, str, str], None]
"""`note(key, reason, detail, text)`: puts one record, or one file, into the ledger."""


class Unreadable(Exception):
    """A file that cannot be read on: one line of the ledger, and the next file comes."""


@dataclass(frozen=True)
class File:
    """A file of a source, or a member of an archive."""

    name: str
    """How ids and the ledger call it: its path below the source's path."""
    uri: str
    """Where it lies."""
    known_size: int = -1
    """In bytes; asked for when it is wanted, if negative."""
    opener: Callable[[], Any] | None = None
    """Opens it, if it is no file of its own but a member of an archive."""

    @cached_property
    def size(self) -> int:
        """Returns its bytes, as it lies there."""
        if self.known_size >= 0:
            return self.known_size
        with self.open_raw() as raw:
            return raw.size()

    def open_raw(self) -> Any:
        """Returns a seekable binary file of the bytes as they lie there."""
        if self.opener is not None:
            return self.opener()
        system, path = _system(self.uri)
        return system.open_input_file(path)

    def open_stream(self) -> Any:
        """Returns a binary file of the content, decompressed if the name ends in `.gz` or `.zst`."""
        raw = self.open_raw()
        codec = COMPRESSIONS.get(PurePosixPath(self.name.lower()).suffix)
        if codec is None:
            return raw
        import pyarrow

        return Bounded(pyarrow.CompressedInputStream(raw, codec), self.size)

    def check_connection(self) -> None:
        """Called when reading failed: bytes that cannot be had are no fault of the file.

        Raises:
            UserError: the file lies elsewhere, and not even its ends can be read now.
        """
        if self.opener is not None or "://" not in self.uri:
            return
        try:
            with self.open_raw() as raw:
                raw.seek(max(0, raw.size() - 1))
                raw.read(1)
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be read now ({_line(error)}); run again to go on") from None


class Bounded:
    """A stream that refuses to unpack to more than its packed size explains."""

    def __init__(self, stream: Any, packed: int) -> None:
        self.stream, self.left = stream, allowance(packed)

    def read(self, count: int) -> bytes:
        """Returns the next bytes, none at the end."""
        data = self.stream.read(count)
        self.left -= len(data)
        if self.left < 0:
            raise Unreadable(f"unpacks to more than {MOST_GROWTH} times its size")
        return data

    def __enter__(self) -> "Bounded":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def allowance(packed: int) -> int:
    """Returns how many bytes a packed file of that size may unpack to."""
    return max(LEAST_GROWTH, MOST_GROWTH * packed)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def reason_of(error: Exception) -> str:
    """Returns what an exception says, in one line, for the ledger."""
    return _line(error) or type(error).__name__


def plain(name: str) -> str:
    """Returns a name that UTF-8 can hold; undecodable bytes of a file name, and lone surrogates, become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------------------- endings


def is_archive(name: str) -> bool:
    """Tells whether a file is one of the archives that are read."""
    return name.lower().endswith(ARCHIVES)


def _bare(name: str) -> str:
    name = name.lower()
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix in COMPRESSIONS else name


def fits(name: str, format: str) -> bool:
    """Tells whether the ending of a file is one of the format, compressed or not."""
    bare = name.lower() if format in ("parquet", "umls") else _bare(name)
    return bare.endswith(ENDINGS[format])


def others(name: str, format: str) -> list[str]:
    """Returns the formats whose ending a file has; none for an ending that says nothing, or if it fits."""
    if fits(name, format):
        return []
    return [other for other in ENDINGS if _bare(name).endswith(ENDINGS[other])]


# ---------------------------------------------------------------------------- listing


def listing(path: str, format: str) -> list[File]:
    """Returns the files of a source in the order of their names.

    A folder gives the files below it whose endings fit the format, and archives; hidden ones and folders already seen
    (a link that loops) are passed over. A pattern gives what it matches. A file that is named is taken at its word,
    unless its ending plainly says another format.

    Raises:
        UserError: the path matches nothing, or nothing of the format.
    """
    base, pattern = _split(path)
    found = sorted(_walk(base), key=lambda file: file[0])
    if not found:
        empty = "://" not in base and os.path.isdir(base)
        how = "matches no file" if pattern else "an empty folder" if empty else "no such file or folder"
        raise UserError(f"{path}: {how}")
    if pattern:
        matcher, root = _matcher(pattern), base.rstrip("/") + "/"
        found = [file for file in found if matcher.fullmatch(file[0].removeprefix(root))]
        if not found:
            raise UserError(f"{path}: matches no file")
    files = [File(relative_name(uri, path), uri, size) for uri, size in found]
    return _of_format(files, path, format, one=found[0][0] == base)


def relative_name(uri: str, path: str) -> str:
    """Returns what ids call a file: its path below the fixed part of the source's path, or its name."""
    base, _ = _split(path)
    root = base.rpartition("/")[0] if uri == base else base.rstrip("/")
    return plain(uri.removeprefix(root + "/"))


def _of_format(files: list[File], path: str, format: str, *, one: bool) -> list[File]:
    fitting = [file for file in files if fits(file.name, format) or is_archive(file.name)]
    if format == "jsonl":  # `.json` beside JSON lines is something else, such as a description of them
        fitting = [file for file in fitting if not _bare(file.name).endswith(".json")] or fitting
    if fitting:
        return fitting
    strangers = [file for file in files if others(file.name, format)]
    named = one or any(mark in path for mark in "*?[")
    if named and not strangers:
        return files
    wanted = " or ".join((*ENDINGS[format], *ARCHIVES[:2]))
    seen = strangers[0].name if strangers else files[0].name
    maybe = f"; set format to '{others(seen, format)[0]}'?" if strangers else ""
    raise UserError(f"{path}: no file of format '{format}' ({wanted}), but e.g. {seen}{maybe}")


def _split(path: str) -> tuple[str, str]:
    """Splits a path, made absolute, into the part without wildcards and the pattern below it."""
    location = path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))
    scheme, mark, rest = location.rpartition("://")
    parts = rest.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    if not mark and os.path.exists(location):  # a name may hold a bracket
        first = len(parts)
    return scheme + mark + ("/".join(parts[:first]) or "/"), "/".join(parts[first:])


def _matcher(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern: `*` and `?` stay within a name, `**` is any number of folders; a folder gives all below."""
    out = []
    for part in pattern.split("/"):
        if part == "**":
            out.append("(?:[^/]+/)*")
            continue
        pieces = re.split(r"(\*|\?|\[[^\]]+\])", part)
        words = {"*": "[^/]*", "?": "[^/]"}
        text = "".join(
            words.get(p) or (p.replace("[!", "[^", 1) if p.startswith("[") else re.escape(p)) for p in pieces
        )
        out.append(text + "/")
    body = "".join(out)
    try:
        return re.compile(
            body.removesuffix("/") + "(?:/.*)?" if body.endswith("/") else body + ".*", re.DOTALL
        )
    except re.error as error:
        raise UserError(f"{pattern}: not a pattern ({error})") from None


def _walk(base: str) -> Iterator[tuple[str, int]]:
    """Yields (uri, bytes) of a file, or of all files below a folder, in any order."""
    if "://" not in base:
        yield from _walk_local(base)
        return
    from pyarrow import fs

    system, path = _system(base)
    try:
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            yield base, info.size
        elif info.type == fs.FileType.Directory:
            for below in system.get_file_info(fs.FileSelector(path, recursive=True)):
                relative = below.path.removeprefix(path).lstrip("/")
                if below.type == fs.FileType.File and not is_hidden(relative):
                    yield f"{base}/{relative}", below.size
    except OSError as error:
        raise UserError(
            f"{base}: cannot be listed ({_line(error)}); check the name and the credentials"
        ) from None


def is_hidden(relative: str) -> bool:
    """Tells whether a file lies in, or is, what begins with a dot, or what macOS adds to archives."""
    parts = relative.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


def _walk_local(base: str) -> Iterator[tuple[str, int]]:
    if os.path.isfile(base):
        yield base, os.path.getsize(base)
        return
    if not os.path.isdir(base):
        if os.path.lexists(base):
            raise UserError(f"{base}: neither a file nor a folder")
        return

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(base, followlinks=True, onerror=refuse):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()  # a link led back to where we have been
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = os.path.join(folder, name)
            try:
                state = os.stat(file)
            except OSError:  # a link to nowhere: told when it is read
                yield file, 0
                continue
            if stat.S_ISREG(state.st_mode) and not name.startswith("."):
                yield file, state.st_size


# ---------------------------------------------------------------------------- file systems


def _system(uri: str) -> tuple[Any, Any]:
    """Returns (pyarrow file system, path in it)."""
    scheme, mark, path = uri.partition("://")
    if not mark:
        return _local(), os.fsencode(uri)  # a name need not be UTF-8
    if scheme == "s3":
        user, at, rest = path.partition("@")
        if at and user == "anonymous":
            return _s3(rest.partition("/")[0], True), rest
        return _s3(path.partition("/")[0], False), path
    if scheme == "hf":
        return _hub(), path
    raise UserError(f"{uri}: paths are local, or begin with s3:// or hf://")


@lru_cache(maxsize=1)
def _local() -> Any:
    from pyarrow import fs

    return fs.LocalFileSystem()


@lru_cache(maxsize=64)
def _s3(bucket: str, anonymous: bool) -> Any:
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError as error:
            raise UserError(f"s3://{bucket}: no such bucket ({_line(error)}); or set AWS_REGION") from None
    try:
        return fs.S3FileSystem(anonymous=anonymous, region=region, endpoint_override=endpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"s3://{bucket}: {_line(error)}; check AWS_ENDPOINT_URL") from None


@lru_cache(maxsize=1)
def _hub() -> Any:
    from huggingface_hub import HfFileSystem
    from pyarrow import fs

    return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))
