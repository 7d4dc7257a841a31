"""Speed of flattening: the statistics pass, the stochastic shift, a wide layer, traces against three other tools.

    make peers
    python benchmarks/flattening_speed.py

Prints four tables; about five minutes on two cores. Networks are random or trained for a few steps on made-up data.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timing import Interval, conditions, median_interval, ratios, take_turns
from torch import Tensor, nn

from galenic.flatten import collect, hessian_trace, shift
from galenic.flatten.curvature import TraceEstimate
from galenic.flatten.products import gauss_newton, hessian
from galenic.flatten.traces import hutchpp, softmax_trace, xtrace

ROOT = Path(__file__).parents[1]
WIDE = 4096


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = perf_counter()
        work()
        return perf_counter() - start

    return run


# ---------------------------------------------------------------------------- networks


def relu_network(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    def block(inputs: int, outputs: int, pool: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), pool]

    layers = [*block(1, 32, nn.MaxPool2d(2)), *block(32, 64, nn.MaxPool2d(2))]
    return nn.Sequential(*layers, *block(64, 64, nn.AdaptiveAvgPool2d(1)), nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norms[1](hidden))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 1024, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


class Case(NamedTuple):
    """A network, its data, its last layer and how many rows are sampled."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    head: str
    every: tuple[int, ...]


def cases() -> list[Case]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 1024, (256, 65))
    classes = torch.randint(0, 10, (4096,))
    return [
        Case("MLP", relu_network(784, 512, 512, 10), torch.randn(4096, 784), classes, "4", (4, 32)),
        Case("convolutional", convolutional(), torch.randn(512, 1, 28, 28), classes[:512], "10", (4, 32)),
        Case("transformer", Transformer(), tokens[:, :-1], tokens[:, 1:], "head", (4, 32)),
    ]


# ---------------------------------------------------------------------------- passes and stochastic shifts


def passes(case: Case, seconds: float) -> None:
    """Prints rows of the statistics pass against a plain forward pass over the same batches."""
    batches = list(case.inputs.split(128))

    @torch.no_grad()
    def forward() -> None:
        case.model.eval()
        for batch in batches:
            case.model(batch)

    contenders = {"forward": timed(forward)} | {
        f"one row of {every}" if every > 1 else "all rows": timed(
            lambda every=every: collect(case.model, batches, every=every)
        )
        for every in (1, *case.every)
    }
    for run in contenders.values():
        run()
    times = take_turns(contenders, 5, seconds)
    plain = statistics.median(times["forward"])
    for name in list(contenders)[1:]:
        found = ratios(times[name], times["forward"])
        print(
            f"| {case.name} | {name} | {plain:.3f} | {statistics.median(times[name]):.3f} | {told(found, 1.3)} |",
            flush=True,
        )


def stochastic(case: Case, seconds: float) -> None:
    """Prints rows of the stochastic shift (100 samples) against one training step of 128."""
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0, momentum=0.9)
    inputs, targets = case.inputs[:128], case.targets[:128]
    weights = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(case.model(inputs).flatten(0, -2), targets.flatten()).backward()
        optimizer.step()

    def shifted(layers: Sequence[str]) -> Callable[[], float]:
        def run() -> float:
            start = perf_counter()
            shift(case.model, collect(case.model, [inputs[:100]], layers, method="qr"), output_budget=0.0)
            seconds = perf_counter() - start
            case.model.load_state_dict(weights)
            return seconds

        return run

    contenders = {"step": timed(step), "last layer": shifted([case.head]), "all layers": shifted(["*"])}
    for run in contenders.values():
        run()
    times = take_turns(contenders, 5, seconds)
    plain = 1e3 * statistics.median(times["step"])
    for name in list(contenders)[1:]:
        own, found = 1e3 * statistics.median(times[name]), ratios(times[name], times["step"])
        print(f"| {case.name} | {name} | {plain:.1f} | {own:.1f} | {told(found, 1.0)} |", flush=True)


def told(found: Interval, limit: float) -> str:
    verdict = "met" if found.median <= limit else "**not met**"
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f}) {verdict}: <= {limit:g}"


# ---------------------------------------------------------------------------- a wide layer


def wide() -> None:
    """Measures a wide layer in a process of its own; prints JSON. Peak memory is the kernel's, reset before a stage."""

    def status(name: str) -> float:
        (line,) = [
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
        ]
        return int(line.split()[1]) * 1024 / 1e9

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, WIDE, bias=False))
    batches = [torch.randn(512, WIDE) for _ in range(8)]
    model(batches[0])
    before, kept, rows = status("VmRSS"), {}, []
    stages = {
        "statistics of 4,096 rows": lambda: kept.update(found=collect(model, batches)),
        "eigendecomposition": lambda: kept["found"].spectrum("0"),
        "shift by ridge": lambda: shift(model, kept["found"], output_budget=0.01),
        "another shift": lambda: shift(model, kept["found"], output_budget=0.02),
    }
    for name, work in stages.items():
        Path("/proc/self/clear_refs").write_text("5")
        seconds = timed(work)()
        rows.append((name, seconds, status("VmHWM") - before))
    print(json.dumps(rows))


