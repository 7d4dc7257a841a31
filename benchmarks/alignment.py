"""The chain of alignment, SFT -> ELO -> TDPO -> PPO, and each of its stages left out, over seeds.

    python benchmarks/alignment.py --run runs/starter [--seeds 5] [--workers 2] [--out runs/alignment]

Every stage is its verb with the starter's configuration (recipes/starter/55 to 59) on the starter's base model; the
seed changes what is drawn: the order of the data and what is sampled. Prints the tables of docs/alignment.md and draws
its figure into --figures. Finished runs and their models stay in --out.
"""

import argparse
import contextlib
import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timing
import units
import yaml
from alignment_measures import ROOM, answers_right, measure

from galenic.cli import VERBS, parse_config
from galenic.corpus.starter.chains import MARKER
from galenic.evaluate.statistics import mcnemar
from galenic.runtime import read_jsonl, write_jsonl

Unit = dict[str, Any]
Results = dict[str, dict[str, list[Unit]]]
"""Arm -> `train`, `measure` and `answers` -> a unit for each seed."""

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("55-sft-alignment", {}),
    "elo": ("56-elo", {}),
    "tdpo": ("57-tdpo", {}),
    "ppo": ("59-ppo", {}),
    "reward": ("58-reward", {}),
    "direct": ("55-sft-alignment", {}),  # the same conversations, their chains cut out
    "elo-30": (
        "56-elo",
        {"steps": 30},
    ),  # of a model that writes no chains, whose samples have all their tokens
}
"""Stage -> (step of the recipe, what is changed in it)."""
CHAIN = ("sft", "elo", "tdpo", "ppo")
ARMS: tuple[tuple[str, ...], ...] = (
    (),
    *(CHAIN[:count] for count in range(1, 5)),
    ("elo-30", "tdpo", "ppo"),
    ("sft", "tdpo", "ppo"),
    ("sft", "elo", "ppo"),
    ("direct",),
)
"""What is compared: the chain stage by stage, without one of its first three, and without chains of thought."""
REWARD = ("sft", "reward")


def named(stages: Sequence[str]) -> str:
    """`sft > elo`."""
    return " > ".join(stages) or "base"


# ---------------------------------------------------------------------------- one model


def configuration(stage: str, recipes: Path, run: Path, changes: dict[str, Any]) -> tuple[str, Any]:
    """Returns verb and configuration of a stage, as the recipe has it but for what is changed."""
    step, variant = STAGES[stage]
    text = (recipes / f"{step}.yaml").read_text(encoding="utf-8").replace("RUN/", f"{run}/")
    verb = step.split("-")[1]
    return verb, parse_config(verb, {**yaml.safe_load(text), **variant, **changes})[0]


def settings(stages: Sequence[str], recipes: Path) -> list[Any]:
    """Returns all that the model of a chain of stages was made with, its seed and the starter run aside."""
    needed = [*stages, *(REWARD if "ppo" in stages else ())]
    texts = [(recipes / f"{STAGES[stage][0]}.yaml").read_text(encoding="utf-8") for stage in needed]
    return [[stage, STAGES[stage][1], text] for stage, text in zip(needed, texts, strict=True)]


def unit(task: str, stages: list[str], seed: int, run: str, recipes: str, models: dict[str, str]) -> Unit:
    """Trains the last of the stages on what the others gave, or measures what it gave.

    Args:
        task: `train`, `measure`, or `answers`: which held-out calculations are right.
        stages: none: the base model itself, which is only measured.
        seed: of the stage.
        run: the starter run.
        recipes: the starter's recipe.
        models: folder of the model of each chain of stages that is needed, by its name.
    """

    def place(some: Sequence[str]) -> str:
        return models[named(some)]

    if task == "measure":
        return measure(place(stages), place(["sft"]), Path(run))
    if task == "answers":
        return {"right": answers_right(place(stages), Path(run))}
    out = Path(place(stages)).parent
    changes: dict[str, Any] = {"model": place(stages[:-1]), "out": str(out), "seed": seed}
    if stages[-1] == "direct":
        changes["conversations"] = str(_without_chains(Path(run), out))
    if stages[-1] == "ppo":
        text = yaml.safe_load((Path(recipes) / "59-ppo.yaml").read_text(encoding="utf-8"))
        changes["rewards"] = text["rewards"] | {"model": place(REWARD)}
    verb, config = configuration(stages[-1], Path(recipes), Path(run), changes)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress
        importlib.import_module(VERBS[verb][1]).run(config)
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] in ("train", "heldout")]
    return {"curves": curves(rows), "heldout": [row for row in rows if row["kind"] == "heldout"]}


