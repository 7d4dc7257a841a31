"""Exact and near duplicates: one copy of each text stays and knows how many it stands for.

    signatures --equal hash of all words--> sets ............................... exact duplicates
               --one of each set--> equal band --> agreement of sketches >= least --> sets ... near duplicates

Sets are joined over all bands and sources: who is near to one member belongs to all (single linkage). This file works
in memory; `files` does the same over the signature files of a corpus.

Source: MinHash, Broder 1997; banding as in Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.
Keeping the count of each document's duplicates: Baichuan-M1 report, section 2.1.1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from galenic.compiled import compiled
from galenic.corpus.duplicates.minhash import (
    PERMUTATIONS,
    bands,
    bands_for,
    least_agreement,
    signatures,
    sketches,
)
from galenic.corpus.records import Document
from galenic.corpus.texts import column

NUM_HASHES = PERMUTATIONS
SMALL = 32
"""Rows of a bucket in which every pair is compared."""
REPRESENTATIVES = 16
"""In a larger one, rows are compared with so many that matched none before them: linear time."""
CHUNK = 1 << 18
"""Rows whose sketches are in memory at once."""
KEPT, EXACT, NEAR, SAME_ID = range(4)
"""What becomes of a row."""
VERDICT = np.dtype([("keeper", "<i8"), ("count", "<i8"), ("reason", "u1")])
"""The row that stays for a row (itself if kept), how many rows a kept one stands for, and what becomes of it."""


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """A document that goes because another says the same."""

    document: Document
    kept: str
    """Id of the document that stays."""
    exact: bool


def deduplicate(
    documents: Sequence[Document], *, threshold: float, seed: int
) -> tuple[list[Document], list[Duplicate]]:
    """Removes exact and near duplicates.

    Of each set of duplicates the document with the longest text stays, of equally long ones the smallest id.

    Args:
        documents: with unique ids.
        threshold: least estimated Jaccard similarity of the word 5-gram sets of near duplicates, in (0, 1].
        seed: of the hash functions.

    Returns:
        (kept documents with `duplicates` set, removed documents), each sorted by id.
    """
    ordered = sorted(documents, key=lambda document: document.id)
    signed = signatures(column(document.text for document in ordered), seed=seed)
    everyone = np.ones(len(ordered), dtype=bool)

    same = equal_pairs(signed.exact)
    first = best(cluster(same, len(ordered)), signed.characters, everyone)
    distinct = np.flatnonzero(first == np.arange(len(ordered)))
    near = distinct[_near_pairs(signed.hashes[distinct], threshold)]
    verdict = settle(first, cluster(near, len(ordered)), signed.characters)

    kept, removed = [], []
    for document, (keeper, count, reason) in zip(ordered, verdict.tolist(), strict=True):
        if reason == KEPT:
            kept.append(replace(document, duplicates=count))
        else:
            removed.append(Duplicate(document=document, kept=ordered[keeper].id, exact=reason == EXACT))
    return kept, removed


def near_pairs(signatures: np.ndarray, *, threshold: float) -> list[tuple[int, int]]:
    """Returns pairs of rows whose MinHash signatures agree in at least `threshold` of their places, by their sketches.

    Args:
        signatures: (n, NUM_HASHES) unsigned integers.
        threshold: in (0, 1].

    Returns:
        Pairs (i, j), i < j, sorted; found among pairs that agree in a whole band.
    """
    return [(i, j) for i, j in _near_pairs(signatures, threshold).tolist()]


def _near_pairs(hashes: np.ndarray, threshold: float) -> np.ndarray:
    permutations = hashes.shape[1]
    sketch, least = sketches(hashes), least_agreement(threshold, permutations)
    found = [np.zeros((0, 2), np.int64)]
    for band in bands(hashes, bands_for(threshold, permutations)):
        found += matches(band, lambda rows: sketch[rows], least)
    return np.unique(np.concatenate(found), axis=0)


def equal_pairs(hashes: np.ndarray) -> np.ndarray:
    """Returns pairs (m, 2) that connect the rows of equal 128-bit hashes (n, 2)."""
    found = matches(np.ascontiguousarray(hashes[:, 0]), lambda rows: as_bytes(hashes[rows]), 16)
    return np.concatenate([np.zeros((0, 2), np.int64), *found])


def as_bytes(hashes: np.ndarray) -> np.ndarray:
    """Returns 128-bit hashes (n, 2) as bytes (n, 16), which agree if all do."""
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 16)


# ---------------------------------------------------------------------------- pairs


def matches(keys: np.ndarray, items: Callable[[np.ndarray], np.ndarray], least: int) -> Iterator[np.ndarray]:
    """Yields pairs of rows of equal keys that agree in at least `least` bytes of their items.

    Of a bucket (the rows of one key) of at most SMALL rows every pair is looked at. Of a larger one each row is
    compared with the REPRESENTATIVES first rows that agreed with none before them.

    Args:
        keys: (n,) uint64, as good as random; n at most 2^24.
        items: returns the bytes (m, width) of m rows.
        least: bytes.

    Yields:
        (pairs, 2) int64, the smaller row first.
    """
    rows, starts = buckets(keys)
    for chunk, cuts in _chunks(rows, starts):
        pairs = _agreeing(items(chunk), cuts, least)
        yield chunk[pairs]


def buckets(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of keys that occur at least twice, a bucket a key, ascending in each, and where each starts.

    A row's number takes the place of the lowest bits of its key, so that one sort of numbers does it, without a
    permutation. Keys that differ in these bits only share a bucket: 2^-40 of all pairs at 2^24 rows. Whoever uses a
    bucket compares its rows anyway.

    >>> rows, starts = buckets(np.array([5 << 60, 7 << 60, 5 << 60, 1 << 60], dtype=np.uint64))
    >>> rows.tolist(), starts.tolist()
    ([0, 2], [0, 2])
    """
    mask = np.uint64((1 << max(1, len(keys)).bit_length()) - 1)
    packed = keys & ~mask
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    edge = np.ones(len(keys) + 1, dtype=bool)
    edge[1:-1] = (packed[1:] ^ packed[:-1]) > mask
    packed &= mask
    crowded = ~(edge[:-1] & edge[1:])
    starts = np.flatnonzero(edge[:-1][crowded])
    rows = packed[crowded].astype(np.int64)
    return rows, np.append(starts, len(rows))


