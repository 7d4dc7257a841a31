"""Questions and answers from the web: answered by the model first, then revised with the original answer.

    question, original answer -> own answer -> revision

Source: Baichuan-M1 report, figure 6.
"""

import re
from typing import Any

from galenic.corpus.synthesis.steps import Ask, Draft, Dropped, Seed

_MARKED = re.compile(
    r"\A\W*(?:Q|question|问|问题|提问)\W{0,3}[:：]\s*(.+?)\n\W*(?:A|answer|答|回答|答案)\W{0,3}[:：]\s*(.+)\Z",
    re.DOTALL | re.IGNORECASE,
)


def requests(items: int) -> int:
    """Requests of one seed, without judge and second tries."""
    return 2


def question_and_answer(text: str) -> tuple[str, str] | None:
    """Splits a document `Question: ... / Answer: ...`, or one whose first paragraph ends with a question mark."""
    text = text.strip()
    match = _MARKED.match(text)
    if match:
        return match[1].strip(), match[2].strip()
    question, _, answer = text.partition("\n\n")
    if question.rstrip().endswith(("?", "？")) and answer.strip():
        return question.strip(), answer.strip()
    return None


async def works(seed: Seed, ask: Ask) -> list[dict[str, Any]]:
    """Splits the document; asks nobody."""
    pair = question_and_answer(seed.text)
    if pair is None:
        raise Dropped("no question with an answer", "", seed.text)
    return [{"question": pair[0], "original": pair[1]}]


async def draft(seed: Seed, work: dict[str, Any], ask: Ask) -> Draft:
    """Answers, then revises with the original answer."""
    question, original = work["question"], work["original"]
    first = await ask.text("answer", numbers_of=question, novel=question, question=question)
    answer = await ask.text("revise", numbers_of=question, question=question, answer=first, original=original)
    return Draft(question=question, answer=answer, reference=original)
