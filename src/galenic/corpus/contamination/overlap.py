"""Kernels that find the words of evaluation items in texts.

    UTF-8 --split--> hashes of folded words --rolling--> key of the seed at each word --bit map--> (mostly: nothing)
                     a hit --> an equal n-gram? an equal short item? a near copy along the diagonal?

A seed is a window of a few words: whatever is looked for begins with one, or holds one.

A word is a run of letters and digits, a Han character is a word by itself; case, width, accents, white space and
punctuation are folded away. An English word says more than a Han character (Chinese words are 1.5 to 2 characters
long), so a window is as long as its weight: with `ngram` 13 and `han_ngram` 20 it holds 13 English words or 20 Han
characters, or a mixture of both. Words are compared by 64-bit hashes; what a key finds is then compared word by word.
"""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np

from galenic.compiled import compiled
from galenic.merge.kernels import MIX_1, MIX_2

PLANES = 0x32400
"""Code points that can be part of a word; those above have no letters."""
FIRST_SELECTOR, LAST_SELECTOR = 0xE0100, 0xE01EF
"""Variation selectors of Han characters: the only marks above those."""
SEPARATOR, IGNORED, HAN = 0, 1, 1 << 31
NGRAM, WHOLE, NEAR = 0, 1, 2
"""Kinds of hits: a shared n-gram, a short item as a whole, a near copy."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the rolling polynomial; odd."""
_SEED, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # FNV-1a


def is_han(code: int) -> bool:
    """True for Han characters, zero (〇) included."""
    return code == 0x3007 or 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code < PLANES


def fold(letter: str) -> str:
    """Returns the character that stands for a letter or digit when words are compared.

    >>> fold("É"), fold("Ａ"), fold("β")
    ('e', 'a', 'β')
    """
    small = unicodedata.normalize("NFKC", letter).casefold()
    bare = "".join(c for c in unicodedata.normalize("NFKD", small) if not unicodedata.combining(c))
    return bare if len(bare) == 1 else small if len(small) == 1 else letter


@cache
def folding() -> np.ndarray:
    """Returns for each code point: SEPARATOR, IGNORED (marks inside words) or its folded form, with HAN set for Han.

    uint32 (PLANES,).
    """
    table = np.zeros(PLANES, dtype=np.uint32)
    for code in range(PLANES):
        letter = chr(code)
        if is_han(code):
            table[code] = ord(fold(letter)) | HAN
        elif letter.isalnum():
            table[code] = ord(fold(letter))
        elif unicodedata.category(letter) == "Mn" or code in (0xAD, 0x200B, 0x200C, 0x200D, 0xFEFF):
            table[code] = IGNORED
    return table


class Index(NamedTuple):
    """What the scan looks up; every list of keys is sorted. A piece is a stem, an answer or a text of an item."""

    words: np.ndarray
    """uint64: hashes of the words of all pieces, one after the other."""
    pieces: np.ndarray
    """int64 (pieces + 1,): where each begins in `words`."""
    answers: np.ndarray
    """uint64: hashes of the words of the answers of short pieces."""
    answer_of: np.ndarray
    """int64 (pieces + 1,): where each one's answer begins in `answers`; most have none."""
    bits: np.ndarray
    """uint64: bit map of the seeds that begin something; a power of two of bits."""
    ngrams: np.ndarray
    """uint64: keys of n-grams."""
    ngram_at: np.ndarray
    """int64 (ngrams + 1,): where the places of each begin in `ngram_places`."""
    ngram_places: np.ndarray
    """int64: places in `words`."""
    seeds: np.ndarray
    """uint64: keys of seeds in long pieces, those in many pieces left out."""
    seed_at: np.ndarray
    seed_places: np.ndarray
    sets: np.ndarray
    """uint64: the sorted different shingles of each long piece."""
    set_of: np.ndarray
    """int64 (pieces + 1,)."""
    shorts: np.ndarray
    """uint64: keys of short pieces."""
    short_piece: np.ndarray
    """int64: the piece of each."""
    lengths: np.ndarray
    """int64: how many words short pieces have."""


