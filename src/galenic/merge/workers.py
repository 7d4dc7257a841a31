"""Several threads over a fixed grid of blocks, with the same bits as one.

The work is cut into blocks the same way whatever the number of workers, every block is computed by one worker alone,
and results come back in the order of the blocks; so sums and outputs do not depend on how many there are. Reading,
writing and the compiled loops (`kernels`) let go of Python's lock, so threads run side by side.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Groups of items a thread may be ahead of the consumer: bounds the results that wait."""
WAITING = 2
"""Threads beyond the cores: some always wait for a disk or for each other."""
GROUP = 8
"""Items a thread takes at a time: every time it comes for more, threads wait for each other."""


def in_order(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Result]:
    """Applies `function` to every item in `workers` threads and yields the results in the items' order.

    Args:
        function: computes one item; runs with one torch thread.
        items: what it is applied to.
        workers: how many threads. Default: as many as torch would use, so `OMP_NUM_THREADS` rules, and `WAITING` more.

    Raises:
        whatever `function` raises, for the first item (in order) that fails; later items are dropped.
    """
    count = workers or torch.get_num_threads() + WAITING
    size = max(1, min(GROUP, len(items) // (4 * count)))

    def several(start: int) -> list[Result | BaseException]:
        done: list[Result | BaseException] = []
        for item in items[start : start + size]:
            try:
                done.append(function(item))
            except Exception as error:
                done.append(error)
                break
        return done

    with ThreadPoolExecutor(count, initializer=_begin) as pool:
        waiting: deque[Future[list[Result | BaseException]]] = deque()
        starts = iter(range(0, len(items), size))
        try:
            while True:
                for start in starts:
                    waiting.append(pool.submit(several, start))
                    if len(waiting) == AHEAD * count:
                        break
                if not waiting:
                    return
                for result in waiting.popleft().result():
                    if isinstance(result, BaseException):
                        raise result
                    yield result
        finally:
            for future in waiting:
                future.cancel()


def _begin() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(
        False
    )  # training sets it, and threads inherit it: subnormal weights would become 0
