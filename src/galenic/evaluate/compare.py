"""The verb `compare`, spelled `galenic evaluate --compare A B`: is one model better than the other on the same items?

    items/<a>.jsonl --+--paired by kind and id--> difference, 95% interval, p --Holm over the kinds--> a plain word
    items/<b>.jsonl --+

A kind is "better" or "worse" where its p, adjusted for the number of kinds, is at most 0.05; else "undecided".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galenic.runtime import Plan, UserError, folder_name, nearest, read_json, read_jsonl, write_json

from .compare_config import CompareConfig, place
from .statistics import (
    RESAMPLES,
    holm,
    interval,
    mcnemar,
    normalised_average,
    paired_bootstrap,
    resampled_means,
    sign_flip,
    summary,
)

LEVEL = 0.05
Key = tuple[str, str]
"""An item's kind and id."""


def plan(config: CompareConfig) -> Plan:
    """Pairs the items without computing anything.

    Raises:
        UserError: see `run`.
    """
    a, b = _read(config)
    pairs = _paired(config, a, b)
    facts = {kind: f"{len(keys)} items" for kind, keys in _by_kind(pairs).items()}
    return Plan(
        reads=config.reads(), writes=[f"{config.out}/compare.json"] if config.out else [], facts=facts
    )


def run(config: CompareConfig) -> None:
    """Prints the comparison, and writes compare.json if a folder is named.

    Raises:
        UserError: a folder that is no finished evaluation, an unknown model, the same model twice, other items, or the
            same item with another answer.
    """
    found = compare(config)
    if config.out:
        write_json(Path(config.out) / "compare.json", found)
    print("\n".join(lines(found)))


# ---------------------------------------------------------------------------- the two models


class Evaluated:
    """One model's items in a finished evaluation.

    Args:
        given: `FOLDER:MODEL`, or `FOLDER` if it holds one model.

    Raises:
        UserError: see `run`.
    """

    def __init__(self, given: str) -> None:
        folder, model = place(given)
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: is not a folder; write EVALUATION_FOLDER:MODEL")
        if not (self.folder / "results.json").is_file():
            if (self.folder / "items").is_dir() or (self.folder / "provenance.json").is_file():
                raise UserError(
                    f"{folder}: the evaluation is not finished (no results.json); run it to its end"
                )
            raise UserError(
                f"{folder}: is no evaluation (no results.json); name the folder of `galenic evaluate`"
            )
        self.results = read_json(self.folder / "results.json")
        models = self.results.get("models") if isinstance(self.results, dict) else None
        if not isinstance(models, dict) or not models:
            raise UserError(f"{self.folder / 'results.json'}: names no models; it is no evaluation's")
        if model is None and len(models) > 1:
            raise UserError(
                f"{folder}: holds {len(models)} models; write {folder}:MODEL, one of {', '.join(models)}"
            )
        self.model = next(iter(models)) if model is None else model
        if self.model not in models:
            hint = nearest(self.model, models) or f"; it holds {', '.join(models)}"
            raise UserError(f"{folder}: no model is called '{self.model}'{hint}")
        self.items = items(self.folder / "items" / f"{self.model}.jsonl")

    @property
    def label(self) -> str:
        """What the model is called in a message."""
        return f"{self.folder}:{self.model}"

    @property
    def name(self) -> str:
        """What the model is called in a result, wherever on this machine it lies."""
        return f"{folder_name(str(self.folder))}:{self.model}"

    def experts(self) -> dict[str, dict[Key, dict[str, Any]]]:
        """Returns kind -> the items of that kind's expert, of the same evaluation."""
        return {
            kind: items(self.folder / "items" / f"{expert}.jsonl")
            for kind, expert in self.results.get("experts", {}).items()
        }


