"""Does shifting help a detector? The optimum shifting paper says so of its detection table; asked here of a small one.

    make env peers
    .venv/bin/python benchmarks/flattening_detection.py            # about 15 minutes on one core
    .venv/bin/python benchmarks/flattening_detection.py --table    # what is done so far

Scenes: 64 x 64 grey canvases with clutter and one to four Fashion-MNIST objects, 14 to 28 pixels. The detector has one
stage and no anchors: a grid of 8 x 8 cells, each with a score for each class (logistic loss) and a box (generalised
IoU). Its losses are of sigmoids, so the gauge of the softmax does not apply: no constant may be taken from all classes.
For every seed, with clean classes and with 20% of the boxes given a wrong one: training scenes of its own, then head,
backbone or both shifted in every way, once trained. Test scenes are the same for all, of the test split, always clean.

Mean average precision is pycocotools', in an environment of its own. The choice is made on held-out scenes, with wrong
classes if the training scenes have them, by the mean loss of a scene. What is done already is not done again.
"""

import argparse
import copy
import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detection import (
    Detector,
    Scenes,
    compose,
    detect,
    ground_truth,
    losses,
    scene_losses,
    targets,
    train,
    with_wrong_classes,
)
from fashion_mnist import fashion_mnist
from safetensors.torch import load_file, save_file
from timing import conditions
from torch import nn
from tqdm import tqdm

from galenic.flatten import apply_plans, collect, hessian_trace, plan_shifts, select_shift, shift
from galenic.flatten.apply import Kind
from galenic.flatten.curvature import student_quantile
from galenic.flatten.layers import select_layers
from galenic.flatten.statistics import Statistics
from galenic.runtime import atomic_path, read_json, write_json

TRAIN, VALIDATION, TEST = 4000, 300, 500
SEEN = 1000
"""Training scenes that the statistics of shifts and the training loss are of."""
HELD_OUT = 50_000
"""Objects of the training split from here on are for validation scenes only."""
VARIANTS = {"clean": 0.0, "wrong": 0.2}
"""Variant -> share of the training boxes that get a wrong class."""
PLACES = {
    "head": ["classify.*", "locate.*"],
    "backbone": ["backbone.*"],
    "both": ["classify.*", "locate.*", "backbone.*"],
}
SHIFTS: dict[str, Kind] = {
    "truncation 0.999": {"energy": 0.999},
    "truncation 0.99": {"energy": 0.99},
    "ridge 0.01": {"output_budget": 0.01},
    "ridge 0.02": {"output_budget": 0.02},
    "ridge 0.05": {"output_budget": 0.05},
    "ridge 0.1": {"output_budget": 0.1},
    "ridge 0.2": {"output_budget": 0.2},
}
FEW = (4, 8)
"""Scenes of the stochastic shift. With 64 windows each, they are about as many windows as a window has values."""
KINDS = ["exact", *(f"stochastic {few}" for few in FEW), *SHIFTS, "chosen"]
TRACED, PROBES = 64, 4
"""Training scenes that the Hessian trace is taken on, and random vectors."""


# ---------------------------------------------------------------------------- scores


