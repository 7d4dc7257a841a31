"""What stays, how often it is repeated, and what is held out: decided in one process over a few bytes a document.

    facts/N.npz, duplicates/N.npy, columns of clean/N.parquet --> decisions/N.npz --> finish_unit

A document's fate depends on its own numbers and on its source's, never on the order in which workers came back.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.config import CorpusConfig, SourceConfig
from galenic.corpus.duplicates.dedup import EXACT, NEAR, SAME_ID
from galenic.corpus.engine import Unit
from galenic.corpus.mixtures.sampling import Sampling, ScoreHistogram, add_ranks, weights
from galenic.corpus.starter.selection import heldout_groups
from galenic.runtime import atomic_path, write_json

KEPT = "kept"
"""Reason number 0."""


class _Fates:
    """Why each document goes: the first reason given, or none."""

    def __init__(self, count: int) -> None:
        self.of = np.zeros(count, dtype=np.int16)
        self.reasons = [KEPT]

    def drop(self, rows: np.ndarray, reason: str) -> None:
        """Marks those of the rows that have no reason yet."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        rows = rows[self.of[rows] == 0]
        self.of[rows] = self.reasons.index(reason)

    def kept(self, rows: np.ndarray) -> np.ndarray:
        """Returns those of the rows that stay so far."""
        return rows[self.of[rows] == 0]


def decide(
    units: Sequence[Unit], sources: Mapping[str, SourceConfig], config: CorpusConfig, work: Path
) -> None:
    """Decides about every document that survived cleaning and leaves the decisions for `finish_unit`.

    Args:
        units: in order; their facts and duplicates lie in the work folder.
        sources: by name.
        config: of the run.
        work: the work folder.
    """
    group, order, size, starts = _facts(units, work)
    rows_of = {name: _rows(name, units, starts) for name in sources}
    verdicts = [np.load(work / "duplicates" / f"{unit['number']:06d}.npy") for unit in units]
    verdict = np.concatenate(verdicts)
    fates = _Fates(len(group))
    for reason, name in ((SAME_ID, "duplicate id"), (EXACT, "exact duplicate"), (NEAR, "near duplicate")):
        fates.drop(np.flatnonzero(verdict["reason"] == reason), name)
    for name, source in sources.items():
        if source.limit is not None:  # a stable random choice
            rows = fates.kept(rows_of[name])
            fates.drop(rows[np.argsort(order[rows], kind="stable")[source.limit :]], "over the limit")

    weight = _weights(units, sources, config.sampling, starts, verdict["count"], size, fates, work)
    heldout = np.zeros(len(group), dtype=bool)
    for rows in rows_of.values():
        rows = fates.kept(rows)
        heldout[rows] = heldout_groups(group[rows], config.heldout_share)

    write_json(work / "reasons.json", fates.reasons)
    _write_keepers(units, starts, np.unique(verdict["keeper"][verdict["reason"] != 0]), work)
    columns: dict[str, Any] = {"fate": fates.of, "weight": weight, "heldout": heldout}
    columns |= {"count": verdict["count"], "keeper": verdict["keeper"]}
    for unit, start, stop in zip(units, starts[:-1], starts[1:], strict=True):
        place = work / "decisions" / f"{unit['number']:06d}.npz"
        with atomic_path(place) as path, open(path, "wb") as file:
            np.savez(file, **{key: column[start:stop] for key, column in columns.items()})


def _facts(units: Sequence[Unit], work: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns group, order and bytes of every document, and where each unit's begin (units + 1)."""
    groups, orders, lengths, sizes = [], [], [], [0]
    for unit in units:
        with np.load(work / "facts" / f"{unit['number']:06d}.npz", allow_pickle=False) as file:
            groups.append(file["group"])
            orders.append(file["order"])
            lengths.append(file["bytes"])
        sizes.append(len(groups[-1]))
    return np.concatenate(groups), np.concatenate(orders), np.concatenate(lengths), np.cumsum(sizes)


def _rows(name: str, units: Sequence[Unit], starts: np.ndarray) -> np.ndarray:
    parts = [
        np.arange(start, stop)
        for unit, start, stop in zip(units, starts[:-1], starts[1:], strict=True)
        if unit["source"] == name
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _weights(
    units: Sequence[Unit],
    sources: Mapping[str, SourceConfig],
    sampling: Sampling,
    starts: np.ndarray,
    count: np.ndarray,
    size: np.ndarray,
    fates: _Fates,
    work: Path,
) -> np.ndarray:
    """Returns how many times an epoch repeats each document; drops those that sampling does not want."""
    weight = np.zeros(len(count))
    histograms: dict[str, ScoreHistogram] = {}
    for ranking in (True, False):
        if ranking and not sampling.score:
            continue
        for unit, start, stop in zip(units, starts[:-1], starts[1:], strict=True):
            rows = fates.kept(np.arange(start, stop))
            if not len(rows):
                continue
            columns = _columns(unit, sources[unit["source"]], rows - start, work)
            columns["duplicates"], columns["bytes"] = count[rows], size[rows]
            if ranking:
                add_ranks(histograms, columns, sampling)
                continue
            weight[rows], reasons = weights(columns, sampling, histograms)
            for reason in sorted({reason for reason in reasons.tolist() if reason}):
                fates.drop(rows[reasons == reason], reason)
    return weight


def _columns(unit: Unit, source: SourceConfig, rows: np.ndarray, work: Path) -> dict[str, np.ndarray]:
    """Returns what sampling may ask of a unit's documents: every column but the text, and the source's own."""
    import pyarrow
    from pyarrow import parquet

    path = work / "clean" / f"{unit['number']:06d}.parquet"
    names = [name for name in parquet.read_schema(path).names if name not in ("id", "text")]
    table = parquet.read_table(path, columns=names).take(pyarrow.array(rows))
    columns = {name: table[name].to_numpy() for name in names}
    columns["source"] = np.full(len(rows), source.name, dtype=object)
    columns["group"] = np.full(len(rows), source.group, dtype=object)
    columns["weight"] = np.full(len(rows), source.weight)
    return columns


def _write_keepers(units: Sequence[Unit], starts: np.ndarray, keepers: np.ndarray, work: Path) -> None:
    """Writes the ids of the documents that stand for others, so that the ledger can name them."""
    import pyarrow
    from pyarrow import ipc, parquet

    ids: list[Any] = []
    for unit, start, stop in zip(units, starts[:-1], starts[1:], strict=True):
        inside = keepers[(keepers >= start) & (keepers < stop)] - start
        if len(inside):
            path = work / "clean" / f"{unit['number']:06d}.parquet"
            ids += parquet.read_table(path, columns=["id"])["id"].take(pyarrow.array(inside)).chunks
    column = pyarrow.chunked_array(ids, type=pyarrow.large_string()).combine_chunks()
    table = pyarrow.table({"row": pyarrow.array(keepers, pyarrow.int64()), "id": column})
    with atomic_path(work / "keepers.arrow") as path, pyarrow.OSFile(str(path), "wb") as sink:
        with ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
