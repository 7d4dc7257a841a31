"""What a character is: a letter, digit or blank as Python says, of which script, a sign that the rules look at."""

import functools
import re

import numpy as np

from galenic.corpus.cleaning.counting import (
    BULLET,
    CONTINUES,
    DIGIT,
    ENDS,
    GOLDEN,
    JOINS,
    SCRIPTS,
    SPACE,
    STOP_SLOTS,
    WORD,
    Tables,
)

STOP_WORDS = tuple("the be to of and that have with is are in a as for".split())
"""Those of Gopher (the, be, to, of, and, that, have, with), and six that short medical sentences have instead."""
# Code points; ranges include their ends.
_HAN_RANGES = ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
_SCRIPT_RANGES = {
    "latin": (
        *((0x41, 0x24F), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xAB30, 0xAB6F)),
        *((0xFB00, 0xFB06), (0xFF21, 0xFF5A)),
    ),
    "han": _HAN_RANGES,
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "indic": ((0x900, 0xDFF),),
    "thai": ((0xE00, 0xE7F),),
}
JOINING = "'’-"
ENDING = ".!?\"'”’»…。！？」』"
BULLETS = "•‣◦⁃●○■□▪▫◆◇▶►※·➢–—*-"
# What the bytes 80 to BF become in Latin-1 and Windows-1252, without the no-break space, which stands after letters.
CONTINUING = "\x80-\x9f\xa1-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"


@functools.cache
def tables() -> Tables:
    """Returns the tables, made from Python's own idea of letters, digits and blanks in a tenth of a second."""
    everything = (
        "".join(map(chr, range(0xD800))) + "\ue000" * 0x800 + "".join(map(chr, range(0xE000, 0x110000)))
    )
    kinds = np.zeros(0x110000, dtype=np.uint16)
    other = len(SCRIPTS)
    script = np.full(0x110000, other, dtype=np.uint16)
    for name, ranges in _SCRIPT_RANGES.items():
        for low, high in ranges:
            script[low : high + 1] = SCRIPTS.index(name) + 1
    for pattern, bit in (
        (r"[^\W_]", WORD),
        (r"\d", DIGIT),
        (f"[{re.escape(JOINING)}]", JOINS),
        (f"[{re.escape(ENDING)}]", ENDS),
        (f"[{re.escape(BULLETS)}]", BULLET),
        (f"[{CONTINUING}]", CONTINUES),
    ):
        for match in re.finditer(f"{pattern}+", everything):
            kinds[match.start() : match.end()] |= bit
    kinds[[i for i, character in enumerate(everything) if character.isspace()]] |= SPACE
    letters = (kinds & WORD > 0) & (kinds & DIGIT == 0)
    kinds[letters] |= script[letters]
    kinds[0xD800:0xE000] = 0  # surrogates are not in UTF-8
    stop_keys, stop_bits = np.zeros(STOP_SLOTS, np.uint64), np.zeros(STOP_SLOTS, np.uint64)
    for i, word in enumerate(STOP_WORDS):
        key = int.from_bytes(word.encode())
        slot = key * int(GOLDEN) % 2**64 >> 58
        while stop_keys[slot]:
            slot = (slot + 1) % STOP_SLOTS
        stop_keys[slot], stop_bits[slot] = key, 1 << i
    return Tables(kinds, stop_keys, stop_bits)
