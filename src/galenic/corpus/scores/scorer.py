"""Verb `scorer`: labelled texts in, a calibrated scorer out, with its agreement with labels it has not seen.

[teacher -->] labels --split by group--> train --network--> calibration --numbers--> held out --figures-->
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.scores.agreement import class_figures, score_figures
from galenic.corpus.scores.calibration import platt, temperature
from galenic.corpus.scores.labelling import labelled, plan_facts
from galenic.corpus.scores.labels import Labelled, examples, heads_of, read_labels, split
from galenic.corpus.scores.scorer_config import LABELS, LEDGER, ScorerConfig
from galenic.corpus.scores.scoring import FACTS, FORMAT, WEIGHTS, Scorer
from galenic.corpus.scores.starter import starter_labels
from galenic.corpus.scores.taxonomy import CLASSES
from galenic.corpus.scores.training import HIDDEN, VECTOR, logits, spans, train
from galenic.corpus.starter.wheels import Wheels
from galenic.corpus.texts import column
from galenic.runtime import Plan, UserError, human_bytes, progress

HAN_SHARE = 0.3
"""Share of Han bytes from which a held-out text counts as Chinese in the figures."""


def plan(config: ScorerConfig) -> Plan:
    """What the verb would do."""
    for path in config.labels:
        if not Path(path).is_file():
            raise UserError(f"labels: {path}: no such file")
    if config.wheels:
        wheels = Wheels(config.wheels, config.requirements)
        wheels.check(wheels.requirements)
    asked = (LABELS, LEDGER) if config.teacher else ()
    return Plan(
        reads=config.reads(),
        writes=[f"{config.out}/{name}" for name in (*asked, WEIGHTS, FACTS)],
        facts=(plan_facts(config.teacher, config.cache_folder) if config.teacher else {})
        | {
            "network": f"2^{config.bits} n-grams of {VECTOR} numbers, hidden layer of {HIDDEN}, "
            f"{human_bytes(2**config.bits * VECTOR * 4)}",
            "training": f"{config.epochs} epochs, one core",
        },
    )


def run(config: ScorerConfig) -> None:
    """Lets the teacher label, trains, calibrates, checks and writes the scorer.

    Raises:
        UserError: a label file is malformed, a wheel is missing, a part of the split is empty, or the teacher fails.
    """
    rows = read_labels(config.labels)
    if config.teacher is not None:
        rows += labelled(config.teacher, Path(config.out) / LABELS, config.cache_folder)
    with progress(config.epochs + 3, "scorer", "steps") as bar:
        if config.wheels:
            rows += starter_labels(
                config.wheels,
                config.requirements,
                per_source=config.per_source,
                seed=config.seed,
                modules=config.code_modules,
            )
        bar.update(1, f"{len(rows)} texts")
        scorer = train_scorer(rows, config, lambda epoch, loss: bar.update(1, f"loss {loss:.3f}"))
        bar.update(2)
    scorer.save(config.out)
    print(table(scorer.facts))


def train_scorer(rows: list[Labelled], config: ScorerConfig, advance: Any = None) -> Scorer:
    """Returns a scorer trained on one part of the rows, calibrated on another, checked on the third.

    Raises:
        UserError: too few groups for three parts.
    """
    parts, taken_out = split(rows, config.seed)
    for name, group in parts.items():
        if not group:
            groups = len({row.group for row in rows})
            raise UserError(
                f"labels: no text falls into the part '{name}' ({groups} groups); give more groups"
            )
    scores, classes = heads_of(parts["train"])
    sizes = [len(CLASSES[name]) for name in classes]
    network = train(
        examples(parts["train"], config.bits, scores, classes),
        sizes,
        bits=config.bits,
        epochs=config.epochs,
        rate=config.rate,
        dropped=config.dropped,
        weights=np.array([config.weights.get(name, 1.0) for name in (*scores, *classes)], np.float32),
        seed=config.seed,
        advance=advance,
    )

    calibration = examples(parts["calibration"], config.bits, scores, classes)
    z = logits(network, calibration.ids, calibration.ends, calibration.shapes)
    facts: dict[str, Any] = {"format": FORMAT, "bits": config.bits, "scores": {}, "classes": {}}
    for s, name in enumerate(scores):
        known = ~np.isnan(calibration.scores[:, s])
        facts["scores"][name] = {"calibration": list(platt(z[known, s], calibration.scores[known, s]))}
    places = spans(sizes, len(scores))
    for c, name in enumerate(classes):
        known = calibration.labels[:, c] >= 0
        heat = temperature(z[known, places[c] : places[c + 1]], calibration.labels[known, c])
        facts["classes"][name] = {"labels": list(CLASSES[name]), "temperature": heat}

    facts["trained_on"] = {
        **{name: dict(sorted(Counter(row.origin for row in group).items())) for name, group in parts.items()},
        "near_copies_taken_out": taken_out,
        "seed": config.seed,
        "epochs": config.epochs,
        "rate": config.rate,
        "dropped": config.dropped,
    }
    scorer = Scorer(network, facts)
    facts["heldout"] = heldout_figures(scorer, parts["heldout"], config.seed)
    return scorer


def heldout_figures(scorer: Scorer, rows: list[Labelled], seed: int) -> dict[str, Any]:
    """Returns for each head the agreement with held-out labels, and again for Chinese texts alone."""
    found = scorer(column(row.text for row in rows))
    data = examples(rows, int(scorer.facts["bits"]), list(scorer.scores), list(scorer.classes))
    groups = np.array([row.group for row in rows])
    chinese = data.shapes[:, 8] > HAN_SHARE
    origins = np.array([row.origin for row in rows])
    figures: dict[str, Any] = {}

    def subsets(name: str, known: np.ndarray) -> list[tuple[str, np.ndarray]]:
        pairs = ((name, known), (f"{name} (Chinese)", known & chinese))
        return [(label, subset) for label, subset in pairs if subset.any()]

    for s, name in enumerate(scorer.scores):
        for label, known in subsets(name, ~np.isnan(data.scores[:, s])):
            figures[label] = score_figures(
                found[name][known],
                data.scores[known, s],
                groups[known].tolist(),
                origins[known].tolist(),
                seed,
            )
    for c, name in enumerate(scorer.classes):
        p = found[f"{name}_probability"]
        if name == "medical":
            p = np.where(found[name] == 1, p, 1 - p)
        for label, known in subsets(name, data.labels[:, c] >= 0):
            figures[label] = class_figures(
                found[name][known],
                p[known],
                data.labels[known, c],
                groups[known].tolist(),
                origins[known].tolist(),
                scorer.classes[name],
                seed,
            )
    return figures


def table(facts: dict[str, Any]) -> str:
    """Returns the held-out figures as a Markdown table."""
    lines = [
        "| head | n (groups) | accuracy or Spearman | 95% interval | macro-F1 or mean error | calibration error |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in facts["heldout"].items():
        figure, second = (
            (f["accuracy"], f["macro_f1"]) if "accuracy" in f else (f["spearman"], f["mean_absolute_error"])
        )
        low, high = f["interval"]
        lines.append(
            f"| {name} | {f['n']} ({f['groups']}) | {figure:.3f} | {low:.3f} to {high:.3f} | {second:.3f} "
            f"| {f['calibration_error']:.3f} |"
        )
    return "\n".join(lines)
