"""The gradient guard (Baichuan-M1 report, Algorithm 1) on corrupt documents: with it and without, over seeds.

    python benchmarks/guard.py --run runs/starter [--seeds 5] [--workers 2] [--out runs/guard]

In six batches of a hundred all documents are corrupt, alone or in bursts of four, of the kinds in `corruption.py`.
Prints the tables of docs/pretraining-experiments.md and draws its figures into --figures. Finished runs stay in --out.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import corruption
import numpy as np
import small
import torch
import units
from corruption import KINDS, Corruption

from galenic.corpus.tokens.shards import read_meta
from galenic.model.folder import load_tokenizer
from galenic.pretrain.config import GuardConfig

STEPS, SHARE, BURST = 600, 0.06, 4
EVERY = 60  # steps between scorings of the held-out documents
HELDOUT = 3000  # held-out tokens a source
INJECTIONS = ("none", "isolated", "bursts")
SILENT = GuardConfig().history  # steps before the guard may speak
WIDE = 2.0  # another factor, for the noisier norms of small batches
OLDER = 20  # steps by which a curve is smoothed, before and after
Unit = dict[str, Any]
Results = dict[tuple[str, bool | float], list[Unit]]
"""(injection, guard) -> a unit for each seed; the guard is off, on as the report has it, or on with another factor."""


# ---------------------------------------------------------------------------- one run


def bad_steps(injection: str, seed: int) -> dict[int, str]:
    """Returns step -> kind of corruption."""
    if injection == "isolated":
        return corruption.isolated(STEPS, SHARE, seed)
    if injection == "bursts":
        return corruption.bursts(STEPS, SHARE, BURST, seed)
    return {}


class Injected:
    """Batches of which some are corrupt; the documents keep their names, as a broken file keeps its."""

    def __init__(self, batches: Any, bad: dict[int, str], corruption: Corruption) -> None:
        self.inner, self.bad, self.corruption = batches, bad, corruption
        self.steps, self.rows, self.context = STEPS, batches.rows, batches.context
        self.domains = batches.domains

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        clean = self.inner.batch(step, rows)
        return self.corruption.apply(clean, self.bad[step], step, rows) if step in self.bad else clean

    def documents(self, step: int) -> list[str]:
        return self.inner.documents(step)

    def state(self, step: int) -> dict[str, Any]:
        return self.inner.state(step)


def train(
    recipes: str,
    tokenizer: str,
    injection: str,
    guarded: bool,
    seed: int,
    factor: float = GuardConfig().factor,
) -> Unit:
    """Trains one network through the general phase and returns what happened."""
    folder = Path(tokenizer)
    phase = small.phases(Path(recipes))[0]
    phase = replace(phase, tokens=(STEPS + 20) * phase.context * phase.rows)
    guard = GuardConfig(factor=factor) if guarded else GuardConfig(max_skips=0)
    meta = read_meta(folder)
    documents = small.heldout(folder, [source for source, share in phase.mixture.items() if share], HELDOUT)
    bad = bad_steps(injection, seed)
    first = 1 + max(meta["special"].values())
    corrupt = Corruption(load_tokenizer(folder), meta["vocab_size"], first, seed)
    bits, probes = [], []
    with tempfile.TemporaryDirectory() as out:
        config = small.config(folder, Path(out), [phase], seed, guard=guard)
        run = small.Run(config, small.training_shards(folder, [phase]))
        clean = run.batches[0]
        run.batches[0] = Injected(clean, bad, corrupt)
        for end in range(EVERY, STEPS + 1, EVERY):
            run.train(0, until=end)
            scored = small.by_source(small.score(run.model, documents, folder, phase.context))
            bits.append(float(np.mean(list(scored.values()))))
            if injection == "none" and not guarded and end > SILENT:
                mean = float(np.mean(list(run.trainer.guard.norms)))
                probes += probe(run.model, clean, corrupt, step=STEPS + end // EVERY, mean=mean, at=end)
        rows = run.rows()
    named = [{"step": row["step"] - 1, "documents": row["documents"]} for row in rows if row.get("documents")]
    return {
        "bits": bits,
        "loss": [round(row["loss"], 5) for row in rows],
        "norm": [round(row["grad_norm"], 5) for row in rows],
        "skipped": [row["step"] - 1 for row in rows if row["skipped"]],
        "named": named,
        "injected": {step: clean.documents(step) for step in bad},
        "kinds": bad,
        "probes": probes,
    }


def probe(
    model: Any, batches: Any, corrupt: Corruption, *, step: int, mean: float, at: int
) -> list[dict[str, Any]]:
    """Measures the gradient norm of one batch with 0 to all of its rows corrupt; the model stays as it is.

    Args:
        model: as it is after step `at`.
        batches: clean ones.
        corrupt: makes them corrupt.
        step: number of a batch that is not trained on.
        mean: of the last accepted norms.
        at: the run's step.
    """
    every = list(range(batches.rows))
    clean = batches.batch(step, every)
    found = []
    model.train()
    for kind in KINDS:
        bad = corrupt.apply(clean, kind, step, every)
        for count in (0, 1, 2, len(every)):
            mixed = {name: torch.cat([bad[name][:count], clean[name][count:]]) for name in clean}
            mixed.pop("domains", None)
            model(**mixed, use_cache=False, skip_logits=True).loss.backward()
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            norm = float(torch.stack(norms).norm())
            model.zero_grad(set_to_none=True)
            found.append(
                {"at": at, "kind": kind, "rows": count, "of": len(every), "norm": norm, "mean": mean}
            )
    return found


# ---------------------------------------------------------------------------- tables


def caught(unit: Unit, kind: str = "") -> dict[str, tuple[int, int]]:
    """Counts (skipped, all) of corrupt batches, before the guard may speak and after, and of clean ones.

    A batch that follows a skipped one is accepted whatever it is ("two in a row"); such corrupt ones are `second`.
    """
    skipped = set(unit["skipped"])
    bad = {int(step): name for step, name in unit["kinds"].items()}
    chosen = [step for step, name in bad.items() if kind in ("", name)]
    parts = {
        "early": [step for step in chosen if step < SILENT],
        "first": [step for step in chosen if step >= SILENT and step - 1 not in skipped],
        "second": [step for step in chosen if step >= SILENT and step - 1 in skipped],
        "clean": [step for step in range(SILENT, len(unit["loss"])) if step not in bad],
    }
    return {part: (len(skipped & set(steps)), len(steps)) for part, steps in parts.items()}


def found_by_name(unit: Unit) -> tuple[int, int, int]:
    """Returns (injected documents named in a skip's row, injected ones, all documents named)."""
    injected = {name for documents in unit["injected"].values() for name in documents}
    named = {name for row in unit["named"] for name in row["documents"]}
    return len(injected & named), len(injected), len(named)


def bits_table(results: Results) -> Iterator[str]:
    """Held-out bits per byte at the end, and what the guard changes."""
    rows = []
    clean = [unit["bits"][-1] for unit in results["none", False]]
    for injection in INJECTIONS:
        without, guarded, wide = (
            [unit["bits"][-1] for unit in results[injection, guard]] for guard in (False, True, WIDE)
        )
        rows.append(
            (
                {
                    "none": "none",
                    "isolated": f"{SHARE:.0%}, isolated",
                    "bursts": f"{SHARE:.0%}, bursts of {BURST}",
                }[injection],
                units.interval(without).words(4),
                units.interval(guarded).words(4),
                units.paired(guarded, without).words(4, sign=True),
                units.paired(wide, without).words(4, sign=True),
                "" if injection == "none" else units.paired(without, clean).words(4, sign=True),
                "" if injection == "none" else units.paired(guarded, clean).words(4, sign=True),
                "" if injection == "none" else units.paired(wide, clean).words(4, sign=True),
            )
        )
    head = (
        "corrupt batches",
        "without guard",
        "with guard",
        "guard - none",
        f"factor {WIDE:g} - none",
        "harm without guard",
        "harm with guard",
        f"harm with factor {WIDE:g}",
    )
    return units.table(head, rows)


def caught_table(results: Results) -> Iterator[str]:
    """Which batches the guard skips."""
    rows = []
    arms = [(injection, True) for injection in INJECTIONS] + [(injection, WIDE) for injection in INJECTIONS]
    for injection, guard in arms:
        for kind in ("", *KINDS) if injection != "none" and guard is True else ("",):
            counts = [caught(unit, kind) for unit in results[injection, guard]]
            total = {
                part: (sum(c[part][0] for c in counts), sum(c[part][1] for c in counts)) for part in counts[0]
            }
            cells = [of(*total[part]) for part in ("early", "first", "second")]
            cells.append(of(*total["clean"]) if not kind else "")
            name = injection if guard is True else f"{injection}, factor {guard:g}"
            rows.append((name, kind or "all", *cells))
    head = (
        "corrupt batches",
        "kind",
        f"skipped in the first {SILENT} steps",
        "skipped after that",
        "skipped right after a skip",
        "clean ones skipped",
    )
    return units.table(head, rows)


def of(part: int, whole: int) -> str:
    """`12 of 30 (40%)`."""
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none there"


def named_table(results: Results) -> Iterator[str]:
    """How many of the injected documents the metrics name."""
    rows = []
    for injection in INJECTIONS[1:]:
        counts = np.array([found_by_name(unit) for unit in results[injection, True]])
        hit, injected, named = counts.sum(axis=0).tolist()
        rows.append((injection, injected, of(hit, injected), named, of(hit, named)))
    head = (
        "corrupt batches",
        "injected documents",
        "of them named",
        "named documents",
        "of them injected",
    )
    return units.table(head, rows)


def probe_table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Norm of a batch by its corrupt rows, to the mean accepted norm, and how often the guard would skip it."""
    rows = []
    limit = GuardConfig()
    for kind in KINDS:
        for count in sorted({probe["rows"] for probe in found}):
            if count == 0 and kind != KINDS[0]:
                continue
            chosen = [probe for probe in found if probe["kind"] == kind and probe["rows"] == count]
            ratios = [probe["norm"] / probe["mean"] for probe in chosen]
            over = sum(p["norm"] > limit.factor * p["mean"] + limit.offset for p in chosen)
            low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
            rows.append(
                (
                    kind if count else "clean",
                    f"{count} of {chosen[0]['of']}",
                    f"{middle:.2f} ({low:.2f} to {high:.2f})",
                    of(over, len(chosen)),
                )
            )
    return units.table(
        ("batch", "corrupt rows", "norm / mean norm, median (10% to 90%)", "would be skipped"), rows
    )


# ---------------------------------------------------------------------------- figures


def draw(results: Results, folder: Path) -> None:
    curves(results, folder / "guard-curves.svg")
    bursts = results["bursts", True]
    early = [
        unit for unit in bursts if min(map(int, unit["kinds"])) < SILENT
    ]  # shows what the first steps let in
    trace((early or bursts)[0], folder / "guard-trace.svg")


def curves(results: Results, path: Path) -> None:
    """Loss of clean batches and held-out bits per byte, each as a difference to the run on clean data without guard."""
    arms: list[tuple[str, bool]] = [
        ("isolated", False),
        ("isolated", True),
        ("bursts", False),
        ("bursts", True),
    ]
    clean = results["none", False]
    ends = np.arange(EVERY, STEPS + 1, EVERY)
    with units.figure(path, panels=3) as (losses, left, right):
        for k, (arm, name) in enumerate(
            (
                (("none", False), "clean data"),
                (("bursts", False), "bursts"),
                (("bursts", True), "bursts, guard"),
            )
        ):
            smoothed = [smooth(unit) for unit in results[arm]]
            x = np.arange(STEPS)
            units.draw_band(losses, k, name, x[OLDER::10], [curve[OLDER::10] for curve in smoothed])
        losses.set_ylabel("loss of clean batches, nats per token")
        for axes, chosen in ((left, arms[:2]), (right, arms[2:])):
            for arm in (("none", True), *chosen):
                gaps = [
                    np.subtract(unit["bits"], base["bits"])
                    for unit, base in zip(results[arm], clean, strict=True)
                ]
                guarded = "guard" if arm[1] else "no guard"
                name = f"{arm[0] if arm in chosen else 'clean data'}, {guarded}"
                k = 1 + chosen.index(arm) if arm in chosen else 0
                units.draw_band(axes, k, name, ends, gaps)
            axes.axhline(0, color="#888888", linewidth=0.8)
            axes.set_ylabel("held-out bits per byte - clean run's")
        for axes in (losses, left, right):
            axes.axvline(SILENT, color="#888888", linewidth=0.8, linestyle=(0, (3, 3)))
            axes.set_xlabel("step")
            axes.legend(loc="upper right")


def smooth(unit: Unit) -> np.ndarray:
    """Mean loss of the clean batches among the steps around each."""
    bad = {int(step) for step in unit["kinds"]}
    good = np.array([step not in bad for step in range(len(unit["loss"]))])
    window = np.ones(2 * OLDER + 1)
    sums = np.convolve(np.where(good, unit["loss"], 0.0), window, mode="same")
    return sums / np.convolve(good.astype(float), window, mode="same")


def trace(unit: Unit, path: Path) -> None:
    """One run's gradient norms with the guard's limit, and the bursts by what became of each batch."""
    norms, skipped = unit["norm"], set(unit["skipped"])
    bad = {int(step) for step in unit["kinds"]}
    limits = limit_line(norms, skipped)
    start = next(step for step in sorted(bad) if step >= SILENT and step - 1 not in bad)
    spans = ((0, len(norms)), (start - 8, start + BURST + 8))  # all, and a closer look at one burst
    groups: list[tuple[str, str, str, set[int]]] = [
        ("clean, skipped", "x", units.COLOURS[4], skipped - bad),
        ("corrupt, skipped", "x", units.COLOURS[0], skipped & bad),
        ("corrupt, taken", "o", units.COLOURS[1], bad - skipped),
    ]
    with units.figure(path, panels=2, height=3.2) as both:
        for axes, (first, last) in zip(both, spans, strict=True):
            steps = np.arange(first, last)
            axes.plot(steps, norms[first:last], color="#999999", linewidth=0.7, label="gradient norm")
            axes.plot(steps, limits[first:last], color="black", linewidth=1, label="limit")
            for name, mark, colour, chosen in groups:
                inside = sorted(step for step in chosen if first <= step < last)
                axes.plot(
                    inside, [norms[step] for step in inside], mark, color=colour, label=name, markersize=4.5
                )
            units.log_scale(axes)
            axes.set_xlabel("step")
        both[0].axvspan(0, SILENT, color="#888888", alpha=0.12, linewidth=0)
        both[0].set_ylabel("gradient norm before clipping")
        both[0].legend(loc="upper right")
        both[1].set_xticks(range(start, start + BURST + 1, BURST))
        both[1].set_title("a burst", fontsize=9)
        both[0].set_title(f"a run; the guard is silent for {SILENT} steps (grey)", fontsize=9)


def limit_line(norms: Sequence[float], skipped: set[int]) -> np.ndarray:
    """Returns the norm above which each step is suspicious; NaN while the history is not full."""
    config = GuardConfig()
    accepted: list[float] = []
    limits = np.full(len(norms), np.nan)
    for step, norm in enumerate(norms):
        if len(accepted) >= config.history:
            limits[step] = config.factor * float(np.mean(accepted[-config.history :])) + config.offset
        if step not in skipped:
            accepted.append(norm)
    return limits


# ---------------------------------------------------------------------------- all


def main() -> None:
    arguments = small.arguments(__doc__ or "", "runs/guard")
    work = {
        f"{injection}-{'guard' if guarded else 'none'}-{seed}": {
            "recipes": str(arguments.recipes),
            "tokenizer": str(arguments.tokenizer),
            "injection": injection,
            "guarded": guarded,
            "seed": seed,
        }
        for seed in range(arguments.seeds)
        for injection in INJECTIONS
        for guarded in (False, True)
    }
    wide = {
        name.replace("-guard-", "-wide-"): {**unit, "factor": WIDE}
        for name, unit in work.items()
        if unit["guarded"]
    }
    work |= wide
    settings = [STEPS, SHARE, BURST, EVERY, HELDOUT, small.settings(arguments.recipes)]
    found = units.run_units(train, work, arguments.out, workers=arguments.workers, settings=settings)
    results: Results = {}
    for name, unit in found.items():
        guard = WIDE if name in wide else work[name]["guarded"]
        results.setdefault((work[name]["injection"], guard), []).append(unit)
    report(results, arguments)


def report(results: Results, arguments: argparse.Namespace) -> None:
    print(small.conditions(arguments, results.values()))
    print(small.size(arguments))
    probes = [probe for unit in results["none", False] for probe in unit["probes"]]
    for title, lines in (
        ("Held-out bits per byte after the last step", bits_table(results)),
        ("Batches skipped", caught_table(results)),
        ("Documents named", named_table(results)),
        ("Norms of batches by corrupt rows", probe_table(probes)),
    ):
        print(f"\n{title}\n", *lines, sep="\n")
    draw(results, arguments.figures)


if __name__ == "__main__":
    main()
