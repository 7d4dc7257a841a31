"""Which documents of a source come next: epoch after epoch, each in an order of its own, from a place of three numbers.

A source of up to `IN_MEMORY` documents has the order of an epoch in memory, 8 bytes for each time a document is read
in it. That of a larger one is computed place by place and never held (`scattered`).
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from galenic.corpus.tokens.shards import Shard
from galenic.runtime import UserError

IN_MEMORY = 2**22
"""Documents of a source whose order is held in memory."""
_CHUNK = 2**18  # places looked at together
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A place in a source's endless stream of documents."""

    epoch: int = 0
    place: int = 0
    """In the epoch's order; not a document's number."""
    tokens: int = 0
    """Drawn so far."""


class Stream:
    """The documents of one source, epoch after epoch in a new order, without end.

    A document of weight w appears floor(w) times an epoch, and once more with probability w - floor(w).

    Args:
        shard: of the source.
        seed: of the run.
        key: what else the order depends on, such as phase and source.
        members: (n,) int64 numbers of the documents to draw from; all if not given.

    Raises:
        UserError: there are no documents, or none holds a token.
    """

    def __init__(self, shard: Shard, *, seed: int, key: str, members: np.ndarray | None = None) -> None:
        self._shard, self._seed, self._key, self._members = shard, seed, key, members
        self._count = len(shard) if members is None else len(members)
        if self._count == 0 or len(shard.tokens) == 0:
            raise UserError(f"source '{key}' has no training documents; take it out of the mixture")
        self._held = self._count <= IN_MEMORY
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)
        if not self._held:
            heaviest = max(
                float(self._weights(np.arange(first, min(first + _CHUNK, self._count))).max())
                for first in range(0, self._count, _CHUNK)
            )
            self._weightless = heaviest == 0
            self._copies = max(
                1, int(np.ceil(heaviest))
            )  # a document has that many tickets, some of them blanks
            self._half = max(1, -(-(self._count * self._copies - 1).bit_length() // 2))

    def draw(self, start: Cursor, tokens: float) -> tuple[np.ndarray, Cursor]:
        """Draws from a place on until `tokens` have been drawn since the stream's beginning.

        Returns:
            (drawn,) int64 numbers of documents, and the place after the last.
        """
        chosen = [np.zeros(0, dtype=np.int64)]
        epoch, place, drawn = start.epoch, start.place, start.tokens
        while drawn < tokens:
            places, documents, after, end = self._read(epoch, place)
            place = after
            if len(documents):
                total = drawn + np.cumsum(self._lengths(documents))
                count = min(int(np.searchsorted(total, tokens)) + 1, len(documents))
                chosen.append(documents[:count])
                drawn = int(total[count - 1])
                if count < len(documents):
                    place = int(places[count - 1]) + 1
            if place >= end:
                epoch, place = epoch + 1, 0
        return np.concatenate(chosen), Cursor(epoch=epoch, place=place, tokens=drawn)

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        starts, ends = self._shard.offsets[documents], self._shard.offsets[documents + 1]
        wrong = (starts < 0) | (ends < starts) | (ends > len(self._shard.tokens))
        if wrong.any():
            raise UserError(
                f"source '{self._key}': damaged shard, document {int(documents[wrong][0])} begins or ends nowhere "
                "(its offsets file); run the tokenizer step again"
            )
        return ends - starts

    def _weights(self, places: np.ndarray) -> np.ndarray:
        return self._shard.weights[places if self._members is None else self._members[places]]

    def _read(self, epoch: int, place: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Returns places of an epoch from `place` on, their documents, the next place, and where the epoch ends."""
        if self._held:
            order = self._in_memory(epoch)
            after = min(place + _CHUNK, len(order))
            places, chosen = np.arange(place, after), order[place:after]
            end = len(order)
        else:
            end = 4**self._half
            after = min(place + _CHUNK, end)
            places = np.arange(place, after)
            key = stable_hash(f"{self._seed}/{self._key}/{epoch}")
            tickets = scattered(places, self._half, key)
            inside = tickets < self._count * self._copies
            places, tickets = places[inside], tickets[inside]
            chosen, copy = tickets % self._count, tickets // self._count
            weights = 1.0 if self._weightless else self._weights(chosen).astype(np.float64)
            valid = copy < np.floor(weights + _uniform(chosen, key))
            places, chosen = places[valid], chosen[valid]
        return places, chosen if self._members is None else self._members[chosen], after, end

    def _in_memory(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            generator = np.random.Generator(
                np.random.Philox(key=[self._seed, stable_hash(f"{self._key}/{epoch}")])
            )
            weights = self._weights(np.arange(self._count))
            chance = generator.random(self._count).astype(np.float32)
            repeats = np.floor(weights + chance).astype(np.int64)
            if not repeats.any():
                repeats[:] = 1
            self._order = generator.permutation(np.repeat(np.arange(self._count), repeats))
            self._epoch = epoch
        return self._order


def draw_documents(shard: Shard, tokens: float, *, seed: int, key: str) -> np.ndarray:
    """Draws documents of one source from its beginning until `tokens` are reached; see `Stream`.

    Returns:
        (drawn,) int64 numbers of documents.

    Raises:
        UserError: the source has no training documents.
    """
    return Stream(shard, seed=seed, key=key).draw(Cursor(), tokens)[0]


# ---------------------------------------------------------------------------- an order that is never held


def scattered(places: np.ndarray, half: int, key: int) -> np.ndarray:
    """Permutes the numbers below 4^half as a Feistel network does: each one by itself, without the others.

        left, right <- right, left xor mix(right, round key)

    Source: Luby and Rackoff, How to construct pseudorandom permutations from pseudorandom functions (1988).

    Args:
        places: (n,) int64, each below 4^half.
        half: bits of a half.
        key: of the permutation, 64 bits.

    Returns:
        (n,) int64, each below 4^half; different places give different numbers.
    """
    mask = np.uint64(2**half - 1)
    left, right = (places.astype(np.uint64) >> np.uint64(half)), places.astype(np.uint64) & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right, key + number + 1) & mask)
    return ((left << np.uint64(half)) | right).astype(np.int64)


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014), of values shifted by a multiple of its constant."""
    values = values + np.uint64((key * 0x9E3779B97F4A7C15) % 2**64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _uniform(documents: np.ndarray, key: int) -> np.ndarray:
    """A number in [0, 1) of each document, the same for all its tickets in an epoch; (n,) float64."""
    return (_mix(documents.astype(np.uint64), key) >> np.uint64(11)).astype(np.float64) / 2**53


def stable_hash(text: str) -> int:
    """Returns a 64-bit number of a text, on every machine the same."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
