"""What every room shares: user errors, plans, atomic files, progress bars, seeds.

Import is cheap (no torch). Nothing here knows about a particular stage.
"""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# Hospitals use this: the telemetry of what we depend on is switched off before any of it is imported.
for _name in ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "SCARF_NO_ANALYTICS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Threads that wait for each other burn their core by default; on a shared machine that made training ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN keeps a kernel for every shape of product it meets, 1,024 by default: texts of any length then take more memory
# with each step. The shapes of a training step are a few dozen.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


class UserError(ValueError):
    """A mistake the user can mend: the command line prints it as one line and exits with code 2."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a verb would do, told without doing it."""

    reads: list[str]
    """Files and folders that would be read."""
    writes: list[str]
    """Files and folders that would be written."""
    facts: dict[str, str] = field(default_factory=dict)
    """Label -> text: parameters, tokens, FLOPs, bytes, memory, time."""


def nearest(word: str, options: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the option nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def human(number: float) -> str:
    """Formats a count for the console: 1234567 -> '1.2M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def human_bytes(number: float) -> str:
    """Formats bytes for the console: 2160000000 -> '2.16GB'."""
    return human(number).replace("B", "G") + "B"


def duration(seconds: float) -> str:
    """Formats a duration: 75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---------------------------------------------------------------------------- files


NO_SPACE = "no space left on device; free some and run the same command to continue"
_FULL = re.compile(
    r"no space left on device|disk quota exceeded|\d+ requested and \d+ written", re.IGNORECASE
)
"""How libraries say, without an error number, that the disk is full; the last are NumPy's words."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or what one may use of it, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(_FULL.search(str(error)))


def fsync(path: Path) -> None:
    """Waits until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there appears at `path` at once, or never.

    The caller creates a file or a folder at the temporary path. On success everything is flushed to disk and
    renamed (an older folder of the same name is replaced); on any error the temporary is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    remove(temporary)
    try:
        yield temporary
        _publish(temporary, path)
    except BaseException:
        remove(temporary)
        raise


@contextmanager
def resumable_folder(path: str | Path, key: str, journal: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that survives a kill; on success it appears at `path` at once.

    What an earlier run of the same key left there is found again, so that the caller can go on. The caller notes
    its progress in the file `journal` of the folder. Without such notes, after a `UserError` (the same inputs would
    fail again), or with another key, the folder is emptied.

    Args:
        path: where the folder appears.
        key: identifies what is made of what; one line.
        journal: name of the caller's file; it is not part of the result.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    mark = temporary / ".key"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
        remove(temporary)
        temporary.mkdir(parents=True)
        mark.write_text(key, encoding="utf-8")
    try:
        yield temporary
    except BaseException as error:
        if isinstance(error, UserError) or not (temporary / journal).exists():
            remove(temporary)
        raise
    mark.unlink()
    remove(temporary / journal)
    _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    """Flushes a file or folder to disk and renames it; an older one of the name is replaced."""
    for file in sorted(temporary.rglob("*")) if temporary.is_dir() else []:
        fsync(file)
    fsync(temporary)
    if temporary.is_dir():
        remove(path)  # a folder cannot be renamed over one that holds files
    os.replace(temporary, path)
    fsync(path.parent)


def remove(path: str | Path) -> None:
    """Removes a file or folder if it exists."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON atomically, keys in the given order, non-ASCII kept."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # bad JSON or UTF-8, numbers too long, nesting too deep
        raise UserError(f"{path}: not valid JSON ({error})") from None


def load_yaml(text: str) -> Any:
    """Loads YAML as `yaml.safe_load` does, but refuses a key that stands twice in a mapping; there the last would win.

    Raises:
        yaml.YAMLError: the text is not YAML, or a key stands twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
            return node

    return yaml.load(text, Loader)


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Appends one row to a JSON-lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes JSON lines atomically and returns how many."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path, *, growing: bool = False) -> Iterator[dict[str, Any]]:
    """Reads a JSON-lines file row by row.

    Args:
        path: the file.
        growing: someone may be writing it: a last line without its end is left out.

    Raises:
        UserError: the file is missing, or a line is not a JSON object (file and line number named).
    """
    for _, row in numbered_jsonl(path, growing=growing):
        if isinstance(row, UserError):
            raise row
        yield row


def numbered_jsonl(
    path: str | Path, *, growing: bool = False
) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """Reads a JSON-lines file as `read_jsonl` does; yields (line, row), or (line, what is wrong with it).

    Blank lines are passed over and count.

    Raises:
        UserError: the file is missing.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or (growing and not line.endswith(b"\n")):
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, UserError(f"{path}: not UTF-8 text (line {number}: {error})")
                continue
            except (ValueError, RecursionError) as error:  # bad JSON, numbers too long, nesting too deep
                said = getattr(error, "msg", error)
                yield number, UserError(f"{path}:{number}: not valid JSON ({said})")
                continue
            if not isinstance(row, dict):
                said = f"expected a JSON object, got {type(row).__name__}"
                yield number, UserError(f"{path}:{number}: {said}")
                continue
            yield number, row


def sha256_file(path: str | Path) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------- progress


class Bar(Protocol):
    """A progress bar: `update` advances it and shows an optional note."""

    def update(self, n: float = 1, note: str = "") -> None:
        """Advances by `n` and shows `note`."""


class _PlainBar:
    """One line when it starts, every ten seconds, and when it ends: for logs and CI."""

    def __init__(self, total: float, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.note = 0.0, ""
        self.started = self.printed = time.monotonic()

    def update(self, n: float = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if now - self.printed >= 10:
            self.printed = now
            self._line(now)

    def _line(self, now: float) -> None:
        elapsed = now - self.started
        counted = f" {human(self.done)}/{human(self.total)} {self.unit}" if self.unit else ""
        share = 100 * self.done / self.total if self.total else 100.0
        left = f", {duration(elapsed / self.done * (self.total - self.done))} left" if self.done else ""
        note = "; " + self.note if self.note else ""
        print(f"  {self.label}: {share:3.0f}%{counted}{left}{note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        elapsed = time.monotonic() - self.started
        if elapsed >= 2:
            counted = f"{human(self.done)} {self.unit}" if self.unit else "done"
            note = "; " + self.note if self.note and self.unit else ""
            print(f"  {self.label}: {counted} in {duration(elapsed)}{note}", file=sys.stderr, flush=True)


@contextmanager
def progress(total: float, label: str, unit: str = "it") -> Iterator[Bar]:
    """Shows progress with time left: a rich bar on a terminal, plain lines elsewhere; counted in `unit`, if given."""
    if not sys.stderr.isatty():
        bar = _PlainBar(total, label, unit)
        yield bar
        bar.close()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class NoteColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(task.fields["note"], style="dim", no_wrap=True, overflow="ellipsis")

    console = Console(stderr=True)
    wide = console.width >= 110
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24 if wide else 8),
        TaskProgressColumn(),
        *([TimeElapsedColumn()] if wide else []),
        TextColumn("left"),
        TimeRemainingColumn(),
        NoteColumn(table_column=Column(no_wrap=False)),  # the column that gives way on a narrow terminal
    )
    with Progress(*columns, console=console) as rich_progress:
        task = rich_progress.add_task(label, total=total, note="")

        class RichBar:
            def update(self, n: float = 1, note: str = "") -> None:
                rich_progress.update(task, advance=n)
                if note:
                    rich_progress.update(task, note=note)

        yield RichBar()


# ---------------------------------------------------------------------------- numbers


def torch_setup(seed: int) -> None:
    """Seeds torch and makes it deterministic; call at the start of every stage that computes.

    Denormals are flushed: they arise in optimizer moments and slow CPU kernels by an order of magnitude.
    """
    import torch
    import torch.utils.deterministic as determinism

    from galenic.products import prefer_onednn

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory cost 4.5% of a training step and guards against code that reads it before writing.
    setattr(determinism, "fill_uninitialized_memory", False)  # noqa: B010 (a property of the module, unknown to types)
    torch.set_flush_denormal(True)
    prefer_onednn()


def peak_memory_bytes() -> int:
    """Returns the process' peak resident memory in bytes since it started.

    Linux hands what the process that started it held on to `ru_maxrss`, so there the kernel's own mark is read.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device() -> str:
    """Where to compute: the first CUDA device if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def folder_name(path: str) -> str:
    """Names a folder without telling where on this machine it lies: its last two parts.

    They are a path from the run folder: `/home/me/run/41-sft/model` -> `41-sft/model`. What is no folder here (a
    Hub id) is returned as it is.
    """
    return "/".join(Path(path).resolve().parts[-2:]) if Path(path).is_dir() else path
