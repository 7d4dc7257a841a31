"""What requests may cost together, and how fast they may follow each other."""

import asyncio
import time

from galenic.corpus.synthesis.synthesise_config import BudgetConfig

Cost = tuple[int, int, float]
"""(requests, tokens, money)"""


class BudgetSpent(Exception):
    """The next request would not fit the budget."""


class Budget:
    """Holds back the largest possible cost of a request before it is sent, and settles it afterwards."""

    def __init__(self, limits: BudgetConfig) -> None:
        self.limits = (limits.requests, limits.tokens, limits.money)
        self.spent: list[float] = [0, 0, 0.0]
        self._held: list[float] = [0, 0, 0.0]
        self._underway = 0
        self._changed = asyncio.Event()

    def add(self, cost: Cost) -> None:
        """Counts what was spent."""
        self.spent = [a + b for a, b in zip(self.spent, cost, strict=True)]

    async def hold(self, cost: Cost) -> None:
        """Waits until the cost fits.

        Raises:
            BudgetSpent: it does not, and nothing is under way that could turn out cheaper.
        """
        while any(
            limit is not None and spent + held + more > limit * (1 + 1e-9)
            for limit, spent, held, more in zip(self.limits, self.spent, self._held, cost, strict=True)
        ):
            if not self._underway:
                raise BudgetSpent("the budget is spent")
            self._changed.clear()
            await self._changed.wait()
        self._held = [a + b for a, b in zip(self._held, cost, strict=True)]
        self._underway += 1

    def settle(self, held: Cost, actual: Cost) -> None:
        """Gives back what was held and counts what it came to."""
        self._held = [a - b for a, b in zip(self._held, held, strict=True)]
        self._underway -= 1
        self.add(actual)
        self._changed.set()


class Pace:
    """Lets units through evenly, so many a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self.seconds = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self, units: float) -> None:
        """Waits for its turn."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + units * self.seconds
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, units: float) -> None:
        """Takes back units that were let through but not used."""
        self._next -= units * self.seconds
