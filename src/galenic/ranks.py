"""Processes side by side: `torchrun` (or `accelerate launch`) starts several, which share the work of one verb.

Without a launcher there is one, and nothing here does anything. What ranks tell each other goes through `gloo`, as JSON
or numbers; tensors on CUDA devices go through NCCL. A process that dies or hangs is noticed by the others: they stop
with one line. Import is cheap (no torch).
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from galenic.runtime import UserError

TIMEOUT_SECONDS = 600.0
"""How long a process waits for another by default."""
CLOSED = re.compile(
    r"closed by peer|reset by peer|[Bb]roken pipe|[Rr]efused|unhandled system error|remote process"
)
"""What gloo and NCCL say when a process is gone."""
LATE = re.compile(r"[Tt]imed? ?out")
"""What they say when it does not answer."""


def rank() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Connects the processes, if there are several and they are not connected yet.

    Args:
        timeout_seconds: how long a process waits for another.

    Raises:
        UserError: another process died or did not answer in time; a machine has fewer GPUs than processes.
    """
    if ranks() == 1:
        yield
        return
    import torch
    import torch.distributed as distributed

    if distributed.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise UserError(f"process {rank()} is number {local} of its machine, which has {devices} GPUs")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        yield
    except UserError:
        raise
    except RuntimeError as error:  # of torch.distributed; anything else goes on as it is
        message = lost(error, timeout_seconds)
        if message is None:
            raise
        raise UserError(message) from error
    distributed.destroy_process_group()  # after an error that could wait for those who are gone


def lost(error: BaseException, timeout_seconds: float) -> str | None:
    """Says that another process was lost, if that is what an error of torch.distributed means."""
    text = str(error)
    if CLOSED.search(text):
        what = "another one has stopped; its own message says why"
    elif LATE.search(text):
        what = f"another one has not answered for {timeout_seconds:g} seconds: it hangs, or died with its machine"
    else:
        return None
    return f"process {rank()} of {ranks()}: {what}. The same command continues from what was saved last"


def barrier() -> None:
    """Waits until all processes have come here."""
    if ranks() > 1:
        import torch.distributed as distributed

        distributed.barrier()


@contextmanager
def zero_first() -> Iterator[None]:
    """Lets process 0 through alone, then all others: for what makes files that the others find."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def gathered(value: Any, group: Any = None) -> list[Any]:
    """Returns the JSON values of all processes, in their order, to all of them; `group`: of torch's, to go through."""
    if ranks() == 1:
        return [value]
    import torch
    import torch.distributed as distributed

    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks())]
    distributed.all_gather(lengths, torch.tensor([len(own)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(ranks())]
    distributed.all_gather(parts, padded, group=group)
    return [
        json.loads(bytes(part[: int(length)].tolist())) for part, length in zip(parts, lengths, strict=True)
    ]


def united(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of all processes' mappings to all of them."""
    return {key: value for part in gathered(dict(found)) for key, value in part.items()}


def added_up(counts: Any) -> Any:
    """Returns the sum of all processes' whole numbers, a numpy int64 array, to all of them."""
    if ranks() > 1:
        import torch
        import torch.distributed as distributed

        distributed.all_reduce(torch.from_numpy(counts))  # in place
    return counts


def share(sizes: Mapping[str, int]) -> set[str]:
    """Returns the names whose work this process does, such that all have about the same to do.

    Example:
        >>> sorted(share({"a": 5, "b": 7}))
        ['a', 'b']
    """
    filled = [0] * ranks()
    own = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        filled[least] += sizes[name]
        if least == rank():
            own.add(name)
    return own


def leave(code: int = 0) -> NoReturn:
    """Ends this process at once.

    Threads of gloo may not yet have let go of the last tensors that were sent. They need Python for it, and abort the
    process when they find it at its end (torch 2.13): one of four processes in some tens of runs on a busy machine.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
