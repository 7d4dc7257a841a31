"""The curriculum's choices (Baichuan-M1 report, section 4.2) one by one, on the starter's corpus, over seeds.

    python benchmarks/curriculum.py --run runs/starter [--seeds 5] [--workers 2] [--out runs/curriculum]

* schedules: warm-up-stable-decay with two ways down, one cosine over all phases, no decay at all;
* RoPE base: 1e5, then 1e6 with the longer context of the last phase; 1e5 throughout; 1e6 throughout;
* phases: what each does to held-out documents of each group, and three phases against all sources mixed throughout;
* order inside a phase: by chance, easy to hard by quality or by quality and difficulty;
* Muon for the matrices.

Runs that differ in the last phase only share the first two: they go on from the same weights and optimizer state.
Prints the tables of docs/pretraining-experiments.md and draws its figures into --figures. Finished runs stay in --out.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import small
import units

from galenic.corpus.tokens.shards import Shard, read_meta, read_shard
from galenic.evaluate.likelihood import token_log_probs
from galenic.pretrain.config import PhaseConfig, PretrainConfig
from galenic.runtime import read_json

REFERENCE = "reference"
HELDOUT = 4000  # held-out tokens a source
LONG = (
    "guidelines",
    "radiology",
    "python-code",
    "python-docs",
)  # sources with documents that need the context
ADVANCED = ("guidelines", "radiology")  # those of them that the last phase trains on
PREVIOUS_SEED = 1000  # of the model that says what is difficult; in no table
READ = 192  # tokens of a document that it reads
Unit = dict[str, Any]

BRANCHES = {
    "1-sqrt": {"decay": "1-sqrt"},
    "no decay": {"final_lr": None},
    "base 1e5": {"rope_theta": 1e5},
}
"""Other ways through the last phase, from the reference's state before it."""
ARMS = (REFERENCE, "cosine", "base 1e6", "mixed", "muon")
PREVIOUS = "previous"
READINGS = {"base 1e5": 1e5, "base 1e6": 1e6}
"""Under which a network is read that was trained under one of them."""
ORDERS = ("easy to hard, quality", "easy to hard")
"""`easy to hard` is by quality and difficulty, as in the report."""


# ---------------------------------------------------------------------------- arms


def arm_config(arm: str, tokenizer: Path, out: Path, phases: list[PhaseConfig], seed: int) -> PretrainConfig:
    """Returns what an arm trains."""
    if arm == "cosine":
        return small.config(tokenizer, out, phases, seed, schedule="cosine")
    if arm == "muon":
        return small.config(tokenizer, out, phases, seed, optim=replace(small.OPTIM, name="muon"))
    if arm == "base 1e6":
        phases = [replace(phase, rope_theta=1e6) for phase in phases]
    elif arm == "mixed":
        phases = [replace(phase, mixture=mixed(phases)) for phase in phases]
    elif arm in ORDERS:
        phases = [replace(phase, order="easy-to-hard") for phase in phases]
    return small.config(tokenizer, out, phases, seed)


def mixed(phases: Sequence[PhaseConfig]) -> dict[str, float]:
    """Returns the mixture of all phases together: each source's share of all their tokens."""
    tokens: dict[str, float] = {}
    for phase in phases:
        total = sum(phase.mixture.values())
        for source, share in phase.mixture.items():
            tokens[source] = tokens.get(source, 0.0) + phase.tokens * share / total
    every = sum(phase.tokens for phase in phases)
    return {source: count / every for source, count in tokens.items()}


def with_scores(shards: dict[str, Shard], arm: str, scores: dict[str, Any]) -> dict[str, Shard]:
    """Returns shards whose documents carry the scores that an order goes by."""
    found = {}
    for source, shard in shards.items():
        quality, difficulty = (
            np.array([np.nan if value is None else value for value in scores[part][source]], dtype=np.float32)
            for part in ("quality", "difficulty")
        )
        only = arm == "easy to hard, quality"
        found[source] = replace(shard, quality=quality, difficulty=None if only else difficulty)
    return found


