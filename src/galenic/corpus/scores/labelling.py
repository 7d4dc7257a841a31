"""The teacher's part of the verb `scorer`: documents are drawn, labelled by an endpoint, and learned from.

documents --draw (evenly from the sources)--> teacher --> OUT/teacher/labels.jsonl, ledger.jsonl --> labels
                                                |
                                     answers into the cache: a killed run asks only for what is missing
"""

import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from galenic.corpus.scores.labels import Labelled, read_labels
from galenic.corpus.scores.scorer_config import TeacherConfig
from galenic.corpus.scores.teacher import label, prompt, write_labels
from galenic.corpus.starter.holdout import stable_shuffle
from galenic.corpus.synthesis.asking import Watch
from galenic.corpus.synthesis.budget import Budget, BudgetSpent
from galenic.corpus.synthesis.cache import Cache
from galenic.corpus.synthesis.client import Client, RequestFailed, count_tokens
from galenic.corpus.synthesis.seeds import open_documents, read_training, unique
from galenic.runtime import UserError, human, progress

FEWEST_FOR_FAILURE = 20
"""Documents that are over before a run is stopped because too many failed."""
_COLUMNS = ("id", "text", "source")
_LOOK_AHEAD = 4  # documents under way for each request under way: the slowest must not stop the others

Row = dict[str, Any]


def plan_facts(teacher: TeacherConfig, cache: str) -> dict[str, str]:
    """Returns what the teacher would be asked, and what it costs at most; reads the documents, asks nobody."""
    endpoint, documents = teacher.endpoint, draw(teacher)
    asked = [count_tokens(prompt(row["text"])) for row in documents if row["text"].strip()]
    answers = len(asked) * endpoint.max_tokens
    money = (sum(asked) * endpoint.price_prompt + answers * endpoint.price_completion) / 1e6
    limits = (f"{name} {value:g}" for name, value in vars(teacher.budget).items() if value is not None)
    sources = len({row["source"] for row in documents})
    return {
        "teacher": f"{endpoint.model} at {endpoint.base_url}",
        "documents": f"{len(documents)} of {sources} source{'s' if sources > 1 else ''}, none held out",
        "requests": f"at most {len(asked)}, without second tries",
        "tokens": f"about {human(sum(asked))} of prompts, at most {human(answers)} of answers",
        "cost": f"at most {money:.2f} for these requests",
        "budget": ", ".join(limits) or "no limit",
        "cache": f"{cache}: what it holds is not asked again",
    }


def draw(teacher: TeacherConfig) -> list[Row]:
    """Draws the documents to label: first one of each source, then a second of each, until there are enough.

    Returns:
        Rows with `id`, `text` and `source`, in the order of their ids.

    Raises:
        UserError: a file is missing or malformed, an id is no string or stands twice, or there is no document.
    """
    files = open_documents(teacher.corpus, teacher.documents, _COLUMNS)
    ranks: dict[str, int] = {}
    ranked = []
    found = unique(read_training(files, ("id", "source"), lambda row: True, None))
    for row in stable_shuffle(found, lambda row: row["id"], teacher.seed, "teacher"):
        if not isinstance(row["id"], str):
            raise UserError(f"teacher.documents: the id {row['id']!r} is no string")
        source = str(row["source"] or "")
        ranks[source] = ranks.get(source, 0) + 1
        ranked.append((ranks[source], source, row["id"]))
    if not ranked:
        raise UserError("teacher: no document of the training split to label; see its corpus and documents")
    chosen = [name for *_, name in sorted(ranked)[: teacher.count]]
    rows = read_training(files, _COLUMNS, lambda row: True, chosen)
    return [
        {"id": row["id"], "text": str(row["text"] or ""), "source": str(row["source"] or "")}
        for row in sorted(rows, key=lambda row: row["id"])
    ]


def labelled(teacher: TeacherConfig, path: Path, cache: str) -> list[Labelled]:
    """Lets the teacher label, writes its labels to a path, and what was no use beside it.

    Returns:
        The labels, whose origin names the teacher and the document's source.

    Raises:
        UserError: bad input; the endpoint does not let us in; too many requests fail; nothing was labelled.
    """
    rows, ledger = asyncio.run(_ask(teacher, draw(teacher), cache))
    if not rows:
        last = ledger[-1]
        why = f"{last['reason']}, {last['detail']}".rstrip(", ")
        raise UserError(
            f"teacher: none of the {len(ledger)} documents was labelled, '{last['id']}' for: {why}"
        )
    write_labels(path.parent, rows, ledger)
    return [
        replace(one, origin=f"{teacher.endpoint.model} on {row['source']}")
        for one, row in zip(read_labels([str(path)]), rows, strict=True)
    ]


async def _ask(teacher: TeacherConfig, documents: list[Row], folder: str) -> tuple[list[Row], list[Row]]:
    endpoint = teacher.endpoint
    sampling: Row = {} if endpoint.temperature is None else {"temperature": 0}
    if endpoint.json_mode:
        sampling["response_format"] = {"type": "json_object"}
    watch = Watch(teacher.failed_share, FEWEST_FOR_FAILURE)
    async with AsyncExitStack() as stack:
        cache = Cache(Path(folder) / "answers.jsonl")
        stack.callback(cache.close)
        budget = Budget(teacher.budget)
        budget.add((cache.requests, cache.tokens, cache.money))
        client = await stack.enter_async_context(Client(endpoint, cache, budget))
        bar = stack.enter_context(progress(len(documents), "teacher", "documents"))

        def note(error: Exception | None) -> None:
            watch.note(error if isinstance(error, RequestFailed) else None)
            bar.update(1)

        rows, ledger = await label(
            documents,
            client,
            failures=(RequestFailed, BudgetSpent),
            many=_LOOK_AHEAD * endpoint.concurrency,
            note=note,
            sampling=sampling,
        )
    usage = client.usage
    print(
        f"  teacher: {len(rows)} of {len(documents)} documents labelled, {usage.sent} requests, "
        f"{usage.cached} of {usage.answers} answers from the cache, {len(ledger)} lines in the ledger",
        file=sys.stderr,
    )
    return rows, ledger
