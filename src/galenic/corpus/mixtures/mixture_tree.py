"""The mixture of a curriculum as a tree: phase -> group -> source, with tokens, documents, repeats, fingerprints.

    share      of the phase's tokens (of a phase: of the curriculum's)
    tokens     that training draws
    documents  that the shards hold
    repeats    tokens drawn / tokens held: how many times the text is read on average
    most       how many times the most repeated document is read: epochs x its weight

An epoch of a source reads each document as often as it weighs, so a source of heavy documents is through its epoch
later. At most ten repetitions (Baichuan-M1 report, section 2.1.2); up to about four, repeated text is worth nearly as
much as new text, and less and less beyond (Muennighoff et al., arXiv 2305.16264).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from galenic.corpus.tokens.shards import PARTS, read_meta, read_shard
from galenic.pretrain.config import PhaseConfig
from galenic.runtime import UserError, human, nearest

MOST_REPEATS = 10.0
"""The report's cap (section 2.1.2)."""
WORTH_REPEATING = 4.0
"""Muennighoff et al. (arXiv 2305.16264): from here on repeated text is worth clearly less than new text."""

_SAMPLED = 2**16  # tokens of a shard that its fingerprint looks at
_AT_ONCE = 2**20  # documents


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the training shard of one source holds."""

    group: str
    documents: int
    tokens: int
    bytes: int
    epoch: float
    """Tokens of one epoch: documents as often as they weigh."""
    heaviest: float
    """Largest weight of a document."""
    fingerprint: str
    """Of the shard; see `fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A curriculum, phase, group or source; JSON by `dataclasses.asdict`."""

    name: str
    share: float
    """Of the phase; of a phase: of the curriculum."""
    tokens: float
    """Drawn."""
    documents: int
    """Held."""
    held: int
    """Tokens held."""
    repeats: float
    most: float
    fingerprint: str
    children: tuple["Node", ...] = ()


# ---------------------------------------------------------------------------- sizes


def fingerprint(shard: Any) -> str:
    """Returns 12 hex digits of a SHA-256 of a shard: all lengths, sizes and weights, and tokens here and there.

    Tokens are looked at in 65,536 evenly spaced places: a change of the documents changes lengths or is found there
    in practice, and a plan need not read a terabyte.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        array = getattr(shard, part)
        digest.update(f"{part} {array.dtype} {array.size}\n".encode())
        stride = max(1, array.size // _SAMPLED) if part == "tokens" else 1
        for start in range(0, array.size, stride * _SAMPLED):  # not all at once: the array is on disk
            digest.update(np.ascontiguousarray(array[start : start + stride * _SAMPLED : stride]).tobytes())
    return digest.hexdigest()[:12]


def shard_sizes(tokenizer: str) -> dict[str, Size]:
    """Returns source -> what its training shard holds, in the order of the tokenizer's sources."""
    sizes = {}
    for source, counts in read_meta(tokenizer)["sources"].items():
        shard = read_shard(tokenizer, source, "train")
        epoch, heaviest = 0.0, 0.0
        for first in range(0, len(shard), _AT_ONCE):  # not all at once: the arrays are on disk
            weights = np.asarray(shard.weights[first : first + _AT_ONCE], dtype=np.float64)
            epoch += float(np.dot(weights, np.diff(shard.offsets[first : first + _AT_ONCE + 1])))
            heaviest = max(heaviest, float(weights.max()))
        sizes[source] = Size(
            group=counts.get("group", "general"),
            documents=len(shard),
            tokens=len(shard.tokens),
            bytes=int(shard.bytes.sum()),
            epoch=epoch or float(len(shard.tokens)),
            heaviest=heaviest or 1.0,  # no weight at all: every document once, as drawn
            fingerprint=fingerprint(shard),
        )
    return sizes


def held(meta: Mapping[str, Any]) -> dict[str, Size]:
    """Returns source -> what its training shard holds, by `meta.json` alone: every document counts once."""
    return {
        source: Size(
            group=counts.get("group", "general"),
            documents=counts["train"]["documents"],
            tokens=counts["train"]["tokens"],
            bytes=counts["train"]["bytes"],
            epoch=counts["train"]["tokens"],
            heaviest=1.0,
            fingerprint="",
        )
        for source, counts in meta["sources"].items()
    }


def expected(tokens: Mapping[str, float]) -> dict[str, Size]:
    """Returns the same for shards that do not exist yet: source -> tokens it will have, documents unknown."""
    return {
        source: Size(
            group="expected",
            documents=0,
            tokens=round(count),
            bytes=0,
            epoch=count,
            heaviest=1.0,
            fingerprint="",
        )
        for source, count in tokens.items()
    }


# ---------------------------------------------------------------------------- the tree


def tree(sizes: Mapping[str, Size], phases: Sequence[PhaseConfig]) -> Node:
    """Makes the tree of a curriculum.

    Args:
        sizes: source -> what is held, from `shard_sizes`.
        phases: in order.

    Raises:
        UserError: a phase names a source that is not there, or one without documents.
    """
    total = sum(phase.tokens for phase in phases)
    branches = tuple(_phase(sizes, phase, total) for phase in phases)
    drawn = _sum_over(branches)
    leaves = [_leaf(sizes, source, drawn[source], total) for source in sizes if source in drawn]
    return _parent("curriculum", leaves, 1.0, branches)


def _phase(sizes: Mapping[str, Size], phase: PhaseConfig, total: float) -> Node:
    mass = sum(phase.mixture.values())
    groups: dict[str, list[Node]] = {}
    for source, part in phase.mixture.items():
        if source not in sizes:
            known = f"{nearest(source, sizes)}; known: {', '.join(sizes)}"
            raise UserError(
                f"phases: '{phase.name}' names source '{source}', which the shards do not have{known}"
            )
        if part and not sizes[source].tokens:
            raise UserError(f"phases: '{phase.name}' draws from '{source}', which has no training documents")
        if part:
            leaf = _leaf(sizes, source, phase.tokens * part / mass, phase.tokens)
            groups.setdefault(sizes[source].group, []).append(leaf)
    branches = tuple(
        _parent(group, leaves, sum(leaf.share for leaf in leaves), tuple(leaves))
        for group, leaves in groups.items()
    )
    leaves = [leaf for group in groups.values() for leaf in group]
    return _parent(phase.name, leaves, phase.tokens / total, branches)


def _leaf(sizes: Mapping[str, Size], source: str, tokens: float, total: float) -> Node:
    size = sizes[source]
    return Node(
        name=source,
        share=tokens / total,
        tokens=tokens,
        documents=size.documents,
        held=size.tokens,
        repeats=tokens / size.tokens,
        most=tokens / size.epoch * size.heaviest,
        fingerprint=size.fingerprint,
    )


def _parent(name: str, leaves: Sequence[Node], share: float, children: tuple[Node, ...]) -> Node:
    """Sums sources, each counted once, into a group, phase or curriculum."""
    tokens, held = sum(leaf.tokens for leaf in leaves), sum(leaf.held for leaf in leaves)
    known = " ".join(f"{leaf.name} {leaf.fingerprint}" for leaf in sorted(leaves, key=lambda leaf: leaf.name))
    return Node(
        name=name,
        share=share,
        tokens=tokens,
        documents=sum(leaf.documents for leaf in leaves),
        held=held,
        repeats=tokens / max(held, 1),
        most=max((leaf.most for leaf in leaves), default=0.0),
        fingerprint=hashlib.sha256(known.encode()).hexdigest()[:12],
        children=children,
    )


def _sum_over(phases: Sequence[Node]) -> dict[str, float]:
    """Returns source -> tokens drawn over all phases."""
    drawn: dict[str, float] = {}
    for phase in phases:
        for group in phase.children:
            for leaf in group.children:
                drawn[leaf.name] = drawn.get(leaf.name, 0.0) + leaf.tokens
    return drawn


# ---------------------------------------------------------------------------- telling


def lines(root: Node) -> list[str]:
    """Draws a tree with aligned columns; see the module's guide for what they mean."""
    rows = [("", "share", "tokens", "documents", "repeats", "most", "fingerprint")]

    def add(node: Node, stem: str, twig: str, below: str) -> None:
        rows.append(
            (
                stem + twig + node.name,
                f"{node.share:.1%}",
                human(node.tokens),
                str(node.documents),
                f"{node.repeats:.2f}",
                f"{node.most:.2f}",
                node.fingerprint,
            )
        )
        for child in node.children:
            last = child is node.children[-1]
            add(child, stem + below, "└─ " if last else "├─ ", "   " if last else "│  ")

    add(root, "", "", "")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if i in (0, 6) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def repeats_by_source(root: Node) -> dict[str, tuple[float, float]]:
    """Returns source -> (repeats, most) over all phases."""
    totals: dict[str, tuple[float, float]] = {}
    for phase in root.children:
        for group in phase.children:
            for leaf in group.children:
                mean, most = totals.get(leaf.name, (0.0, 0.0))
                totals[leaf.name] = (mean + leaf.repeats, most + leaf.most)
    return totals


def warnings(root: Node, most_repeats: float = MOST_REPEATS) -> list[str]:
    """Says which sources are repeated more than is known to help, over all phases."""
    found = []
    for source, (mean, most) in repeats_by_source(root).items():
        if mean > most_repeats:
            found.append(
                f"{source}: read {mean:.1f} times, above the cap of {most_repeats:g} (report, section 2.1.2)"
            )
        elif mean > WORTH_REPEATING:
            found.append(
                f"{source}: read {mean:.2f} times; beyond {WORTH_REPEATING:g} repeated text is worth clearly less "
                "than new text (arXiv 2305.16264)"
            )
        if mean <= most_repeats < most:
            found.append(
                f"{source}: its most repeated document is read {most:.1f} times, above the cap of {most_repeats:g}"
            )
    return found


def check_repeats(root: Node, most_repeats: float = MOST_REPEATS) -> None:
    """Refuses a curriculum that reads a source more often than the cap, all phases together.

    Raises:
        UserError: naming the worst source and the largest budget at these shares.
    """
    totals = repeats_by_source(root)
    source = max(totals, key=lambda name: totals[name][0], default="")
    if source and totals[source][0] > most_repeats:
        fits = root.tokens * most_repeats / totals[source][0]
        raise UserError(
            f"phases: '{source}' would be read {totals[source][0]:.1f} times, above the cap of {most_repeats:g}; "
            f"lower its shares, or the curriculum to {human(fits)} tokens"
        )


def mixture_preview(tokenizer: str, phases: Sequence[PhaseConfig]) -> list[str]:
    """Returns the tree of a curriculum and what to mind about it, as lines for the console."""
    root = tree(shard_sizes(tokenizer), phases)
    return [*lines(root), *(f"! {warning}" for warning in warnings(root))]


def as_json(root: Node) -> dict[str, Any]:
    """Returns the tree as JSON values."""
    return asdict(root)