# ---------------------------------------------------------------------------- one unit


def train(recipes: str, tokenizer: str, arm: str, seed: int, corpus: str, scores: str = "") -> Unit:
    """Trains an arm through all phases; the reference also through the branches of the last."""
    if arm == PREVIOUS:
        return previous(recipes, tokenizer, corpus, seed)
    folder, phases = Path(tokenizer), small.phases(Path(recipes))
    shards = small.training_shards(folder, phases)
    if scores:
        shards = with_scores(shards, arm, read_json(scores)["result"])
    documents = small.heldout(folder, list(read_meta(folder)["sources"]), HELDOUT)
    long = long_documents(folder)

    def positions(run: small.Run, base: float | None = None) -> dict[str, dict[str, float]]:
        """Bits per byte by position in long documents, at the long context whatever the phase's is."""
        scores = small.score(run.model, long, folder, phases[-1].context, base)
        return {"all": small.by_position(scores, LONG), "advanced": small.by_position(scores, ADVANCED)}

    def bits(run: small.Run, context: int) -> dict[str, float]:
        return small.by_source(small.score(run.model, documents, folder, context))

    with tempfile.TemporaryDirectory() as out:
        run = small.Run(arm_config(arm, folder, Path(out) / "run", phases, seed), shards)
        found: Unit = {"ends": [], "before": {}, "branches": {}}
        for number, phase in enumerate(phases):
            if number == 2 and arm in (REFERENCE, "base 1e6"):
                found["before"] = {name: positions(run, base) for name, base in READINGS.items()}
            if number == 2 and arm == REFERENCE:
                for name, change in BRANCHES.items():
                    changed = [*phases[:2], replace(phases[2], **change)]
                    other = run.fork(small.config(folder, Path(out) / name, changed, seed))
                    other.train(2)
                    found["branches"][name] = {
                        "bits": bits(other, phase.context),
                        "after": positions(other),
                        **curve(other),
                    }
            run.train(number)
            found["ends"].append(bits(run, phase.context))
        return found | {"bits": found["ends"][-1], "after": positions(run), **curve(run)}


def curve(run: small.Run) -> Unit:
    """Loss and learning rate of the steps that a run took itself, and the first's number."""
    rows = run.rows()
    return {
        "loss": [round(row["loss"], 5) for row in rows],
        "lr": [round(row["lr"], 8) for row in rows],
        "first": rows[0]["step"],
        "skipped": sum(row["skipped"] for row in rows),
    }


def long_documents(tokenizer: Path) -> list[tuple[str, np.ndarray]]:
    """Returns the held-out documents of `LONG` that go beyond the short context, cut at the long one."""
    short, most = small.SHAPES[0][0], small.SHAPES[-1][0]
    everything = small.heldout(tokenizer, LONG, 10**9)
    return [(source, ids[:most]) for source, ids in everything if len(ids) > short]


def previous(recipes: str, tokenizer: str, corpus: str, seed: int) -> Unit:
    """Trains a small model on the same data, as the report's "previous model", and scores every training document."""
    folder, phases = Path(tokenizer), small.phases(Path(recipes))
    shards = small.training_shards(folder, phases)
    with tempfile.TemporaryDirectory() as out:
        run = small.Run(arm_config("mixed", folder, Path(out), phases, seed), shards)
        for number in range(len(phases)):
            run.train(number)
    run.model.eval()
    sizes = small.token_bytes(folder)
    difficulty = {}
    for source, shard in shards.items():
        beginnings = [shard.document(index)[:READ] for index in range(len(shard))]
        logs = token_log_probs(run.model, beginnings, context=READ, batch_tokens=4096)
        difficulty[source] = [
            round(float(-log.sum() / np.log(2) / max(1, sizes[ids].sum())), 5)
            for log, ids in zip(logs, beginnings, strict=True)
        ]
    return {"difficulty": difficulty, "quality": qualities(Path(corpus), folder, list(shards))}


