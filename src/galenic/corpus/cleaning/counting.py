"""The loops of `measure`: one pass over a text's bytes, then a look at what repeats, in compiled code.

All of it is in this file, with every constant it uses: Numba remembers what it compiled until this file changes.

An n-gram that repeats is made of two (n-1)-grams that repeat, so each length looks only at the places that were left
by the length before: ordinary text is through after three.
"""

from typing import Any, NamedTuple

import numpy as np

from galenic.compiled import compiled

SCRIPTS = tuple("latin han kana hangul cyrillic greek arabic hebrew indic thai other".split())
"""Kinds of letters; in the table and in `MEASURES["scripts"]` the first one has number 1."""
LATIN, HAN = 1, 2
WORD, DIGIT, SPACE, JOINS, ENDS, BULLET, CONTINUES = (1 << bit for bit in range(4, 11))
"""Bits of `Tables.kinds` above the script's four: letter or digit; digit; blank; joins a word; ends a sentence; begins
an item; continues a sequence of UTF-8 that was read as another encoding."""
SHORT_LINE = 30
"""Bytes: 30 Latin letters (FineWeb's short line) or 10 Han characters."""
MEASURES = np.dtype(
    [
        (name, np.int64)
        for name in (
            "characters",
            "words",
            "word_characters",
            "lettered_words",  # words with a letter
            "letters",
            "digits",
            "replaced",  # U+FFFD
            "mojibake",  # sequences of UTF-8 read as another encoding
            "stop_words",  # different ones of STOP_WORDS
            "stop_word_uses",
            "lines",
            "line_characters",
            "repeated_lines",  # all but the first of equal lines
            "repeated_line_characters",
            "short_lines",
            "ellipsis_lines",  # end with an ellipsis
            "bullet_lines",  # begin with a bullet
            "ended_lines",  # end with terminal punctuation
            "code_lines",  # end with a brace or a semicolon
            "hashes",
            "ellipses",
            "url_characters",
        )
    ]
    + [
        ("scripts", np.int64, (len(SCRIPTS) + 1,)),  # letters of each; 0 is unused
        (
            "top",
            np.int64,
            (3,),
        ),  # characters of the 2-, 3-, 4-gram that covers most, times how often it occurs
        ("repeated", np.int64, (6,)),  # characters of words in a 5- ... 10-gram that occurred before
    ]
)
"""One row for each text; everything is a count, so that shares are exact until they are divided."""

FNV, FNV_SEED = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)
"""Fowler, Noll and Vo's hash, 64 bits."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Spreads keys over a hash table (Fibonacci hashing)."""
STOP_SLOTS = 64
LOWER = np.uint64(0x20)


class Tables(NamedTuple):
    """What the pass looks things up in."""

    kinds: np.ndarray
    """(0x110000,) uint16: for each code point its script and the bits above."""
    stop_keys: np.ndarray
    """(64,) uint64: a hash table of the stop words' letters; 0 is empty."""
    stop_bits: np.ndarray
    """(64,) uint64: one bit for each stop word."""


class Scratch(NamedTuple):
    """Working memory of the longest text."""

    hashes: np.ndarray
    """Of words."""
    ends: np.ndarray
    """Characters of all words up to each word; one more than words."""
    lines: np.ndarray
    """(lines, 3): first byte, byte after the last one, characters."""
    first: np.ndarray
    """Where each word occurred first."""
    gram: np.ndarray
    """Where the n-gram that begins at each word occurred first."""
    count: np.ndarray
    keys: np.ndarray
    live: np.ndarray
    slots: np.ndarray


@compiled
def _url(data: Any, p: int, end: int) -> int:
    """Returns where a web address that begins at p ends, or p."""
    q = p
    if data[p] == 119:  # www.
        if end - p >= 4 and data[p + 1] == 119 and data[p + 2] == 119 and data[p + 3] == 46:
            q = p + 4
    elif end - p >= 7 and data[p + 1] == 116 and data[p + 2] == 116 and data[p + 3] == 112:  # http
        colon = p + 5 if data[p + 4] == 115 else p + 4
        if colon + 3 <= end and data[colon] == 58 and data[colon + 1] == 47 and data[colon + 2] == 47:
            q = colon + 3
    if q > p:
        while q < end and 33 <= data[q] <= 126 and data[q] != 34 and data[q] != 60 and data[q] != 62:
            q += 1
    return q


