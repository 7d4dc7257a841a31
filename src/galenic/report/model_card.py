"""The model card (README.md) of a model folder, in the format of the Hugging Face Hub.

`render` writes the card that every saved model gets; `with_evaluation` adds to a card what was measured afterwards.
Both take values and return text: nothing in a card depends on when or where it is written.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

LIMITS = """\
Research on training, merging and evaluating medical language models. It has not been assessed for safety or
clinical accuracy, can state falsehoods fluently, and knows only what its training texts say.

**It is not a medical device and its output is not medical advice.** Do not use it to diagnose, treat or triage.
"""
_LAST = "Intended use and limits"
_MOST_LINES = 60


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says."""

    title: str
    description: str
    licence: str | None = None
    """As the Hub names it; `other` where the texts decide."""
    languages: Sequence[str] = ()
    pipeline: str | None = None
    """The Hub's name of what it does: `text-generation`."""
    parents: Sequence[str] = ()
    """Models it was made from."""
    relation: str | None = None
    """To its parents, as the Hub names it: `merge`."""
    tags: Sequence[str] = ("galenic",)
    sections: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """(heading, text), before how it may be used."""


def render(card: Card) -> str:
    """Returns the whole text of a card: front matter, what it is, its sections, and what it is not for."""
    front: dict[str, Any] = {
        "license": card.licence,
        "language": list(card.languages),
        "library_name": "transformers",
        "pipeline_tag": card.pipeline,
        "base_model": list(card.parents),
        "base_model_relation": card.relation,
        "tags": list(card.tags),
    }
    body = [f"# {card.title}\n\n{card.description.strip()}\n"]
    body += [
        f"## {heading}\n\n{text.strip()}\n" for heading, text in (*card.sections, (_LAST, LIMITS)) if text
    ]
    return f"---\n{_front({key: value for key, value in front.items() if value})}---\n\n" + "\n".join(body)


def _front(values: dict[str, Any]) -> str:
    """YAML; a list of one word stands on its key's line."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}\n")
        else:
            lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True))
    return "".join(lines)


def listed(entries: Sequence[str]) -> str:
    """Returns entries as a list, nothing of none."""
    return "\n".join(f"* {entry}" for entry in entries)


def licences(sources: dict[str, str]) -> str:
    """Returns the section on texts it learned from: source -> licence."""
    if not sources:
        return ""
    told = listed([f"{name}: {licence}" for name, licence in sources.items()])
    return f"{told}\n\nWhoever passes the model on takes over the duties of these licences."


def fenced(provenance: dict[str, Any]) -> str:
    """Returns how it was made as JSON, its first lines where there are many."""
    lines = json.dumps(provenance, ensure_ascii=False, indent=2).splitlines()
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"... {len(lines) - _MOST_LINES} more lines in galenic.json"]
    return "\n".join(["```json", *lines, "```"])


# ---------------------------------------------------------------------------- what was measured afterwards


def with_evaluation(
    text: str,
    name: str,
    numbers: dict[str, Any] | None,
    protocol: dict[str, str],
    *,
    sources: dict[str, dict[str, Any]] | None = None,
    made_by: Sequence[str] = (),
) -> str:
    """Returns a card with its evaluation: a table with intervals, and the Hub's `model-index`.

    Sections of the same headings are replaced, so that a card may be completed again.

    Args:
        text: of the card.
        name: of the model, as the Hub should list it.
        numbers: of the model, as in results.json; None of one that was not evaluated.
        protocol: in words, as in results.json.
        sources: of the corpus: name -> its title, licence and package.
        made_by: steps of its run that it comes from, a line each.
    """
    front, body = split(text)
    scored = numbers or {"accuracy": {}}
    results = [
        _index_entry(kind, f"{kind} questions", "accuracy", score)
        for kind, score in scored["accuracy"].items()
    ]
    results += [
        _index_entry(row, row, score.get("metric", "accuracy"), score)
        for row, score in scored.get("benchmarks", {}).items()
    ]
    front.pop("model-index", None)
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    sections = {"Evaluation": evaluation(numbers, protocol) if numbers else "It was not evaluated."}
    if sources:
        sections["Texts it learned from"] = _sources(sources)
    if made_by:
        sections["Steps that made it"] = listed(made_by)
    for heading, words in sections.items():
        body = _put(body, heading, words)
    return f"---\n{_front(front)}---\n\n{body}"


def split(text: str) -> tuple[dict[str, Any], str]:
    """Returns the front matter and the rest of a card; a text without front matter is all rest."""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}, text
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}, text
    return (front, parts[2].lstrip("\n")) if isinstance(front, dict) else ({}, text)


def _index_entry(key: str, name: str, metric: str, score: dict[str, Any]) -> dict[str, Any]:
    """One result of the Hub's `model-index`, with the interval that the Hub has no place for among its arguments."""
    slug = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
    kept = {
        "n": score["n"],
        "low": _percent(score["low"]),
        "high": _percent(score["high"]),
        "interval": "95%",
    }
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": f"galenic-{slug}", "name": name},
        "metrics": [
            {
                "type": metric,
                "value": _percent(score["value"]),
                "name": f"{metric}, %",
                "args": kept,
                "verified": False,
            }
        ],
    }


