"""What evaluation reads: questions, held-out documents and conversations; checked, sampled, the same every time."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from galenic.align.rewards.units import quantities
from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.runtime import UserError, nearest, read_jsonl

from .bits_per_byte import Scored, document
from .config import EvaluateConfig

T = TypeVar("T")
HELDOUT = ".heldout.jsonl"


def sample(items: Sequence[T], keys: Sequence[str], limit: int, seed: int) -> list[T]:
    """Keeps the `limit` items whose keyed hash is lowest, in their order: a sample that ignores file order."""
    ranked = sorted(range(len(items)), key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest())
    return [items[i] for i in sorted(ranked[:limit])]


def folder(path: str, key: str) -> Path:
    """Returns the folder a config field names.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_dir():
        raise UserError(f"{key}: {path} is not a folder")
    return Path(path)


def _numbered(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads JSON lines with their line numbers; blank lines count but give no row."""
    with open(file, encoding="utf-8") as lines:
        numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    yield from zip(numbers, read_jsonl(file), strict=True)


# ---------------------------------------------------------------------------- questions


def question_files(config: EvaluateConfig) -> list[Path]:
    """Returns the question files, by name; none without a folder."""
    return sorted(Path(config.questions).glob("*.jsonl")) if config.questions else []


def load_questions(config: EvaluateConfig) -> dict[str, list[dict[str, Any]]]:
    """Returns the sampled questions of each kind, kinds in alphabetical order.

    Raises:
        UserError: no question files, an empty or malformed one (file and line named), or a limit or expert for a kind
            that has no file.
    """
    if config.questions is None:
        return {}
    folder(config.questions, "questions")
    files = question_files(config)
    if not files:
        raise UserError(f"questions: {config.questions} holds no <kind>.jsonl file")
    kinds = [file.stem for file in files]
    for key, named in (
        ("kind_limits", config.kind_limits),
        ("experts", config.experts),
        ("answer", config.answer),
    ):
        for kind in named:
            if kind not in kinds:
                raise UserError(
                    f"{key}: no questions of kind '{kind}' in {config.questions}{nearest(kind, kinds)}"
                )
    questions = {}
    for file in files:
        rows = read_questions(file, rule=config.rule(file.stem))
        limit = config.kind_limits.get(file.stem, config.questions_per_kind)
        questions[file.stem] = sample(rows, [row["id"] for row in rows], limit, config.seed)
    return questions


def read_questions(file: Path, *, rule: str | None = None) -> list[dict[str, Any]]:
    """Reads and checks one question file.

    Args:
        file: JSON lines.
        rule: by which written answers to it are checked.

    Raises:
        UserError: naming file:line and what is wrong with it.
    """
    rows, seen = [], {}
    for number, row in _numbered(file):
        where = f"{file}:{number}"
        options = row.get("options")
        for key in ("id", "question"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f"{where}: '{key}' must be a text that is not empty, got {row.get(key)!r}")
        if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
            raise UserError(f"{where}: 'options' must be a list of texts that are not empty, got {options!r}")
        if len(options) != 4:
            raise UserError(f"{where}: a question has 4 options, this one has {len(options)}")
        if len(set(options)) != 4:
            raise UserError(f"{where}: two options are the same: {options!r}")
        answer = row.get("answer")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < 4:
            raise UserError(
                f"{where}: 'answer' must be the index of the right option, 0 to 3, got {answer!r}"
            )
        if rule == "numeric":
            tolerance = row.get("tolerance", 0)
            if (
                not isinstance(tolerance, int | float)
                or isinstance(tolerance, bool)
                or not 0 <= tolerance < 1
            ):
                raise UserError(f"{where}: 'tolerance' must be a number from 0 to 1, got {tolerance!r}")
            if not quantities(options[answer]):
                raise UserError(
                    f"{where}: the right option {options[answer]!r} holds no number; answer this kind by option or "
                    "likelihood"
                )
        for key in (row["id"], (row["question"], *options)):
            if key in seen:
                what = "id" if isinstance(key, str) else "question"
                raise UserError(f"{where}: the same {what} as line {seen[key]}; each must be there once")
            seen[key] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{file}: no questions in it; remove the file or fill it")
    return rows


# ---------------------------------------------------------------------------- held-out text


def heldout_sources(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Returns tokens/meta.json's entry of every source that has held-out documents, in alphabetical order.

    Without a tokenizer step there are none.

    Raises:
        UserError: not a tokenizer step folder, or nothing is held out.
    """
    if config.tokens is None:
        return {}
    sources = read_meta(folder(config.tokens, "tokens"))["sources"]
    found = {name: sources[name] for name in sorted(sources) if sources[name]["heldout"]["documents"]}
    if not found:
        raise UserError(
            f"{config.tokens}: no source has held-out documents; raise the corpus' held-out share"
        )
    return found


def load_heldout(config: EvaluateConfig, source: str) -> list[Scored]:
    """Returns a source's sampled held-out documents: whole documents until `heldout_tokens` is reached."""
    shard = read_shard(str(config.tokens), source, "heldout")
    order = sorted(
        range(len(shard)), key=lambda i: hashlib.sha256(f"{config.seed}:{source}:{i}".encode()).digest()
    )
    documents: list[Scored] = []
    for index in order:
        if sum(len(text.ids) for text in documents) >= config.heldout_tokens:
            break
        documents.append(document(shard.document(index), int(shard.bytes[index])))
    return documents


# ---------------------------------------------------------------------------- conversations


def load_conversations(config: EvaluateConfig) -> dict[str, list[list[dict[str, str]]]]:
    """Returns the sampled held-out conversations of each set, sets in alphabetical order.

    Raises:
        UserError: no files, an empty one, or a row that is no conversation (file and line named).
    """
    if config.conversations is None:
        return {}
    files = sorted(folder(config.conversations, "conversations").glob("*" + HELDOUT))
    if not files:
        raise UserError(f"conversations: {config.conversations} holds no <set>{HELDOUT} file")
    sets = {}
    for file in files:
        rows = [_messages(row, f"{file}:{number}") for number, row in _numbered(file)]
        if not rows:
            raise UserError(f"{file}: no conversations in it; remove the file or fill it")
        keys = [str(number) for number in range(len(rows))]
        sets[file.name.removesuffix(HELDOUT)] = sample(rows, keys, config.conversations_per_set, config.seed)
    return sets


def _messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    messages = row.get("messages")
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not well_formed:
        raise UserError(f"{where}: 'messages' must be a list of role and content")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)] or turns[-1] != "assistant":
        raise UserError(
            f"{where}: roles must be system (optional), then user and assistant in turn; got {roles}"
        )
    return messages