def curves(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns what a run tells of each step."""
    steps = [row for row in rows if row["kind"] == "train"]
    names = ("loss", "reward", "accuracy", "kl", "entropy", "length")
    return {name: [row[name] for row in steps] for name in names if all(name in row for row in steps)}


def _without_chains(run: Path, out: Path) -> Path:
    """Writes the conversations that alignment begins with, with answers in place of chains and answers."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "direct.train.jsonl"
    rows = []
    for row in read_jsonl(run / "10-corpus" / "sft" / "alignment.train.jsonl"):
        messages = [
            {**message, "content": message["content"].rpartition(MARKER)[2]}
            if message["role"] == "assistant"
            else message
            for message in row["messages"]
        ]
        rows.append({**row, "messages": messages})
    write_jsonl(path, rows)
    return path


# ---------------------------------------------------------------------------- tables

COLUMNS = (
    ("chains", "calculations right", 100, 1),
    ("log-likelihood", "log p(A given Q, chain)", 1, 2),
    ("choices", "choices right", 100, 1),
    ("recall", "recall", 100, 1),
    ("transfer", "transfer", 100, 1),
    ("pairs of calculations", "pairs of calculations", 100, 1),
    ("pairs of facts", "pairs of facts", 100, 1),
    ("kl", "KL from SFT", 1, 3),
    ("chains length", "tokens of a calculation", 1, 1),
    ("general", "bits/byte, general", 1, 3),
    ("all", "bits/byte, all", 1, 3),
)
"""(measure, head, factor, digits)."""


def values(results: Results, arm: Sequence[str], name: str) -> list[float]:
    return [told[name] for told in results[named(arm)]["measure"]]


def arms_table(results: Results) -> Iterator[str]:
    """Every arm's means with their intervals; the base model is one, and has none."""
    rows = []
    for arm in ARMS:
        cells = []
        for name, _, factor, digits in COLUMNS:
            some = [factor * value for value in values(results, arm, name)]
            cells.append(units.interval(some).words(digits) if arm else f"{some[0]:.{digits}f}")
        rows.append((named(arm), *cells))
    return units.table(("model", *(head for _, head, *_ in COLUMNS)), rows)


COMPARED: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    *((CHAIN[:count], CHAIN[: count - 1]) for count in range(1, 5)),
    *((CHAIN, arm) for arm in ARMS[5:8]),
    (("sft",), ("direct",)),
)
"""(one arm, the other)."""


def differences_table(results: Results) -> Iterator[str]:
    """What a stage adds, on top of those before it and within the whole chain; bold where the interval leaves 0 out."""
    rows = []
    for arm, other in COMPARED:
        cells = []
        for name, _, factor, digits in COLUMNS:
            some, others = values(results, arm, name), values(results, other, name)
            if not other:  # there is one base
                others = others * len(some)
            found = units.paired([factor * value for value in some], [factor * value for value in others])
            words = found.words(digits, sign=True)
            cells.append(f"**{words}**" if found.decided else words)
        rows.append((f"{named(arm)} against {named(other)}", *cells))
    return units.table(("difference", *(head for _, head, *_ in COLUMNS)), rows)


def tasks_table(results: Results) -> Iterator[str]:
    """Calculation by calculation, seed by seed: which of two arms alone is right, and McNemar's exact p.

    Says whether these models differ, not whether those of other seeds would.
    """
    rows = []
    for arm, other in COMPARED:
        if not (arm and other):
            continue
        ours, theirs = ([told["right"] for told in results[named(one)]["answers"]] for one in (arm, other))
        pairs = [list(zip(a, b, strict=True)) for a, b in zip(ours, theirs, strict=True)]
        won = sum(a > b for seed in pairs for a, b in seed)
        lost = sum(a < b for seed in pairs for a, b in seed)
        points = " ".join(f"{100 * sum(a - b for a, b in seed) / len(seed):+.1f}" for seed in pairs)
        rows.append((f"{named(arm)} against {named(other)}", won, lost, points, f"{mcnemar(won, lost):.2g}"))
    return units.table(("difference", "right alone", "other right alone", "points, seed by seed", "p"), rows)


def rewards_table(results: Results) -> Iterator[str]:
    """Held-out accuracy and calibration of the reward models that PPO used."""
    ends = [told["heldout"][-1] for told in results[named(REWARD)]["train"]]
    names = [
        name
        for name, value in ends[0].items()
        if isinstance(value, int | float) and name not in ("step", "time")
    ]
    cells = [units.interval([end[name] for end in ends]).words(3) for name in names]
    return units.table(("reward model", *names), [("held-out pairs", *cells)])


