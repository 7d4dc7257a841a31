"""Papers: the evidence, the conclusions, and the analysis that leads from one to the other.

    paper -> evidence, conclusions (both quoted) -> analysis that links them

Source: Baichuan-M1 report, figure 6. Quotes have to stand in the paper word for word.
"""

from typing import Any

from galenic.corpus.synthesis.checks import Problem, foreign_quote
from galenic.corpus.synthesis.steps import Ask, Draft, Dropped, Seed

TASK = {"en": "What follows from these findings, and why?", "zh": "从这些结果可以得出什么结论？为什么？"}


def requests(items: int) -> int:
    """Requests of one seed, without judge and second tries."""
    return 2


async def works(seed: Seed, ask: Ask) -> list[dict[str, Any]]:
    """Extracts evidence and conclusions."""

    def check(found: dict[str, Any]) -> Problem | None:
        quotes = [*found["evidence"], *found["conclusions"]]
        if not all(isinstance(quote, str) for quote in quotes):
            return Problem("missing field", "evidence, conclusions (lists of texts)")
        quote = foreign_quote(quotes, seed.text)
        return Problem("quote not in the text", quote) if quote else None

    found = await ask.json("findings", {"evidence": list, "conclusions": list}, check, text=seed.text)
    if not found["evidence"] or not found["conclusions"]:
        raise Dropped("no evidence with a conclusion", "", seed.text)
    return [found]


async def draft(seed: Seed, work: dict[str, Any], ask: Ask) -> Draft:
    """Writes the analysis."""
    evidence = "\n".join(f"- {quote.strip()}" for quote in work["evidence"])
    conclusions = "\n".join(f"- {quote.strip()}" for quote in work["conclusions"])
    answer = await ask.text("analysis", novel=seed.text, evidence=evidence, conclusions=conclusions)
    return Draft(question=f"{TASK[seed.language]}\n\n{evidence}", answer=answer, reference=seed.text)
