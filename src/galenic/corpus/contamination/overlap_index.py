"""From the pieces of evaluation items to the sorted keys that `overlap.scan` looks up."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from galenic.corpus.contamination import overlap
from galenic.corpus.texts import buffers, column


class Sizes(NamedTuple):
    """What words and windows weigh."""

    latin: int
    """A word of letters and digits."""
    han: int
    """A Han character."""
    ngram: int
    """A run that counts by itself; pieces of this weight are long."""
    seed: int
    """A window that whatever is found begins with or holds."""
    shingle: int
    """A window whose set is compared for near copies."""
    shortest: int
    """A short piece with its answer."""
    stock: int
    """Pieces that may share an n-gram or a shingle; what more of them share is common wording."""


def build_index(
    texts: Sequence[str], answers: Sequence[str], alone: Sequence[bool], sizes: Sizes
) -> tuple[overlap.Index, list[int], list[int]]:
    """Indexes pieces.

    Args:
        texts: of pieces.
        answers: the answer that a short one needs near, or an empty string.
        alone: whether a short one may stand for its item.
        sizes: how long is long.

    Returns:
        (the index, the numbers of the texts that are in it, the piece of each).
    """
    split = partial(overlap.split_all, table=overlap.folding(), latin=sizes.latin, han=sizes.han)
    words, weights, at = split(*buffers(column(texts)))
    answer_words, answer_weights, answer_at = split(*buffers(column(answers)))
    weight = _sums(weights, at)
    long = weight >= sizes.ngram
    short = (
        ~long
        & np.array(alone)
        & (weight >= sizes.seed)
        & (weight + _sums(answer_weights, answer_at) >= sizes.shortest)
    )

    pieces: dict[tuple[bytes, bytes], int] = {}
    kept, piece, chosen = [], [], []
    for t in np.flatnonzero(long | short):
        answer = b"" if long[t] else answer_words[answer_at[t] : answer_at[t + 1]].tobytes()
        key = (words[at[t] : at[t + 1]].tobytes(), answer)
        if key not in pieces:
            pieces[key] = len(pieces)
            chosen.append(t)
        kept.append(int(t))
        piece.append(pieces[key])

    rows = np.array(chosen, dtype=np.int64)
    places, starts = _gather(at, rows)
    words, weights = words[places], weights[places]
    answer_rows = [answer_words[answer_at[t] : answer_at[t + (not long[t])]] for t in rows]
    answer_of = np.concatenate([[0], np.cumsum([len(row) for row in answer_rows])]).astype(np.int64)
    is_long = long[rows]

    keys, there = overlap.windows(words, weights, starts, sizes.seed)
    shingles, full = overlap.windows(words, weights, starts, sizes.shingle)
    of_long = np.repeat(is_long, np.diff(starts))
    grams, whole = overlap.windows(words, weights, starts, sizes.ngram)
    owner = np.repeat(np.arange(len(rows)), np.diff(starts))
    ngrams, ngram_at, ngram_places = _postings(grams, whole, owner, sizes.stock)
    seeds, seed_at, seed_places = _postings(keys, there & of_long, owner, sizes.stock)
    sets = [
        np.unique(shingles[a:b][full[a:b]]) if wide else shingles[:0]
        for a, b, wide in zip(starts[:-1], starts[1:], is_long, strict=True)
    ]
    shorts = np.flatnonzero(~is_long)
    short_keys = np.array([overlap.key_of(words, starts[p], starts[p + 1]) for p in shorts], dtype=np.uint64)
    order = np.argsort(short_keys, kind="stable")
    begin = np.concatenate([ngram_places, seed_places, starts[:-1][~is_long]])
    index = overlap.Index(
        words=words,
        pieces=starts,
        answers=np.concatenate([*answer_rows, words[:0]]),
        answer_of=answer_of,
        bits=_bits(keys[begin]),
        ngrams=ngrams,
        ngram_at=ngram_at,
        ngram_places=ngram_places,
        seeds=seeds,
        seed_at=seed_at,
        seed_places=seed_places,
        sets=np.concatenate([*sets, words[:0]]),
        set_of=np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.int64),
        shorts=short_keys[order],
        short_piece=shorts[order],
        lengths=np.unique(np.diff(starts)[~is_long]),
    )
    return index, kept, piece


def _sums(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Returns the sum of `values[at[i]:at[i + 1]]` for each i."""
    total = np.concatenate([[0], np.cumsum(values)])
    return total[at[1:]] - total[at[:-1]]


def _gather(at: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the chosen rows, one after the other, and where each begins."""
    sizes = at[rows + 1] - at[rows]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return np.repeat(at[rows] - starts[:-1], sizes) + np.arange(starts[-1]), starts


def _postings(
    keys: np.ndarray, there: np.ndarray, owner: np.ndarray, stock: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (sorted keys, where the places of each begin, places), without keys of more than `stock` owners."""
    places = np.flatnonzero(there)
    places = places[np.lexsort((places, keys[places]))]
    first = np.concatenate([[True], keys[places][1:] != keys[places][:-1]])[: len(places)]
    group = np.cumsum(first) - 1
    change = first | np.concatenate([[True], owner[places][1:] != owner[places][:-1]])[: len(places)]
    wanted = np.bincount(group[change], minlength=int(first.sum())) <= stock
    places, first = places[wanted[group]], first[wanted[group]]
    return keys[places[first]], np.append(np.flatnonzero(first), len(places)).astype(np.int64), places


def _bits(keys: np.ndarray) -> np.ndarray:
    """Returns a bit map with the bit of every key set, at least 16 bits a key."""
    size = 1 << max(10, int(16 * max(1, len(keys)) - 1).bit_length())
    bits = np.zeros(size // 64, dtype=np.uint64)
    place = keys & np.uint64(size - 1)
    np.bitwise_or.at(bits, place >> np.uint64(6), np.uint64(1) << (place & np.uint64(63)))
    return bits