def coco_version(python: Path) -> str:
    command = [python, "-c", "from importlib.metadata import version; print(version('pycocotools'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Judge:
    """pycocotools in a process of its own; it waits without spinning."""

    def __init__(self, python: Path, folder: Path, scenes: Scenes):
        self.scenes, self.file = scenes, folder / "detections.json"
        write_json(folder / "truth.json", ground_truth(scenes))
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("coco_worker.py"), folder / "truth.json"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def precision(self, model: Detector) -> dict[str, Any]:
        self.file.write_text(json.dumps(detect(model, self.scenes.images)))
        assert self.process.stdin and self.process.stdout
        print(json.dumps(str(self.file)), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"pycocotools' process ended early; try it: {self.process.args}")
        return json.loads(answer)


def trace(model: Detector, scenes: Scenes) -> dict[str, float]:
    """Hessian trace of the mean loss of a scene, by all parameters; the same probes for all models."""
    part = scenes.part(TRACED)
    wanted = targets(model.centres, part)
    estimate = hessian_trace(
        lambda images: (losses(model, images, wanted).sum(), len(images)),
        model.parameters(),
        [part.images],
        probes=PROBES,
        generator=torch.Generator().manual_seed(0),
    )
    return {"trace": estimate.mean, "trace error": estimate.standard_error}


# ---------------------------------------------------------------------------- shifts


def restricted(model: nn.Module, found: Statistics, place: str) -> Statistics:
    """Returns the statistics of a place's layers alone."""
    part, names = copy.copy(found), select_layers(model, PLACES[place])
    part.owner = {name: owner for name, owner in found.owner.items() if name in names}
    return part


def prepared(seed: int, variant: str) -> tuple[Scenes, Scenes]:
    """Draws a seed's training and validation scenes."""
    images, labels = fashion_mnist("train")
    scenes = [
        compose(TRAIN, (images[:HELD_OUT], labels[:HELD_OUT]), 2 * seed),
        compose(VALIDATION, (images[HELD_OUT:], labels[HELD_OUT:]), 2 * seed + 1),
    ]
    train, validation = (
        with_wrong_classes(part, VARIANTS[variant], 2 * seed + i) for i, part in enumerate(scenes)
    )
    return train, validation


def compare(folder: Path, seed: int, variant: str, judge: Judge, started: str) -> None:
    """Trains a detector and scores it and all its shifts; what the folder has is not done again."""
    name = f"seed-{seed}-{variant}"
    place, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    results: dict[str, Any] = read_json(place) if place.exists() else {"conditions": started, "models": {}}
    models = results["models"]
    todo = [(part, kind) for part in PLACES for kind in KINDS if f"{part}: {kind}" not in models]
    if not todo:
        return
    scenes, validation = prepared(seed, variant)
    if not weights.exists():
        with atomic_path(weights) as temporary:
            save_file(train(scenes, seed).state_dict(), temporary)
    model, original = Detector().eval(), load_file(weights)
    model.load_state_dict(original)
    seen = scenes.part(SEEN)
    full = collect(model, seen.images.split(250))
    few = {f"stochastic {n}": collect(model, [scenes.part(n).images], method="qr") for n in FEW}

    def score() -> dict[str, Any]:
        found = judge.precision(model) | trace(model, seen)
        for split, part in {"train": seen, "validation": validation, "test": judge.scenes}.items():
            found[f"{split} loss"] = float(scene_losses(model, part).mean())
        return found

    if "original" not in models:
        models["original"] = score()
    for part, kind in tqdm(todo, desc=name, leave=False):
        key = f"{part}: {kind}"
        model.load_state_dict(original)
        inputs = restricted(model, few.get(kind, full), part)
        if kind == "chosen":
            selection = select_shift(
                model, inputs, list(SHIFTS.values()), lambda: scene_losses(model, validation), caution=1.0
            )
            choice = None if selection.chosen is None else list(SHIFTS)[selection.chosen]
            models[key] = models[f"{part}: {choice}" if choice else "original"] | {"choice": choice}
        elif kind == "exact":
            plans = plan_shifts(model, inputs)
            moved = [plan for plan in plans if plan.action != "no-op"]
            apply_plans(model, moved)
            models[key] = (score() if moved else models["original"]) | {
                "moved": f"{len(moved)} of {len(plans)}"
            }
        else:
            shifts = list(shift(model, inputs, **SHIFTS.get(kind, {"output_budget": 0.0})).values())
            after, before = sum(s.norm_after**2 for s in shifts), sum(s.norm_before**2 for s in shifts)
            models[key] = score() | {"squared norm": after / before}
        write_json(place, results)


# ---------------------------------------------------------------------------- the table


RATIOS = ("train loss", "test loss", "squared norm", "trace")
"""Scores that are shown as ratios to the original's."""


def shown(values: Sequence[float], form: str) -> str:
    """Writes a mean and, of several, its 95% interval (Student's t)."""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    half = student_quantile(0.95, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:{form.lstrip('+')}}"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Writes one variant's seeds as Markdown; differences (in points) and ratios are taken within each seed."""
    lines = [
        f"| shifted | mAP | difference | mAP50 | difference | {' | '.join(RATIOS)} |",
        "|---|" + "--:|" * 8,
    ]
    for name in ["original", *(f"{part}: {kind}" for part in PLACES for kind in KINDS)]:
        pairs = [(run[name], run["original"]) for run in runs]
        cells = []
        for score in ("mAP", "mAP50"):
            cells.append(f"{100 * statistics.fmean(after[score] for after, _ in pairs):.2f}")
            cells.append(shown([100 * (after[score] - before[score]) for after, before in pairs], "+.2f"))
        for score in RATIOS:
            cells.append(
                shown([after.get(score, 1) / before.get(score, 1) for after, before in pairs], ".3f")
            )
        if name == "original":
            cells = [cell if place in (0, 2) else "" for place, cell in enumerate(cells)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def remarks(runs: Sequence[dict[str, Any]]) -> str:
    """Says what exact shifts found to move, what was chosen and how large the original's trace is."""
    lines = []
    for part in PLACES:
        exact = [run[f"{part}: exact"] for run in runs]
        choices = [run[f"{part}: chosen"]["choice"] or "none" for run in runs]
        moved = ", ".join(found["moved"] for found in exact)
        lines.append(f"{part}: layers that an exact shift moves: {moved}; chosen: {', '.join(choices)}")
    for score, form in {"mAP": ".3f", "train loss": ".2f", "test loss": ".2f", "trace": ".0f"}.items():
        values = ", ".join(f"{run['original'][score]:{form}}" for run in runs)
        lines.append(f"{score} of the original, seed by seed: {values}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default="runs/flattening-detection", help="keeps weights and results"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--python", type=Path, default=".venvs/coco/bin/python", help="that has pycocotools")
    parser.add_argument("--table", action="store_true", help="only prints what is done")
    options = parser.parse_args()
    if not options.table:
        if not options.python.exists():
            raise SystemExit(
                f"{options.python} is missing: run `make peers`, or name a python with pycocotools"
            )
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        started = conditions(1, f"pycocotools {coco_version(options.python)}")
        judge = Judge(options.python, options.folder, compose(TEST, fashion_mnist("test"), 10**6))
        for seed in range(options.seeds):
            for variant in VARIANTS:
                compare(options.folder, seed, variant, judge, started)
    for variant, share in VARIANTS.items():
        files = [options.folder / f"seed-{seed}-{variant}.json" for seed in range(options.seeds)]
        runs = [read_json(file) for file in files if file.exists()]
        models = [run["models"] for run in runs if "both: chosen" in run["models"]]
        if models:
            title = f"{len(models)} seeds, {share:.0%} of the training boxes with a wrong class"
            print(runs[0]["conditions"], title, table(models), remarks(models), "", sep="\n\n")


if __name__ == "__main__":
    main()
