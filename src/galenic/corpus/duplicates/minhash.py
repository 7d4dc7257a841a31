"""What a text says, in a few bytes: a hash of all its words and the least hashes of its word 5-grams.

    UTF-8 --fold case, split words--> word hashes --rolling--> 5-gram hashes --128 permutations--> minima
                                          `--in order--> 128-bit hash of the whole text

One pass over the bytes, compiled. Words are what white space separates; a character of a script that is written
without spaces is a word of its own. Punctuation stays: 7 + 5 is not 7 - 5.

For sets A and B and a random order of all shingles, P(min A = min B) = |A & B| / |A | B| = J (Broder 1997), so the
share of equal minima under k orders estimates J with variance J (1 - J) / k. An order is the value of

    h_i(x) = a_i high(x) + (low(x) xor b_i)   mod 2^32,   a_i odd, b_i random,

where x is the 64-bit hash of a shingle. high and low are independent, so every h_i is as good as random on its own, at
one multiplication for 8 or 16 permutations at a time: a fifth of the time is theirs, the rest is parsing. One
permutation with densified bins (Shrivastava 2017) would save that fifth and is less exact on texts of fewer shingles
than bins: `benchmarks/dedup_speed.py` compares them.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from galenic.compiled import compiled
from galenic.corpus.texts import buffers

PERMUTATIONS = 128
NGRAM = 5
"""Words in a shingle. A shorter text is one shingle."""

SPACE, ALONE = 1 << 31, 1 << 30
"""Marks in the table of characters: white space, and characters that are words of their own."""
TABLE = 0x20000
"""Code points in the table; above are Han characters up to 0x3FFFF, then none that has two cases."""
UNSPACED = (
    (0x0E01, 0x0F00),  # Thai, Lao
    (0x0F00, 0x1000),  # Tibetan
    (0x1000, 0x10A0),  # Burmese
    (0x1780, 0x17E0),  # Khmer
    (0x2E80, 0x2FE0),  # radicals
    (0x3005, 0x3008),
    (0x3021, 0x302A),
    (0x3031, 0x303C),
    (0x3041, 0x3100),  # kana
    (0x31F0, 0x3200),
    (0x3400, 0x4DC0),  # Han
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0xFF66, 0xFF9E),
    (0x16FE0, 0x18D80),  # Tangut, which is written as Han is
    (0x1AFF0, 0x1B170),
)
"""Ranges of scripts without spaces between words. Their digits form numbers."""

WORD, OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
"""Odd multipliers of the two lanes that make 128 bits."""
BASE = np.uint64(0xD6E8FEB86659FD93)
"""Of the rolling polynomial."""
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""SplitMix64's mixing."""
_A, _B = np.uint64(32), np.uint64(29)


class Signatures(NamedTuple):
    """What a batch of n texts is compared by."""

    exact: np.ndarray
    """(n, 2) uint64: 128-bit hash of the words in order."""
    hashes: np.ndarray
    """(n, permutations) uint32: minima."""
    characters: np.ndarray
    """(n,) int32: code points of the text as it is."""


def signatures(texts: Any, *, permutations: int = PERMUTATIONS, ngram: int = NGRAM, seed: int) -> Signatures:
    """Returns the signatures of texts; equal texts, seeds and settings give equal ones anywhere.

    Args:
        texts: a `pyarrow.LargeStringArray` without nulls.
        permutations: minima of each text.
        ngram: words in a shingle.
        seed: of the hash functions.
    """
    data, offsets = buffers(texts)
    # SplitMix64: the same numbers under every version of numpy
    drawn = _mixed.py_func(np.arange(permutations + 1, dtype=np.uint64) * WORD + np.uint64(seed))
    multipliers = (drawn[1:] >> _A).astype(np.uint32) | np.uint32(1)
    masks = drawn[1:].astype(np.uint32)
    result = Signatures(
        exact=np.empty((len(texts), 2), np.uint64),
        hashes=np.full((len(texts), permutations), 0xFFFFFFFF, np.uint32),
        characters=np.empty(len(texts), np.int32),
    )
    _sign(data, offsets, _characters(), multipliers, masks, drawn[0], ngram, *result)
    return result


def hashed(values: Any) -> np.ndarray:
    """Returns 128-bit hashes of the very bytes of strings, such as ids: (n, 2) uint64.

    Args:
        values: a `pyarrow.LargeStringArray` without nulls.
    """
    result = np.empty((len(values), 2), np.uint64)
    _hash(*buffers(values), result)
    return result


def bands(hashes: np.ndarray, count: int) -> np.ndarray:
    """Returns a 64-bit hash of each of `count` bands of consecutive minima: (count, n) uint64.

    Two texts of similarity J share a band of r minima with probability J^r, and at least one of b bands with
    1 - (1 - J^r)^b (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4).
    """
    result = np.empty((count, len(hashes)), np.uint64)
    _bands(hashes, result)
    return result