@compiled
def _read(data: Any, begin: int, end: int, look: Any, scratch: Any, row: Any) -> None:
    """Reads a text once, character by character, with a newline behind it; all but repetition is counted here."""
    characters = words = word_characters = lettered = letters = latin = digits = replaced = mojibake = (
        lines
    ) = 0
    line_characters = hashes = ellipses = address_characters = 0
    stops = np.uint64(0)
    # the word that is being read
    length, key, wide, joint = 0, np.uint64(0), 0, 0
    lettered_word = False
    hashed = FNV_SEED
    # the line
    first = last = -1
    first_character = last_character = opening = closing = closing_run = 0
    # the characters before this one
    before = before_that = run = 0
    address = begin
    p = begin
    while p <= end:
        if p < end and data[p] < 0x80 and look.kinds[data[p]] & WORD:
            # ASCII letters and digits, of which most texts are made, as many as there are: nothing else can happen
            if (data[p] == 104 or data[p] == 119) and p >= address and not look.kinds[before] & WORD:
                address = _url(data, p, end)
                address_characters += address - p
            if joint:
                hashed = (hashed ^ np.uint64(joint)) * FNV
                length += 1
                wide |= 128
                joint = 0
            q, numerals = p, 0
            while q < end and data[q] < 0x80 and look.kinds[data[q]] & WORD:
                hashed = (hashed ^ np.uint64(data[q])) * FNV
                key = key << np.uint64(8) | np.uint64(data[q]) | LOWER
                numerals += data[q] < 58
                q += 1
            size = q - p
            if first < 0:
                first, first_character, opening = p, characters, int(data[p])
            characters += size
            length += size
            digits += numerals
            latin += size - numerals
            if size > numerals:
                lettered_word = True
            before_that, before = int(data[q - 2]) if size > 1 else before, int(data[q - 1])
            last, last_character, closing, closing_run, run = q, characters, before, 1, 1
            p = q
            continue
        size, point = 1, 10
        if p == end:
            size = 0
        else:
            point = int(data[p])
            if point >= 0x80:
                if point < 0xE0:
                    size, point = 2, point & 0x1F
                elif point < 0xF0:
                    size, point = 3, point & 0x0F
                else:
                    size, point = 4, point & 0x07
                for q in range(p + 1, min(p + size, end)):
                    point = point << 6 | int(data[q]) & 0x3F
                size, point = min(size, end - p), min(point, 0x10FFFF)  # of bytes that are no UTF-8
            characters += 1
        kind = int(look.kinds[point])
        run = run + 1 if point == before else 1

        # ---- words
        script = kind & 15
        if script:
            letters += 1
            row.scripts[script] += 1
        elif kind & DIGIT:
            digits += 1
        if kind & WORD and script != HAN:
            if joint:
                hashed = (hashed ^ np.uint64(joint)) * FNV
                length += 1
                wide |= 128
                joint = 0
            hashed = (hashed ^ np.uint64(point)) * FNV
            key = key << np.uint64(8) | np.uint64(point) | LOWER
            wide |= point
            length += 1
            if script:
                lettered_word = True
        elif length and not joint and kind & JOINS:
            joint = point
        else:
            if length:
                scratch.hashes[words] = hashed
                word_characters += length
                words += 1
                scratch.ends[words] = word_characters
                lettered += lettered_word
                if length <= 4 and wide < 128:
                    slot = key * GOLDEN >> np.uint64(58)
                    while look.stop_keys[slot]:
                        if look.stop_keys[slot] == key:
                            stops |= look.stop_bits[slot]
                            row.stop_word_uses += 1
                            break
                        slot = (slot + np.uint64(1)) % np.uint64(STOP_SLOTS)
                length, key, wide, joint = 0, np.uint64(0), 0, 0
                lettered_word = False
                hashed = FNV_SEED
            if script == HAN:
                scratch.hashes[words] = (FNV_SEED ^ np.uint64(point)) * FNV
                word_characters += 1
                words += 1
                lettered += 1
                scratch.ends[words] = word_characters

        # ---- signs
        if point == 35:
            hashes += 1
        elif point == 46 or point == 0x3002:
            ellipses += run == 3
        elif point >= 0x80:
            ellipses += point == 0x2026 and run == 1
            replaced += point == 0xFFFD
            # what GBK makes of a Chinese full stop, and of two replacement characters; what Latin-1 and Windows-1252
            # make of two and three bytes of UTF-8
            if point == 0x9286 or (point == 0x62F7 and before == 0x65A4 and before_that == 0x951F):
                mojibake += 1
            elif before == 0xC2 or before == 0xC3:
                mojibake += point <= 0xBF
            elif before_that == 0xE2 and before == 0x20AC:
                mojibake += kind & CONTINUES > 0
            elif 0xE5 <= before_that <= 0xE8:
                mojibake += kind & CONTINUES > 0 and look.kinds[before] & CONTINUES > 0

        # ---- lines
        if point == 10:
            if first >= 0:
                size_of_line = last - first
                scratch.lines[lines, 0] = first
                scratch.lines[lines, 1] = last
                scratch.lines[lines, 2] = last_character - first_character
                lines += 1
                line_characters += last_character - first_character
                row.short_lines += size_of_line <= SHORT_LINE
                row.ellipsis_lines += closing == 0x2026 or (
                    closing_run >= 3 and (closing == 46 or closing == 0x3002)
                )
                row.bullet_lines += look.kinds[opening] & BULLET > 0
                row.ended_lines += look.kinds[closing] & ENDS > 0
                row.code_lines += closing == 59 or closing == 123 or closing == 125
            first = -1
        elif not kind & SPACE:
            if first < 0:
                first, first_character, opening = p, characters - 1, point
            last, last_character, closing, closing_run = p + size, characters, point, run
        before_that, before = before, point
        p += max(size, 1)
    row.characters = characters
    row.words, row.word_characters, row.lettered_words = words, word_characters, lettered
    row.scripts[LATIN] += latin
    row.letters, row.digits, row.replaced, row.mojibake = letters + latin, digits, replaced, mojibake
    row.stop_words = np.int64(stops)
    row.lines, row.line_characters = lines, line_characters
    row.hashes, row.ellipses, row.url_characters = hashes, ellipses, address_characters