# ---------------------------------------------------------------------------- traces


class Problem(NamedTuple):
    name: str
    sizes: tuple[int, ...]
    samples: int
    steps: int
    turns: int
    best: dict[str, str]
    """Matrix -> which of our estimators the others are compared with."""


PROBLEMS = [
    Problem(
        "small",
        (20, 32, 32, 5),
        512,
        60,
        60,
        {"Gauss-Newton": "galenic XTrace", "Hessian": "galenic hessian_trace"},
    ),
    Problem(
        "middle",
        (784, 128, 128, 10),
        512,
        15,
        30,
        {"Gauss-Newton": "galenic softmax_trace", "Hessian": "galenic hessian_trace"},
    ),
]
PRODUCTS = {"Hutchinson": 24, "Hutch++": 48, "XTrace": 48}
THEIRS = {
    "curvlinops": (("Gauss-Newton", "Hessian"), ("Hutchinson", "Hutch++", "XTrace")),
    "hessian-eigenthings": (("Gauss-Newton", "Hessian"), ("Hutchinson", "Hutch++")),
    "PyHessian": (("Hessian",), ("Hutchinson",)),
}


def trained(problem: Problem) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Returns a network with ReLU a few steps after its start, and its data."""
    torch.manual_seed(0)
    inputs, *_, classes = problem.sizes
    y = torch.randint(0, classes, (problem.samples,))
    x = torch.randn(classes, inputs)[y] / inputs**0.25 + torch.randn(problem.samples, inputs)
    model = relu_network(*problem.sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(problem.steps):
        chosen = torch.randint(0, len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model, x, y


def summed(model: nn.Module) -> Callable[[Any], tuple[Tensor, int]]:
    return lambda batch: (F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1]))


def true_trace(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, str]:
    """Returns the trace: of the dense Hessian in float64 if it is small, else a long run's, and how it was found.

    With ReLU between linear layers the Hessian and the Gauss-Newton matrix have the same trace.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    if size < 5000:
        wide = model.double()
        matrix = hessian(summed(wide), wide.parameters(), [(x.double(), y)])
        exact = float(matrix.product(torch.eye(size, dtype=torch.float64)).trace())
        model.float()
        return exact, "exact, from the dense Hessian in float64"
    batches = list(zip(x.split(16), y.split(16), strict=True))
    generator = torch.Generator().manual_seed(2**40)
    long = softmax_trace(
        lambda batch: model(batch[0]), model.parameters(), batches, probes=256, generator=generator
    )
    return long.mean, f"of a long run, relative standard error {long.standard_error / long.mean:.2%}"


def ours(model: nn.Module, x: Tensor, y: Tensor) -> dict[tuple[str, str], Callable[[torch.Generator], Any]]:
    """Returns (matrix, name) -> estimator by a generator of probes."""
    parameters = list(model.parameters())

    def cut(size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.split(size), y.split(size), strict=True))

    def outer(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])

    whole, by_32, by_128 = cut(len(x)), cut(32), cut(128)
    matrices = {
        "Gauss-Newton": gauss_newton(lambda batch: model(batch[0]), outer, parameters, whole),
        "Hessian": hessian(summed(model), parameters, whole),
    }
    found: dict[tuple[str, str], Callable[[torch.Generator], Any]] = {
        ("Gauss-Newton", "galenic softmax_trace"): lambda source: softmax_trace(
            lambda batch: model(batch[0]), parameters, by_32, probes=4, generator=source
        ),
        ("Hessian", "galenic hessian_trace"): lambda source: hessian_trace(
            summed(model),
            parameters,
            by_128,
            probes=4,
            generator=source,
            fresh=True,
            blocks=len(parameters) // 2,
        ),
    }
    for matrix, operator in matrices.items():
        for name, estimate in (("Hutch++", hutchpp), ("XTrace", xtrace)):
            found[matrix, f"galenic {name}"] = (
                lambda source, operator=operator, name=name, estimate=estimate: estimate(
                    operator, products=PRODUCTS[name], generator=source
                )
            )
    return found