def bands_for(threshold: float, permutations: int = PERMUTATIONS) -> int:
    """Returns the fewest bands in which a pair of similarity `threshold` meets with probability 0.9.

    >>> [bands_for(threshold) for threshold in (0.95, 0.85, 0.7, 0.5)]
    [8, 16, 32, 64]
    """
    count = 8
    while count < permutations and 1 - (1 - threshold ** (permutations // count)) ** count < 0.9:
        count *= 2
    return count


def sketches(hashes: np.ndarray) -> np.ndarray:
    """Returns the lowest byte of each minimum: (n, permutations) uint8."""
    return hashes.astype(np.uint8)


def least_agreement(threshold: float, permutations: int = PERMUTATIONS) -> int:
    """Returns how many bytes of two sketches must agree for an estimated similarity of `threshold`.

    Bytes of unequal minima agree by chance, so P(agree) = C + (1 - C) J with C = 2^-8 and J is estimated by
    (share - C) / (1 - C): b-bit minwise hashing, Li and Koenig 2010, theorem 1, for sets that are small against 2^32.

    >>> [least_agreement(threshold) for threshold in (0.5, 0.85, 1.0)]
    [65, 109, 128]
    """
    return int(np.ceil(permutations * (threshold + (1 - threshold) / 256) - 1e-9))


# ---------------------------------------------------------------------------- kernels


@functools.cache
def _characters() -> np.ndarray:
    """Returns for each code point its folded one with its marks: (TABLE,) uint32."""
    table = np.arange(TABLE, dtype=np.uint32)
    for first, end in UNSPACED:
        table[first:end] |= ALONE
    for code in range(TABLE):
        character = chr(code)
        if character.isspace():
            table[code] = SPACE
        elif character.isdecimal():
            table[code] = code
        else:  # one character becomes one: what casefold or lower make longer stays
            folded = character.casefold()
            folded = folded if len(folded) == 1 else character.lower()
            if len(folded) == 1:
                table[code] = (table[code] & ALONE) | ord(folded)
    return table


@compiled
def _mixed(x):
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def _lower(minima, multipliers, masks, shingle):
    """Lowers the minima of one text by one shingle."""
    high, low = np.uint32(shingle >> _A), np.uint32(shingle & np.uint64(0xFFFFFFFF))
    for i in range(minima.size):
        minima[i] = min(minima[i], np.uint32(np.uint32(multipliers[i] * high) + (low ^ masks[i])))


@compiled
def _sign(data, offsets, table, multipliers, masks, start, ngram, exact, hashes, characters):
    ring = np.empty(ngram, np.uint64)
    leaves = np.uint64(1)  # BASE ** ngram: what a word has grown to when it leaves the shingle
    for _ in range(ngram):
        leaves *= BASE
    for text in range(offsets.size - 1):
        place, end, length, words = offsets[text], offsets[text + 1], 0, 0
        word = other = whole_1 = whole_2 = start
        rolling = np.uint64(0)
        ring[:] = rolling
        inside = alone = False
        while place <= end:
            if place == end:  # as if white space followed
                mark = np.uint32(SPACE)
                place += 1
            else:
                code = np.uint32(data[place])
                place += 1
                if code >= 0x80:
                    more = 1 if code < 0xE0 else (2 if code < 0xF0 else 3)
                    code &= np.uint32(0x3F >> more)
                    while more > 0 and place < end:
                        code = (code << np.uint32(6)) | np.uint32(data[place] & 0x3F)
                        place += 1
                        more -= 1
                length += 1
                if code < TABLE:
                    mark = table[code]
                else:
                    mark = code | np.uint32(ALONE) if code < 0x40000 else code
            if inside and (alone or mark >= ALONE):  # a word has ended
                value = _mixed(word)
                whole_1 = (whole_1 ^ value) * WORD
                whole_1 ^= whole_1 >> _A
                whole_2 = (whole_2 ^ other) * OTHER
                whole_2 ^= whole_2 >> _B
                rolling = rolling * BASE + value - ring[words % ngram] * leaves
                ring[words % ngram] = value
                words += 1
                if words >= ngram:
                    _lower(hashes[text], multipliers, masks, _mixed(rolling))
                word = other = start
                inside = False
            if mark < SPACE:
                word = (word ^ np.uint64(mark)) * WORD
                word ^= word >> _A
                other = (other ^ np.uint64(mark)) * OTHER
                other ^= other >> _B
                inside = True
            alone = mark >= ALONE
        if words < ngram:
            _lower(hashes[text], multipliers, masks, _mixed(rolling))
        exact[text, 0] = _mixed(whole_1 + np.uint64(words))
        exact[text, 1] = _mixed(whole_2)
        characters[text] = length


@compiled
def _hash(data, offsets, result):
    for i in range(offsets.size - 1):
        word, other = WORD, OTHER
        for place in range(offsets[i], offsets[i + 1]):
            word = (word ^ np.uint64(data[place])) * WORD
            word ^= word >> _A
            other = (other ^ np.uint64(data[place])) * OTHER
            other ^= other >> _B
        result[i, 0] = _mixed(word + np.uint64(offsets[i + 1] - offsets[i]))
        result[i, 1] = _mixed(other)


@compiled
def _bands(hashes, result):
    width = hashes.shape[1] // result.shape[0]
    for i in range(hashes.shape[0]):
        for band in range(result.shape[0]):
            value = WORD
            for k in range(band * width, (band + 1) * width):
                value = _mixed(value + np.uint64(hashes[i, k]))
            result[band, i] = value