@compiled
def _hash(data: Any, begin: int, end: int) -> Any:
    """Returns a hash of some bytes."""
    hashed = FNV_SEED
    for p in range(begin, end):
        hashed = (hashed ^ np.uint64(data[p])) * FNV
    return hashed


@compiled
def _repeated_lines(data: Any, scratch: Any, row: Any) -> None:
    """Fills in what the lines in `scratch` repeat."""
    lines, slots = row.lines, scratch.slots
    if lines < 2:
        return
    mask = 3
    while mask < 2 * lines:
        mask = 2 * mask + 1
    slots[: mask + 1] = -1
    for i in range(lines):
        begin, end = scratch.lines[i, 0], scratch.lines[i, 1]
        hashed = _hash(data, begin, end)
        scratch.keys[i] = np.int64(hashed)
        slot = np.int64(hashed >> np.uint64(20)) & mask
        while slots[slot] >= 0 and scratch.keys[slots[slot]] != scratch.keys[i]:
            slot = (slot + 1) & mask
        if slots[slot] >= 0:
            row.repeated_lines += 1
            row.repeated_line_characters += scratch.lines[i, 2]
        else:
            slots[slot] = i


@compiled
def _repeated_grams(scratch: Any, row: Any) -> None:
    """Fills in `top` and `repeated` from the words in `scratch`."""
    words = row.words
    hashes, first, gram, count = scratch.hashes, scratch.first, scratch.gram, scratch.count
    keys, live, slots, ends = scratch.keys, scratch.live, scratch.slots, scratch.ends
    ends[0] = 0
    mask = 3
    while mask < 2 * words:
        mask = 2 * mask + 1
    slots[: mask + 1] = -1
    for i in range(words):
        hashed = hashes[i]
        slot = np.int64(hashed * GOLDEN >> np.uint64(32)) & mask
        while slots[slot] >= 0 and hashes[slots[slot]] != hashed:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = i
            count[i] = 0
        first[i] = gram[i] = slots[slot]
        count[slots[slot]] += 1
    alive = 0
    for i in range(words):
        if count[gram[i]] > 1:
            live[alive] = i
            alive += 1
    for n in range(2, 11):
        # candidates: places where both the (n-1)-gram that begins here and the one that begins a word later repeat
        candidates = 0
        for j in range(alive - 1):
            if live[j + 1] == live[j] + 1 and live[j] + n <= words:
                live[candidates] = live[j]
                candidates += 1
        if candidates < 2:
            return
        mask = 3
        while mask < 2 * candidates:
            mask = 2 * mask + 1
        slots[: mask + 1] = -1
        for j in range(candidates):
            i = live[j]
            keys[i] = np.int64(gram[i]) << 32 | np.int64(first[i + n - 1])
            slot = np.int64(np.uint64(keys[i]) * GOLDEN >> np.uint64(32)) & mask
            while slots[slot] >= 0 and keys[slots[slot]] != keys[i]:
                slot = (slot + 1) & mask
            if slots[slot] < 0:
                slots[slot] = i
                count[i] = 0
            gram[i] = slots[slot]
            count[slots[slot]] += 1
        alive = covered = 0
        for j in range(candidates):
            i = live[j]
            if count[gram[i]] < 2:
                continue
            live[alive] = i
            alive += 1
            if n <= 4:
                row.top[n - 2] = max(row.top[n - 2], count[gram[i]] * (ends[i + n] - ends[i]))
            elif gram[i] != i:
                row.repeated[n - 5] += ends[i + n] - ends[max(i, covered)]
                covered = i + n


@compiled
def count(data: Any, starts: Any, look: Any, scratch: Any, longest: int, out: Any) -> None:
    """Fills in rows of MEASURES; `stop_words` as bits."""
    for text in range(len(out)):
        begin, end = starts[text], starts[text + 1]
        row = out[text]
        if end - begin > longest:
            for p in range(begin, end):
                row.characters += data[p] & 0xC0 != 0x80
            continue
        _read(data, begin, end, look, scratch, row)
        _repeated_lines(data, scratch, row)
        _repeated_grams(scratch, row)
