"""Two vocabularies become one: a general BPE merged with an additional one, as in the report (section 4.1).

The report merges a general tokenizer with a multilingual and medical BPE and does not say how. Here both lists of
merges are read side by side, as far as the vocabulary lasts, and what the second brings is spelled with the pieces
that are there by then.
"""

from itertools import pairwise
from typing import NamedTuple

Merge = tuple[str, str]
"""Two pieces that become one."""


class Bpe(NamedTuple):
    """A byte-pair encoding without its bytes and special tokens."""

    characters: list[str]
    """Pieces of one character."""
    merges: list[Merge]
    """In the order in which they are applied."""


def merge_bpe(first: Bpe, second: Bpe, *, share: float, pieces: int) -> Bpe:
    """Merges two byte-pair encodings so that every piece of the result encodes to itself.

    Step i of the first stands at i / (1 - share), step i of the second at i / share; in this order each step's piece is
    added if it is new. It is encoded with the merges so far: if two pieces are left, their merge is added, later than
    all before it. So the piece stays reachable whatever comes after: earlier merges work on it as they did, and a
    later one never comes first. If more than two are left, no merge of two pieces makes it, and it is left out (one
    in eighty on the starter's text).

    Args:
        first: learned from general text.
        second: learned from the additional text.
        share: of the steps that the second takes, in (0, 1).
        pieces: at most this many in the result, characters included.

    Returns:
        The characters of both, the first's before those that only the second has, and the merges, one for each piece.
    """
    characters = list(dict.fromkeys([*first.characters, *second.characters]))
    steps = [((i + 1) / (1 - share), 0, merge) for i, merge in enumerate(first.merges)]
    steps += [((i + 1) / share, 1, merge) for i, merge in enumerate(second.merges)]
    steps.sort(key=lambda step: step[:2])  # stable: each list keeps its order
    known = set(characters)
    ranks: dict[Merge, int] = {}
    for _, _, (left, right) in steps:
        if len(known) >= pieces:
            break
        piece = left + right
        if piece in known:
            continue
        parts = encode(piece, ranks)
        if len(parts) == 2:
            ranks[parts[0], parts[1]] = len(ranks)
            known.add(piece)
    return Bpe(characters, list(ranks))


def encode(text: str, ranks: dict[Merge, int]) -> list[str]:
    """Splits a text into pieces: the merge of the lowest rank first, the leftmost of equals, until there is none."""
    parts = list(text)
    while len(parts) > 1:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            break
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
