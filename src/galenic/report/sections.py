"""What the page says about the corpus, the pipeline and its timings; names shared by the other sections.

Every section takes the run and returns a dictionary for the template, or None when it was not run.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from galenic.runtime import human

from .inputs import Run, Step

GROUPS = ("general", "medical-basic", "medical-advanced")
BREAKDOWNS = (
    ("by_language", "Documents by language"),
    ("by_category", "Documents by category"),
    ("by_department", "Documents by department"),
    ("questions", "Questions made"),
    ("conversations", "Conversations made"),
)


def spell(seconds: float) -> str:
    """Formats a duration in words: 75.2 -> '1 min 15 s', 700 -> '12 min'."""
    if seconds >= 600:
        seconds = 60 * round(seconds / 60)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def groups(run: Run) -> dict[str, str]:
    """Source -> group, from whichever step knows."""
    sources = (
        run.corpus.get("sources.json") or (run.tokenizer.get("tokens/meta.json") or {}).get("sources") or {}
    )
    return {name: source["group"] for name, source in sources.items()}


def by_group(names: Iterable[str], group: dict[str, str]) -> list[str]:
    """Sorts sources by group, then by name; those of unknown group last."""
    return sorted(
        names, key=lambda name: (GROUPS.index(group[name]) if group.get(name) in GROUPS else 9, name)
    )


# ---------------------------------------------------------------------------- corpus


def corpus(run: Run) -> dict[str, Any] | None:
    """Composition of the corpus, what was dropped and why."""
    sources = run.corpus.get("sources.json")
    if sources is None:
        return None
    stats = run.corpus.get("stats.json") or {}
    ordered = sorted(
        sources, key=lambda name: (GROUPS.index(sources[name]["group"]), -sources[name]["characters"], name)
    )
    dropped: Counter[str] = Counter()
    for source in sources.values():
        dropped.update(source["dropped"])
    return {
        "rows": [
            {"name": name, **sources[name], "dropped": sum(sources[name]["dropped"].values())}
            for name in ordered
        ],
        "bars": [
            (name, sources[name]["characters"], human(sources[name]["characters"]), sources[name]["group"])
            for name in ordered
        ],
        "documents": sum(source["documents"] for source in sources.values()),
        "characters": sum(source["characters"] for source in sources.values()),
        "heldout": sum(source["heldout"] for source in sources.values()),
        "dropped": sum(dropped.values()),
        "reasons": _bars(dropped),
        "breakdowns": [(title, _bars(stats[key])) for key, title in BREAKDOWNS if stats.get(key)],
    }


def _bars(counts: dict[str, int]) -> list[tuple[str, int, str, str]]:
    """(label, size, text, colour) by size; everything after the tenth together."""
    items = sorted(
        ((str(name) or "none", n) for name, n in counts.items()), key=lambda item: (-item[1], item[0])
    )
    if len(items) > 11:
        items = [*items[:10], (f"{len(items) - 10} others", sum(n for _, n in items[10:]))]
    return [(name, n, f"{n:,}", "other") for name, n in items]


def tokens(run: Run) -> dict[str, Any] | None:
    """Vocabulary and token counts."""
    meta = run.tokenizer.get("tokens/meta.json")
    if meta is None:
        return None
    train = [source["train"] for source in meta["sources"].values()]
    size, count = sum(entry["bytes"] for entry in train), sum(entry["tokens"] for entry in train)
    return {
        "vocabulary": meta["vocab_size"],
        "tokens": count,
        "bytes_per_token": size / count if count else 0.0,
    }


# ---------------------------------------------------------------------------- the pipeline


def pipeline(run: Run, content: dict[str, Any]) -> list[dict[str, Any]]:
    """One card a stage: its state, time, memory and numbers, taken from the finished sections."""
    data, text, trained = content["corpus"], content["tokens"], content["training"]
    flat, scored = content["flattening"], content["evaluation"]
    facts: dict[str, list[str]] = {
        "Corpus": [f"{data['documents']:,} documents", f"{human(data['characters'])} characters"]
        if data
        else [],
        "Tokenizer": [f"{text['vocabulary']:,} entries", f"{human(text['tokens'])} training tokens"]
        if text
        else [],
        "Pre-training": [f"{len(trained['phases'])} phases", f"{human(trained['tokens'])} tokens"]
        if trained
        else [],
        "Experts": list(run.experts),
        "Merges": list(run.merges),
        "Alignment": list(run.alignment),
        "Flattening": [f"{len(flat['layers'])} layers", f"{human(flat['rows'])} {flat['unit']}s of data"]
        if flat
        else [],
        "Evaluation": [f"{len(scored['models'])} models", f"{scored['questions']:,} questions"]
        if scored
        else [],
    }
    stages: dict[str, list[Step]] = {
        "Corpus": [run.corpus],
        "Tokenizer": [run.tokenizer],
        "Pre-training": [run.pretrain],
        "Experts": list(run.experts.values()),
        "Merges": list(run.merges.values()),
        "Alignment": list(run.alignment.values()),
        "Flattening": [run.flatten],
        "Evaluation": [run.evaluate],
    }
    return [
        {
            "title": title,
            "state": _state(steps),
            "facts": facts[title],
            "seconds": sum(step.done.get("seconds", 0) for step in steps),
            "memory": max((step.done.get("peak_rss_bytes", 0) for step in steps), default=0),
        }
        for title, steps in stages.items()
    ]


def _state(steps: list[Step]) -> str:
    states = {step.state for step in steps}
    if not states or states == {"not run"}:
        return "not run"
    return "done" if states == {"done"} else "unfinished"


def timings(run: Run) -> dict[str, Any] | None:
    """Time, memory, fingerprint and versions of every step."""
    steps = run.steps()
    if not steps:
        return None
    keys = list(dict.fromkeys(key for step in steps for key in step.done.get("versions", {})))
    rows = [
        {
            "name": step.name,
            "state": step.state,
            "seconds": step.done.get("seconds"),
            "memory": step.done.get("peak_rss_bytes"),
            "fingerprint": str(step.done.get("fingerprint", ""))[:12],
            "versions": [step.done.get("versions", {}).get(key, "") for key in keys],
        }
        for step in steps
    ]
    total = sum(row["seconds"] or 0 for row in rows)
    return {
        "rows": rows,
        "keys": keys,
        "total": spell(total),
        "rounded": f"{round(total / 60)} min" if total >= 120 else spell(total),
        "finished": sum(r["state"] == "done" for r in rows),
    }
