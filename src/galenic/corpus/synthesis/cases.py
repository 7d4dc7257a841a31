"""Patient cases: every decision of the course, what speaks for and against it, an expert's reasoning, one narrative.

    case -> presentation, decisions -> evidence (quoted) -> reasoning with alternatives -> narrative

Source: Baichuan-M1 report, figure 6. Evidence has to stand in the case word for word.
"""

from typing import Any

from galenic.corpus.synthesis.checks import Problem, foreign_quote, numbers
from galenic.corpus.synthesis.steps import Ask, Draft, Dropped, Seed

TASK = {
    "en": "Work through this case as an experienced physician: from the first impression to the outlook.",
    "zh": "请以一位经验丰富的医生的身份分析这个病例：从初步印象一直到预后。",
}


def requests(items: int) -> int:
    """Requests of one seed, without judge and second tries."""
    return 4


async def works(seed: Seed, ask: Ask) -> list[dict[str, Any]]:
    """Extracts what was known at first, and the decisions over the whole course."""

    def check(found: dict[str, Any]) -> Problem | None:
        if not all(isinstance(decision, str) and decision.strip() for decision in found["decisions"]):
            return Problem("missing field", "decisions (a list of texts)")
        invented = numbers(found["presentation"]) - numbers(seed.text)
        return Problem("invented numbers", ", ".join(sorted(invented))) if invented else None

    found = await ask.json("decisions", {"presentation": str, "decisions": list}, check, text=seed.text)
    if not found["decisions"]:
        raise Dropped("no clinical decision", "", seed.text)
    return [found]


async def draft(seed: Seed, work: dict[str, Any], ask: Ask) -> Draft:
    """Weighs the decisions and tells the course as one line of reasoning."""
    decisions = [decision.strip() for decision in work["decisions"]]

    def check(found: dict[str, Any]) -> Problem | None:
        rows = found["evidence"]
        sides = [row.get(side) for row in rows if isinstance(row, dict) for side in ("for", "against")]
        if len(rows) != len(decisions) or len(sides) != 2 * len(rows):
            return Problem("missing field", f"evidence (one entry for each of {len(decisions)} decisions)")
        if not all(isinstance(side, list) and all(isinstance(q, str) for q in side) for side in sides):
            return Problem("missing field", "for, against (lists of texts)")
        quote = foreign_quote(
            (quote for side in sides if isinstance(side, list) for quote in side), seed.text
        )
        return Problem("quote not in the text", quote) if quote else None

    listed = "\n".join(f"{i}. {decision}" for i, decision in enumerate(decisions, start=1))
    found = await ask.json("evidence", {"evidence": list}, check, text=seed.text, decisions=listed)
    weighed = "\n".join(
        f"{i}. {decision}\n   + {'; '.join(row['for']) or '-'}\n   - {'; '.join(row['against']) or '-'}"
        for i, (decision, row) in enumerate(zip(decisions, found["evidence"], strict=True), start=1)
    )
    thoughts = await ask.text("reasoning", novel=seed.text, text=seed.text, evidence=weighed)
    question = f"{TASK[seed.language]}\n\n{work['presentation'].strip()}"
    narrative = await ask.text(
        "narrative", novel=seed.text, text=seed.text, evidence=weighed, reasoning=thoughts
    )
    return Draft(question=question, answer=narrative, reference=seed.text)
