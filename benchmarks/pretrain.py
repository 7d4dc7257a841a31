"""Speed of pre-training against Hugging Face's Trainer and a plain Llama: one table from one run.

    python benchmarks/pretrain.py              two CPU threads, float32, about 6 minutes
    python benchmarks/pretrain.py --compiled   every contender once more under torch.compile
    python benchmarks/pretrain.py --quick      a network of nothing, to see that it runs

* Galenic: the loop that `galenic pretrain` runs, with its guard and a metrics row for each step. Once more without
  oneDNN (`galenic/products.py`), which it prefers to MKL on AMD processors.
* HF Trainer: transformers' `Trainer` on the same network, weights and batches of packed documents (`position_ids`),
  fused AdamW, nothing logged or saved. Once as it is, once with our network's `skip_logits` put into the batches.
* plain Llama: `plain_llama.py`, of the same width, depth, vocabulary, batch and number of parameters. It lets
  documents of a row see each other, so that it needs no mask.

Every contender is a process of its own with the same environment. They take turns in an order that changes, and whoever
waits does not compute. A ratio is theirs / ours in seconds within one turn: its median over turns and 95%
order-statistic interval. Memory is the peak of the whole process, its modules included.

With a CUDA device the table is another: about 1.5B parameters in bfloat16, 8k and 32k packed tokens, the share of the
matrix-product peak measured in the same run, memory beside what `galenic.pretrain.planning.memory` plans.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain_sizes import CONTENDERS, HF, HF_SKIP, OURS, OURS_MKL, PLAIN, SIZES
from timing import conditions, median_interval, ratios, take_turns

import galenic.runtime  # noqa: F401 (its settings of threads are every worker's)

MEAN_DOCUMENT = 186.0
"""Tokens of a document, as `pretrain_worker.py` draws them."""
TARGETS = {HF: 1.1, HF_SKIP: 1.1, PLAIN: 0.95}
"""Contender -> smallest ratio of speeds, ours to its."""


class Worker:
    """A contender in a process of its own, which computes only when it is asked."""

    def __init__(self, name: str, size: str, threads: int) -> None:
        self.name = name
        variables = {"OMP_NUM_THREADS": str(threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        here = Path(__file__)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(here.with_name("pretrain_worker.py")), name, size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "QUIET" in os.environ else None,
            text=True,
            env=os.environ | variables,
        )
        self.told: list[dict[str, Any]] = []

    def steps(self, count: int) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"steps": count}) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                self.told.append(json.loads(line))
                return self.told[-1]["seconds"]
        raise SystemExit(f"{self.name}: its process ended early; its error stands above")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def cell(ratio: Any, target: float | None) -> str:
    text = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    if target is None:
        return text
    return f"{text} {'met' if ratio.median >= target else '**not met**'}: >= {target}"


def measure(size: str, names: list[str], arguments: argparse.Namespace) -> list[str]:
    """Measures one size and returns its lines of the table."""
    shape = SIZES[size]
    workers = {}
    try:
        for name in names:
            workers[name] = Worker(name, size, arguments.threads)
            workers[name].steps(2)  # starts, allocates, compiles; alone
        turns = {name: lambda w=worker: w.steps(shape.steps) for name, worker in workers.items()}
        times = take_turns(turns, arguments.repeats, arguments.seconds)
        first = {name: worker.told[0]["loss"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    counts = {name: worker.told[0]["parameters"] for name, worker in workers.items()}
    for name in names:
        assert abs(counts[name] / counts[OURS] - 1) < 0.005, f"{name}: not the same number of parameters"
        assert PLAIN in name or abs(first[name] - first[OURS]) < 1e-3, f"{name}: not the same first loss"
    lines, tokens = [], shape.rows * shape.context * shape.steps
    ours = workers[OURS].told[-1]["peak"]
    for name, worker in workers.items():
        told = worker.told[1:]
        speed = tokens / median_interval(times[name]).median
        spent = median_interval([answer["processor"] for answer in told]).median / shape.steps
        peak = told[-1]["peak"]
        target = TARGETS.get(name.removesuffix(", compiled")) if size != "tiny" else None
        ratio = "" if name == OURS else cell(ratios(times[name], times[OURS]), target)
        memory = f"{peak / 1e9:.2f}"
        if target and PLAIN not in name:
            memory += " met: ours <= it" if ours <= peak else " **not met**: ours <= it"
        lines.append(
            f"| {size} | {name} | {speed:,.0f} | {spent:.3f} | {memory} | {ratio} | {len(times[name])} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    print(
        f"{size}: {shape.rows} x {shape.context} tokens, {counts[OURS]:,} parameters; {workers[OURS].told[0]['note']}"
    )
    return lines


def on_cuda() -> list[str]:
    """Measures our loop alone on a CUDA device and returns the lines of its table."""
    import torch

    from galenic.model import BaichuanM1Config
    from galenic.pretrain.planning.budget import flops
    from galenic.pretrain.planning.memory import ALONE, memory
    from model import matmul_peak

    peak, lines = matmul_peak("cuda", torch.bfloat16), []
    for size, least in (("1.5b", 0.5), ("1.5b-32k", None)):
        shape = SIZES[size]
        config = BaichuanM1Config(**shape.shape, max_position_embeddings=shape.context)
        worker = Worker(f"{OURS}, compiled", size, threads=8)
        worker.steps(3)
        seconds = median_interval([worker.steps(shape.steps) for _ in range(7)]).median / shape.steps
        worker.close()
        tokens = shape.rows * shape.context
        mfu = flops(config, shape.context, MEAN_DOCUMENT).trained * tokens / seconds / peak
        planned = memory(config, ALONE, rows=shape.rows, micro=shape.rows, context=shape.context).peak
        found = worker.told[-1]["peak"]
        near = "met" if abs(found / planned - 1) <= 0.1 else "**not met**"
        verdict = "" if least is None else f" {'met' if mfu >= least else '**not met**'}: >= {least:.0%}"
        lines.append(
            f"| {size} | {tokens / seconds:,.0f} | {mfu:.0%}{verdict} "
            f"| {found / 1e9:.1f} | {planned / 1e9:.1f} {near} |"
        )
    print(f"matrix-product peak {peak / 1e12:.0f} TFLOP/s, {torch.cuda.get_device_name()}\n")
    head = ["size", "tokens/s", "MFU", "peak memory, GB", "planned, GB (within 10%)"]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, help="default: starter starter-768 100m")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="beside ours; default: all not compiled"
    )
    parser.add_argument("--compiled", action="store_true", help="all of them under torch.compile too")
    parser.add_argument("--quick", action="store_true", help="two turns of a tiny network")
    parser.add_argument("--repeats", type=int, default=9, help="turns at least (default 9)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="turns go on for at least so long (default 60)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contender (default 2)")
    return parser.parse_args()


def cuda_here() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    arguments = parse()
    sizes, names = arguments.size or ["starter", "starter-768", "100m"], [OURS, OURS_MKL, HF, HF_SKIP, PLAIN]
    if cuda_here() and not (arguments.quick or arguments.size):
        print(conditions(arguments.threads, "bfloat16, compiled") + "\n")
        print("\n".join(on_cuda()))
        return
    if arguments.quick:
        sizes, arguments.repeats, arguments.seconds = ["tiny"], 2, 0.0
    if arguments.contenders:
        names = [OURS, *(name for name in arguments.contenders if name != OURS)]
    if arguments.compiled:
        names += [f"{name}, compiled" for name in names]
    print(conditions(arguments.threads, "float32") + "\n")
    lines = [line for size in sizes for line in measure(size, names, arguments)]
    header = ["size", "contender", "tokens/s", "processor s/step", "peak memory, GB", "ours / it", "turns"]
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
