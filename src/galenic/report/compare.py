"""The page that sets the models of one or several runs side by side.

Every function takes the runs by name, or the models chosen of them, and returns what the template shows, or None.
"""

from collections.abc import Sequence
from typing import Any

from galenic.runtime import UserError, human, nearest, read_json

from . import benchmarks, charts, cost, failures, probes, score_charts
from .config import TITLE, ReportConfig
from .data import Chart
from .flattening import half_width, trace_name, verdict
from .inputs import Run
from .scores import GROUP_WORDS, KIND_ORDER, KIND_WORDS, headline
from .sections import GROUPS, spell
from .versus import Model, comparison, differences, told

Runs = dict[str, Run]
MOST = 6
"""Models in a drawing where each has a line of its own."""


def content(config: ReportConfig, runs: Runs) -> dict[str, Any]:
    """Computes every section of the page.

    Raises:
        UserError: no run was evaluated, or a model is asked for that none has.
    """
    models = choose(config, runs)
    marked = highlighted(runs, models)
    numbers = {model.name: model.numbers for model in models}
    first = [*marked, *(model for model in models if model not in marked)]
    pairs = differences(runs, first, marked[0])
    return {
        "title": config.title if config.title != TITLE else f"Comparison of {_models_of(models, runs)}",
        "tiles": _tiles(runs, models),
        "summary": told(pairs),
        "runs": list(runs),
        "measures": measures(models),
        "radar": radar(marked[:4]),
        "bars_by_kind": bars(models),
        "legend": [
            (g, words) for g, words in GROUP_WORDS.items() if any(m.numbers["group"] == g for m in models)
        ],
        "versus": pairs,
        "comparisons": [comparison(found) for found in _comparisons(config, runs)],
        "benchmarks": benchmarks.benchmarks(numbers),
        "probes": probes.probes(numbers),
        "probed": probes.drawings({model.name: model.numbers for model in marked[:4]}),
        "training": training(runs),
        "merging": merging(runs),
        "curvature": curvature(runs),
        "corpora": corpora(runs),
        "costs": costs(runs, config.watts),
        "failures": worth_reading(runs, models, config.failures),
        "protocols": {n: r["protocol"] for n, run in runs.items() if (r := run.evaluate.get("results.json"))},
    }


def _models_of(models: list[Model], runs: Runs) -> str:
    return f"{len(models)} models" + (f" of {len(runs)} runs" if len(runs) > 1 else f" of {next(iter(runs))}")


# ---------------------------------------------------------------------------- models


def choose(config: ReportConfig, runs: Runs) -> list[Model]:
    """Returns the models that the config names; else all of one run, of several each one's base and product.

    Raises:
        UserError: see `content`.
    """
    several = len(runs) > 1
    known: dict[str, Model] = {}
    ends: list[str] = []
    for label, run in runs.items():
        results = run.evaluate.get("results.json") or {"models": {}}
        for own, numbers in results["models"].items():
            name = f"{label}: {own}" if several else own
            known[name] = Model(name=name, run=label, own=own, numbers=numbers)
        if results["models"]:
            product, base = headline(results)
            ends += [f"{label}: {own}" for own in dict.fromkeys((base, product))]
    if not known:
        raise UserError(f"compare: no model of {', '.join(runs)} was evaluated; run `galenic evaluate` first")
    for name in config.models:
        if name not in known:
            raise UserError(
                f"models: '{name}' is not here{nearest(name, known)}; there are {', '.join(known)}"
            )
    return [known[name] for name in config.models or (ends if several else known)]


def highlighted(runs: Runs, models: list[Model]) -> list[Model]:
    """Returns a few models in the order that matters: what the others are compared with comes first.

    Of one run: its base, what it made, and the best of each other group. Else the models as they were chosen.
    """
    if len(models) <= MOST or len(runs) > 1:
        return models[:MOST]
    product, base = headline({"models": {model.own: model.numbers for model in models}})
    best = [
        max((m for m in models if m.numbers["group"] == group), key=_mean, default=None)
        for group in GROUP_WORDS
    ]
    names = dict.fromkeys([base, product, *(model.own for model in best if model)])
    by_name = {model.own: model for model in models}
    return [by_name[name] for name in names][:MOST]


def _mean(model: Model) -> float:
    values = [score["value"] for score in model.numbers["accuracy"].values()]
    return sum(values) / len(values) if values else 0.0


def _kinds(models: list[Model]) -> list[str]:
    found = {kind for model in models for kind in model.numbers["accuracy"]}
    return sorted(found, key=lambda kind: (KIND_ORDER.index(kind) if kind in KIND_ORDER else 9, kind))


