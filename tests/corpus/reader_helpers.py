"""What the tests of readers share: a source, and reading all of it."""

import json
import re
import sys
from contextlib import contextmanager

import pyarrow as pa
import pytest

from galenic.corpus.config import SourceConfig
from galenic.corpus.units import plan_units, read_unit

COLUMNS = ["id", "text", "language", "category", "department"]


def source(path, format, **changes):
    return SourceConfig(**{"name": "s", "path": str(path), "format": format, "licence": "CC0", **changes})


def read(path, format, unit_bytes=2**26, **changes):
    """Returns (rows, drops as (id, reason, detail, text)) of a source, checking what holds for every table."""
    config = source(path, format, **changes)
    rows, drops = [], []
    units = plan_units([config], unit_bytes)
    assert units == plan_units([config], unit_bytes) and units == json.loads(json.dumps(units))
    assert [unit["number"] for unit in units] == list(range(len(units)))
    for unit in units:
        for table in read_unit(unit, config, lambda *row: drops.append(row)):
            assert table.column_names == COLUMNS
            assert all(kind == pa.large_string() for kind in table.schema.types)
            assert 0 < table.num_rows <= 2000
            assert not sum(column.null_count for column in table.columns)
            table.validate(full=True)
            rows += table.to_pylist()
    return rows, drops


@contextmanager
def memory_within(most):
    """Fails if the resident memory of this process grows by more than `most` bytes at any moment inside."""
    if sys.platform != "linux":
        pytest.skip("the peak of memory is reset on Linux only")

    def resident(name):
        with open("/proc/self/status") as file:
            return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) * 1024

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    yield
    grown = resident("VmHWM") - before
    assert grown <= most, f"{grown / 2**20:.0f} MiB more"


def texts(rows):
    return {row["id"]: row["text"] for row in rows}


def reasons(drops):
    return [(drop[0], drop[1]) for drop in drops]
