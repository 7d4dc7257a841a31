"""Texts as hashed n-grams and as shapes, in one compiled pass over their UTF-8 bytes.

A text is read as tokens: words (runs of letters and digits, lower case, every digit as 0), Han and kana characters, one
token for each run of the same punctuation mark or of line ends. Features are tokens, pairs of neighbours, triples of
Han characters, and of long words the first five and the last four bytes (`cardi-`, `-itis`). Each is hashed to one of
2**bits buckets. Long texts are read in part: their beginning and pieces spread evenly over the rest.
"""

from typing import Any

import numpy as np

from galenic.compiled import compiled
from galenic.corpus.texts import buffers

HEAD = 4096
"""Bytes of a text that are always read."""
PIECES, PIECE_BYTES = 8, 512
"""Pieces read of what follows, spread evenly, and the bytes of each."""
LONGEST = HEAD + PIECES * PIECE_BYTES
"""Most bytes of a text that are read."""
MOST = 2 * LONGEST + 64
"""Most features of a text: a byte of its own gives two."""
SHAPES = (
    "length",
    "letters",
    "capitals",
    "digits",
    "blanks",
    "line ends",
    "punctuation",
    "brackets",
    "han",
    "other scripts",
    "word length",
    "words without a vowel",
    "distinct tokens",
    "repeated pairs",
    "single letters",
    "digits inside words",
    "ends a sentence",
    "empty",
)
"""What a text's shape tells, each in [0, 1]."""

_SEEN = 8192
"""Places of the table that finds repeated tokens; a power of two above the tokens of most texts."""
_PRIME, _START = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)  # FNV-1a
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # SplitMix64
_KIND = np.uint64(0x9E3779B97F4A7C15)


# Classes of bytes: between tokens, a letter, ..., the first byte of two, of three, of four, a byte inside a character.
_BLANK, _LETTER, _DIGIT, _MARK, _LINE, _TWO, _THREE, _FOUR, _INSIDE = range(9)


def _classes() -> np.ndarray:
    table = np.zeros(256, dtype=np.uint8)
    for value in range(33, 127):
        table[value] = _LETTER if chr(value).isalpha() else _DIGIT if chr(value).isdigit() else _MARK
    table[[10, 13]] = _LINE
    table[0x80:0xC0], table[0xC0:0xE0], table[0xE0:0xF0], table[0xF0:] = _INSIDE, _TWO, _THREE, _FOUR
    return table


def _flags(characters: str) -> np.ndarray:
    table = np.zeros(256, dtype=np.uint8)
    table[list(characters.encode())] = 1
    return table


_CLASS = _classes()
_VOWELS = _flags("aeiouyAEIOUY")
_BRACKETS = _flags("()[]{}<>=_#*|\\/@^~`")
_ENDS = _flags(".!?:;)\"'`]}|>*")


