"""Decontamination: what evaluation sets ask is taken out of training texts, and every removed span is listed.

    files --evaluation_items--> pieces --Evaluations--> sorted keys (.npz) --overlap.scan--> hits in a table's texts
    hits --merge--> spans --cut--> the text without them, or a dropped document

Found are, in both languages (`overlap.py` says how words are folded and weighed):

* 13-gram: a run of 13 words (20 Han characters) of an item, as in GPT-3 (arXiv 2005.14165, appendix C);
* whole item: an item shorter than that, as a whole; a question only with its right answer near, because a short
  stem alone is a phrase that anybody may write;
* near copy: an item whose shingles (runs of `shingle` words) are those of the text at the same place, up to a Jaccard
  similarity of `near_copy`, if the two share a run of twice as many words. MinHash estimates this similarity for pairs
  too many to compare; the items are few enough to be indexed, so that each shared run names its candidates and the
  number is computed exactly.

What is done follows GPT-3, too: the span goes with `window` characters on both sides, short pieces go, and a document
with many spans goes whole. Llama 2 (arXiv 2307.09288, A.6) and PaLM (arXiv 2204.02311, section 8) call an item
contaminated when 80% of its tokens or 70% of its 8-grams are in training data; they judge results, not training data.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.contamination import overlap
from galenic.corpus.contamination.evaluation_items import read_items
from galenic.corpus.contamination.overlap_index import Sizes, build_index
from galenic.corpus.contamination.report import KINDS, contamination_report, markdown, span_schema
from galenic.corpus.texts import buffers, column
from galenic.runtime import UserError, atomic_path

__all__ = [
    "Decontamination",
    "Evaluations",
    "Span",
    "contamination_report",
    "cut",
    "decontaminate_table",
    "find_spans",
    "markdown",
]

EXCERPT = 200
"""Characters of a span that are listed."""


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """What counts as contamination and what is done about it."""

    evaluations: tuple[str, ...] = ()
    """Evaluation files (.jsonl, .json, .parquet); without any the step does nothing."""
    ngram: int = 13
    """Words of a run that an item and a training text must not share (GPT-3: 13)."""
    han_ngram: int = 20
    """Han characters that count as much as `ngram` words."""
    shortest_item: int = 8
    """Words of a shorter item, question and answer together, to be looked for as a whole."""
    answer_within: int = 30
    """Words between a short question and its answer at most."""
    shingle: int = 3
    """Words in a shingle of near copies; weighed like n-grams in Chinese."""
    near_copy: float = 0.5
    """Least Jaccard similarity of a near copy, in (0, 1]; above 1 looks for none."""
    stock: int = 30
    """An n-gram or shingle in more different items than this is their common wording and ignored."""
    window: int = 200
    """Characters removed on each side of a span (GPT-3: 200)."""
    shortest: int = 200
    """Characters; shorter pieces left between cuts go, too (GPT-3: 200)."""
    most_spans: int = 10
    """A document with more cuts is dropped (GPT-3: 10)."""
    least_left: float = 0.5
    """A document of which less than this share is left is dropped, in [0, 1]."""

    def __post_init__(self) -> None:
        for name, low in (("ngram", 2), ("han_ngram", 2), ("shingle", 2), ("shortest_item", 1), ("stock", 1)):
            if getattr(self, name) < low:
                raise UserError(f"{name}: {getattr(self, name)} is below {low}")
        for name in ("answer_within", "window", "shortest", "most_spans"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative")
        if self.shingle >= self.ngram:
            raise UserError(f"shingle: {self.shingle} words are not fewer than ngram, {self.ngram}")
        if self.near_copy <= 0:
            raise UserError(f"near_copy: {self.near_copy} is not above 0")
        if not 0 <= self.least_left <= 1:
            raise UserError(f"least_left: {self.least_left} is not in [0, 1]")

    def sizes(self) -> Sizes:
        """Weights: `ngram` words weigh as much as `han_ngram` Han characters."""
        return Sizes(
            latin=self.han_ngram,
            han=self.ngram,
            ngram=self.ngram * self.han_ngram,
            seed=min(2 * self.shingle, self.ngram) * self.han_ngram,
            shingle=self.shingle * self.han_ngram,
            shortest=self.shortest_item * self.han_ngram,
            stock=self.stock,
        )


@dataclass(frozen=True)
class Evaluations:
    """Evaluation items, indexed for the search; saved and loaded as arrays."""

    rules: Decontamination
    index: overlap.Index
    items: tuple[str, ...]
    """Names of items."""
    files: tuple[str, ...]
    """The file of each item."""
    piece_items: tuple[np.ndarray, np.ndarray]
    """(int64 items, int64 (pieces + 1,) where those of each piece begin)."""
    unsearched: dict[str, int]
    """File -> items too short to be looked for."""

    @classmethod
    def read(cls, files: Sequence[str], rules: Decontamination | None = None) -> "Evaluations":
        """Reads and indexes evaluation files.

        Raises:
            UserError: as `read_items`, or no file.
        """
        if not files:
            raise UserError("evaluations: no file is named; decontamination needs what is to be kept out")
        rules = rules or Decontamination(evaluations=tuple(files))
        items = list(read_items(files))
        texts: list[str] = []
        answers: list[str] = []
        owner: list[int] = []
        alone: list[bool] = []
        for number, item in enumerate(items):
            for text, answer in (*item.pieces, *((answer, None) for answer in item.answers)):
                texts.append(text)
                answers.append(answer or "")
                owner.append(number)
                alone.append(answer is not None)
        index, kept, piece = build_index(texts, answers, alone, rules.sizes())
        pairs = sorted({(p, owner[t]) for t, p in zip(kept, piece, strict=True)})
        starts = np.searchsorted([p for p, _ in pairs], np.arange(len(index.pieces)))
        searched = {number for _, number in pairs}
        missed: dict[str, int] = defaultdict(int)
        for number, item in enumerate(items):
            missed[item.file] += number not in searched
        return cls(
            rules,
            index,
            tuple(item.name for item in items),
            tuple(item.file for item in items),
            (np.array([number for _, number in pairs], dtype=np.int64), starts.astype(np.int64)),
            dict(missed),
        )

    def save(self, path: str | Path) -> None:
        """Writes arrays and names to a `.npz` file, whole or not at all; the same items give the same bytes."""
        import json

        head = {
            "rules": asdict(self.rules),
            "items": self.items,
            "files": self.files,
            "unsearched": self.unsearched,
        }
        words = np.frombuffer(json.dumps(head, ensure_ascii=False).encode(), dtype=np.uint8)
        owners = {"piece_items": self.piece_items[0], "piece_starts": self.piece_items[1]}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, head=words, **owners, **self.index._asdict())

    @classmethod
    def load(cls, path: str | Path) -> "Evaluations":
        """Reads what `save` wrote."""
        import json

        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            index = overlap.Index(**{name: arrays[name] for name in overlap.Index._fields})
            owners = arrays["piece_items"], arrays["piece_starts"]
        known = {field.name for field in fields(Decontamination)}
        rules = {name: value for name, value in head["rules"].items() if name in known}
        rules["evaluations"] = tuple(rules["evaluations"])
        return cls(
            Decontamination(**rules),
            index,
            tuple(head["items"]),
            tuple(head["files"]),
            owners,
            head["unsearched"],
        )


# ---------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Span:
    """Where a piece of an item stands in a text, in characters."""

    kind: int
    piece: int
    start: int
    stop: int


def find_spans(texts: Any, evaluations: Evaluations) -> dict[int, list[Span]]:
    """Returns row -> what was found in that text, in order; overlapping finds of one item are one span.

    Args:
        texts: a column of `texts.column`.
        evaluations: what to look for.
    """
    rules = evaluations.rules
    sizes = rules.sizes()
    data, offsets = buffers(texts)
    hits = overlap.scan(
        data,
        offsets,
        overlap.folding(),
        sizes.latin,
        sizes.han,
        sizes.ngram,
        sizes.seed,
        sizes.shingle,
        rules.answer_within,
        rules.near_copy,
        evaluations.index,
    )
    found: dict[int, list[Span]] = {}
    for text, kind, piece, start, stop in hits[np.lexsort((hits[:, 3], hits[:, 2], hits[:, 0]))].tolist():
        spans = found.setdefault(text, [])
        last = spans[-1] if spans else None
        if last and last.piece == piece and start <= last.stop:
            # The most certain kind names the span; the near copy around an n-gram widens it.
            spans[-1] = Span(min(last.kind, kind), piece, last.start, max(last.stop, stop))
        else:
            spans.append(Span(kind, piece, start, stop))
    for text, spans in found.items():
        raw = data[offsets[text] : offsets[text + 1]].tobytes()
        base = int(offsets[text])
        found[text] = sorted(
            (
                Span(s.kind, s.piece, len(raw[: s.start - base].decode()), len(raw[: s.stop - base].decode()))
                for s in spans
            ),
            key=lambda s: (s.start, s.stop, s.piece),
        )
    return found


def cut(text: str, spans: Sequence[Span], rules: Decontamination) -> tuple[str, str]:
    """Removes spans with their surroundings.

    Returns:
        (what is left, joined by blank lines; "") or ("", why the document goes).
    """
    holes: list[list[int]] = []
    for span in sorted(spans, key=lambda s: s.start):
        start, stop = _outwards(text, span.start - rules.window, span.stop + rules.window)
        if holes and start <= holes[-1][1]:
            holes[-1][1] = max(holes[-1][1], stop)
        else:
            holes.append([start, stop])
    if len(holes) > rules.most_spans:
        return "", f"{len(holes)} cuts, at most {rules.most_spans}"
    edges = [0, *(edge for hole in holes for edge in hole), len(text)]
    pieces = [text[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    left = "\n\n".join(piece for piece in pieces if len(piece) >= max(1, rules.shortest))
    if len(left) < rules.least_left * len(text) or not left:
        return (
            "",
            f"{len(left) / len(text):.0%} left after {len(holes)} cuts, at least {rules.least_left:.0%}",
        )
    return left, ""


def _outwards(text: str, start: int, stop: int) -> tuple[int, int]:
    """Moves both ends outwards to the edges of words (at most 40 characters), so that no half word is left."""
    start, stop = max(0, start), min(len(text), stop)
    inside = [i for i in (start, stop) if 0 < i < len(text) and _joined(text[i - 1]) and _joined(text[i])]
    if start in inside:
        start = next((i for i in range(start, max(0, start - 40), -1) if not _joined(text[i - 1])), start)
    if stop in inside:
        stop = next((i for i in range(stop, min(len(text), stop + 40)) if not _joined(text[i])), stop)
    return start, stop


def _joined(letter: str) -> bool:
    return letter.isalnum() and not overlap.is_han(ord(letter))


def decontaminate_table(table: Any, evaluations: Evaluations) -> tuple[Any, Any, Any]:
    """Takes what the evaluations ask out of a table of documents.

    Args:
        table: `pyarrow.Table` with `id`, `text` and, if it has one, `source`.
        evaluations: what to keep out.

    Returns:
        (kept rows in order, with cut texts; dropped rows as they were, with a column `detail`; spans: id, source,
        item, kind, start, stop, excerpt, outcome, in characters of the text as it came; a span for every item).
    """
    import pyarrow as pa

    texts = (
        pa.chunked_array([table.column("text")])
        if isinstance(table, pa.RecordBatch)
        else table.column("text")
    )
    texts = texts.cast(pa.large_string()).combine_chunks()
    found = find_spans(texts, evaluations)
    ids = table.column("id")
    sources = table.column("source") if "source" in table.schema.names else None
    owners, starts = evaluations.piece_items
    changed: dict[int, str] = {}
    details: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    for row, spans in sorted(found.items()):
        text = texts[row].as_py()
        left, why = cut(text, spans, evaluations.rules)
        (details if why else changed)[row] = why or left
        for span in spans:
            for owner in owners[starts[span.piece] : starts[span.piece + 1]]:
                rows.append(
                    {
                        "id": ids[row].as_py(),
                        "source": sources[row].as_py() if sources is not None else "",
                        "item": evaluations.items[owner],
                        "file": evaluations.files[owner],
                        "kind": KINDS[span.kind],
                        "start": span.start,
                        "stop": span.stop,
                        "excerpt": text[span.start : span.stop][:EXCERPT],
                        "outcome": "dropped" if why else "cut",
                    }
                )
        if why:
            details[row] = f"{evaluations.items[owners[starts[spans[0].piece]]]}: {why}"
    gone = np.array(sorted(details), dtype=np.int64)
    stays = np.setdiff1d(np.arange(len(texts)), gone)
    if changed:
        texts = column(changed.get(row, text) for row, text in enumerate(texts.to_pylist()))
    place = table.schema.get_field_index("text")
    kept = table.set_column(place, "text", texts).take(stays)
    dropped = table.take(gone).append_column(
        "detail", pa.array([details[i] for i in gone.tolist()], pa.string())
    )
    return kept, dropped, pa.Table.from_pylist(rows, schema=span_schema())
