"""Answers that a model writes itself: one piece writes them, another says whether they are right.

    question -> Writer -> Written     the likeliest token each time, until the model ends its turn
    Written, question -> grade        the line behind the last "Answer:", else all of it, by a rule of
                                      `galenic.align.rewards.rules`

    option     options are shown with the question; right is who names the true one, by its text or letter
    numeric    options are not shown; right is who gives the true one's numbers, in any unit of its dimension

A model that works in steps can only show it here: the likelihood of an option right behind the question leaves no
room for them. What did not come to an end, or holds no answer, is wrong and counted as `unanswered`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from galenic.align.data.tasks import with_options
from galenic.align.rewards.rules import answer_of, option, result_of, same_numbers
from galenic.align.rewards.units import quantities
from galenic.align.rollouts.sampling import end_tokens, sample
from galenic.corpus.tokens.chat_format import encode_text
from galenic.runtime import UserError

from .likelihood import Advance
from .multiple_choice import PromptFormat
from .statistics import wilson

BATCH = 64
"""Answers written at a time."""

# ---------------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a model wrote."""

    text: str
    ended: bool
    """Whether it came to an end by itself."""
    truncated: bool
    """Whether the question lost its beginning, to fit the context."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Lets a model answer questions in its own words, greedily."""

    model: Any
    tokenizer: Any
    prompt: PromptFormat
    context: int
    """Tokens that the model reads at most."""
    tokens: int
    """Tokens that an answer has at most."""

    def __call__(self, questions: Sequence[str], advance: Advance | None = None) -> list[Written]:
        """Writes an answer to each question.

        Args:
            questions: their texts.
            advance: called with the number of answers after each batch.

        Raises:
            UserError: no room is left for a question.
        """
        room = self.context - self.tokens
        if questions and room < 2:
            raise UserError(
                f"written_tokens: {self.tokens} leave no room for a question; the model reads {self.context} tokens"
            )
        prompts = [self._ids(question) for question in questions]
        fitting = [ids if len(ids) <= room else ids[:1] + ids[len(ids) - room + 1 :] for ids in prompts]
        chat = self.prompt.name == "chat"
        ends = end_tokens(self.tokenizer, self.model) if chat else [self.tokenizer.eos_token_id]
        found = []
        for start in range(0, len(fitting), BATCH):
            some = fitting[start : start + BATCH]
            found += sample(
                self.model,
                some,
                keys=[(start + number,) for number in range(len(some))],
                max_new_tokens=self.tokens,
                end={end for end in ends if end is not None},
                temperature=0.0,
                batch=BATCH,
            )
            if advance:
                advance(len(some))
        return [
            Written(
                text=self.tokenizer.decode(rollout.ids, skip_special_tokens=True).strip(),
                ended=rollout.ended,
                truncated=len(ids) > room,
            )
            for rollout, ids in zip(found, prompts, strict=True)
        ]

    def _ids(self, question: str) -> list[int]:
        head, prefix = self.prompt.parts(self.tokenizer, question)
        return head + encode_text(self.tokenizer, prefix)


# ---------------------------------------------------------------------------- scoring


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What an answer is worth."""

    pick: int | None
    """The option it names, if it names one."""
    right: bool
    answered: bool
    """Whether there is an answer at all, right or wrong."""


def posed(row: dict[str, Any], rule: str) -> str:
    """Returns a question as it is put to a model that writes; see above."""
    return with_options(row["question"], row["options"]) if rule == "option" else row["question"]


def grade(row: dict[str, Any], written: Written, rule: str) -> Grade:
    """Checks an answer.

    Args:
        row: the question, with `options`, `answer` and, for numbers, perhaps `tolerance`: the relative error that one
            may have, 0 by default, as wrong options are near misses.
        written: what was answered.
        rule: `option` or `numeric`.
    """
    options, true = row["options"], row["answer"]
    said = answer_of(written.text, lines=1 + max(text.count("\n") for text in options))
    if not (written.ended and said):
        return Grade(pick=None, right=False, answered=False)
    if rule == "option":
        pick = option(said, options)
        return Grade(pick=pick, right=pick == true, answered=pick is not None)
    same = [same_numbers(said, text, row.get("tolerance", 0)) for text in options]
    pick = true if same[true] else same.index(True) if any(same) else None
    answered = len(quantities(result_of(said))) == len(quantities(options[true]))
    return Grade(pick=pick, right=same[true], answered=answered)


def answered(
    writer: Writer, kind: str, questions: Sequence[dict[str, Any]], rule: str, advance: Advance | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a row for each question of a kind, and the accuracy with its interval."""
    found = writer([posed(row, rule) for row in questions], advance)
    grades = [grade(row, written, rule) for row, written in zip(questions, found, strict=True)]
    rows = [
        {
            "kind": kind,
            "id": row["id"],
            "answer": row["answer"],
            "pick": graded.pick,
            "right": float(graded.right),
            "answered": graded.answered,
            "ended": written.ended,
            "said": written.text,
        }
        for row, written, graded in zip(questions, found, grades, strict=True)
    ]
    right, n = sum(graded.right for graded in grades), len(grades)
    low, high = wilson(right, n)
    return rows, {
        "value": right / n,
        "low": low,
        "high": high,
        "n": n,
        "chance": 0.25 if rule == "option" else None,
        "unanswered": sum(not graded.answered for graded in grades),
        "truncated": sum(written.truncated for written in found),
    }


def protocol(rule: str, put: str, tokens: int) -> str:
    """Says in words how a kind of questions was measured.

    Args:
        rule: of the kind.
        put: the prompt, with `{question}` where the question stands.
        tokens: of an answer at most.
    """
    if rule == "option":
        put = put.replace("{question}", "{question}\nChoose one: {options}.")
        right = "it names the true option and no other, by its text or letter"
    else:
        right = "it gives the true option's numbers, in any unit of its dimension; no options are shown"
    return (
        f"the likeliest token each time after {put!r}, at most {tokens}; the answer is the line behind the last "
        f"'Answer:', else all that was written; right if {right}; what did not end or holds no answer is wrong, and "
        "counted as unanswered; 95% interval by Wilson"
    )