@compiled
def _mixed(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def _han(data: np.ndarray, i: int) -> bool:
    """Whether the three-byte character at i is written without spaces: kana to U+9FFF, U+F900 to U+FAFF."""
    a, b = data[i], data[i + 1]
    return (a == 0xE3 and b >= 0x81) or (0xE4 <= a <= 0xE9) or (a == 0xEF and 0xA4 <= b <= 0xAB)


@compiled
def _mark3(data: np.ndarray, i: int) -> bool:
    """Whether the three-byte character at i is punctuation: U+2000 to U+2FFF, U+3000 to U+303F, full-width forms."""
    a, b = data[i], data[i + 1]
    return a == 0xE2 or (a == 0xE3 and b == 0x80) or (a == 0xEF and b >= 0xBC)


@compiled
def _seen(table: np.ndarray, stamp: int, value: np.uint64) -> bool:
    """Notes a hash in a table of this text's; returns whether it (or one that fell on the same place) was there."""
    place = np.int64(value >> np.uint64(51))
    there = table[place] == stamp
    table[place] = stamp
    return there


@compiled
def read_text(
    data: np.ndarray,
    start: int,
    end: int,
    bits: int,
    ids: np.ndarray,
    shape: np.ndarray,
    tokens: np.ndarray,
    pairs: np.ndarray,
    stamp: int,
) -> int:
    """Reads one text.

    Args:
        data: (bytes,) uint8, UTF-8.
        start: of the text.
        end: of the text.
        bits: features are numbers below 2**bits.
        ids: (MOST,) int32, written: the features, repeated ones again.
        shape: (len(SHAPES),) float32, written.
        tokens: (_SEEN,) int64, scratch.
        pairs: (_SEEN,) int64, scratch.
        stamp: another number for each text that uses the same scratch.

    Returns:
        How many features.
    """
    shift = np.uint64(64 - bits)
    count = 0
    letters = capitals = digits = blanks = lines = marks = brackets = han_bytes = other = read = 0
    words = word_bytes = unvoiced = singles = mixed_words = all_tokens = fresh = all_pairs = again = 0
    rest = max(0, end - start - HEAD)
    for piece in range(PIECES + 1):
        if piece == 0:
            i, stop = start, min(end, start + HEAD)
        elif rest <= PIECES * PIECE_BYTES:  # what is left fits into the pieces: one run
            if piece > 1 or rest == 0:
                break
            i, stop = start + HEAD, end
        else:
            i = start + HEAD + (rest - PIECE_BYTES) * (piece - 1) // (PIECES - 1)
            stop = min(end, i + PIECE_BYTES)
        while i < stop and _CLASS[data[i]] == _INSIDE:  # not in the middle of a character
            i += 1
        read += stop - i
        before, before2, before_han = np.uint64(0), np.uint64(0), 0
        while i < stop:
            kind = _CLASS[data[i]]
            value = _START
            if kind == _BLANK:
                blanks += 1
                i += 1
                continue
            if kind == _INSIDE:
                i += 1
                continue
            is_han = False
            word = False
            first = i
            if kind == _THREE and i + 2 < end and not _han(data, i) and _mark3(data, i):
                value = ((_START ^ np.uint64(data[i + 1])) * _PRIME ^ np.uint64(data[i + 2])) * _PRIME
                marks += 3
                i += 3
            elif (kind == _THREE and i + 2 < end and _han(data, i)) or (
                kind == _FOUR and i + 3 < end and data[i + 1] >= 0xA0
            ):
                is_han = True
                size = 3 if kind == _THREE else 4
                for j in range(i, i + size):
                    value = (value ^ np.uint64(data[j])) * _PRIME
                han_bytes += size
                i += size
            elif kind == _MARK or kind == _LINE:
                mark = data[i]
                value = (value ^ np.uint64(mark)) * _PRIME
                while i < stop and (data[i] == mark or (kind == _LINE and _CLASS[data[i]] == _LINE)):
                    if kind == _LINE:
                        lines += 1
                    else:
                        marks += 1
                        brackets += _BRACKETS[mark]
                    i += 1
            else:  # a word
                word = True
                word_letters = word_digits = vowels = 0
                while i < end and i - first < 64:
                    kind = _CLASS[data[i]]
                    if kind == _LETTER:
                        byte = data[i]
                        capitals += byte < 97
                        vowels += _VOWELS[byte]
                        value = (value ^ np.uint64(byte | 32)) * _PRIME
                        word_letters += 1
                    elif kind == _DIGIT:
                        value = (value ^ np.uint64(48)) * _PRIME
                        word_digits += 1
                    elif kind == _TWO or kind == _INSIDE or kind == _THREE or kind == _FOUR:
                        if (kind == _THREE and i + 2 < end and (_han(data, i) or _mark3(data, i))) or (
                            kind == _FOUR and i + 3 < end and data[i + 1] >= 0xA0
                        ):
                            break
                        value = (value ^ np.uint64(data[i])) * _PRIME
                        vowels += 1
                        other += 1
                    else:
                        break
                    i += 1
                letters += word_letters
                digits += word_digits
                size = i - first
                words += 1
                word_bytes += size
                unvoiced += word_letters >= 3 and vowels == 0
                singles += word_letters == 1 and size == 1
                mixed_words += word_letters > 1 and word_digits > 0
            token = _mixed(value)
            ids[count] = np.int32(token >> shift)
            count += 1
            all_tokens += 1
            fresh += not _seen(tokens, stamp, token)
            if before != np.uint64(0):
                pair = _mixed(before * _PRIME ^ value)
                ids[count] = np.int32(pair >> shift)
                count += 1
                all_pairs += 1
                again += _seen(pairs, stamp, pair)
                if is_han and before_han >= 2:
                    triple = _mixed((before2 * _PRIME ^ before) * _PRIME ^ value)
                    ids[count] = np.int32(triple >> shift)
                    count += 1
            if word and i - first >= 7:
                prefix, suffix = _KIND, ~_KIND
                for j in range(first, first + 5):
                    prefix = (prefix ^ np.uint64(data[j] | 32)) * _PRIME
                for j in range(i - 4, i):
                    suffix = (suffix ^ np.uint64(data[j] | 32)) * _PRIME
                ids[count] = np.int32(_mixed(prefix) >> shift)
                ids[count + 1] = np.int32(_mixed(suffix) >> shift)
                count += 2
            before2, before = before, value
            before_han = before_han + 1 if is_han else 0

    last = end - 1
    while last >= start and (_CLASS[data[last]] == _BLANK or _CLASS[data[last]] == _LINE):
        last -= 1
    ended = last >= start and _ENDS[data[last]] == 1
    if last - 2 >= start and _CLASS[data[last]] == _INSIDE:
        ended = _CLASS[data[last - 2]] == _THREE and _mark3(data, last - 2)
    total = max(1, read)
    shape[0] = min(1.0, np.log2(1.0 + (end - start)) / 16)
    shape[1] = letters / total
    shape[2] = capitals / max(1, letters)
    shape[3] = digits / total
    shape[4] = blanks / total
    shape[5] = min(1.0, 20 * lines / total)
    shape[6] = marks / total
    shape[7] = min(1.0, 5 * brackets / total)
    shape[8] = han_bytes / total
    shape[9] = other / total
    shape[10] = min(1.0, word_bytes / max(1, words) / 12)
    shape[11] = unvoiced / max(1, words)
    shape[12] = fresh / max(1, all_tokens)
    shape[13] = again / max(1, all_pairs)
    shape[14] = singles / max(1, words)
    shape[15] = mixed_words / max(1, words)
    shape[16] = 1.0 if ended else 0.0
    shape[17] = 1.0 if count == 0 else 0.0
    return count


@compiled
def _read_all(
    data: np.ndarray, offsets: np.ndarray, bits: int, ids: np.ndarray, ends: np.ndarray, shapes: np.ndarray
) -> None:
    scratch, tokens, pairs = (
        np.empty(MOST, np.int32),
        np.zeros(_SEEN, np.int64),
        np.zeros(_SEEN, np.int64),
    )
    place = 0
    for i in range(len(offsets) - 1):
        count = read_text(data, offsets[i], offsets[i + 1], bits, scratch, shapes[i], tokens, pairs, i + 1)
        ids[place : place + count] = scratch[:count]
        place += count
        ends[i + 1] = place


def features(texts: Any, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the features of a text column, for training.

    Args:
        texts: `pyarrow.LargeStringArray` without nulls.
        bits: features are numbers below 2**bits.

    Returns:
        (ids int32 (features,), ends int64 (n + 1,), shapes float32 (n, len(SHAPES))): text i has the features
        `ids[ends[i] : ends[i + 1]]`.
    """
    data, offsets = buffers(texts)
    lengths = np.minimum(np.diff(offsets), LONGEST)
    ids = np.empty(2 * int(lengths.sum()) + 64, dtype=np.int32)
    ends = np.zeros(len(texts) + 1, dtype=np.int64)
    shapes = np.zeros((len(texts), len(SHAPES)), dtype=np.float32)
    _read_all(data, np.ascontiguousarray(offsets), bits, ids, ends, shapes)
    return ids[: ends[-1]].copy(), ends, shapes