def items(file: Path) -> dict[Key, dict[str, Any]]:
    """Reads one model's rows: (kind, id) -> row.

    Raises:
        UserError: no file, a row without a score in [0, 1], or an item that is there twice.
    """
    found: dict[Key, dict[str, Any]] = {}
    for number, row in enumerate(read_jsonl(file), start=1):
        right = row.get("right")
        if not isinstance(right, int | float) or isinstance(right, bool) or not 0 <= right <= 1:
            what = "has no 'right'" if right is None else f"'right' is {right!r}"
            raise UserError(f"{file}:{number}: {what}, the score from 0 to 1; evaluate the model anew")
        key = str(row.get("kind")), str(row.get("id"))
        if key in found:
            raise UserError(
                f"{file}:{number}: item '{key[1]}' of {key[0]} is there twice; evaluate the model anew"
            )
        found[key] = row
    if not found:
        raise UserError(f"{file}: no items in it; the evaluation asked no questions")
    return found


def _read(config: CompareConfig) -> tuple[Evaluated, Evaluated]:
    a, b = Evaluated(config.a), Evaluated(config.b)
    if a.folder.resolve() == b.folder.resolve() and a.model == b.model:
        raise UserError(f"{a.label} is named twice; a model is compared with another one")
    return a, b


def _paired(config: CompareConfig, a: Evaluated, b: Evaluated) -> list[Key]:
    """Returns the items that are compared, in the order of the first model's rows."""
    both = [key for key in a.items if key in b.items]
    only_a, only_b = len(a.items) - len(both), len(b.items) - len(both)
    if not both:
        raise UserError(
            f"{a.label} and {b.label} have no item in common; evaluate both on the same questions"
        )
    if (only_a or only_b) and not config.common:
        first = next(key for key in (*a.items, *b.items) if (key in a.items) != (key in b.items))
        raise UserError(
            f"the items differ: {only_a} only of {a.label}, {only_b} only of {b.label} (the first is '{first[1]}' of "
            f"{first[0]}); --common true compares the {len(both)} of both"
        )
    for key in both:
        if a.items[key].get("answer") != b.items[key].get("answer"):
            raise UserError(
                f"item '{key[1]}' of {key[0]} has answer {a.items[key].get('answer')!r} for {a.label} and "
                f"{b.items[key].get('answer')!r} for {b.label}: it is not the same question"
            )
    return both


def _by_kind(keys: Sequence[Key]) -> dict[str, list[Key]]:
    kinds: dict[str, list[Key]] = {}
    for key in keys:
        kinds.setdefault(key[0], []).append(key)
    return kinds


# ---------------------------------------------------------------------------- the comparison


def compare(config: CompareConfig) -> dict[str, Any]:
    """Returns what compare.json holds.

    Raises:
        UserError: see `run`.
    """
    a, b = _read(config)
    kinds = _by_kind(_paired(config, a, b))
    scores = {kind: (_scores(a.items, keys), _scores(b.items, keys)) for kind, keys in kinds.items()}
    found = differences(scores, resamples=config.resamples, seed=config.seed)
    compared = sum(map(len, kinds.values()))
    average = _normalised(config, a, b, kinds)
    return {
        "a": a.name,
        "b": b.name,
        "items": {"compared": compared, "only_a": len(a.items) - compared, "only_b": len(b.items) - compared},
        "kinds": found,
        "normalised_average": None if isinstance(average, str) else average,
        "notes": [f"no normalised average: {average}"] if isinstance(average, str) else [],
        "protocol": {
            "difference": f"score of b minus score of a; 95% percentile interval over {config.resamples} bootstrap "
            f"draws of the items, the same for both models, seed {config.seed}",
            "values": "mean of the items' scores; 95% interval by Wilson, of graded scores with the effective "
            "number of answers",
            "p": "two-sided: McNemar's exact test for scores of 0 and 1, random sign flips for graded ones",
            "p_holm": "adjusted by Holm for the number of kinds",
            "verdict": f"of b against a: better or worse where p_holm is at most {LEVEL}, else undecided",
            "normalised_average": "mean over kinds of the score divided by that kind's expert's (MetaGPT, arXiv "
            "2406.11385, section 4); items are drawn within kinds, together for a, b and the expert",
        },
    }


def _scores(rows: Mapping[Key, Mapping[str, Any]], keys: Sequence[Key]) -> np.ndarray:
    return np.array([rows[key]["right"] for key in keys], dtype=np.float64)