def _tiles(runs: Runs, models: list[Model]) -> list[tuple[str, str, str]]:
    tiles = [("models", str(len(models)), ""), ("runs", str(len(runs)), ", ".join(runs))]
    for kind in _kinds(models)[:3]:
        best = max(
            (model for model in models if kind in model.numbers["accuracy"]),
            key=lambda model: model.numbers["accuracy"][kind]["value"],
        )
        score = best.numbers["accuracy"][kind]
        note = f"{best.name}; {100 * score['low']:.1f}\u2013{100 * score['high']:.1f}"
        tiles.append((f"highest {kind}", f"{100 * score['value']:.1f}%", note))
    return tiles


# ---------------------------------------------------------------------------- scores


def measures(models: list[Model]) -> dict[str, Any]:
    """The table of models by measures."""
    kinds = _kinds(models)
    rows = [
        {
            "name": model.name,
            "group": model.numbers["group"],
            "parameters": model.numbers["parameters"],
            "scores": [model.numbers["accuracy"].get(kind) for kind in kinds],
            "bits": _middle_bits(model.numbers["bits_per_byte"]),
            "average": model.numbers.get("normalised_average"),
        }
        for model in models
    ]
    return {
        "kinds": kinds,
        "rows": rows,
        "best": [
            max((row["scores"][i]["value"] for row in rows if row["scores"][i]), default=None)
            for i in range(len(kinds))
        ],
        "table": [
            (row["name"], kind, score["value"], score["low"], score["high"], score["n"])
            for row in rows
            for kind, score in zip(kinds, row["scores"], strict=True)
            if score
        ],
    }


def _middle_bits(sources: dict[str, dict[str, float]]) -> float | None:
    values = [entry["value"] for entry in sources.values()]
    return sum(values) / len(values) if values else None


def radar(models: list[Model]) -> Chart | None:
    """A few models over the measures that all of them have."""
    kinds = [kind for kind in _kinds(models) if all(kind in model.numbers["accuracy"] for model in models)]
    if len(kinds) < 3:
        return None
    lines: dict[str, Sequence[score_charts.Measure]] = {
        model.name: [
            (100 * score["value"], 100 * score["low"], 100 * score["high"])
            for score in (model.numbers["accuracy"][kind] for kind in kinds)
        ]
        for model in models
    }
    words = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {value:.1f}%" for kind, (value, *_) in zip(kinds, line, strict=True))
        for name, line in lines.items()
    )
    return score_charts.radar("radar", f"Right answers by kind. {words}.", kinds, lines)


def bars(models: list[Model]) -> list[tuple[str, str, Chart]]:
    """(kind, note, chart) of each kind of questions."""
    found = []
    for kind in _kinds(models):
        scored = [
            (model, model.numbers["accuracy"][kind]) for model in models if kind in model.numbers["accuracy"]
        ]
        chances = {score["chance"] for _, score in scored}
        chance = 100 * chances.pop() if len(chances) == 1 and None not in chances else None
        words = ", ".join(f"{model.name} {100 * score['value']:.1f}%" for model, score in scored)
        counts = sorted({score["n"] for _, score in scored})
        chart = score_charts.bars(
            f"accuracy-{kind}",
            f"Accuracy on {kind} questions: {words}.",
            [
                (model.name, model.numbers["group"], *(100 * score[key] for key in ("value", "low", "high")))
                for model, score in scored
            ],
            mark=chance,
            mark_name="" if chance is None else f"chance {chance:g}%",
            x_title="right answers, % (95% interval)",
        )
        note = " or ".join(f"{n:,}" for n in counts) + " questions"
        found.append((kind, note + (f": {KIND_WORDS[kind]}" if kind in KIND_WORDS else ""), chart))
    return found


def _comparisons(config: ReportConfig, runs: Runs) -> list[dict[str, Any]]:
    named = [read_json(f"{folder}/compare.json") for folder in config.comparisons]
    return [*named, *(found for run in runs.values() for found in run.comparisons)]


# ---------------------------------------------------------------------------- what the runs did


