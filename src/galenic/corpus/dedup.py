"""Exact and near duplicates, on Daft: one copy of each text stays and knows how many it stands for.

    texts --normalise--> group by equal text ............ exact duplicates
          --MinHash--> bands --equal band--> candidates --estimate >= threshold--> union-find ... near duplicates

Source: MinHash, Broder 1997; banding as in Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.
Keeping the count of each document's duplicates: Baichuan-M1 report, section 2.1.1.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from galenic.corpus.records import Document

os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # read when Daft is imported; our own bars suffice

NUM_HASHES = 128
BANDS = 16
"""Bands of 8 hashes: a pair of similarity 0.85 meets in some band with probability 0.99, one of 0.5 with 0.06."""
NGRAM = 5
"""Words in a shingle; a Han character counts as a word."""


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
    import daft
    from daft import col
    from daft.functions import minhash

    ordered = sorted(documents, key=lambda document: (-len(document.text), document.id))
    table = daft.from_pydict(
        {"row": np.arange(len(ordered), dtype=np.int64).tolist(), "text": [d.text for d in ordered]}
    )
    # Punctuation stays: 7 + 5 is not 7 - 5.
    words = col("text").lower().regexp_replace(r"(\p{Han})", " $1 ").regexp_replace(r"\s+", " ").strip()
    table = table.select(col("row"), words.alias("words"))
    groups = table.groupby("words").agg(col("row").list_agg().alias("rows"), col("row").min().alias("first"))
    firsts = groups.select(
        col("rows"),
        col("first"),
        minhash(col("words"), num_hashes=NUM_HASHES, ngram_size=NGRAM, seed=seed + 1).alias("signature"),
    ).to_arrow()

    first = firsts.column("first").to_numpy()
    order = np.argsort(
        first, kind="stable"
    )  # rows are ordered by who stays, so the smallest row of a set stays
    flat = firsts.column("signature").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    signatures = flat.reshape(-1, NUM_HASHES)[order]
    first = first[order]
    members = [sorted(rows) for rows in firsts.column("rows").to_pylist()]
    members = [members[i] for i in order]
    root = cluster(near_pairs(signatures, threshold=threshold), len(first))

    counts = np.zeros(len(first), dtype=np.int64)
    for index, rows in enumerate(members):
        counts[root[index]] += len(rows)
    kept = [replace(ordered[first[i]], duplicates=int(counts[i])) for i in range(len(first)) if root[i] == i]
    removed = []
    for index, rows in enumerate(members):
        keeper = ordered[first[root[index]]].id
        for row in rows:
            if row != first[index] or root[index] != index:
                removed.append(Duplicate(document=ordered[row], kept=keeper, exact=row != first[index]))
    return sorted(kept, key=lambda d: d.id), sorted(removed, key=lambda d: d.document.id)


def near_pairs(signatures: np.ndarray, *, threshold: float) -> list[tuple[int, int]]:
    """Returns pairs of rows whose MinHash signatures agree in at least `threshold` of their places.

    Args:
        signatures: (n, NUM_HASHES) unsigned integers.
        threshold: in (0, 1].

    Returns:
        Pairs (i, j), i < j, sorted; found among pairs that agree in a whole band, so a pair just at a low threshold
        may be missed.
    """
    rows = NUM_HASHES // BANDS
    found: set[tuple[int, int]] = set()
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * rows))).ravel()
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        edges = np.flatnonzero(np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1], [True])))
        for start, end in pairwise(edges):
            if end - start > 1:
                found.update(_agreeing(signatures, np.sort(order[start:end]), threshold))
    return sorted(found)


def _agreeing(signatures: np.ndarray, bucket: np.ndarray, threshold: float) -> Iterable[tuple[int, int]]:
    for place, row in enumerate(bucket[:-1]):
        rest = bucket[place + 1 :]
        agreement = (signatures[rest] == signatures[row]).mean(axis=1)
        for other in rest[agreement >= threshold]:
            yield int(row), int(other)


def cluster(pairs: Iterable[tuple[int, int]], count: int) -> np.ndarray:
    """Returns for each of `count` items the smallest item it is connected with (union-find).

    >>> cluster([(1, 3), (3, 4)], 5).tolist()
    [0, 1, 2, 1, 1]
    """
    root = np.arange(count)

    def find(item: int) -> int:
        while root[item] != item:
            root[item] = root[root[item]]
            item = int(root[item])
        return item

    for left, right in pairs:
        a, b = sorted((find(left), find(right)))
        root[b] = a
    return np.array([find(item) for item in range(count)], dtype=np.int64)
