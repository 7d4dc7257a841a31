"""Repair and boilerplate: one compiled pass over the UTF-8 bytes of each text that writes what stays.

Repaired is what is never meant: control characters, foreign line ends, blanks at line ends, heaps of blank lines. Then
each line is walked through the automaton of `phrases`; a line of boilerplate goes, with its newline.
"""

from typing import Any

import numpy as np

from galenic.compiled import compiled
from galenic.corpus.cleaning.phrases import ADVERT, BEGINS, CONTAINS, PLACEHOLDER, automaton

FORBIDDEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffe\uffff"
"""C0 and C1 controls except tab and newline, zero-width and direction marks, line separators, BOM, noncharacters, as
in a regular expression. Line ends among them become newlines, the others go."""
TIDIED = np.dtype(
    [
        (name, np.int64)
        for name in (
            "cut_lines",
            "cut_characters",
            "placeholders",
            "adverts",  # different phrases of advertisements
            "lost_mojibake",  # sequences of UTF-8 read as Latin-1 that lost their control character
        )
    ]
)
_LOOK = np.zeros(256, dtype=np.bool_)  # bytes at which something may begin that does not stay
_LOOK[[*range(9), *range(10, 32), 127, 0xC2, 0xE2, 0xEF]] = True


def tidy(data: np.ndarray, starts: np.ndarray, *, cut: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Repairs texts and takes boilerplate lines out.

    Args:
        data: (bytes,) uint8, valid UTF-8.
        starts: (n + 1,) int64; text i is `data[starts[i] : starts[i + 1]]`.
        cut: look for phrases at all; without it texts are only repaired.

    Returns:
        (data, starts, rows of TIDIED (n,)) of the texts that are left.
    """
    out = np.empty(int(starts[-1] - starts[0]), dtype=np.uint8)
    ends = np.zeros(len(starts), dtype=np.int64)
    rows = np.zeros(len(starts) - 1, dtype=TIDIED)
    _tidy(data, starts, _LOOK, automaton(), cut, out, ends, rows)
    rows["adverts"] = np.bitwise_count(rows["adverts"].view(np.uint64))
    return out[: ends[-1]], ends, rows


@compiled
def _break(data: Any, p: int, end: int) -> tuple[int, int]:
    """Returns (bytes, newlines) of a line end or forbidden character at p; 0 bytes if it is neither."""
    byte = data[p]
    if byte < 0x80:
        if byte == 10:
            return 1, 1
        if byte == 13:
            return (2, 1) if p + 1 < end and data[p + 1] == 10 else (1, 1)
        return (1, 0) if (byte < 32 and byte != 9) or byte == 127 else (0, 0)
    if byte == 0xC2:  # U+0080 to U+009F
        return (2, 0) if p + 1 < end and data[p + 1] < 0xA0 else (0, 0)
    if (byte != 0xE2 and byte != 0xEF) or p + 2 >= end:
        return 0, 0
    second, third = data[p + 1], data[p + 2]
    if byte == 0xEF:  # U+FEFF, U+FFFE, U+FFFF
        return (3, 0) if (second == 0xBB and third == 0xBF) or (second == 0xBF and third >= 0xBE) else (0, 0)
    if second == 0x81:  # U+2060
        return (3, 0) if third == 0xA0 else (0, 0)
    if second != 0x80:
        return 0, 0
    if third == 0xA8 or third == 0xA9:  # line and paragraph separator
        return 3, third - 0xA7
    return (3, 0) if 0x8B <= third <= 0x8F or 0xAA <= third <= 0xAE else (0, 0)


@compiled
def _is_boilerplate(out: Any, begin: int, end: int, phrases: Any, row: Any) -> tuple[bool, Any]:
    """Walks a line through the automaton: (whether it goes, bits of the advertisements in it)."""
    while begin < end and (out[begin] == 32 or out[begin] == 9):
        begin += 1
    marks, row_of_state, adverts = 0, np.uint64(0), np.uint64(0)
    for p in range(begin, end):
        entry = phrases.move[row_of_state + np.uint64(phrases.symbol[out[p]])]
        row_of_state = np.uint64(entry >> 1)
        if entry & 1:
            state = int(row_of_state) // phrases.symbols
            mark = int(phrases.marks[state])
            if mark & BEGINS and p + 1 - begin != phrases.depth[state]:
                mark &= ~BEGINS
            marks |= mark
            if mark & ADVERT:
                adverts |= phrases.adverts[state]
            if mark & PLACEHOLDER:
                row.placeholders += 1
    size = end - begin
    goes = (marks & CONTAINS and size <= phrases.longest_containing) or (
        marks & BEGINS and size <= phrases.longest_beginning
    )
    return bool(goes), adverts


@compiled
def _tidy(data: Any, starts: Any, look: Any, phrases: Any, cut: bool, out: Any, ends: Any, rows: Any) -> None:
    w = 0
    for text in range(len(rows)):
        row = rows[text]
        end, begin_out = starts[text + 1], w
        line, newlines = w, 0
        adverts = np.uint64(0)
        p = starts[text]
        while p <= end:
            size = breaks = 0
            if p < end:
                if look[data[p]]:
                    size, breaks = _break(data, p, end)
                if size == 0:
                    out[w] = data[p]
                    w += 1
                    p += 1
                    continue
                if breaks == 0:
                    if size == 2 and p - starts[text] >= 2 and data[p - 2] == 0xC3:
                        row.lost_mojibake += data[p - 1] == 0x82 or data[p - 1] == 0x83
                    p += size
                    continue
            # ---- a line ends
            while w > line and (out[w - 1] == 32 or out[w - 1] == 9):
                w -= 1
            if w > line:
                newlines = 0
                if cut:
                    goes, seen = _is_boilerplate(out, line, w, phrases, row)
                    adverts |= seen
                    if goes:
                        row.cut_lines += 1
                        for q in range(line, w):
                            row.cut_characters += out[q] & 0xC0 != 0x80
                        w = line
                        breaks -= 1
                        newlines = _newlines_before(out, begin_out, w)
            for _ in range(breaks):
                if w > begin_out and newlines < 3:
                    out[w] = 10
                    w += 1
                    newlines += 1
            line = w
            p += max(size, 1)
        while w > begin_out and out[w - 1] == 10:
            w -= 1
        row.adverts = np.int64(adverts)
        ends[text + 1] = w


@compiled
def _newlines_before(out: Any, begin: int, w: int) -> int:
    count = 0
    while w - count > begin and out[w - count - 1] == 10:
        count += 1
    return count
