"""The engine: one function over many units of work, on the cores of one machine or on a Ray cluster, by Daft.

    units --Daft--> workers (processes here, actors there): function(unit) --> results, as they come

A unit is a small dictionary that says what to read and where to write; the function reads its slice and writes its
files by name, whole or not at all. So a killed run goes on with the units whose files are missing, memory is bounded
by the unit, and both runners write the same bytes.
"""

import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from galenic.runtime import UserError

os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # read when Daft is imported; our own bars suffice

Unit = dict[str, Any]
"""What one call works on: JSON values."""


def map_units(
    function: Callable[[Unit], Unit], units: Sequence[Unit], *, workers: int, address: str = ""
) -> Iterator[Unit]:
    """Calls `function(unit)` for every unit in worker processes and yields the results in any order.

    Args:
        function: a function of a module (it travels by name), from JSON values to JSON values.
        units: what to do.
        workers: processes at once.
        address: of a Ray cluster, such as `ray://host:10001` or `auto`; on this machine if empty.

    Raises:
        UserError: a worker raised one; its message is kept. Or a process of this machine died; a cluster puts another
            in the place of one that dies, and does its unit again.
        RuntimeError: a worker failed otherwise; its traceback is in the message.
    """
    if not units:
        return
    if workers <= 1 and not address:
        for unit in units:
            yield function(unit)
        return
    import daft
    from daft import DataType, col

    if address:
        _connect(address)

    @daft.cls(max_concurrency=min(workers, len(units)), use_process=True)
    class Worker:
        @daft.method.batch(return_dtype=DataType.string(), batch_size=1)
        def work(self, units: Any) -> list[str]:
            return [_answer(function, unit) for unit in units.to_pylist()]

    rows = daft.from_pydict({"unit": [json.dumps(unit) for unit in units]})
    if address:
        rows = rows.into_partitions(len(units))
    work: Any = Worker().work
    answers = rows.select(work(col("unit")).alias("answer")).iter_rows(results_buffer_size=workers)
    while (row := _next(answers)) is not None:
        answer = json.loads(row["answer"])
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "traceback" in answer:
            raise RuntimeError(f"a worker failed:\n{answer['traceback']}")
        yield answer["result"]


def _next(answers: Iterator[Unit]) -> Unit | None:
    """Returns the next answer, or None after the last.

    Raises:
        UserError: a worker died: what killed it is not in its answer.
    """
    try:
        return next(answers, None)
    except RuntimeError as error:
        if "UDF process" not in str(error) and "Actor" not in str(error):
            raise
        raise UserError(
            "a worker process died, killed or out of memory; with less unit_bytes or fewer workers it needs less. "
            "The same command continues"
        ) from error


def cores(address: str) -> int:
    """Returns how many cores this machine has, or the cluster."""
    if not address:
        return os.cpu_count() or 1
    _connect(address)
    import ray  # pyrefly: ignore[missing-import]

    return int(ray.cluster_resources().get("CPU", 1))


@cache
def _connect(address: str) -> None:
    """Makes Daft run on a Ray cluster, once a process.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    import daft

    try:
        import ray  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError:
        raise UserError(
            "address: a cluster needs Ray: pip install 'galenic[cluster]' (here and on its nodes)"
        ) from None
    try:
        ray.init(address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
    except (ConnectionError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"address: no Ray cluster at '{address}' ({told}); start it with `ray start --head`"
        ) from None
    daft.set_runner_ray(noop_if_initialized=True)


def _answer(function: Callable[[Unit], Unit], unit: str) -> str:
    try:
        return json.dumps({"result": function(json.loads(unit))})
    except UserError as error:
        return json.dumps({"mistake": str(error)})
    except Exception:
        return json.dumps({"traceback": traceback.format_exc()})