def draw(results: Results, path: Path) -> None:
    """ELO's and PPO's steps: the mean over seeds with its interval."""
    panels = (
        ("reward", "ELO: log p(A given Q, chain), nats", (("sft", "elo"),)),
        ("accuracy", "ELO: mean p(A given Q, chain)", (("sft", "elo"),)),
        ("reward", "PPO: reward", (CHAIN, ("sft", "tdpo", "ppo"), ("sft", "elo", "ppo"))),
    )
    with units.figure(path, panels=len(panels)) as every:
        for axes, (name, title, arms) in zip(every, panels, strict=True):
            for k, arm in enumerate(arms):
                lines = [told["curves"][name] for told in results[named(arm)]["train"]]
                units.draw_band(axes, k, named(arm), range(1, len(lines[0]) + 1), lines)
            axes.set_xlabel("step")
            axes.set_title(title, fontsize=9)
            axes.legend(loc="lower right")


# ---------------------------------------------------------------------------- all


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/starter"), help="a starter run, pre-trained")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm, 2 or more")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"), help="finished runs and models")
    parser.add_argument("--figures", type=Path, default=Path("docs/img"), help="where the figure goes")
    parser.add_argument("--recipes", type=Path, default=Path("recipes/starter"), help="the starter's recipe")
    found = parser.parse_args()
    if found.seeds < 2:
        parser.error(f"--seeds {found.seeds}: an interval needs 2 at least")
    if not (found.run / "30-pretrain" / "phase-3-medical-advanced").is_dir():
        parser.error(f"{found.run}: no base model; run `make starter` first, or give --run RUN_DIR")
    return found


def plan_units(seeds: int) -> Iterator[tuple[str, str, list[str], int, list[str]]]:
    """Yields (name, task, stages, seed, names of what it needs) of all units, what most others wait for first."""
    chains = {chain[:count] for chain in (*ARMS, REWARD) for count in range(1, len(chain) + 1)}

    def left(chain: tuple[str, ...]) -> int:  # the most stages that still follow
        follow = max(len(other) for other in chains if other[: len(chain)] == chain)
        return (len(CHAIN) if chain == REWARD else follow) - len(chain)

    trained = sorted(chains, key=lambda chain: (-left(chain), -len(chain), chain))
    for stages in trained:
        for seed in range(seeds):
            before = [stages[:-1]] if stages[1:] else []
            needed = before + ([REWARD] if stages[-1] == "ppo" else [])
            yield (
                named_unit("train", stages, seed),
                "train",
                list(stages),
                seed,
                [named_unit("train", some, seed) for some in needed],
            )
    for stages in ARMS:
        for seed in range(seeds if stages else 1):
            for task, others in (("measure", (("sft",),)), ("answers", ())):
                yield (
                    named_unit(task, stages, seed),
                    task,
                    list(stages),
                    seed,
                    [named_unit("train", some, seed) for some in (stages, *others) if some],
                )


def named_unit(task: str, stages: Sequence[str], seed: int) -> str:
    """`train-sft-elo-0`."""
    return f"{task}-{'-'.join(stages) or 'base'}-{seed}"


def main() -> None:
    given = arguments()
    conditions = timing.conditions(1)
    base = given.run / "30-pretrain" / "phase-3-medical-advanced"
    every = list(plan_units(given.seeds))

    def model(stages: Sequence[str], seed: int) -> str:
        made_with = units.fingerprint(settings(stages, given.recipes))
        folder = given.out / f"{'-'.join(stages)}-{seed}-{made_with}"
        return str(folder / "model" if stages else base)

    def arguments_of(task: str, stages: list[str], seed: int) -> dict[str, Any]:
        others = {"train": [stages[:-1]], "measure": [["sft"]], "answers": []}[task]
        chains = [stages, *others, *([list(REWARD)] if stages[-1:] == ["ppo"] else [])]
        models = {named(chain): model(chain, seed) for chain in chains}
        places = {"run": str(given.run), "recipes": str(given.recipes), "models": models}
        return {"task": task, "stages": stages, "seed": seed, **places}

    found = units.run_units(
        unit,
        {name: arguments_of(task, stages, seed) for name, task, stages, seed, _ in every},
        given.out,
        workers=given.workers,
        settings=ROOM,
        needs={name: needed for name, *_, needed in every},
    )
    results: Results = {}
    for name, task, stages, *_ in every:
        told = results.setdefault(named(stages), {}).setdefault(task, [])
        told.append(found[name])
    seconds = sum(unit["seconds"] for unit in found.values())
    print(f"{conditions}; {len(found)} runs, {given.seeds} seeds, {seconds:.0f} s of one thread in all")
    for title, lines in (
        ("Means over seeds", arms_table(results)),
        ("Differences", differences_table(results)),
        ("Calculations, one by one", tasks_table(results)),
        ("Reward models", rewards_table(results)),
    ):
        print(f"\n{title}\n", *lines, sep="\n")
    draw(results, given.figures / "alignment.svg")


if __name__ == "__main__":
    main()
