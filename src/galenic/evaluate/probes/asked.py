"""How a probe asks: options scored by likelihood, or an answer of the model's own."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from galenic.corpus.tokens.chat_format import encode_text
from galenic.evaluate import multiple_choice
from galenic.evaluate.likelihood import Advance
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.statistics import summary
from galenic.evaluate.written import Writer, Written

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under examination and how it is asked."""

    model: Any
    tokenizer: Any
    prompt: PromptFormat = field(default_factory=PromptFormat)
    batch_tokens: int = 2048
    advance: Advance = lambda n: None
    """Called with the number of prompts done."""

    @property
    def context(self) -> int:
        """Most tokens that the model takes."""
        return int(self.model.config.max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question about a long text, with options that all occur in it."""

    id: str
    text: str
    """The long text and the question after it."""
    options: list[str]
    answer: int
    tokens: int
    """Of the whole prompt with the longest option or answer, or the length that was asked for if that is more."""
    about: dict[str, Any]
    """What results are grouped by: context, depth, hops, language."""


def tokens_of(tokenizer: Any, prompt: PromptFormat, text: str) -> list[int]:
    """Returns a prompt's tokens up to where the answer begins."""
    head, rest = prompt.parts(tokenizer, text)
    return head + encode_text(tokenizer, rest)


def choose(
    subject: Subject, texts: Sequence[str], options: Sequence[Sequence[str]]
) -> tuple[list[list[float]], int]:
    """Returns log p(option | text) in nats, for every option of every text, and how many texts lost their beginning."""
    prompts = [
        multiple_choice.tokenize(subject.tokenizer, subject.prompt, text, given, subject.context)
        for text, given in zip(texts, options, strict=True)
    ]
    scores = multiple_choice.option_log_probs(
        subject.model, prompts, batch_tokens=subject.batch_tokens, advance=subject.advance
    )
    return scores, sum(prompt.truncated for prompt in prompts)


def write(subject: Subject, texts: Sequence[str], most: int) -> list[Written]:
    """Returns what the model itself answers, the likeliest token each time; see `written.Writer`.

    Args:
        subject: the model.
        texts: what it is asked.
        most: tokens of an answer.
    """
    longest = max((len(tokens_of(subject.tokenizer, subject.prompt, text)) for text in texts), default=0)
    rows = max(1, subject.batch_tokens // (longest + most))
    writer = Writer(
        model=subject.model,
        tokenizer=subject.tokenizer,
        prompt=subject.prompt,
        context=subject.context,
        tokens=most,
    )
    return [
        found
        for first in range(0, len(texts), rows)
        for found in writer(texts[first : first + rows], subject.advance)
    ]


def first_named(text: str, options: Sequence[str]) -> int | None:
    """Returns the option that a text names first, none if it names none.

    An option has to stand by itself: not inside a longer number or a longer word of Latin letters. Of options that
    begin at the same place the longest counts.
    """
    found = []
    for index, option in enumerate(options):
        match = re.search(rf"(?<![0-9A-Za-z]){re.escape(option)}(?![0-9A-Za-z])", text, re.IGNORECASE)
        if match:
            found.append((match.start(), -len(option), index))
    return min(found)[2] if found else None


# ---------------------------------------------------------------------------- questions on long texts


def answer(subject: Subject, items: Sequence[Item], kind: str, written_tokens: int) -> list[Row]:
    """Asks the items, by likelihood and, with `written_tokens`, by the model's own answer.

    An item longer than the model reads is not asked: it is wrong, and `too_long`.
    """
    fit = [item for item in items if item.tokens <= subject.context]
    subject.advance((1 + bool(written_tokens)) * (len(items) - len(fit)))
    scores, _ = choose(subject, [item.text for item in fit], [item.options for item in fit])
    picks = {
        item.id: multiple_choice.best(_per_byte(values, item.options))
        for item, values in zip(fit, scores, strict=True)
    }
    said: dict[str, Written] = {}
    if written_tokens and fit:
        answers = write(subject, [item.text for item in fit], written_tokens)
        said = {item.id: found for item, found in zip(fit, answers, strict=True)}
    rows = []
    for item in items:
        row: Row = {"kind": f"probe-{kind}", "id": item.id, "right": float(picks.get(item.id) == item.answer)}
        row |= {**item.about, "options": item.options, "answer": item.answer, "pick": picks.get(item.id)}
        if item.id not in picks:
            row["too_long"] = True
        if written_tokens:
            text = said[item.id].text if item.id in said else ""
            named = first_named(text, item.options)
            row |= {
                "said": text,
                "said_right": float(named == item.answer),
                "said_named": named is not None,
            }
        rows.append(row)
    return rows


def _per_byte(values: Sequence[float], options: Sequence[str]) -> list[float]:
    return [value / len(option.encode()) for value, option in zip(values, options, strict=True)]


def numbers(rows: Sequence[Row], by: Sequence[str]) -> dict[str, Any]:
    """Returns the accuracy of all rows, of each value of each key in `by`, and of each pair of the first two keys.

    Returns:
        {"value", "low", "high", "n", "chance", "too_long", "written"?, "by": {key: {value: accuracy}},
        "grid": {first key's value: {second key's value: accuracy}}}.
    """
    written = {}
    if rows and "said" in rows[0]:
        unanswered = sum(not row["said_named"] for row in rows)
        written = {"written": {**summary([row["said_right"] for row in rows]), "unanswered": unanswered}}
    return {
        **summary([row["right"] for row in rows]),
        "chance": 0.25,
        "too_long": sum("too_long" in row for row in rows),
        **written,
        "by": {key: _each(rows, lambda row, key=key: str(row[key]), _right) for key in by},
        "grid": _each(
            rows,
            lambda row: str(row[by[0]]),
            lambda inside: _each(inside, lambda row: str(row[by[1]]), _right),
        ),
    }


def _right(rows: Sequence[Row]) -> dict[str, Any]:
    return summary([row["right"] for row in rows])


def _each(
    rows: Sequence[Row], key: Callable[[Row], str], of: Callable[[Sequence[Row]], Any]
) -> Mapping[str, Any]:
    """Applies `of` to the rows of each value of a key, values in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {value: of(group) for value, group in groups.items()}
