"""Failures worth reading: what a model got wrong though most others did not, and what it was sure of."""

import math
from collections.abc import Sequence
from typing import Any

from .inputs import Rows, Run

LONGEST = 600
"""Letters shown of what a model wrote."""
Item = tuple[str, str]
"""(kind, id)."""


def right(row: dict[str, Any], scoring: str) -> float:
    """Returns an item's headline score in [0, 1]; older rows tell the options picked only."""
    if "right" in row:
        return float(row["right"])
    return float(row["picks"][scoring] == row["answer"])


def confidence(scores: Sequence[float]) -> float:
    """Returns the share of the best option: the largest entry of softmax(scores).

    Args:
        scores: of the options, log-likelihoods up to what all share; shape (options,).
    """
    best = max(scores)
    return 1.0 / sum(math.exp(score - best) for score in scores)


def failures(run: Run, name: str, most: int) -> dict[str, Any] | None:
    """A model's failures of both sorts; None where nothing was kept, or nothing is to be shown.

    Args:
        run: with its items and questions.
        name: of the model.
        most: shown of each sort.
    """
    results = run.evaluate.get("results.json") or {}
    scoring = results.get("protocol", {}).get("scoring", "total")
    items = {model: _by_item(rows, scoring) for model, rows in run.items.items()}
    mine = items.get(name)
    if not mine or not most:
        return None
    wrong = [item for item, row in mine.items() if right(row, scoring) < 0.5 and item in run.questions]
    others = {
        item: [
            right(rows[item], scoring) >= 0.5
            for model, rows in items.items()
            if model != name and item in rows
        ]
        for item in wrong
    }
    share = {item: sum(votes) / len(votes) for item, votes in others.items() if votes}
    missed = sorted((item for item, part in share.items() if part > 0.5), key=lambda i: (-share[i], i))
    sure = {item: confidence(row[scoring]) for item in wrong if _scored(row := mine[item], scoring)}
    bold = sorted((item for item in sure if sure[item] > 0.5), key=lambda item: (-sure[item], item))

    def tell(item: Item) -> dict[str, Any]:
        question, row = run.questions[item], mine[item]
        pick = row.get("picks", {}).get(scoring, row.get("pick"))
        return {
            "kind": item[0],
            "source": question.get("source", ""),
            "question": question["question"],
            "options": [
                {"letter": chr(65 + i), "text": text, "right": i == question["answer"], "picked": i == pick}
                for i, text in enumerate(question["options"])
            ],
            "said": (row.get("said") or "")[:LONGEST],
            "others": (sum(others[item]), len(others[item])) if others[item] else None,
            "sure": sure.get(item),
        }

    if not (missed or bold):
        return None
    return {
        "model": name,
        "wrong": len(wrong),
        "asked": sum(item in run.questions for item in mine),
        "missed": [tell(item) for item in _varied(missed, most)],
        "missed_all": len(missed),
        "bold": [tell(item) for item in _varied(bold, most)],
        "bold_all": len(bold),
        "scoring": scoring,
    }


def _by_item(rows: Rows, scoring: str) -> dict[Item, dict[str, Any]]:
    return {
        (row["kind"], row["id"]): row for row in rows if "right" in row or scoring in row.get("picks", {})
    }


def _scored(row: dict[str, Any], scoring: str) -> bool:
    return isinstance(row.get(scoring), list) and len(row[scoring]) > 1


def _varied(items: list[Item], most: int) -> list[Item]:
    """Returns the first items of every kind in turn, so that one kind does not take all places."""
    kinds = list(dict.fromkeys(kind for kind, _ in items))
    turns = {kind: [item for item in items if item[0] == kind] for kind in kinds}
    longest = max(map(len, turns.values()), default=0)
    mixed = [turns[kind][i] for i in range(longest) for kind in kinds if i < len(turns[kind])]
    return mixed[:most]
