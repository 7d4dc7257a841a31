"""Many cores over a fixed grid of blocks, with the same bits as one.

The work is cut into blocks the same way whatever the number of workers, every block is computed by one worker alone,
and results come back in the order of the blocks; so sums and outputs do not depend on how many there are.

Workers are processes where the system can fork, else threads: between short operations threads wait for each other's
interpreter lock, which made two of them no faster than one (benchmarks/merging_speed.py measures whole merges).
"""

import ctypes
import multiprocessing
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch import Tensor

from galenic.runtime import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Blocks a thread may be ahead of the consumer: bounds the results that wait."""


def in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None = None,
    forks: bool = True,
) -> Iterator[Result]:
    """Applies `function` to every item in `workers` processes or threads and yields the results in the items' order.

    Args:
        function: computes one item; runs with one torch thread. Where workers are processes, what it returns is
            copied (use numpy's arrays, not tensors), and what it changes in memory is lost.
        items: what it is applied to.
        workers: how many. Default: as many as torch would use threads, so `OMP_NUM_THREADS` rules.
        forks: whether workers may be processes.

    Raises:
        UserError: a process was killed, most likely for want of memory.
        whatever `function` raises, for the first item (in order) that fails; later items are dropped.
    """
    count = min(workers or torch.get_num_threads(), max(1, len(items)))
    # A process that has started CUDA cannot be forked; on macOS, hardly any can.
    if forks and count > 1 and sys.platform == "linux" and not torch.cuda.is_initialized():
        yield from _in_processes(function, items, count)
    else:
        yield from _in_threads(function, items, count)


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Result]:
    _keep_freed_memory()
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


def _in_processes(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Result]:
    """Deals the items to forked processes in turn; a full pipe keeps a process from running far ahead."""
    context = multiprocessing.get_context("fork")
    ends: list[Connection] = []
    processes = []
    try:
        for k in range(count):
            end, others_end = context.Pipe(duplex=False)
            ends.append(end)
            process = context.Process(
                target=_work, args=(function, items[k::count], others_end, ends), daemon=True
            )
            with warnings.catch_warnings():
                # Python warns of locks that other threads hold: the children only compute, read and write.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            processes.append(process)
            others_end.close()
        for i in range(len(items)):
            try:
                done, result = ends[i % count].recv()
            except EOFError:
                processes[i % count].join()
                raise UserError(
                    f"a worker process died (exit code {processes[i % count].exitcode}), most likely for want of "
                    "memory; try again with OMP_NUM_THREADS=1"
                ) from None
            if not done:
                raise result
            yield result
    finally:
        for process in processes:
            process.kill()
            process.join()
        for end in ends:
            end.close()


def _work(
    function: Callable[[Any], Any], items: Sequence[Any], results: Connection, ends: Sequence[Connection]
) -> None:
    for end in ends:
        end.close()  # as long as a child held one, nobody would notice that the parent is dead
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    _keep_freed_memory()
    try:
        for item in items:
            results.send((True, function(item)))
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note("".join(traceback.format_exception(error)))
        results.send((False, error))


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