def _percent(value: float) -> float:
    return round(100 * value, 2)


def evaluation(numbers: dict[str, Any], protocol: dict[str, str]) -> str:
    """Returns the section: every share with its interval and number of items, and how it was measured."""
    lines = ["| measure | right, % | 95% interval | items | chance, % |", "|---|--:|--:|--:|--:|"]
    scores = [(kind, score) for kind, score in numbers["accuracy"].items()]
    scores += list(numbers.get("benchmarks", {}).items())
    for name, score in scores:
        chance = "" if score.get("chance") is None else f"{100 * score['chance']:g}"
        lines.append(
            f"| {name} | {100 * score['value']:.1f} | {100 * score['low']:.1f} to {100 * score['high']:.1f} "
            f"| {score['n']:,} | {chance} |"
        )
    parts = ["\n".join(lines)] if scores else []
    level = [n for n, s in scores if s.get("chance") is not None and s["low"] <= s["chance"] <= s["high"]]
    if level:
        parts.append(f"Not distinguishable from chance: {', '.join(level)}.")
    if bits := numbers.get("bits_per_byte"):
        mean = sum(entry["value"] for entry in bits.values()) / len(bits)
        parts.append(f"Held-out text: {mean:.3f} bits per byte, mean over {len(bits)} sources.")
    if numbers.get("normalised_average") is not None:
        parts.append(f"Normalised average: {numbers['normalised_average']:.3f}; 1 is as good as each expert.")
    kept = {key: words for key, words in protocol.items() if key in ("accuracy", "prompt", "bits_per_byte")}
    parts.append(listed([f"{key.replace('_', ' ')}: {_code(words)}" for key, words in kept.items()]))
    return "\n\n".join(part for part in parts if part)


def _code(words: str) -> str:
    """Keeps what looks like markup from being taken for it."""
    return f"`{words}`" if "<" in words and "`" not in words else words


def _sources(sources: dict[str, dict[str, Any]]) -> str:
    lines = ["| source | what | licence | from |", "|---|---|---|---|"]
    lines += [
        "| " + " | ".join(_cell(v) for v in (name, s["title"], s["licence"], s["url_or_package"])) + " |"
        for name, s in sources.items()
    ]
    duties = "Whoever passes the model on takes over the duties of these licences."
    return "\n".join([*lines, "", duties])


def _cell(words: Any) -> str:
    return " ".join(str(words).replace("|", "\\|").split())


def _put(body: str, heading: str, text: str) -> str:
    """Replaces a section, or puts it before how the model may be used, or at the end."""
    section = f"## {heading}\n\n{text.strip()}\n\n"
    parts = re.split(r"(?m)^(?=## )", body)  # a heading begins a line
    for i, part in enumerate(parts):
        if part.startswith(f"## {heading}\n"):
            return "".join([*parts[:i], section, *parts[i + 1 :]])
    for i, part in enumerate(parts):
        if part.startswith(f"## {_LAST}\n"):
            return "".join([*parts[:i], section, *parts[i:]])
    return body.rstrip("\n") + "\n\n" + section.rstrip("\n") + "\n"