def qualities(corpus: Path, tokenizer: Path, sources: Sequence[str]) -> dict[str, list[float | None]]:
    """Returns source -> quality of its training documents (None: unknown), in the order of their shard."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(
        corpus / "documents.parquet", columns=["source", "split", "quality", "text"]
    ).to_pylist()
    found = {}
    for source in sources:
        mine = [row for row in rows if row["source"] == source and row["split"] == "train"]
        sizes = [len(row["text"].encode()) for row in mine]
        if sizes != read_shard(tokenizer, source, "train").bytes.tolist():
            raise SystemExit(f"{corpus}: documents of '{source}' are not those of {tokenizer}")
        found[source] = [row["quality"] for row in mine]
    return found


# ---------------------------------------------------------------------------- tables

Results = dict[str, list[Unit]]
"""Arm or branch -> its units over seeds, each with `bits` by source and by position (`after`) at the end."""


def collected(found: dict[str, Unit], work: dict[str, dict[str, Any]]) -> Results:
    """Sorts units by arm; the reference's branches stand as arms of their own."""
    results: Results = {}
    for name, unit in found.items():
        results.setdefault(work[name]["arm"], []).append(unit)
        for branch, part in unit["branches"].items():
            results.setdefault(branch, []).append(part)
    return results


def final_table(
    results: Results, known: dict[str, list[str]], arms: dict[str, str], reference: str
) -> Iterator[str]:
    """Held-out bits per byte at the end, and differences to a reference arm by group.

    Args:
        results: of all arms.
        known: group -> sources.
        arms: arm -> its name in the table; the reference is one of them.
        reference: arm that the others are compared with.
    """
    columns = ["all", *known]

    def means(arm: str) -> dict[str, list[float]]:
        each = [small.by_group(unit["bits"], known) for unit in results[arm]]
        return {column: [one[column] for one in each] for column in columns}

    base, rows = means(reference), []
    for arm, name in arms.items():
        own = means(arm)
        gaps = [units.paired(own[column], base[column]) for column in columns]
        cells = [gap.words(4, sign=True) if arm != reference else "" for gap in gaps]
        rows.append((name, units.interval(own["all"]).words(4), *cells))
    head = ("arm", "bits per byte", "difference", *(f"{group}, difference" for group in known))
    return units.table(head, rows)


def phase_table(reference: list[Unit], other: list[Unit], known: dict[str, list[str]]) -> Iterator[str]:
    """Bits per byte of each group after each phase, what the phase changed, and what mixing all would have given."""
    rows = []
    for group in known:
        ends = [
            [small.by_group(unit["ends"][number], known)[group] for unit in reference] for number in range(3)
        ]
        instead = [small.by_group(unit["bits"], known)[group] for unit in other]
        cells = [units.interval(ends[0]).words(3)]
        for number in (1, 2):
            change = units.paired(ends[number], ends[number - 1])
            cells.append(f"{units.interval(ends[number]).words(3)} ({change.words(3, sign=True)})")
        rows.append((group, *cells, units.paired(ends[2], instead).words(3, sign=True)))
    head = (
        "group",
        "after phase 1",
        "after phase 2 (change)",
        "after phase 3 (change)",
        "phases - mixed, at the end",
    )
    return units.table(head, rows)


BASES = {
    "1e5 throughout": ("base 1e5", "after"),
    "1e5, then 1e6 (the report's)": (REFERENCE, "after"),
    "1e6 throughout": ("base 1e6", "after"),
}
BEFORE = {
    "trained with 1e5, read with 1e5": (REFERENCE, "base 1e5"),
    "trained with 1e5, read with 1e6": (REFERENCE, "base 1e6"),
    "trained with 1e6, read with 1e6": ("base 1e6", "base 1e6"),
}


def at_positions(results: Results, arm: str, when: str, documents: str, band: str) -> list[float]:
    """Returns an arm's bits per byte in one band of positions, over seeds."""
    found = [unit["after"] if when == "after" else unit["before"][when] for unit in results[arm]]
    return [one[documents][band] for one in found]


