"""How far two who judged the same items agree: pure functions on labels."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from galenic.evaluate.statistics import wilson

Label = Hashable


def share(count: int, n: int) -> dict[str, Any] | None:
    """Returns a share with its 95% interval (Wilson), or None of nothing."""
    if not n:
        return None
    low, high = wilson(count, n)
    return {"value": count / n, "low": low, "high": high, "n": n}


def chance_agreement(pairs: Sequence[tuple[Label, Label]]) -> float:
    """Returns p_e = sum over labels k of p(first says k) p(second says k): agreement of two who do not look.

    Source: J. Cohen, Educational and Psychological Measurement 20 (1960), pages 37-46.
    """
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    return math.fsum(count * second[label] for label, count in first.items()) / len(pairs) ** 2


def kappa(pairs: Sequence[tuple[Label, Label]]) -> dict[str, float] | None:
    """Returns Cohen's kappa (p_o - p_e) / (1 - p_e) with a 95% interval; None where both gave one and the same label.

    p_o is the share of items with equal labels, p_e the agreement by chance. As in Cohen's standard error, p_e counts
    as known; in place of the normal interval of p_o stands Wilson's. The delta method (Fleiss, Cohen and Everitt 1969)
    leaves no width where all labels agree, which is what one hopes for of a judge: with 30 items of true kappa 0.98 its
    interval held that in a quarter of the cases, this one in 97% (`tests/evaluate/judging/test_judge_agreement.py`).

    Source: as `chance_agreement`.
    """
    if not pairs:
        return None
    chance = chance_agreement(pairs)
    if math.isclose(chance, 1):
        return None
    agreed = sum(a == b for a, b in pairs)
    low, high = wilson(agreed, len(pairs))

    def scaled(observed: float) -> float:
        return max(-1.0, (observed - chance) / (1 - chance))

    return {"value": scaled(agreed / len(pairs)), "low": scaled(low), "high": scaled(high)}


def confusion(pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Returns how often the second said what where the first said what, both in order: first -> second -> count."""
    table: dict[str, dict[str, int]] = {}
    for (first, second), count in sorted(Counter(pairs).items()):
        table.setdefault(first, {})[second] = count
    return table


def agreement(pairs: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """Returns raw agreement with its interval, kappa with its own, and the confusion; None of no pairs."""
    raw = share(sum(a == b for a, b in pairs), len(pairs))
    return raw and {**raw, "kappa": kappa(pairs), "confusion": confusion(pairs)}


def summary(items: Sequence[Mapping[str, Any]], verdicts: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Returns what is to be known about a judge beside its verdicts: prompt -> numbers.

    Args:
        items: as judged; those with a `rule` say what a rule found, in the judge's words (`"A"`, `"none"`, 1, ...).
        verdicts: of them.

    Returns:
        of each prompt: `n`; `unusable`, a share, and its `reasons`; `blank` and `shortened` answers; `rule`, the
        agreement with rules, first the rule, and how many verdicts it lacks because they are `unusable`; `order`, the
        agreement with itself when asked in another order. None where nothing was compared.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(item["prompt"] for item in items):
        own = [(i, v) for i, v in zip(items, verdicts, strict=True) if i["prompt"] == name]
        lost = [v for _, v in own if v.score is None]
        ruled = [(label(i["rule"]), v) for i, v in own if "rule" in i and not v.blank]
        twice = [(v.said, v.again) for _, v in own if v.said is not None and v.again is not None]
        rule = agreement([(said, v.said) for said, v in ruled if v.said is not None])
        found[name] = {
            "n": len(own),
            "unusable": {**(share(len(lost), len(own)) or {}), "reasons": _reasons(lost)},
            "blank": sum(v.blank for _, v in own),
            "shortened": sum(v.shortened for _, v in own),
            "rule": rule and {**rule, "unusable": sum(v.said is None for _, v in ruled)},
            "order": agreement(twice),
        }
    return found


def label(value: Any) -> str:
    """Returns how a value is written among labels: None -> none, True -> 1, 3.0 -> 3."""
    if value is None:
        return "none"
    if isinstance(value, bool | int | float) and value == int(value):
        return str(int(value))
    return str(value)


def _reasons(lost: Sequence[Any]) -> dict[str, int]:
    return dict(Counter(verdict.reason.split(":")[0] for verdict in lost).most_common())