@compiled
def mix(x):
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def split(data, start, stop, table, latin, han, words, weights, begins, ends):
    """Splits `data[start:stop]` into words; fills hashes, weights and byte places and returns how many there are."""
    count, inside, at = 0, False, start
    value = _SEED
    while at < stop:
        byte, first = np.uint32(data[at]), at
        if byte < 0x80:
            code, at = byte, at + 1
        elif byte < 0xE0:
            code = ((byte & 0x1F) << 6) | (data[at + 1] & 0x3F)
            at += 2
        elif byte < 0xF0:
            code = ((byte & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F)
            at += 3
        else:
            code = (
                ((byte & 0x07) << 18)
                | ((data[at + 1] & 0x3F) << 12)
                | ((data[at + 2] & 0x3F) << 6)
                | (data[at + 3] & 0x3F)
            )
            at += 4
        if FIRST_SELECTOR <= code <= LAST_SELECTOR:
            continue
        kind = table[code] if code < PLANES else np.uint32(SEPARATOR)
        if kind == IGNORED:
            continue
        if inside and (kind == SEPARATOR or kind >= HAN):
            words[count], weights[count], ends[count] = mix(value), latin, first
            count, inside = count + 1, False
        if kind >= HAN:
            words[count] = mix((_SEED ^ np.uint64(kind)) * _PRIME)
            weights[count], begins[count], ends[count] = han, first, at
            count += 1
        elif kind != SEPARATOR:
            if not inside:
                value, inside = _SEED, True
                begins[count] = first
            value = (value ^ np.uint64(kind)) * _PRIME
    if inside:
        words[count], weights[count], ends[count] = mix(value), latin, stop
        count += 1
    return count


@compiled
def split_all(data, offsets, table, latin, han):
    """Splits every text; returns (words, weights, int64 (texts + 1,) where the words of each begin)."""
    words, weights = np.empty(len(data), dtype=np.uint64), np.empty(len(data), dtype=np.int64)
    begins, ends = np.empty((2, len(data)), dtype=np.int64)
    at = np.zeros(len(offsets), dtype=np.int64)
    for t in range(len(offsets) - 1):
        n = at[t]
        at[t + 1] = n + split(
            data, offsets[t], offsets[t + 1], table, latin, han, words[n:], weights[n:], begins[n:], ends[n:]
        )
    return words[: at[-1]].copy(), weights[: at[-1]].copy(), at


@compiled
def windows(words, weights, at, weight):
    """Returns for the window of `weight` at each word of each text its key and whether it lies within the text."""
    keys, there = np.zeros(len(words), dtype=np.uint64), np.zeros(len(words), dtype=np.bool_)
    for t in range(len(at) - 1):
        for i in range(at[t], at[t + 1]):
            end = window_end(weights, i, at[t + 1], weight)
            if end >= 0:
                keys[i], there[i] = key_of(words, i, end), True
    return keys, there


@compiled
def key_of(words, start, stop):
    """Returns the key of `words[start:stop]`: the same for the same words, wherever they stand."""
    value = np.uint64(0)
    for i in range(start, stop):
        value = value * BASE + words[i]
    return mix(value + np.uint64(stop - start))


@compiled
def window_end(weights, start, count, weight):
    """Returns where the window that begins at `start` and weighs at least `weight` ends, or -1 beyond the text."""
    total = 0
    for i in range(start, count):
        total += weights[i]
        if total >= weight:
            return i + 1
    return -1


@compiled
def rolling_keys(words, weights, count, weight, keys, stops):
    """Fills key and end of the window of `weight` at each word (end -1: none), by a rolling polynomial."""
    value, total, stop = np.uint64(0), 0, 0
    power = np.empty(weight + 2, dtype=np.uint64)  # a word weighs at least 1
    power[0] = np.uint64(1)
    for i in range(1, weight + 2):
        power[i] = power[i - 1] * BASE
    for i in range(count):
        while stop < count and total < weight:
            value = value * BASE + words[stop]
            total += weights[stop]
            stop += 1
        if total < weight:
            keys[i], stops[i] = np.uint64(0), -1
        else:
            keys[i], stops[i] = mix(value + np.uint64(stop - i)), stop
        total -= weights[i]
        value -= words[i] * power[stop - i - 1]


@compiled
def find(keys, key):
    """Returns the place of a key in sorted keys, or -1."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) >> 1
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low if low < len(keys) and keys[low] == key else -1


@compiled
def equal(left, at, right, start, length):
    """True if `left[at:at + length]` and `right[start:start + length]` are there and equal."""
    if at < 0 or start < 0 or at + length > len(left) or start + length > len(right):
        return False
    for i in range(length):
        if left[at + i] != right[start + i]:
            return False
    return True


@compiled
def jaccard(words, weights, start, stop, weight, others):
    """Returns the Jaccard similarity of the windows of `weight` in [start, stop) and a sorted set of keys."""
    length = stop - start
    keys, stops = np.empty(length, dtype=np.uint64), np.empty(length, dtype=np.int64)
    rolling_keys(words[start:stop], weights[start:stop], length, weight, keys, stops)
    count = 0
    while count < length and stops[count] >= 0:
        count += 1
    mine = np.sort(keys[:count])
    both, different, j = 0, 0, 0
    for i in range(count):
        if i and mine[i] == mine[i - 1]:
            continue
        different += 1
        while j < len(others) and others[j] < mine[i]:
            j += 1
        if j < len(others) and others[j] == mine[i]:
            both += 1
    union = different + len(others) - both
    return both / union if union else 0.0


@compiled
def grown(rows, count):
    """Returns rows with room for one more."""
    if count < len(rows):
        return rows
    larger = np.empty((2 * len(rows), rows.shape[1]), dtype=np.int64)
    larger[:count] = rows
    return larger


@compiled
def with_answer(words, start, stop, answer, within):
    """Returns (begin, end) of a stem at [start, stop) with its answer at most `within` words away, or (-1, -1)."""
    if len(answer) == 0:
        return start, stop
    for gap in range(within + 1):
        if equal(words, stop + gap, answer, 0, len(answer)):
            return start, stop + gap + len(answer)
        if equal(words, start - gap - len(answer), answer, 0, len(answer)):
            return start - gap - len(answer), stop
    return -1, -1


@compiled
def scan(data, offsets, table, latin, han, ngram, seed, shingle, within, least, index):
    """Finds what texts share with evaluation items.

    Args:
        data: uint8, UTF-8 of all texts.
        offsets: int64 (texts + 1,).
        table: of `folding`.
        latin: weight of a word.
        han: weight of a Han character.
        ngram: weight of an n-gram.
        seed: weight of a seed.
        shingle: weight of a shingle, the unit of near copies.
        within: words between a short stem and its answer at most.
        least: Jaccard similarity of a near copy.
        index: an `Index`.

    Returns:
        int64 (hits, 5): text, kind, piece, first byte and end in the text; of an n-gram the whole run of them.
    """
    longest = 0
    for t in range(len(offsets) - 1):
        longest = max(longest, offsets[t + 1] - offsets[t])
    words, keys = np.empty(longest + 1, dtype=np.uint64), np.empty(longest + 1, dtype=np.uint64)
    weights, begins, ends, stops = np.empty((4, longest + 1), dtype=np.int64)
    rows = np.empty((64, 5), dtype=np.int64)
    count = 0
    pieces = len(index.pieces) - 1
    run_row, run_stop = np.full(pieces, -1), np.zeros(pieces, dtype=np.int64)
    tried = np.full((pieces, 2), -1)  # text and diagonal that were compared last
    mask = np.uint64(len(index.bits) * 64 - 1)
    for t in range(len(offsets) - 1):
        first_row = count
        n = split(data, offsets[t], offsets[t + 1], table, latin, han, words, weights, begins, ends)
        rolling_keys(words, weights, n, seed, keys, stops)
        for i in range(n):
            if stops[i] < 0:
                break
            bit = keys[i] & mask
            if not (index.bits[bit >> np.uint64(6)] >> (bit & np.uint64(63))) & np.uint64(1):
                continue
            # ---- n-grams
            end = window_end(weights, i, n, ngram)
            gram = find(index.ngrams, key_of(words, i, end)) if end > 0 else -1
            if gram >= 0:
                for p in range(index.ngram_at[gram], index.ngram_at[gram + 1]):
                    place = index.ngram_places[p]
                    if not equal(words[:n], i, index.words, place, end - i):
                        continue
                    piece = np.searchsorted(index.pieces, place, side="right") - 1
                    row = run_row[piece]
                    if row >= first_row and run_stop[piece] >= i:
                        rows[row, 4], run_stop[piece] = ends[end - 1], end
                        continue
                    rows = grown(rows, count)
                    rows[count, 0], rows[count, 1], rows[count, 2] = t, NGRAM, piece
                    rows[count, 3], rows[count, 4] = begins[i], ends[end - 1]
                    run_row[piece], run_stop[piece] = count, end
                    count += 1
            # ---- short items
            for length in index.lengths:
                end = i + length
                short = find(index.shorts, key_of(words, i, end)) if end <= n else -1
                while 0 <= short < len(index.shorts) and index.shorts[short] == key_of(words, i, end):
                    piece = index.short_piece[short]
                    short += 1
                    place = index.pieces[piece]
                    if index.pieces[piece + 1] - place != length:
                        continue
                    if not equal(words[:n], i, index.words, place, length):
                        continue
                    answer = index.answers[index.answer_of[piece] : index.answer_of[piece + 1]]
                    begin, stop = with_answer(words[:n], i, end, answer, within)
                    if begin >= 0:
                        rows = grown(rows, count)
                        rows[count, 0], rows[count, 1], rows[count, 2] = t, WHOLE, piece
                        rows[count, 3], rows[count, 4] = begins[begin], ends[stop - 1]
                        count += 1
            # ---- near copies: the item laid along the text so that the shared seed meets itself
            at = find(index.seeds, keys[i])
            if at >= 0:
                for p in range(index.seed_at[at], index.seed_at[at + 1]):
                    place = index.seed_places[p]
                    piece = np.searchsorted(index.pieces, place, side="right") - 1
                    start = i - (place - index.pieces[piece])
                    stop = start + index.pieces[piece + 1] - index.pieces[piece]
                    if tried[piece, 0] == t and tried[piece, 1] == start:
                        continue
                    tried[piece, 0], tried[piece, 1] = t, start
                    start, stop = max(start, 0), min(stop, n)
                    others = index.sets[index.set_of[piece] : index.set_of[piece + 1]]
                    if jaccard(words, weights, start, stop, shingle, others) >= least:
                        rows = grown(rows, count)
                        rows[count, 0], rows[count, 1], rows[count, 2] = t, NEAR, piece
                        rows[count, 3], rows[count, 4] = begins[start], ends[stop - 1]
                        count += 1
    return rows[:count]
