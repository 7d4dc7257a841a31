"""What the cleaning rules look at, counted in one compiled pass over the UTF-8 bytes of each text.

A word is a Han character, or a run of other letters and digits with single apostrophes or hyphens inside. Lines are
split at newlines and stripped of blanks; empty ones do not count. Equal words and lines are found by 64-bit hashes,
equal n-grams exactly from the words'.
"""

import numpy as np

from galenic.corpus.cleaning.characters import tables
from galenic.corpus.cleaning.counting import MEASURES, Scratch, count


def measure(data: np.ndarray, starts: np.ndarray, *, longest: int = 1 << 40) -> np.ndarray:
    """Measures texts.

    Args:
        data: (bytes,) uint8, valid UTF-8.
        starts: (n + 1,) int64; text i is `data[starts[i] : starts[i + 1]]`.
        longest: of texts of more bytes only the characters are counted.

    Returns:
        (n,) rows of MEASURES.
    """
    sizes = np.diff(starts)
    longest_text = int(sizes[sizes <= longest].max(initial=0)) + 2
    out = np.zeros(len(sizes), dtype=MEASURES)
    slots = 4
    while slots < 2 * longest_text:
        slots *= 2
    integers = [np.empty(longest_text, dtype=np.int32) for _ in range(4)]
    scratch = Scratch(
        hashes=np.empty(longest_text, dtype=np.uint64),
        ends=np.empty(longest_text, dtype=np.int32),
        lines=np.empty((longest_text, 3), dtype=np.int64),
        first=integers[0],
        gram=integers[1],
        count=integers[2],
        keys=np.empty(longest_text, dtype=np.int64),
        live=integers[3],
        slots=np.empty(slots, dtype=np.int32),
    )
    count(data, starts, tables(), scratch, longest, out)
    out["stop_words"] = np.bitwise_count(out["stop_words"])
    return out
