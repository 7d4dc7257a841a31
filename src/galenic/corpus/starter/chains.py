"""Calculations of several steps whose working comes first: tasks, worked conversations, pairs with a slip.

    terms --hash, whatever their order--> training | held out | questions
    terms --kind--> prompt, "8 + 5 = 13", "13 + 9 = 22", "22 mg" --> task          prompt, "22 mg"
                                                                 --> conversation  prompt, the steps, "Answer: 22 mg"
                                                                 --> pair          the same, and one with a slip

What several numbers come to has to be worked out a step at a time: a small network that has learnt to add two of them
cannot add four at one go. No step is one that questions ask for (`reasoning.Problem`).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

from galenic.corpus.starter.holdout import stable_key
from galenic.corpus.starter.questions import seal
from galenic.corpus.starter.reasoning import Problem, near_misses
from galenic.corpus.starter.worked import asked

MARKER = "\nAnswer: "
"""What stands between the working and the answer."""
Side = Literal["train", "heldout", "questions"]
SHARES: dict[Side, float] = {"heldout": 0.1, "questions": 0.2}
"""Shares of all sets of terms; the rest is for training."""
LARGEST = 9
"""Largest number in a prompt."""
DOMAIN = "chains"


@dataclass(frozen=True)
class Kind:
    """One kind of calculation: a running sum, asked for in words."""

    name: str
    signs: tuple[tuple[int, ...], ...]
    """+1 or -1 for each term; one of them is drawn."""
    prompts: tuple[str, ...]
    """`{terms}` stands for the sum: `8 + 5 - 3`."""
    unit: str


KINDS = (
    Kind(
        "total",
        ((1, 1, 1), (1, 1, 1, 1)),
        (
            "Find the dose of one day: {terms} mg.",
            "Doses given: {terms} mg. Find the sum.",
            "Add up: {terms} mg.",
        ),
        "mg",
    ),
    Kind(
        "balance",
        ((1, 1, -1), (1, -1, 1)),
        (
            "Find the balance: {terms} mL.",
            "In and out: {terms} mL. What is left?",
            "Fluids: {terms} mL. Find the rest.",
        ),
        "mL",
    ),
    Kind(
        "stock",
        ((1, -1, 1, -1), (1, 1, -1, -1), (1, 1, -1, 1)),
        (
            "Find what is left: {terms} tablets.",
            "A box: {terms} tablets. Count.",
            "Stock: {terms} tablets. Find it.",
        ),
        "tablets",
    ),
)


@dataclass(frozen=True)
class Chain:
    """One calculation."""

    kind: str
    terms: tuple[int, ...]
    """Signed; the running sum stays above 0."""
    prompt: str
    unit: str

    @property
    def side(self) -> Side:
        """Whose these terms are, in any order and in any words."""
        first, *rest = self.terms
        ordered = sorted(self.terms) if min(rest) > 0 else (first, *sorted(rest))
        place = stable_key("chains", self.kind, *ordered) / 2**64
        for side, share in SHARES.items():
            if place < share:
                return side
            place -= share
        return "train"

    def steps(self, slip: tuple[int, int] | None = None) -> list[str]:
        """Returns one equation for each term after the first.

        Args:
            slip: (number of a step, what its result is wrong by); later steps go on from there.
        """
        found, running = [], self.terms[0]
        for number, term in enumerate(self.terms[1:]):
            wrong = slip[1] if slip and slip[0] == number else 0
            result = running + term + wrong
            found.append(f"{running} {'+' if term > 0 else '-'} {abs(term)} = {result}")
            running = result
        return found

    def answer(self, wrong: int = 0) -> str:
        """Returns the result with its unit.

        Args:
            wrong: what it is wrong by.
        """
        return f"{sum(self.terms) + wrong} {self.unit}"

    def worked(self, slip: tuple[int, int] | None = None) -> str:
        """Returns steps and answer as a model is to write them."""
        return "\n".join(self.steps(slip)) + MARKER + self.answer(slip[1] if slip else 0)


def chains(label: str, seed: int, side: Side) -> Iterator[Chain]:
    """Yields calculations of one side, each kind in turn, without end."""
    draw = random.Random(stable_key(seed, label, side))
    while True:
        for kind in KINDS:
            chain = _draw(kind, draw)
            while chain is None or chain.side != side:
                chain = _draw(kind, draw)
            yield chain


def _draw(kind: Kind, draw: random.Random) -> Chain | None:
    """Returns a calculation, or None if what was drawn will not do."""
    terms = tuple(sign * draw.randint(2, LARGEST) for sign in draw.choice(kind.signs))
    running = list(accumulate(terms))
    if min(running) < 1 or any(_asked(a, b) for a, b in zip(running, terms[1:], strict=False)):
        return None
    written = "".join(f" {'+' if term > 0 else '-'} {abs(term)}" for term in terms).removeprefix(" + ")
    prompt = draw.choice(kind.prompts).format(terms=written)
    return Chain(kind.name, terms, prompt, kind.unit)


def _asked(running: int, term: int) -> bool:
    """Whether a step is one that questions ask for."""
    if term > 0:
        return asked("add", *sorted((running, term)))
    return asked("subtract", running, -term)


# ---------------------------------------------------------------------------- what is made of them


def _distinct(
    make: Callable[[Chain], dict[str, Any]], label: str, count: int, seed: int, side: Side
) -> list[dict[str, Any]]:
    """Makes rows of `count` calculations with different prompts; fewer if there are not so many."""
    rows: dict[str, dict[str, Any]] = {}
    source = chains(label, seed, side)
    for _ in range(50 * count):
        if len(rows) == count:
            break
        chain = next(source)
        rows.setdefault(chain.prompt, make(chain))
    return list(rows.values())


def chain_tasks(count: int, seed: int, side: Side) -> list[dict[str, Any]]:
    """Writes tasks {"id", "prompt", "answer", "rule", "tolerance", "domain"}; see `galenic.align.data.tasks`."""

    def make(chain: Chain) -> dict[str, Any]:
        key = ",".join(map(str, chain.terms))
        return {
            "id": f"{DOMAIN}/{chain.kind}/{key}/{stable_key(chain.prompt) % 10**6:06d}",
            "prompt": chain.prompt,
            "answer": chain.answer(),
            "rule": "numeric",
            "tolerance": 0,
            "domain": DOMAIN,
        }

    return _distinct(make, "chain tasks", count, seed, side)


def chain_conversations(count: int, seed: int, side: Side) -> list[dict[str, Any]]:
    """Writes conversations whose answer works its steps first and ends in `Answer: ...`."""

    def make(chain: Chain) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": chain.prompt},
            {"role": "assistant", "content": chain.worked()},
        ]
        return {"messages": messages, "source": DOMAIN, "department": ""}

    return _distinct(make, "chain conversations", count, seed, side)


def chain_pairs(count: int, seed: int, side: Side) -> list[dict[str, Any]]:
    """Writes preference pairs: the working, and one that goes on from a step that slipped by one or ten."""
    draw = random.Random(stable_key(seed, "slips", side))

    def make(chain: Chain) -> dict[str, Any]:
        number = draw.randrange(len(chain.terms) - 1)
        least = min(list(accumulate(chain.terms))[number + 1 :])  # no result falls below 1
        wrong = draw.choice([by for by in (-10, -1, 1, 10) if least + by >= 1])
        return {
            "prompt": chain.prompt,
            "chosen": chain.worked(),
            "rejected": chain.worked((number, wrong)),
            "source": DOMAIN,
            "department": "",
        }

    return _distinct(make, "chain pairs", count, seed, side)


def chain_questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Writes multiple-choice questions whose wrong results are near misses; see `reasoning.arithmetic_questions`."""

    def make(chain: Chain) -> dict[str, Any]:
        result = Problem("add", (), (), "", Fraction(sum(chain.terms)), chain.unit)
        wrong = near_misses(result, random.Random(stable_key(seed, "misses", chain.prompt)))
        key = ",".join(map(str, chain.terms))
        return {
            "id": f"{DOMAIN}/{chain.kind}/{key}/{stable_key(chain.prompt) % 10**6:06d}",
            "question": chain.prompt,
            "options": [chain.answer(), *wrong],
            "answer": 0,
            "source": DOMAIN,
            "department": "",
            "entity": chain.kind,
        }

    rows = _distinct(make, "chain questions", count, seed, "questions")
    return seal([row for row in rows if len(set(row["options"])) == 4], seed)