def training(runs: Runs) -> dict[str, Any] | None:
    """Loss of every run's pre-training over its tokens."""
    lines, rows = {}, []
    for name, run in runs.items():
        train = [row for row in run.pretrain.get("metrics.jsonl") or [] if row["kind"] == "train"]
        if not train:
            continue
        lines[name] = ([row["tokens"] for row in train], [row["loss"] for row in train])
        last = [row["loss"] for row in train[-10:]]
        rows.append(
            {
                "name": name,
                "steps": len(train),
                "tokens": train[-1]["tokens"],
                "loss": sum(last) / len(last),
                "skipped": sum(row["skipped"] for row in train),
                "seconds": spell(sum(row["seconds"] for row in train)),
            }
        )
    if not lines:
        return None
    words = ", ".join(f"{row['name']} ends at {row['loss']:.2f}" for row in rows)
    chart = charts.curves("loss", f"Training loss: {words}.", lines, y_title="loss, nats per token")
    return {"chart": chart, "rows": rows}


def merging(runs: Runs) -> dict[str, Any] | None:
    """Coefficients of every merge."""
    rows = [
        (_named(runs, label, name), data)
        for label, run in runs.items()
        for name, step in run.merges.items()
        if (data := step.get("merge.json"))
    ]
    if not rows:
        return None
    experts = list(dict.fromkeys(expert for _, data in rows for expert in data["coefficients"]))
    table = [
        {
            "name": name,
            "method": data["method"],
            "coefficients": [data["coefficients"].get(expert) for expert in experts],
            "effective": data["effective_models"],
        }
        for name, data in rows
    ]
    shown = table[:MOST]
    words = "; ".join(
        f"{row['name']}: "
        + ", ".join(
            f"{e} {c:.3f}" for e, c in zip(experts, row["coefficients"], strict=True) if c is not None
        )
        for row in shown
    )
    chart = charts.dots(
        "coefficients",
        f"Coefficients of the task vectors. {words}.",
        experts,
        {row["name"]: row["coefficients"] for row in shown},
        x_title="coefficient",
    )
    return {"experts": experts, "rows": table, "chart": chart, "left": len(table) - len(shown)}


def curvature(runs: Runs) -> dict[str, Any] | None:
    """The trace before and after each run's flattening."""
    found = {name: data for name, run in runs.items() if (data := run.flatten.get("flatten.json"))}
    traced = {name: data["trace"] for name, data in found.items() if data["trace"]}
    if not found:
        return None
    chart = None
    if traced:
        points = [
            (_named(runs, name, when), trace[when]["mean"], half_width(trace[when]))
            for name, trace in traced.items()
            for when in ("before", "after")
        ]
        what = " and ".join(dict.fromkeys(trace_name(trace) for trace in traced.values()))
        words = ", ".join(f"{name} {mean:.4g}" for name, mean, _ in points)
        chart = charts.before_after(
            "trace", f"The {what}: {words}.", points, x_title=f"{what} (95% intervals)"
        )
    return {"chart": chart, "verdicts": [(name, verdict(data)) for name, data in found.items()]}


def _named(runs: Runs, label: str, name: str) -> str:
    return f"{label}: {name}" if len(runs) > 1 else name


def corpora(runs: Runs) -> dict[str, Any] | None:
    """What each run's corpus holds, by group; runs of the same corpus together."""
    found = {name: sources for name, run in runs.items() if (sources := run.corpus.get("sources.json"))}
    if not found:
        return None
    first = next(iter(found.values()))
    same = len(found) > 1 and all(sources == first for sources in found.values())
    kept = dict(list(found.items())[:1]) if same else found
    rows = [
        (
            group,
            [
                (
                    sum(source["documents"] for source in sources.values() if source["group"] == group),
                    sum(source["characters"] for source in sources.values() if source["group"] == group),
                )
                for sources in kept.values()
            ],
        )
        for group in GROUPS
    ]
    bars = {
        name: [
            (source, entry["characters"], human(entry["characters"]), entry["group"])
            for source, entry in sorted(sources.items(), key=lambda item: (-item[1]["characters"], item[0]))[
                :16
            ]
        ]
        for name, sources in kept.items()
    }
    return {"same": same, "names": list(kept), "rows": rows, "bars": bars}


def costs(runs: Runs, watts: float) -> dict[str, Any] | None:
    """What each run cost."""
    found = {name: data for name, run in runs.items() if (data := cost.cost(run, watts))}
    if not found:
        return None
    bars = [(name, d["total"]["seconds"], d["total"]["spelled"], "other") for name, d in found.items()]
    return {"runs": found, "watts": watts, "bars": bars}


def worth_reading(runs: Runs, models: list[Model], most: int) -> list[tuple[str, dict[str, Any]]]:
    """(run, failures) of what each run made."""
    found = []
    for name, run in runs.items():
        own = {model.own: model.numbers for model in models if model.run == name}
        if own and (data := failures.failures(run, headline({"models": own})[0], most)):
            found.append((name, data))
    return found