def position_table(results: Results, arms: dict[str, tuple[str, str]], documents: str) -> Iterator[str]:
    """Bits per byte by position in the document; the first arm's, and the differences of the others to it."""
    bands = [f"{low}-{high}" for low, high in small.BANDS]
    first, rows = next(iter(arms.values())), []
    for name, (arm, when) in arms.items():
        cells = []
        for band in bands:
            own = at_positions(results, arm, when, documents, band)
            base = at_positions(results, *first, documents, band)
            same = (arm, when) == first
            cells.append(
                units.interval(own).words(3) if same else units.paired(own, base).words(4, sign=True)
            )
        rows.append((name, *cells))
    return units.table(("RoPE base", *(f"tokens {band}" for band in bands)), rows)


# ---------------------------------------------------------------------------- figures


def draw_schedules(results: Results, path: Path) -> None:
    """Learning rates, and the smoothed training loss of the last phase, as a difference to the reference."""
    names = {
        REFERENCE: "constant, then cosine",
        "1-sqrt": "constant, then 1 - sqrt",
        "no decay": "constant",
        "cosine": "one cosine",
    }
    with units.figure(path, panels=2) as (rates, losses):
        # A seed's last phase begins where its branches do; packing makes it a step longer or shorter.
        begins = [unit["first"] for unit in results["1-sqrt"]]
        last = [losses_from(unit, begin) for unit, begin in zip(results[REFERENCE], begins, strict=True)]
        steps = np.arange(min(map(len, last)))
        for k, (arm, name) in enumerate(names.items()):
            unit, style = results[arm][0], {"color": units.COLOURS[k], "linestyle": units.DASHES[k]}
            rates.plot(np.arange(len(unit["lr"])) + unit["first"], unit["lr"], label=name, **style)
            if arm != REFERENCE:
                gaps = [
                    smooth((losses_from(unit, begin) - other)[: len(steps)])
                    for unit, begin, other in zip(results[arm], begins, last, strict=True)
                ]
                units.draw_band(losses, k, name, steps[::4], [gap[::4] for gap in gaps])
        losses.axhline(0, color="#888888", linewidth=0.8)
        rates.set_ylabel("learning rate")
        losses.set_ylabel("loss - that of constant, then cosine")
        for axes, title in ((rates, "step"), (losses, "step of the last phase")):
            axes.set_xlabel(title)
            axes.legend()


def losses_from(unit: Unit, step: int) -> np.ndarray:
    """Returns the losses of a unit's steps from one on."""
    return np.array(unit["loss"][step - unit["first"] :])


def smooth(values: np.ndarray, half: int = 20) -> np.ndarray:
    """Mean over the values around each, fewer near the ends."""
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def draw_groups(reference: list[Unit], other: list[Unit], known: dict[str, list[str]], path: Path) -> None:
    """Bits per byte of each group at the phases' ends: three phases, and all sources mixed throughout."""
    with units.figure(path, height=3.6) as axes:
        for k, group in enumerate(known):
            for runs, dash, name in ((reference, "-", group), (other, ":", f"{group}, mixed throughout")):
                points = [
                    units.interval([small.by_group(unit["ends"][i], known)[group] for unit in runs])
                    for i in range(3)
                ]
                axes.errorbar(
                    (1, 2, 3),
                    [point.mean for point in points],
                    yerr=[point.margin for point in points],
                    color=units.COLOURS[k],
                    linestyle=dash,
                    marker="osD"[k],
                    markersize=4,
                    capsize=2,
                    linewidth=1.4,
                    label=name,
                )
        axes.set_xticks(
            (1, 2, 3), ("phase 1\ngeneral", "phase 2\nmedical basic", "phase 3\nmedical advanced")
        )
        axes.set_ylabel("held-out bits per byte")
        axes.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_bases(results: Results, path: Path) -> None:
    """Differences to base 1e5 throughout by position in the document, after the last phase and before it."""
    bands = [f"{low}-{high}" for low, high in small.BANDS]
    with units.figure(path, panels=2) as both:
        titles = ("after the phase with context 768", "before it (context 192), read at 768")
        for axes, arms, title in zip(both, (BASES, BEFORE), titles, strict=True):
            first, *others = arms.items()
            for k, (name, (arm, when)) in enumerate(others):
                gaps = [
                    units.paired(
                        at_positions(results, arm, when, "all", band),
                        at_positions(results, *first[1], "all", band),
                    )
                    for band in bands
                ]
                axes.errorbar(
                    np.arange(len(bands)) + 0.08 * k,
                    [gap.mean for gap in gaps],
                    yerr=[gap.margin for gap in gaps],
                    color=units.COLOURS[k],
                    linestyle=units.DASHES[k],
                    marker="os"[k],
                    markersize=4,
                    capsize=2,
                    label=name,
                )
            axes.axhline(0, color="#888888", linewidth=0.8)
            axes.set_xticks(range(len(bands)), bands)
            axes.set_xlabel("position in the document, tokens")
            axes.set_title(title, fontsize=9)
            axes.legend()
        both[0].set_ylabel("bits per byte - base 1e5's")


