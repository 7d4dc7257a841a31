"""Time and memory of the loss over a large vocabulary: one table from one run (Linux; the naive loss needs 14 GB).

    python benchmarks/loss.py                     8,192 tokens, vocabulary 133,120, width 512, float32, two threads
    python benchmarks/loss.py --tokens 512        the same, small enough for a look

Three ways to the same number, the summed cross-entropy of a head with unit-length rows, forward and backward:

* naive: `F.cross_entropy(F.linear(hidden, F.normalize(weight)), targets)`, which holds all logits several times;
* PyTorch: `F.linear_cross_entropy(hidden, F.normalize(weight), targets, options=LinearCrossEntropyOptions())`;
* ours: `linear_cross_entropy(hidden, weight, targets, unit_rows=True)` of the modelling file.

Every measurement is a fresh process that makes weights, hidden states and gradients to be added to, writes to all of
them, runs a tiny loss to wake the threads, notes its resident memory, and runs the loss once. Extra memory is the
process' peak minus that note: what a training step must have free beyond weights, hidden states and gradients. The
processes run one at a time and take turns; a ratio is that of one turn. Differences are those of the value and of both
gradients (largest absolute difference over largest entry) from the naive loss in float64, at 64 tokens and 1,000 words
in eight chunks.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from galenic.runtime import peak_memory_bytes  # (before torch: sets how its threads wait)

# isort: split
import torch
import torch.nn.functional as F
from timing import conditions, median_interval, ratios, take_turns

from galenic.model.modeling_baichuan_m1 import linear_cross_entropy

VOCABULARY, WIDTH = 133_120, 512
MEMORY, TIME, DIFFERENCE = 0.8, 1.15, 1e-5  # targets: GB, times the naive loss, relative
NAIVE, PYTORCH, OURS = "naive", "PyTorch", "ours"


def loss(
    name: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int | None = None
):
    """Summed cross-entropy; `chunk` is the tokens in a chunk, by default what the implementation chooses."""
    if name == OURS:
        options = {} if chunk is None else {"chunk_elements": chunk * weight.shape[0]}
        return linear_cross_entropy(hidden, weight, targets, unit_rows=True, **options)
    rows = F.normalize(weight, dim=-1)
    if name == NAIVE:
        return F.cross_entropy(F.linear(hidden, rows), targets, reduction="sum")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return F.linear_cross_entropy(hidden, rows, targets, reduction="sum", options=options)


def problem(tokens: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32):
    """Draws hidden states and weights that want gradients, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def measure(name: str, tokens: int) -> dict[str, float]:
    """Runs one loss in this process: seconds, and bytes of peak memory beyond what was there before."""
    hidden, weight, targets = problem(tokens, VOCABULARY, WIDTH)
    for leaf in (hidden, weight):
        leaf.grad = torch.ones_like(leaf)
    loss(name, *problem(16, 100, WIDTH)).backward()
    before, start = resident_bytes(), perf_counter()
    loss(name, hidden, weight, targets).backward()
    return {"seconds": perf_counter() - start, "bytes": peak_memory_bytes() - before}


def in_a_process(name: str, tokens: int, threads: int) -> dict[str, float]:
    options = ["--measure", name, "--tokens", str(tokens), "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(
            f"the {name} loss ended with code {done.returncode}; -9: give it more memory, or less --tokens"
        )
    return json.loads(done.stdout)


def difference(name: str) -> float:
    """Largest relative difference of value and gradients from the naive loss in float64."""

    def value_and_gradients(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        hidden, weight, targets = problem(64, 1000, 64, dtype)
        value = loss(name, hidden, weight, targets, chunk=8)
        return [tensor.double() for tensor in (value.detach(), *torch.autograd.grad(value, (hidden, weight)))]

    pairs = zip(
        value_and_gradients(name, torch.float32), value_and_gradients(NAIVE, torch.float64), strict=True
    )
    return max(float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in pairs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="default 8192")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--measure", choices=(NAIVE, PYTORCH, OURS), help="one measurement in this process, as JSON"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.tokens)))
        return
    size = f"{arguments.tokens:,} tokens, vocabulary {VOCABULARY:,}, width {WIDTH}, float32"
    print(conditions(arguments.threads, size) + "\n")
    extra: dict[str, float] = {}

    def turn(name: str) -> float:
        result = in_a_process(name, arguments.tokens, arguments.threads)
        extra[name] = max(extra.get(name, 0), result["bytes"] / 1e9)
        return result["seconds"]

    names = (NAIVE, PYTORCH, OURS)
    times = take_turns({name: lambda n=name: turn(n) for name in names}, arguments.repeats)
    print(
        "| loss | seconds | times naive | extra memory, GB | largest relative difference |\n|---|---|---|---|---|"
    )
    for name in names:
        seconds, slower = median_interval(times[name]), ratios(times[name], times[NAIVE])
        cells = [
            (slower.median, TIME, f"{slower.median:.2f} ({slower.low:.2f} to {slower.high:.2f})"),
            (extra[name], MEMORY, f"{extra[name]:.2f}"),
            (difference(name), DIFFERENCE, f"{difference(name):.1e}"),
        ]
        if name == OURS:
            verdicts = [
                (text, "met" if value <= target else "**not met**", target) for value, target, text in cells
            ]
            texts = [f"{text} {verdict}: <= {target:g}" for text, verdict, target in verdicts]
        else:
            texts = [text for _, _, text in cells]
        spread = f"{seconds.median:.1f} ({min(times[name]):.1f} to {max(times[name]):.1f})"
        print(f"| {name} | {spread} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