def differences(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Compares two models kind by kind: values, the difference b - a with its interval, p, and a plain word.

    Args:
        scores: kind -> (scores of a, scores of b on the same items), each (items) in [0, 1].
        resamples: draws of the bootstrap and of the sign flips.
        seed: of the draws.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind, (x, y) in scores.items():
        change = paired_bootstrap(x, y, resamples=resamples, seed=seed)
        whole = bool(np.isin(np.concatenate([x, y]), (0, 1)).all())
        only_a, only_b = int((x > y).sum()), int((y > x).sum())
        p = mcnemar(only_a, only_b) if whole else sign_flip(x, y, resamples=resamples, seed=seed)
        found[kind] = {
            "n": len(x),
            "a": summary(x),
            "b": summary(y),
            "difference": {"value": change.value, "low": change.low, "high": change.high},
            "only_a": only_a,
            "only_b": only_b,
            "test": "mcnemar" if whole else "sign flips",
            "p": p,
        }
    for kind, adjusted in holm({kind: row["p"] for kind, row in found.items()}).items():
        sign = found[kind]["difference"]["value"]
        found[kind]["p_holm"] = adjusted
        found[kind]["verdict"] = "undecided" if adjusted > LEVEL else "better" if sign > 0 else "worse"
    return found


def _normalised(
    config: CompareConfig, a: Evaluated, b: Evaluated, kinds: Mapping[str, list[Key]]
) -> dict[str, Any] | str | None:
    """Returns both normalised averages and their difference, or why there are none; None if nobody named experts."""
    experts = a.experts()
    if not experts:
        return None
    others = b.experts() if b.folder.resolve() != a.folder.resolve() else experts
    columns: dict[str, np.ndarray] = {}
    for kind, rows in experts.items():
        keys = kinds.get(kind, [])
        if not keys or not all(key in rows for key in keys):
            return f"the items of {kind}, which has an expert, are not all compared"
        columns[kind] = np.stack([_scores(given, keys) for given in (a.items, b.items, rows)], axis=1)
        same = kind in others and all(key in others[kind] for key in keys)
        if not same or (_scores(others[kind], keys) != columns[kind][:, 2]).any():
            return f"the two evaluations have different experts of {kind}"
    means = [
        resampled_means(part, resamples=config.resamples, seed=config.seed + 1 + number)
        for number, part in enumerate(columns.values())
    ]
    if not all((drawn[:, 2] > 0).all() for drawn in means):
        return "an expert has next to nothing right, so that a ratio to it has no meaning"
    drawn = np.mean([part[:, :2] / part[:, 2:] for part in means], axis=0)
    scores = [{kind: float(part[:, i].mean()) for kind, part in columns.items()} for i in range(3)]
    first, second = (normalised_average(scores[i], scores[2]) or 0.0 for i in (0, 1))

    def told(value: float, draws: np.ndarray) -> dict[str, float]:
        low, high = interval(draws)
        return {"value": value, "low": low, "high": high}

    return {
        "kinds": list(columns),
        "n": sum(map(len, columns.values())),
        "a": told(first, drawn[:, 0]),
        "b": told(second, drawn[:, 1]),
        "difference": told(second - first, drawn[:, 1] - drawn[:, 0]),
    }


# ---------------------------------------------------------------------------- on the terminal


def lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the comparison as a table for the terminal."""
    head = ("", "n", "a", "b", "b - a", "95% interval", "p", "p (Holm)", "b is")
    rows = [head]
    for kind, row in found["kinds"].items():
        rows.append((kind, f"{row['n']}", *_values(row), _p(row["p"]), _p(row["p_holm"]), row["verdict"]))
    average = found["normalised_average"]
    if average:
        rows.append(("normalised average", f"{average['n']}", *_values(average), "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    told = [f"a  {found['a']}", f"b  {found['b']}", ""]
    for row in rows:
        cells = (
            cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        told.append("  ".join(cells).rstrip())
    left = found["items"]["only_a"], found["items"]["only_b"]
    if any(left):
        told += ["", f"left out: {left[0]} items only of a, {left[1]} only of b"]
    return [*told, "", *found["notes"]] if found["notes"] else told


def _values(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    change = row["difference"]
    return (
        f"{row['a']['value']:.3f}",
        f"{row['b']['value']:.3f}",
        f"{change['value']:+.3f}",
        f"{change['low']:+.3f} to {change['high']:+.3f}",
    )


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"