# ---------------------------------------------------------------------------- all


def main() -> None:
    arguments = small.arguments(__doc__ or "", "runs/curriculum")
    where = {"recipes": str(arguments.recipes), "tokenizer": str(arguments.tokenizer)}
    where["corpus"] = str(arguments.run / "10-corpus")
    settings = [HELDOUT, LONG, ADVANCED, READ, PREVIOUS_SEED, BRANCHES, small.settings(arguments.recipes)]
    options: dict[str, Any] = {"workers": arguments.workers, "settings": settings}
    scores = {"scores": str(arguments.out / f"{PREVIOUS}.json")}
    first: dict[str, dict[str, Any]] = {PREVIOUS: where | {"arm": PREVIOUS, "seed": PREVIOUS_SEED}}
    work: dict[str, dict[str, Any]] = {}
    for seed in range(arguments.seeds):
        for arm in (*ARMS, *ORDERS):
            name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            work[name] = where | {"arm": arm, "seed": seed} | (scores if arm in ORDERS else {})
            if arm in ARMS:
                first[name] = work[name]
    units.run_units(train, first, arguments.out, **options)  # the orders go by what the previous model says
    found = units.run_units(train, work, arguments.out, **options)
    results = collected(found, work)
    known = small.groups(arguments.tokenizer)
    print(small.conditions(arguments, [list(found.values())]))
    print(small.size(arguments))
    report(results, known)
    draw_schedules(results, arguments.figures / "curriculum-schedules.svg")
    draw_groups(results[REFERENCE], results["mixed"], known, arguments.figures / "curriculum-phases.svg")
    draw_bases(results, arguments.figures / "curriculum-bases.svg")


def report(results: Results, known: dict[str, list[str]]) -> None:
    """Prints all tables."""
    schedules = {
        REFERENCE: "constant, then cosine (the report's)",
        "1-sqrt": "constant, then 1 - sqrt",
        "no decay": "constant",
        "cosine": "one cosine over all phases",
    }
    orders = {
        REFERENCE: "by chance",
        "easy to hard, quality": "easy to hard, by quality",
        "easy to hard": "easy to hard, by quality and difficulty",
    }
    for title, lines in (
        ("Schedules", final_table(results, known, schedules, REFERENCE)),
        ("Phases", phase_table(results[REFERENCE], results["mixed"], known)),
        ("RoPE base: documents of all long sources", position_table(results, BASES, "all")),
        ("RoPE base: documents of the last phase's", position_table(results, BASES, "advanced")),
        ("RoPE base before the last phase", position_table(results, BEFORE, "all")),
        ("Order inside a phase", final_table(results, known, orders, REFERENCE)),
        ("Optimizer", final_table(results, known, {REFERENCE: "AdamW", "muon": "Muon"}, REFERENCE)),
    ):
        print(f"\n{title}\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
