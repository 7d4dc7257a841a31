"""Conversations for fine-tuning: read, checked, encoded.

    file --read_conversations--> samples, each with its category and line; ledger of the lines that are left out

A line: {"messages": [{"role", "content"}, ...], "category": ...}. The messages are the user's and the assistant's in
turn, a system message may stand first; of several turns each answer is learnt. The category may be missing; it is what
losses are told by. The report names five for medicine beside general data (section 5.1): see `CATEGORIES`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from galenic.corpus.tokens.chat_template import encode_chat
from galenic.pretrain.data.collate import IGNORE
from galenic.runtime import UserError, human, numbered_jsonl

CATEGORIES = {
    "knowledge": "medical knowledge",
    "understanding": "language: entities and their classes, standard terms, intent, context",
    "reasoning": "summary and differential diagnosis, treatment and prognosis, review",
    "long-context": "questions on a text that stands among others",
    "safety": "what is asked with bad intent or would end badly, and what only looks so",
    "general": "everything else, mathematics and code too",
}
"""The report's five categories of medical conversations, and the rest; a file may have others."""

MOST_CATEGORIES = 64
"""A field with more values than this is no category."""

Sample = tuple[np.ndarray, np.ndarray]
"""Token ids and labels of one conversation, both (length,) int64; labels are IGNORE outside answers."""

BadLines = Literal["refuse", "skip"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A file of conversations."""

    samples: list[Sample]
    categories: list[str]
    """Of each sample; empty: none."""
    lines: list[int]
    """Of each sample, where it stands in the file."""
    ledger: list[dict[str, Any]]
    """{"line", "reason"} of what was left out."""
    too_long: int
    """How many of those were longer than the context."""

    @property
    def names(self) -> list[str]:
        """The categories that there are, in the order of `CATEGORIES`, others behind."""
        return in_order(self.categories)

    def first(self, count: int) -> "Encoded":
        """The same with so many samples at most."""
        return replace(
            self,
            samples=self.samples[:count],
            categories=self.categories[:count],
            lines=self.lines[:count],
        )


def in_order(categories: Sequence[str]) -> list[str]:
    """Returns each category once, in the order of `CATEGORIES`, others behind."""
    known = list(CATEGORIES)
    return sorted(
        set(categories) - {""}, key=lambda name: (known.index(name) if name in known else len(known), name)
    )


def read_conversations(path: str, tokenizer: Any, context: int, *, bad_lines: BadLines = "refuse") -> Encoded:
    """Reads and encodes a file of conversations.

    Args:
        path: JSON lines; see above.
        tokenizer: of the model.
        context: tokens at most; longer ones are left out.
        bad_lines: whether a line that is no conversation ends the run or is left out.

    Raises:
        UserError: a bad line, named; nothing is left; a field with too many values for a category.
    """
    samples, categories, lines, ledger = [], [], [], []
    too_long = 0
    for number, row in numbered_jsonl(path):
        try:
            if isinstance(row, UserError):
                raise row
            sample, category = _encode(row, tokenizer)
        except ValueError as error:
            said = str(error).removeprefix(f"{path}:{number}: ").removeprefix(f"{path}: ")
            if bad_lines == "refuse":
                raise UserError(f"{path}:{number}: {said}") from None
            ledger.append({"line": number, "reason": said})
            continue
        if len(sample[0]) > context:
            too_long += 1
            ledger.append({"line": number, "reason": f"longer than context: {len(sample[0])} tokens"})
            continue
        samples.append(sample)
        categories.append(category)
        lines.append(number)
    if not samples:
        bad = f"; {len(ledger) - too_long} lines are no conversations" if len(ledger) > too_long else ""
        raise UserError(f"{path}: no conversation fits {context} tokens{bad}")
    if len(set(categories)) > MOST_CATEGORIES:
        raise UserError(
            f"{path}: {len(set(categories))} different categories; at most {MOST_CATEGORIES}, such as "
            f"{', '.join(CATEGORIES)}"
        )
    return Encoded(samples=samples, categories=categories, lines=lines, ledger=ledger, too_long=too_long)


def _encode(row: Mapping[str, Any], tokenizer: Any) -> tuple[Sample, str]:
    """Returns a line's sample and category.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        messages = row["messages"]
        check_messages(messages)
        category = category_of(row)
        ids, answers = encode_chat(tokenizer, messages)
    except KeyError:
        raise ValueError("not a conversation (it has no messages)") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a conversation ({error})") from None
    if not any(answers):
        raise ValueError("a conversation without an answer has nothing to learn")
    tokens = np.array(ids, dtype=np.int64)
    return (tokens, np.where(answers, tokens, IGNORE)), category


def check_messages(messages: Any) -> None:
    """Checks what holds for every chat template: user and assistant in turn, no empty answer.

    A role that only some models know, such as `tool`, may stand between; their template decides.

    Raises:
        ValueError: what is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation needs at least one message, in a list")
    before = ""
    for place, message in enumerate(messages, start=1):
        fields = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else ()
        if not (fields and all(isinstance(field, str) for field in fields)):
            raise ValueError(f"message {place} is not a role and a content")
        role, content = fields
        if role == "assistant" and not str(content).strip():
            raise ValueError(f"message {place}, the assistant's, is empty")
        follows = {"user": ("user",), "assistant": ("", "system", "assistant"), "system": (before,)}
        if before in follows.get(str(role), ()) and not (role == "system" and place == 1):
            expected = "assistant" if before == "user" else "user"
            raise ValueError(f"message {place} is of role '{role}', expected '{expected}'")
        before = str(role)


def category_of(row: Mapping[str, Any]) -> str:
    """Returns the category of a line, empty if it has none.

    Raises:
        ValueError: it is no text.
    """
    category = row.get("category")
    if category is None:
        return ""
    if not isinstance(category, str):
        raise ValueError(f"category {category!r} is not a text")
    return category.strip()


def count_categories(path: str) -> tuple[int, str]:
    """Counts the lines of a file, and says in words how many each category has, for a plan."""
    found: Counter[str] = Counter()
    for _, row in numbered_jsonl(path):
        category = row.get("category") if isinstance(row, dict) else None
        found[category if isinstance(category, str) else ""] += 1
    names = in_order(list(found))
    words = [f"{name} {human(found[name])}" for name in names[:MOST_CATEGORIES]]
    if names and found[""]:
        words.append(f"without one {human(found[''])}")
    return found.total(), ", ".join(words)
