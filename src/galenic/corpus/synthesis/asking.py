"""One way to ask until a reply can be used, many at a time, and to stop when an endpoint fails most of it."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from galenic.corpus.synthesis.checks import Problem
from galenic.corpus.synthesis.client import Client, Reply, RequestFailed
from galenic.runtime import UserError

T = TypeVar("T")
R = TypeVar("R")
_QUOTED = 1000  # characters of an unusable reply that are sent back


async def ask(
    client: Client,
    prompt: str,
    read: Callable[[Reply], T | Problem],
    *,
    key: str,
    attempts: int,
    language: str = "en",
    anew: bool = False,
    **sampling: Any,
) -> tuple[T | Problem, Reply]:
    """Asks, and sends a reply that cannot be used back with what is wrong.

    Args:
        client: who is asked.
        prompt: what is asked.
        read: returns what a reply holds, or why it cannot be used.
        key: tells requests apart that would be equal otherwise.
        attempts: replies at most.
        language: `en` or `zh`: in which what is wrong is told.
        anew: replies that are in the cache do not count among the attempts: what came to nothing in an earlier run is
            asked again.
        **sampling: fields of the request.

    Returns:
        what the last reply holds or why it cannot be used, and that reply.

    Raises:
        RequestFailed, BudgetSpent, UserError: as `Client.complete`.
    """
    messages, counted = [{"role": "user", "content": prompt}], 0
    for attempt in itertools.count(1):
        name = f"{key}/{attempt}"
        counted += not (anew and client.knows(messages, key=name, **sampling))
        reply = await client.complete(messages, key=name, **sampling)
        found = read(reply)
        if not isinstance(found, Problem) or counted >= attempts:
            return found, reply
        messages = [
            messages[0],
            {"role": "assistant", "content": reply.text[:_QUOTED] or "..."},
            {"role": "user", "content": found.told(language)},
        ]
    raise AssertionError  # count() has no end


async def in_order(
    function: Callable[[T], Awaitable[R]], items: Iterable[T], many: int
) -> AsyncGenerator[R, None]:
    """Yields `function(item)` in the order of the items, `many` of them under way; an error cancels the rest."""
    underway: deque[asyncio.Task[R]] = deque()
    try:
        for item in items:
            underway.append(asyncio.ensure_future(_awaited(function, item)))
            if len(underway) >= many:
                yield await underway.popleft()
        while underway:
            yield await underway.popleft()
    finally:
        for task in underway:
            task.cancel()
        await asyncio.gather(*underway, return_exceptions=True)


async def _awaited(function: Callable[[T], Awaitable[R]], item: T) -> R:
    return await function(item)


class Watch:
    """Stops a run whose endpoint fails most of the items."""

    def __init__(self, share: float, minimum: int) -> None:
        self.share, self.minimum = share, minimum
        self.over = self.failed = 0

    def note(self, error: RequestFailed | None) -> None:
        """Counts an item.

        Raises:
            UserError: too many have failed.
        """
        self.over += 1
        self.failed += error is not None
        if error is not None and self.over >= self.minimum and self.failed > self.share * self.over:
            raise UserError(
                f"endpoint: the requests of {self.failed} of {self.over} items failed, the last one with: {error}; "
                "mend it and run the same command, what was answered is kept"
            )