def _chunks(rows: np.ndarray, starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts buckets into chunks of at most CHUNK rows; parts of a larger bucket each begin with its first row."""
    bucket, last = 0, len(starts) - 1
    while bucket < last:
        begin = starts[bucket]
        following = int(np.searchsorted(starts, begin + CHUNK, side="right")) - 1
        if following > bucket:
            yield rows[begin : starts[following]], starts[bucket : following + 1] - begin
            bucket = following
            continue
        for place in range(begin + 1, starts[bucket + 1], CHUNK - 1):
            part = rows[place : min(place + CHUNK - 1, starts[bucket + 1])]
            yield np.append(rows[begin], part), np.array([0, len(part) + 1])
        bucket += 1


def _agreeing(items: np.ndarray, starts: np.ndarray, least: int) -> np.ndarray:
    """Returns pairs (m, 2) of places in one bucket whose items (n, width) agree in at least `least` bytes."""
    sizes = np.diff(starts)
    most = np.where(sizes <= SMALL, sizes * (sizes - 1) // 2, sizes * REPRESENTATIVES).sum()
    pairs = np.empty((most, 2), np.int32)
    return pairs[: _compare(items, starts, least, pairs)]


@compiled
def _compare(items, starts, least, pairs):
    found = 0
    held = np.empty(SMALL, np.int64)
    for bucket in range(starts.size - 1):
        begin, end = starts[bucket], starts[bucket + 1]
        small = end - begin <= SMALL
        count = 0
        for row in range(begin, end):
            alone = True
            for k in range(count):
                if _agreement(items[held[k]], items[row]) >= least:
                    pairs[found, 0], pairs[found, 1] = held[k], row
                    found += 1
                    alone = False
            if small or (alone and count < REPRESENTATIVES):
                held[count] = row
                count += 1
    return found


@compiled
def _agreement(left, right):
    equal = np.uint8(0)  # at most 255 bytes: narrow sums fill the processor's vectors
    for k in range(left.size):
        equal = np.uint8(equal + np.uint8(left[k] == right[k]))
    return np.int64(equal)


# ---------------------------------------------------------------------------- sets


def cluster(pairs: Iterable[tuple[int, int]] | np.ndarray, count: int) -> np.ndarray:
    """Returns for each of `count` items the smallest item it is connected with (union-find).

    >>> cluster([(1, 3), (3, 4)], 5).tolist()
    [0, 1, 2, 1, 1]
    """
    if not isinstance(pairs, np.ndarray):
        pairs = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    root = np.arange(count)
    unite(root, pairs)
    return roots(root)


@compiled
def unite(root, pairs):
    """Joins sets: root (n,) int64 leads each item to its set's smallest; pairs (m, 2) belong together."""
    for k in range(pairs.shape[0]):
        left, right = pairs[k, 0], pairs[k, 1]
        while root[left] != left:
            root[left] = root[root[left]]
            left = root[left]
        while root[right] != right:
            root[right] = root[root[right]]
            right = root[right]
        if left < right:
            root[right] = left
        else:
            root[left] = right


@compiled
def roots(root):
    """Returns `root` with every item led straight to its set's smallest, in place: leaders are smaller, so one pass."""
    for item in range(root.size):
        root[item] = root[root[item]]
    return root


@compiled
def best(root, characters, eligible):
    """Returns for each row the eligible row of its set with the longest text, of equally long ones the first; or -1.

    Args:
        root: (n,) int64, the same for all rows of a set.
        characters: (n,) length of each text.
        eligible: (n,) bool.
    """
    leader = np.full(root.size, -1, np.int64)
    for row in range(root.size):
        if eligible[row]:
            known = leader[root[row]]
            if known < 0 or characters[row] > characters[known]:
                leader[root[row]] = row
    return leader[root]


def settle(first: np.ndarray, near: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """Returns the VERDICT (n,) on each row.

    Args:
        first: (n,) for each row the best of its exact set; -1 for rows that go because of their id.
        near: (n,) for each row that is its own `first`, the smallest such row it is connected with.
        characters: (n,) length of each text.
    """
    row = np.arange(len(first))
    here = first >= 0
    group = near[first]  # of rows that go, anything
    keeper = best(group, characters, first == row)
    verdict = np.zeros(len(first), VERDICT)
    counts = np.bincount(group[here], minlength=len(first))
    verdict["keeper"] = np.where(here, keeper, -1)
    verdict["count"] = np.where(keeper == row, counts[group], 0)
    verdict["reason"] = np.select([~here, first != row, keeper != row], [SAME_ID, EXACT, NEAR], KEPT)
    return verdict
