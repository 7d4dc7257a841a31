"""Encyclopaedias, textbooks, guidelines: knowledge points become exam questions, answered first without the passage.

    passage -> points -> (each) question -> answer without reference -> revision with the reference

Source: Baichuan-M1 report, figure 6; the passage's richness is judged in the same request that extracts the points.
"""

from typing import Any

from galenic.corpus.synthesis.checks import Problem
from galenic.corpus.synthesis.steps import Ask, Draft, Dropped, Seed, choice_text

RICH_ENOUGH = 4
"""Of 10; what is below holds too little knowledge to ask for."""


def requests(items: int) -> int:
    """Requests of one seed that becomes so many items, without judge and second tries."""
    return 1 + 3 * items


async def works(seed: Seed, ask: Ask) -> list[dict[str, Any]]:
    """Extracts the knowledge points of a passage."""

    def check(found: dict[str, Any]) -> Problem | None:
        if not 0 <= found["richness"] <= 10:
            return Problem("missing field", "richness (0 to 10)")
        if not all(isinstance(point, str) and point.strip() for point in found["points"]):
            return Problem("missing field", "points (a list of texts)")
        return None

    fields = {"richness": (int, float), "points": list}
    found = await ask.json("points", fields, check, text=seed.text, most=str(seed.most))
    if found["richness"] < RICH_ENOUGH or not found["points"]:
        raise Dropped("too little knowledge", f"richness {found['richness']}", seed.text)
    return [{"point": point.strip()} for point in dict.fromkeys(found["points"])][: seed.most]


def question_problem(found: dict[str, Any]) -> Problem | None:
    """Checks a question: no options, or three to six different texts of which the answer is one."""
    options = found["options"]
    if not all(isinstance(option, str) and option.strip() for option in options):
        return Problem("missing field", "options (a list of texts)")
    if options and not (3 <= len({option.strip().casefold() for option in options}) == len(options) <= 6):
        return Problem("missing field", "options (three to six, all different)")
    if options and found["answer"] not in options:
        return Problem("missing field", "answer (word for word one of the options)")
    return None


async def draft(seed: Seed, work: dict[str, Any], ask: Ask) -> Draft:
    """Makes one exam question of a point and answers it."""
    fields = {"question": str, "options": list, "answer": str}
    made = await ask.json("question", fields, question_problem, text=seed.text, point=work["point"])
    question = choice_text(made["question"].strip(), made["options"])
    stem = made["question"]
    first = await ask.text("answer", numbers_of=stem, novel=question, question=question)
    reference = f"{seed.text}\n\n{work['point']}\n{made['answer']}"
    answer = await ask.text(
        "revise", numbers_of=stem, novel=seed.text, question=question, answer=first, text=reference
    )
    return Draft(question=question, answer=answer, reference=reference)
