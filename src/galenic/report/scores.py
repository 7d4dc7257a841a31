"""What the page says about evaluation: accuracies, bits per byte, averages, and questions with their answers."""

from typing import Any

from . import score_charts
from .data import Chart
from .inputs import Run
from .sections import by_group, groups

KIND_WORDS = {
    "recall": "the facts are in the training text, the question is not",
    "transfer": "the entity and all its names appear nowhere in training",
    "translation": "Chinese and English",
    "arithmetic": "calculations",
    "code": "programs",
    "chains": "calculations of several steps",
}
KIND_ORDER = tuple(KIND_WORDS)
GROUP_WORDS = {
    "base": "base model",
    "expert": "expert",
    "merge": "merge",
    "aligned": "aligned",
    "flattened": "flattened",
    "other": "other",
}


def evaluation(run: Run) -> dict[str, Any] | None:
    """Tables and charts of all models."""
    results = run.evaluate.get("results.json")
    if results is None:
        return None
    models = results["models"]
    kinds = sorted(
        {kind for model in models.values() for kind in model["accuracy"]},
        key=lambda kind: (KIND_ORDER.index(kind) if kind in KIND_ORDER else 9, kind),
    )
    return {
        "models": [{"name": name, **model} for name, model in models.items()],
        "questions": sum(next(iter(models.values()))["accuracy"][kind]["n"] for kind in kinds)
        if kinds
        else 0,
        "kinds": [_kind(models, kind) for kind in kinds],
        "written": [
            kind
            for kind in kinds
            if any("unanswered" in m["accuracy"].get(kind, {}) for m in models.values())
        ],
        "averages": _averages(models),
        "shared_words": results.get("shared_words", {}),
        "best": {kind: max(model["accuracy"][kind]["value"] for model in models.values()) for kind in kinds},
        "best_average": max((m["normalised_average"] or 0 for m in models.values()), default=0),
        "experts": results["experts"],
        "bits": _bits(run, models, "bits_per_byte", "value"),
        "answers": _bits(run, models, "answers", "bits_per_byte"),
        "protocol": results["protocol"],
        "legend": [
            (group, words)
            for group, words in GROUP_WORDS.items()
            if group in {model["group"] for model in models.values()}
        ],
    }


def _kind(models: dict[str, Any], kind: str) -> dict[str, Any]:
    """The chart of one kind of questions."""
    found = {name: model["accuracy"][kind] for name, model in models.items() if kind in model["accuracy"]}
    first = next(iter(found.values()))
    words = ", ".join(f"{name} {100 * score['value']:.1f}%" for name, score in found.items())
    chance = None if first["chance"] is None else 100 * first["chance"]
    written = ["answers written by the model"] if "unanswered" in first else []
    return {
        "name": kind,
        "words": ", ".join([*filter(None, [KIND_WORDS.get(kind)]), *written]),
        "n": first["n"],
        "chart": score_charts.bars(
            f"accuracy-{kind}",
            f"Accuracy on {first['n']} {kind} questions: {words}{'' if chance is None else f'; chance {chance:g}%'}.",
            [
                (name, models[name]["group"], 100 * score["value"], 100 * score["low"], 100 * score["high"])
                for name, score in found.items()
            ],
            mark=chance,
            mark_name="" if chance is None else f"chance {chance:g}%",
            x_title="right answers, % (95% interval)",
        ),
    }


def _averages(models: dict[str, Any]) -> Chart | None:
    """The chart of normalised averages."""
    found = [
        (name, model["group"], *[model["normalised_average"]] * 3)
        for name, model in models.items()
        if model["normalised_average"] is not None
    ]
    if not found:
        return None
    words = ", ".join(f"{name} {value:.3f}" for name, _, value, *_ in found)
    return score_charts.bars(
        "averages",
        f"Normalised average: {words}.",
        found,
        mark=1.0,
        mark_name="each expert on its own kind",
        x_title="normalised average",
    )


def _bits(run: Run, models: dict[str, Any], field: str, key: str) -> dict[str, Any] | None:
    """Columns by group, the lowest of each column marked."""
    known = groups(run)
    columns = by_group({column for model in models.values() for column in model[field]}, known)
    if not columns:
        return None
    rows = [
        {
            "name": name,
            "group": model["group"],
            "cells": [model[field].get(column, {}).get(key) for column in columns],
        }
        for name, model in models.items()
    ]
    lowest = [
        min((row["cells"][i] for row in rows if row["cells"][i] is not None), default=None)
        for i in range(len(columns))
    ]
    return {
        "columns": [(column, known.get(column, "")) for column in columns],
        "rows": rows,
        "lowest": lowest,
    }


def shown(run: Run) -> list[dict[str, Any]]:
    """Questions with the models that picked each option."""
    results = run.evaluate.get("results.json")
    if results is None:
        return []
    return [
        {
            **question,
            "rows": [
                {
                    "letter": "ABCD"[index],
                    "text": option,
                    "right": index == question["answer"],
                    "by": [
                        (name, results["models"][name]["group"])
                        for name, p in question["picks"].items()
                        if p == index
                    ],
                }
                for index, option in enumerate(question["options"])
            ],
            "correct": sum(pick == question["answer"] for pick in question["picks"].values()),
        }
        for question in results["shown"]
    ]


def headline(results: dict[str, Any]) -> tuple[str, str]:
    """Returns the names of the product and of the base it grew from.

    The product is what was flattened, else merged, else aligned last, else an expert.
    """
    models = results["models"]
    by_group: dict[str, list[str]] = {}
    for name, model in models.items():
        by_group.setdefault(model["group"], []).append(name)
    merges = sorted(by_group.get("merge", []), key=lambda name: "metagpt" not in name)
    base = (by_group.get("base") or [next(iter(models))])[-1]
    product = (
        by_group.get("flattened")
        or merges
        or by_group.get("aligned", [])[-1:]
        or by_group.get("expert")
        or [base]
    )[0]
    return product, base
