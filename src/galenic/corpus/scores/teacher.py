"""A language model as teacher: it labels documents, from 0 to 5 with a reason, and the labels make a scorer's file.

    documents --prompt--> client (cached, retried, budgeted) --JSON--> checked --> labels.jsonl
                                                                  +--> ledger.jsonl (what was no use, and why)

What a teacher says is an opinion too: print its agreement with people (`agreement.score_figures`) before it is trusted.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from galenic.corpus.scores.taxonomy import CLASSES, SCORES, label_number
from galenic.corpus.synthesis.asking import in_order
from galenic.runtime import UserError, write_jsonl

BEST = 5
"""Scores are asked from 0 to this, and divided by it."""
CHARACTERS = 6000
"""Of a document that the teacher sees: the beginning."""


class Chat(Protocol):
    """What asks: `galenic.corpus.synthesis.client.Client`, or anything like it."""

    async def chat(self, messages: list[dict[str, str]], *, key: str, **sampling: Any) -> str:
        """Returns the answer to a conversation; `key` tells equal requests apart."""
        ...


def prompt(text: str) -> str:
    """Returns the request for one document."""
    example = {name: {"score": 3, "reason": "..."} for name in SCORES}
    example |= {"general": "medicine", "medical": True, "content": "guideline", "department": "cardiology"}
    words = (Path(__file__).parent / "prompts" / "score.md").read_text(encoding="utf-8")
    slots = {
        "general": ", ".join(CLASSES["general"]),
        "content": ", ".join(CLASSES["content"]),
        "department": ", ".join(CLASSES["department"]),
        "example": json.dumps(example),
        # The document comes last: no slot is looked for in it, and it cannot end its own frame.
        "text": text[:CHARACTERS].replace("</document>", "</ document>"),
    }
    for name, value in slots.items():
        words = words.replace("{" + name + "}", value, 1)
    return words


def first_object(answer: str) -> dict[str, Any]:
    r"""Returns the first JSON object in an answer, also from inside a fence or between words.

    >>> first_object('Sure! ```json\n{"quality": 4}\n``` Anything else?')
    {'quality': 4}

    Raises:
        ValueError: there is none.
    """
    decoder = json.JSONDecoder()
    place = answer.find("{")
    while place >= 0:
        try:
            found, _ = decoder.raw_decode(answer, place)
            if isinstance(found, dict) and found:
                return found
        except (ValueError, RecursionError):
            pass
        place = answer.find("{", place + 1)
    raise ValueError("no JSON object in the answer")


def parse(answer: str) -> tuple[dict[str, Any], list[str]]:
    """Reads an answer: every head that is well-formed counts, the others are told.

    Returns:
        (fields of a label row with `reasons`, what was wrong).

    Raises:
        ValueError: no head is well-formed.
    """
    found, wrong = first_object(answer), []
    row: dict[str, Any] = {}
    reasons = {}
    for name in SCORES:
        value = found.get(name)
        reason = ""
        if isinstance(value, dict):
            reason, value = str(value.get("reason", ""))[:300], value.get("score")
        if isinstance(value, str) and value.strip().removesuffix(f"/{BEST}").strip().isdecimal():
            value = int(value.strip().removesuffix(f"/{BEST}"))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= BEST:
            wrong.append(f"{name}: {str(value)[:60]}")
            continue
        row[name] = value / BEST
        reasons[name] = " ".join(_clean(reason).split())
    for name, labels in CLASSES.items():
        value = found.get(name)
        if name == "department" and value in ("", None):
            continue
        try:
            value = value.strip().lower() if isinstance(value, str) else value
            if name == "medical" and value in ("true", "false", "yes", "no"):
                value = value in ("true", "yes")
            row[name] = labels[label_number(name, value)]
        except UserError:
            wrong.append(f"{name}: {str(value)[:60]}")
    if not row:
        raise ValueError(f"no score or class in the answer ({'; '.join(wrong)[:300]})")
    return {**row, "reasons": reasons}, wrong


async def label(
    documents: Sequence[dict[str, str]],
    client: Chat,
    *,
    failures: tuple[type[Exception], ...] = (),
    many: int = 32,
    note: Callable[[Exception | None], None] = lambda error: None,
    sampling: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Asks for the labels of documents; answers may come in any order, rows are in the documents'.

    Args:
        documents: `id` and `text`; `group` and `source` go through to the label row.
        client: asks; paces itself.
        failures: what the client raises for one document that fails for good; anything else ends the run.
        many: documents under way at once.
        note: told of each document in turn, with the failure if it failed; may raise to end the run.
        sampling: fields of the request, such as `temperature`.

    Returns:
        (label rows, ledger rows: id, reason, detail, answer).
    """

    async def one(
        document: dict[str, str],
    ) -> tuple[dict[str, Any] | None, list[dict[str, str]], Exception | None]:
        key, text = document["id"], document["text"]
        if not text.strip():
            return None, [_entry(key, "no text", "", "")], None
        try:
            messages = [{"role": "user", "content": prompt(text)}]
            answer = await client.chat(messages, key=f"label/{key}", **(sampling or {}))
        except failures as error:
            return None, [_entry(key, "no answer", str(error), "")], error
        try:
            fields, wrong = parse(answer)
        except ValueError as error:
            return None, [_entry(key, "no labels", str(error), answer)], None
        row = {name: document[name] for name in ("id", "text", "group", "source") if name in document}
        ledger = [_entry(key, "a label left out", "; ".join(wrong), answer)] if wrong else []
        return {**row, **fields}, ledger, None

    rows, ledger = [], []
    async with aclosing(in_order(one, documents, many)) as results:
        async for row, entries, error in results:
            rows += [row] if row else []
            ledger += entries
            note(error)
    return rows, ledger


def _entry(key: str, reason: str, detail: str, answer: str) -> dict[str, str]:
    return {"id": key, "reason": reason, "detail": _clean(detail)[:500], "answer": _clean(answer)[:2000]}


def _clean(text: str) -> str:
    """Half a surrogate pair, which JSON can spell, is no text and would not be written."""
    return text.encode("utf-8", "replace").decode()


def write_labels(out: str | Path, rows: Sequence[dict[str, Any]], ledger: Sequence[dict[str, str]]) -> None:
    """Writes `labels.jsonl`, which the verb `scorer` reads, and `ledger.jsonl` to a folder."""
    write_jsonl(Path(out) / "ledger.jsonl", ledger)
    write_jsonl(Path(out) / "labels.jsonl", rows)
