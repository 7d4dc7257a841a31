"""Threads over a fixed grid of blocks: many cores, the same bits as one.

The work is cut into blocks the same way whatever the number of threads, every block is computed by one thread alone,
and results come back in the order of the blocks; so sums and outputs do not depend on the number of threads. torch
releases the interpreter lock inside its operations, and reads and writes do too.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Blocks a thread may be ahead of the consumer: bounds the results that wait."""


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Applies `function` to every item in `workers` threads and yields the results in the items' order.

    Args:
        function: computes one item; runs with one torch thread.
        items: read lazily, a few ahead of the consumer.
        workers: threads. Default: as many as torch would use, so `OMP_NUM_THREADS` rules.

    Raises:
        whatever `function` raises, for the first item (in order) that fails; later items are dropped.
    """
    _keep_freed_memory()
    count = workers or torch.get_num_threads()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _keep_freed_memory() -> None:
    """Asks glibc to keep what a block frees for the next block.

    By default buffers of this size go back to the system and come again page by page, which takes longer than the
    arithmetic on them. Where the C library is another one, nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    m_mmap_threshold, m_trim_threshold = -3, -1
    mallopt(m_mmap_threshold, 1 << 25)
    mallopt(m_trim_threshold, 1 << 27)


class Workspace(threading.local):
    """Buffers that a thread keeps from block to block: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns uninitialised memory of this thread, overwritten when the thread asks for the same use again."""
        size = 1
        for length in shape:
            size *= length
        held = self._buffers.get((use, dtype))
        if held is None or held.numel() < size:
            held = self._buffers[use, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)