def traces(problem: Problem) -> None:
    """Prints rows: seconds and error of every tool, and what they make together."""
    model, x, y = trained(problem)
    truth, how = true_trace(model, x, y)
    errors: dict[tuple[str, str], list[float]] = {}
    contenders: dict[tuple[str, str], Callable[[], float]] = {}

    for key, estimate in ours(model, x, y).items():

        def run(key: tuple[str, str] = key, estimate: Callable[[Any], TraceEstimate] = estimate) -> float:
            source = torch.Generator().manual_seed(len(errors.setdefault(key, [])))
            start = perf_counter()
            value = estimate(source).mean
            seconds = perf_counter() - start
            errors[key].append(value / truth - 1)
            return seconds

        contenders[key] = run

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        arrays = {
            f"{index}.{name}": tensor.detach().numpy()
            for index, layer in enumerate(layers)
            for name, tensor in layer.named_parameters()
        }
        np.savez(file, x=x.numpy(), y=y.numpy(), **arrays)
        words = [ROOT / ".venvs/curvlinops/bin/python", "-I", ROOT / "benchmarks/trace_worker.py", file]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            assert worker.stdin and worker.stdout

            def ask(key: tuple[str, str], tool: str, estimator: str) -> float:
                job = {
                    "tool": tool,
                    "matrix": key[0],
                    "estimator": estimator,
                    "products": PRODUCTS[estimator],
                }
                worker.stdin.write(json.dumps(job) + "\n")
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline())
                errors.setdefault(key, []).append(answer["estimate"] / truth - 1)
                return answer["seconds"]

            for tool, (matrices, estimators) in THEIRS.items():
                for matrix in matrices:
                    for estimator in estimators:
                        key = (matrix, f"{tool} {estimator}")
                        contenders[key] = lambda key=key, tool=tool, estimator=estimator: ask(
                            key, tool, estimator
                        )
            for run in contenders.values():
                run()
            errors.clear()
            times = take_turns({"\n".join(key): run for key, run in contenders.items()}, problem.turns)
            worker.stdin.close()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"\n{problem.name}: {size:,} parameters, {len(x)} samples; trace {truth:.4g}, {how}; {problem.turns} turns\n"
    )
    print(
        "| matrix | estimator | seconds | relative error | seconds to 2% | times ours |\n|---|---|--:|--:|--:|---|"
    )
    for key in sorted(contenders):
        spent, missed = times["\n".join(key)], errors[key]
        best = (key[0], problem.best[key[0]])
        found = times_to_accuracy(spent, missed, times["\n".join(best)], errors[best])
        verdict = "met" if found.median >= 1.5 else "**not met**"
        versus = f"{found.median:.1f} ({found.low:.1f} to {found.high:.1f})"
        if key[1].startswith("galenic"):
            verdict = "" if key != best else "ours"
        elif not key[1].startswith("PyHessian"):
            verdict += ": >= 1.5"
        else:
            verdict = ""
        print(
            f"| {key[0]} | {key[1]} | {statistics.median(spent):.4f} | {root_mean_square(missed):.2%} | "
            f"{cost(spent, missed):.4f} | {'' if key == best else versus} {verdict} |",
            flush=True,
        )


def root_mean_square(values: Sequence[float]) -> float:
    return statistics.fmean(value**2 for value in values) ** 0.5


def cost(seconds: Sequence[float], errors: Sequence[float]) -> float:
    """Seconds until the mean of repeated runs has a relative standard error of 2%."""
    return statistics.median(seconds) * (root_mean_square(errors) / 0.02) ** 2


def times_to_accuracy(
    seconds: Sequence[float],
    errors: Sequence[float],
    own_seconds: Sequence[float],
    own_errors: Sequence[float],
) -> Interval:
    """Returns the ratio of two costs with a 95% interval, by drawing turns anew: times in pairs, errors apart."""
    source = random.Random(0)

    def drawn(values: Sequence[float]) -> list[float]:
        return [values[source.randrange(len(values))] for _ in values]

    pairs = list(zip(seconds, own_seconds, strict=True))
    samples = []
    for _ in range(1000):
        of_times = median_interval([a / b for a, b in (source.choice(pairs) for _ in pairs)]).median
        samples.append(
            of_times * (root_mean_square(drawn(errors)) / root_mean_square(drawn(own_errors))) ** 2
        )
    samples.sort()
    middle = (
        ratios(seconds, own_seconds).median * (root_mean_square(errors) / root_mean_square(own_errors)) ** 2
    )
    return Interval(middle, samples[25], samples[974])


def main() -> None:
    """Prints the four tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="of turns for each row of the first two tables"
    )
    parser.add_argument("--wide", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wide:
        wide()
        return
    peers = ("curvlinops 3.0.1", "hessian-eigenthings 1.0.0a5", "PyHessian 0.1")
    print(conditions(torch.get_num_threads(), *peers, "float32"), flush=True)
    networks = cases()
    print(
        "\n| network | statistics of | forward, s | pass, s | times a forward pass |\n|---|---|--:|--:|---|"
    )
    for case in networks:
        passes(case, arguments.seconds)
    print(
        "\n| network | stochastic shift of | step, ms | shift, ms | times a training step |\n|---|---|--:|--:|---|"
    )
    for case in networks:
        stochastic(case, arguments.seconds / 2)
    done = subprocess.run(
        [sys.executable, __file__, "--wide"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    print(f"\n| {WIDE:,} inputs and outputs | seconds | peak memory, GB |\n|---|--:|--:|")
    for name, seconds, memory in json.loads(done.stdout):
        print(f"| {name} | {seconds:.2f} | {memory:.2f} |", flush=True)
    for problem in PROBLEMS:
        traces(problem)


if __name__ == "__main__":
    main()
