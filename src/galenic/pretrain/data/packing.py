"""How documents are cut and packed into rows. Pure functions of seeds: nothing to save."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from galenic.corpus.tokens.shards import Shard
from galenic.pretrain.data.bins import fill_bins
from galenic.pretrain.data.drawing import draw_documents, stable_hash


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of one document that fits a row."""

    source: str
    document: int
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows(Sequence[list[Piece]]):
    """Packed rows, kept as arrays: a phase of millions of documents takes some tens of bytes for each."""

    sources: list[str]
    """Names that `source` points to."""
    source: np.ndarray
    """(pieces,) int64; the pieces of row r stand at bounds[r] to bounds[r + 1]."""
    document: np.ndarray
    """(pieces,) int64: number of the document in its source."""
    start: np.ndarray
    """(pieces,) int64: first token of the document that belongs to the piece."""
    length: np.ndarray
    """(pieces,) int64."""
    whole: np.ndarray
    """(pieces,) int64: tokens of the whole document."""
    bounds: np.ndarray
    """(rows + 1,) int64."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, place: int) -> list[Piece]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[Piece]]: ...
    def __getitem__(self, place: int | slice) -> list[Piece] | list[list[Piece]]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        return [
            Piece(
                source=self.sources[self.source[i]],
                document=int(self.document[i]),
                start=int(self.start[i]),
                length=int(self.length[i]),
            )
            for i in range(self.bounds[row], self.bounds[row + 1])
        ]


# ---------------------------------------------------------------------------- cut


def cut(source: str, document: int, length: int, context: int) -> list[Piece]:
    """Cuts a document into pieces of `context` tokens and a rest: full pieces fill rows without padding."""
    _, starts, lengths = cut_all(np.array([length]), context)
    return [
        Piece(source=source, document=document, start=start, length=size)
        for start, size in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


def cut_all(lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents as `cut` does; one that fits a row stays whole.

    Args:
        lengths: (documents,) int64.
        context: tokens in a row.

    Returns:
        (place in `lengths`, start, length) of each piece, int64.
    """
    counts = -(-lengths // context)
    owner = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts  # number of each document's first piece
    starts = (np.arange(len(owner)) - first[owner]) * context
    return owner, starts, np.minimum(context, lengths[owner] - starts)


# ---------------------------------------------------------------------------- pack


def best_fit(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Best-fit bin packing, row after row: the longest piece, then the piece or pair that fills the rest best.

    The report packs so that documents are not truncated (section 2.1); this leaves well under 1% padding when
    there are many short documents. See `fill_bins`.

    Args:
        lengths: of the pieces, each from 1 to `capacity`.
        capacity: tokens in a row.

    Returns:
        Indices of the pieces in each row.
    """
    order, bounds = fill_bins(np.array(list(lengths), dtype=np.int64), capacity)
    return [order[bounds[row] : bounds[row + 1]].tolist() for row in range(len(bounds) - 1)]


def phase_rows(
    shards: dict[str, Shard], mixture: dict[str, float], *, tokens: int, context: int, seed: int, name: str
) -> Rows:
    """Draws a phase's documents by its mixture and packs them into rows of `context` tokens, in training order.

    Args:
        shards: source -> training shard.
        mixture: source -> share of `tokens`, normalised here.
        tokens: the phase's budget.
        context: tokens in a row.
        seed: of the run.
        name: of the phase.

    Returns:
        Rows of pieces, shuffled.
    """
    total = sum(mixture.values())
    drawn = {
        source: draw_documents(
            shards[source], tokens * mixture[source] / total, seed=seed, key=f"{name}/{source}"
        )
        for source in sorted(mixture)
        if mixture[source]
    }
    return pack(shards, drawn, context=context, seed=seed, name=name)


def pack(
    shards: Mapping[str, Shard], drawn: Mapping[str, np.ndarray], *, context: int, seed: int, name: str
) -> Rows:
    """Packs documents into rows of `context` tokens, in an order by chance.

    Args:
        shards: source -> training shard.
        drawn: source -> (documents,) int64 numbers, each as often as it is read; its order numbers `Rows.source`.
        context: tokens in a row.
        seed: of the run.
        name: what else the order depends on.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for number, (source, documents) in enumerate(drawn.items()):
        whole = shards[source].offsets[documents + 1] - shards[source].offsets[documents]
        owner, starts, lengths = cut_all(whole, context)
        columns.append((np.full(len(owner), number), documents[owner], starts, lengths, whole[owner]))
    pieces = [np.concatenate(column) for column in zip(*columns, strict=True)]
    generator = np.random.Generator(np.random.Philox(key=[seed, stable_hash(f"{name}/rows")]))
    shuffled = generator.permutation(len(pieces[0]))
    order, bounds = fill_bins(pieces[3][shuffled], context)
    rows = generator.permutation(len(bounds) - 1)
    sizes = np.diff(bounds)[rows]
    ends = np.cumsum(sizes)
    # Piece j of the k-th row in training order stands at bounds[rows[k]] + j in `order`.
    places = np.arange(len(order)) + np.repeat(bounds[rows] - (ends - sizes), sizes)
    chosen = shuffled[order[places]]
    source, document, start, length, whole = (column[chosen] for column in pieces)
    return Rows(
        sources=list(drawn),
        source=source,
        document=document,
        start=start,
        length=length,
        whole=whole,
        bounds=np.concatenate([[0], ends]),
    )


# ---------------------------------------------------------------------------- report


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What packing cost: how many documents were cut and how much was filled up."""

    context: int
    rows: int
    documents: int
    """Documents drawn, each as often as it was."""
    tokens: int
    """Of them, in rows."""
    truncated: int
    """Documents that are cut, or not there whole, although they would fit a row; never any."""
    split: dict[str, tuple[int, int, int]]
    """source -> documents, documents longer than a row, which must be cut, and the tokens of those."""

    @property
    def padding(self) -> float:
        """Share of the rows' places that hold no token."""
        return 1 - self.tokens / max(self.rows * self.context, 1)

    @property
    def split_documents(self) -> float:
        """Share of documents that are longer than a row."""
        return sum(long for _, long, _ in self.split.values()) / max(self.documents, 1)

    @property
    def split_tokens(self) -> float:
        """Share of tokens in such documents."""
        return sum(tokens for _, _, tokens in self.split.values()) / max(self.tokens, 1)

    def __str__(self) -> str:
        """In words: `truncated 0 documents, split 6.4% (20% of tokens), padding 0.9%`."""
        return (
            f"truncated {self.truncated} documents, split {self.split_documents:.2%} "
            f"({self.split_tokens:.1%} of tokens), padding {self.padding:.2%}"
        )


def packing_report(rows: Rows, context: int) -> PackingReport:
    """Counts what packing did to documents.

    A document that is longer than a row has to be split. One that is not stands in one piece: those that do not are
    counted as truncated.
    """
    first = rows.start == 0
    long = rows.whole > context
    split = {}
    for number, source in enumerate(rows.sources):
        mine = rows.source == number
        tokens = int(rows.length[mine & long].sum())
        split[source] = int((first & mine).sum()), int((first & mine & long).sum()), tokens
    return PackingReport(
        context=context,
        rows=len(rows),
        documents=int(first.sum()),
        tokens=int(rows.length.sum()),
        truncated=int((first & ~long & (rows.length < rows.whole)).sum()),
        split=split,
    )
