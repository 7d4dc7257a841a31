"""What became of the items: rows of the output files, and the counts.

Outcome --Output--> documents.parquet, sft.jsonl, ledger.jsonl (whole, or not at all)
        --Tally---> stats.json
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from galenic.corpus.records import Document
from galenic.corpus.synthesis.budget import Budget
from galenic.corpus.synthesis.client import Client
from galenic.corpus.synthesis.seeds import Selection
from galenic.corpus.synthesis.steps import Draft, Seed
from galenic.corpus.synthesis.synthesise_config import PipelineConfig
from galenic.runtime import atomic_path

FILES = ("documents.parquet", "sft.jsonl", "ledger.jsonl", "stats.json")

Row = dict[str, Any]

_CATEGORIES = {
    "encyclopaedia": "knowledge",
    "cases": "reasoning",
    "knowledge-graph": "knowledge",
    "papers": "reasoning",
    "online-qa": "knowledge",
    "long-context": "long-context",
    "safety": "safety",
}
"""Pipeline -> category of its conversations (`galenic.align.conversations.CATEGORIES`)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one item: a document with the judge's score, a conversation or both, or a row of the ledger."""

    id: str
    document: Document | None = None
    conversation: Row | None = None
    round: int = 0
    """In which judgement it passed; 0 without a judge."""
    ledger: Row | None = None
    failed: bool = False
    """Its requests failed; nothing is known about the item."""


def source_of(pipeline: PipelineConfig) -> str:
    """Returns the source that a pipeline's documents are of."""
    return f"synthetic-{pipeline.name}"


def id_of(pipeline: PipelineConfig, seed: Seed) -> str:
    """Returns the id of what is made of a seed."""
    return f"{source_of(pipeline)}/{seed.id}"


def made(pipeline: PipelineConfig, seed: Seed, name: str, draft: Draft, score: float, number: int) -> Outcome:
    """Returns the outcome of an item that passed with a score in [0, 1] in a round."""
    document = Document(
        id=name,
        text=f"{draft.question}\n\n{draft.answer}" if draft.question else draft.answer,
        source=source_of(pipeline),
        licence=f"derived from {seed.source}: {seed.licence}",
        language=seed.language,
        category=seed.category,
        department=seed.department,
        quality=round(score, 4),
        value=seed.value,
    )
    conversation = None
    if draft.question:
        turns = (draft.question, draft.answer)
        conversation = conversation_row(pipeline, name, turns, department=seed.department, document=seed.id)
    return Outcome(id=name, document=document, conversation=conversation, round=number)


def conversation_row(pipeline: PipelineConfig, name: str, turns: Sequence[str], **more: Any) -> Row:
    """Returns a row of sft.jsonl: turns of the user and the assistant, one after the other."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {
        "messages": messages,
        "source": source_of(pipeline),
        "category": _CATEGORIES[pipeline.name],
        "id": name,
        **more,
    }


def dropped(
    pipeline: PipelineConfig, name: str, reason: str, detail: str, text: str, failed: bool = False
) -> Outcome:
    """Returns the outcome of an item, or a seed, that came to nothing."""
    row = {
        "id": name,
        "source": source_of(pipeline),
        "reason": reason,
        "detail": detail[:500],
        "text": text[:2000],
    }
    return Outcome(id=name, ledger=row, failed=failed)


class Output:
    """The three files of rows, written as the items come; they appear together, whole."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> "Output":
        import pyarrow
        from pyarrow import parquet

        kinds = {float: pyarrow.float64(), int: pyarrow.int64(), str: pyarrow.string()}
        columns = [pyarrow.field(f.name, kinds[f.type]) for f in fields(Document) if isinstance(f.type, type)]
        self._schema = pyarrow.schema(columns)
        with ExitStack() as stack:
            paths = [stack.enter_context(atomic_path(self.out / name)) for name in FILES[:3]]
            self._parquet = stack.enter_context(
                parquet.ParquetWriter(paths[0], self._schema, compression="zstd")
            )
            self._sft = stack.enter_context(open(paths[1], "w", encoding="utf-8"))
            self._ledger = stack.enter_context(open(paths[2], "w", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        self._stack.__exit__(*error)

    def write(self, outcome: Outcome) -> Outcome:
        """Writes an item's rows and returns it."""
        if outcome.document is not None:
            self._rows.append(astuple(outcome.document))
            if len(self._rows) >= 4096:
                self._flush()
        for file, row in ((self._sft, outcome.conversation), (self._ledger, outcome.ledger)):
            if row is not None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return outcome

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            columns = [
                pyarrow.array(c, t)
                for c, t in zip(zip(*self._rows, strict=True), self._schema.types, strict=True)
            ]
            self._parquet.write_table(pyarrow.table(columns, schema=self._schema))
            self._rows = []


# ---------------------------------------------------------------------------- numbers


@dataclass
class Tally:
    """Counts of one pipeline."""

    selection: Selection
    passed: int = 0
    rounds: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def note(self, outcome: Outcome) -> None:
        """Counts an item."""
        if outcome.ledger is not None:
            self.dropped[outcome.ledger["reason"]] += 1
        else:
            self.passed += 1
            self.rounds[outcome.round] += 1


def statistics(
    tallies: list[Tally], writer: Client | None, judge: Client | None, budget: Budget, seconds: float
) -> Row:
    """Returns what goes into stats.json; what differs from run to run stands under `this_run`."""
    clients = {"writer": writer} | ({"judge": judge} if judge is not writer else {})
    used = {name: client.usage for name, client in clients.items() if client is not None}
    answers, cached = sum(u.answers for u in used.values()), sum(u.cached for u in used.values())
    retries: Counter[str] = Counter()
    for usage in used.values():
        retries.update(usage.retries)
    return {
        "pipelines": {
            source_of(t.selection.pipeline) + (" (templates)" if t.selection.pipeline.offline else ""): {
                "seeds": len(t.selection.seeds) + len(t.selection.too_long),
                "items": t.passed + sum(t.dropped.values()),
                "passed": t.passed,
                "passed_in_round": {str(k): v for k, v in sorted(t.rounds.items())},
                "dropped": dict(sorted(t.dropped.items())),
            }
            for t in tallies
        },
        "answers": {
            name: {
                "answers": u.answers,
                "prompt_tokens": u.prompt_tokens,
                "completion_tokens": u.completion_tokens,
            }
            for name, u in used.items()
        },
        "this_run": {
            "answers_from_cache": cached,
            "cache_hit_rate": round(cached / answers, 4) if answers else None,
            "requests_sent": sum(u.sent for u in used.values()),
            "retries": dict(sorted(retries.items())),
            "seconds": round(seconds, 1),
        },
        "spent_with_this_cache": {
            "requests": int(budget.spent[0]),
            "tokens": int(budget.spent[1]),
            "money": round(budget.spent[2], 6),
        },
    }
