"""Models against one model on the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galenic.evaluate import compare
from galenic.runtime import UserError

from . import score_charts
from .failures import Item, right
from .inputs import Run

MOST = 6
"""Models whose differences are drawn; the table has all."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of a run that was evaluated."""

    name: str
    """On the page: with its run's name before it where there are several."""
    run: str
    own: str
    """In its run's results."""
    numbers: dict[str, Any]


Scores = dict[str, dict[Item, float]]
"""Kind -> item -> headline score."""


def differences(runs: dict[str, Run], models: Sequence[Model], against: Model) -> dict[str, Any] | None:
    """Compares every model with one, kind by kind, where both answered the same questions.

    Args:
        runs: by name.
        models: of them.
        against: what they are compared with.
    """
    mine = _scores(runs[against.run], against.own)
    rows, left_out = [], []
    for model in models:
        if model.name == against.name:
            continue
        theirs = _scores(runs[model.run], model.own)
        scores = {}
        for kind in sorted(mine.keys() & theirs.keys()):
            if not _same(runs[against.run], runs[model.run], mine[kind], theirs[kind]):
                left_out.append(f"{model.name} on {kind}")
                continue
            items = sorted(mine[kind])
            ours, others = (np.array([each[kind][item] for item in items]) for each in (mine, theirs))
            scores[kind] = ours, others
        rows += [
            {
                "model": model.name,
                "kind": kind,
                "n": told["n"],
                "measure": tuple(100 * told["difference"][key] for key in ("value", "low", "high")),
                "p": told["p_holm"],
                "verdict": told["verdict"],
            }
            for kind, told in compare.differences(scores).items()
        ]
    if not rows:
        return None
    names = list(dict.fromkeys(row["model"] for row in rows))
    return {
        "against": against.name,
        "rows": rows,
        "left_out": left_out,
        "charts": [
            (name, _chart(number, name, against.name, rows)) for number, name in enumerate(names[:MOST])
        ],
        "more": len(names) - MOST,
    }


def _chart(number: int, name: str, against: str, rows: list[dict[str, Any]]) -> Any:
    own = [row for row in rows if row["model"] == name]
    words = ", ".join(f"{row['kind']} {row['measure'][0]:+.1f} ({row['verdict']})" for row in own)
    return score_charts.differences(
        f"versus-{number}",
        f"{name} less {against}, points of right answers: {words}.",
        [(row["kind"], row["measure"], row["verdict"]) for row in own],
        x_title="points more right answers (95% intervals)",
    )


def told(pairs: dict[str, Any] | None) -> list[str]:
    """One sentence a model: at what it is better, at what worse."""
    if pairs is None:
        return []
    lines = []
    for name in list(dict.fromkeys(row["model"] for row in pairs["rows"]))[:MOST]:
        own = [row for row in pairs["rows"] if row["model"] == name]
        parts = [
            f"{word} at {', '.join(kinds)}"
            for word in ("better", "worse")
            if (kinds := [_points(row) for row in own if row["verdict"] == word])
        ]
        undecided = sum(row["verdict"] == "undecided" for row in own)
        if undecided == len(own):
            kinds = "kind" if undecided == 1 else "kinds"
            parts = [f"not told apart at any of {undecided} {kinds} of questions"]
        elif undecided:
            parts.append(f"undecided at {undecided} of {len(own)} kinds")
        lines.append(f"{name} against {pairs['against']}: {'; '.join(parts)}.")
    return lines


def _points(row: dict[str, Any]) -> str:
    return f"{row['kind']} ({row['measure'][0]:+.1f} points)".replace("-", "\u2212")


def _scores(run: Run, model: str) -> Scores:
    scoring = (run.evaluate.get("results.json") or {}).get("protocol", {}).get("scoring", "total")
    found: Scores = {}
    for row in run.items.get(model, []):
        if "right" in row or scoring in row.get("picks", {}):
            found.setdefault(row["kind"], {})[row["kind"], row["id"]] = right(row, scoring)
    return found


def _same(one: Run, other: Run, mine: dict[Item, float], theirs: dict[Item, float]) -> bool:
    """Whether two models were asked the same: the same names of items, and behind them the same questions."""
    if mine.keys() != theirs.keys():
        return False
    return one is other or all(_asked(one, item) == _asked(other, item) for item in mine)


def _asked(run: Run, item: Item) -> tuple[Any, Any]:
    question = run.questions.get(item, {})
    return question.get("question"), question.get("options")


def comparison(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one `compare.json`: a row a kind, in points.

    Raises:
        UserError: it is another file than `galenic evaluate --compare` writes.
    """
    try:
        a, b = (Path(found[side]).name for side in ("a", "b"))  # not where on this machine they lie
        rows = [
            {
                "kind": kind,
                "n": entry["n"],
                "measure": tuple(100 * entry["difference"][key] for key in ("value", "low", "high")),
                "p": entry["p_holm"],
                "verdict": entry["verdict"],
            }
            for kind, entry in found["kinds"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"comparisons: a compare.json is not what `galenic evaluate --compare` writes ({error!r})"
        ) from None
    return {"title": f"{b} less {a}", "rows": rows}
