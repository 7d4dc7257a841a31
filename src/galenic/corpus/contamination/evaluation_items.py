"""Items of evaluation sets, read from the shapes they are published in, for decontamination.

An item is one or more pieces: a text to look for and, where it is a question, the right answer that must stand near.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galenic.runtime import UserError, read_json, read_jsonl

SHAPES = (
    '{"question", "options" or "choices", "answer"}, {"question", "answer"}, {"prompt", "completion"}, '
    '{"messages"} or {"text"}'
)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of an evaluation set."""

    name: str
    """`file:id`, or `file:line` where it has no id."""
    file: str
    pieces: tuple[tuple[str, str], ...]
    """(text, right answer or an empty string) pairs."""
    answers: tuple[str, ...]
    """Texts that count only where they are long: what is answered, as many a short answer is a stock phrase."""


def read_items(files: Sequence[str]) -> Iterator[Item]:
    """Reads the items of evaluation files: `.jsonl`, `.json` (a list) or `.parquet`.

    Raises:
        UserError: a file is missing, empty or of another kind; a record has none of the shapes (file and line named).
    """
    names = [Path(file).name for file in files]
    for file, short in zip(files, names, strict=True):
        name = short if names.count(short) == 1 else file
        empty = True
        for number, row in _rows(file):
            empty = False
            pieces = tuple(
                (text, answer) for text, answer in _pieces(row, f"{file}:{number}") if text.strip()
            )
            if not pieces:
                raise UserError(f"{file}:{number}: an item without text")
            key = row.get("id")
            try:
                "".join(text for pair in pieces for text in pair).encode()
            except UnicodeEncodeError:
                raise UserError(f"{file}:{number}: a lone surrogate; write the file anew as UTF-8") from None
            answers = tuple(dict.fromkeys(answer for _, answer in pieces if answer.strip()))
            yield Item(
                name=f"{name}:{number if key is None else key}", file=name, pieces=pieces, answers=answers
            )
        if empty:
            raise UserError(f"{file}: no items; an evaluation set that is empty protects nothing")


def _rows(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line or record number from 1, record)."""
    ending = Path(file).suffix
    if ending == ".jsonl":
        for number, row in enumerate(read_jsonl(file), start=1):
            yield number, row
    elif ending == ".json":
        rows = read_json(file)
        if not isinstance(rows, list):
            raise UserError(f"{file}: expected a list of items, got {type(rows).__name__}")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: expected a JSON object, got {type(row).__name__}")
            yield number, row
    elif ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from None
        yield from enumerate(rows, start=1)
    else:
        raise UserError(f"{file}: evaluation sets are .jsonl, .json or .parquet files")


def _pieces(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    if "question" in row:
        yield _string(row["question"], f"{where}: question"), _answer(row, where)
    elif "messages" in row or isinstance(row.get("prompt"), list):
        yield from _turns(row["messages"] if "messages" in row else row["prompt"], where)
    elif "prompt" in row:
        answer = next((row[key] for key in ("completion", "chosen", "answer") if row.get(key)), "")
        yield _string(row["prompt"], f"{where}: prompt"), answer if isinstance(answer, str) else ""
    elif "text" in row:
        yield _string(row["text"], f"{where}: text"), ""
    else:
        raise UserError(f"{where}: has the fields {', '.join(row) or 'none'}; an item is {SHAPES}")


def _turns(messages: Any, where: str) -> Iterator[tuple[str, str]]:
    """What the user says with what is answered; system messages are instructions that many items share."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise UserError(f"{where}: messages is not a list of objects with role and content")
    for place, message in enumerate(messages):
        content = _string(message.get("content"), f"{where}: content of message {place + 1}")
        follows = messages[place + 1] if place + 1 < len(messages) else {}
        answer = follows.get("content", "") if follows.get("role") == "assistant" else ""
        if message["role"] == "user":
            yield content, answer if isinstance(answer, str) else ""


def _answer(row: Mapping[str, Any], where: str) -> str:
    """The right answer's text: what a number or a letter stands for among the options, or the text itself."""
    options = row.get("options") or row.get("choices") or []
    if isinstance(options, Mapping) and isinstance(options.get("text"), list):  # ARC's {"text", "label"}
        options = dict(zip(map(str, options.get("label") or ()), options["text"], strict=False))
    if isinstance(options, Sequence) and not isinstance(options, str):
        options = {chr(ord("A") + i): option for i, option in enumerate(options)}
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: options are neither a list nor an object")
    answer = row.get("answer", row.get("answerKey"))
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    if answer is None:
        return ""
    if isinstance(answer, int) and options:
        if not 0 <= answer < len(options):
            raise UserError(f"{where}: answer {answer} of {len(options)} options; they count from 0")
        return str(list(options.values())[answer])
    return str(options.get(str(answer), answer))


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {type(value).__name__}, not a text")
    return value
