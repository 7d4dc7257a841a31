"""Whether training on several processes is training on one: one table from one run (CPU, gloo).

    python benchmarks/equivalence.py              50 steps of each of three phases, every layout
    python benchmarks/equivalence.py --steps 5    the same, small enough for a look

A network with everything that could go wrong (global and sliding-window layers of different heads, convolution,
NormHead) learns from packed documents of a small random language, whose documents end anywhere: across the chunks of
context parallelism, around windows. Phases differ in context, RoPE base and learning rate as the curriculum's do; rows
have different numbers of targets, one none. The optimizer is AdamW with clipping, in float32.

Each line compares one run with that of a single process: the largest and the mean difference of the losses of a phase's
steps, relative to the loss, and of the weights at its end, relative to the largest change of a weight in that phase.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.checkpoints.checkpoints import Checkpoints
from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig, ParallelConfig
from galenic.pretrain.loop import Silent, Trainer
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.ranks import leave, process_group, rank

VOCABULARY, ROWS = 256, 8
PHASES = {  # context, RoPE base, learning rate: those of the starter, smaller
    "general": (48, 1e4, 2e-3),
    "medical": (48, 1e4, 1e-3),
    "long": (96, 1e5, 5e-4),
}
RUNS: dict[str, tuple[int, dict, int]] = {  # name -> processes, layout, rows at a time (0: all)
    "1 process": (1, {}, 0),
    "1 process, 8 x 1 row": (1, {}, 1),
    "1 process, selective recomputation": (1, {"activation_checkpointing": "selective"}, 0),
    "1 process, full recomputation": (1, {"activation_checkpointing": "full"}, 0),
    "shard 2": (2, {"shard": 2}, 0),
    "shard 2, 4 x 1 row": (2, {"shard": 2}, 1),
    "context 2": (2, {"context": 2}, 0),
    "tensor 2": (2, {"tensor": 2}, 0),
    "shard 4": (4, {"shard": 4}, 0),
    "replicate 2 x shard 2": (4, {"replicate": 2, "shard": 2}, 0),
    "replicate 2 x shard 2, 2 x 1 row": (4, {"replicate": 2, "shard": 2}, 1),
    "shard 2 x context 2": (4, {"shard": 2, "context": 2}, 0),
    "shard 2 x tensor 2": (4, {"shard": 2, "tensor": 2}, 0),
    "context 2 x tensor 2": (4, {"context": 2, "tensor": 2}, 0),
}


def network() -> BaichuanM1ForCausalLM:
    """A layer of each kind."""
    torch.manual_seed(0)
    config = BaichuanM1Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_swa_attention_heads=8,
        num_swa_key_value_heads=4,
        sliding_window=16,
        max_position_embeddings=96,
    )
    return BaichuanM1ForCausalLM(config)


@dataclass
class Language:
    """Batches of packed documents, each word following from the one before by one of four chances."""

    steps: int
    context: int
    seed: int
    rows: int = ROWS
    domains: tuple[str, ...] = ()

    def batch(self, step: int, rows: list[int]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 100_000 + step)
        choices = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(7))
        shape = (ROWS, self.context)
        starts = torch.rand(shape, generator=generator) < 0.04
        starts[:, 0] = True
        fresh, chance = (torch.randint(n, shape, generator=generator) for n in (VOCABULARY, 4))
        ids = fresh.clone()
        for column in range(1, self.context):
            following = choices[ids[:, column - 1], chance[:, column]]
            ids[:, column] = torch.where(starts[:, column], fresh[:, column], following)
        index = torch.arange(self.context)
        ignored = (torch.rand(shape, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]) | starts
        whole = {
            "input_ids": ids,
            "position_ids": index - torch.cummax(index * starts, dim=1).values,
            "labels": ids.masked_fill(ignored, -100),
        }
        return {name: tensor[rows] for name, tensor in whole.items()}

    def documents(self, step: int) -> list[str]:
        return []

    def state(self, step: int) -> dict[str, int]:
        return {"step": step}


def work(out: Path, steps: int, layout: dict, micro_rows: int) -> None:
    """One process of one run: `metrics.jsonl`, and the whole weights at the end of each phase."""
    torch.set_num_threads(1)
    with process_group():
        model, parallel = network(), Parallel(ParallelConfig(**layout))
        parallel.apply(model)
        with Checkpoints(out, CheckpointConfig(seconds=1e9)) as checkpoints:
            trainer = Trainer(
                model,
                OptimConfig(),
                GuardConfig(),
                out,
                parallel=parallel,
                checkpoints=checkpoints,
                micro_rows=micro_rows,
            )
            for number, (phase, (context, base, peak)) in enumerate(PHASES.items()):
                model.config.rope_theta = base
                first = number * steps
                trainer.train(
                    Language(steps, context, number),
                    first=first,
                    last=first + steps,
                    lr=lambda step, first=first, peak=peak: peak * min(1.0, (first + step + 1) / 20),
                    bar=Silent(),
                    phase=phase,
                )
                weights = {}
                for name, tensor in model.state_dict().items():
                    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                    weights[name] = parallel.official_rows(name, whole).clone().contiguous()
                if rank() == 0:
                    save_file(weights, out / f"{phase}.safetensors")


def launch(out: Path, steps: int, name: str) -> None:
    """Runs the processes of one run."""
    out.mkdir(parents=True)
    processes = RUNS[name][0]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), __file__]
    done = subprocess.run(
        [*command, "--steps", str(steps), "--worker", name, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")


def compare(reference: Path, other: Path) -> dict[str, tuple[float, float, float, float]]:
    """Returns for each phase the largest and mean relative difference of losses, then of weights."""
    losses = []
    for folder in (reference, other):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["phase"], row["loss"], row["skipped"]) for row in rows if row["kind"] == "train"])
    found = {}
    before = network().state_dict()
    for phase in PHASES:
        pairs = [(a, b) for a, b in zip(*losses, strict=True) if a[0] == phase]
        assert all(a[2] == b[2] for a, b in pairs), "the guard skipped other steps"
        apart = [abs(a[1] - b[1]) / a[1] for a, b in pairs]
        one, two = (load_file(folder / f"{phase}.safetensors") for folder in (reference, other))
        moved = max(float((one[name] - before[name]).abs().max()) for name in one)
        differences = torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).double() / moved
        found[phase] = (
            *(max(apart), sum(apart) / len(apart)),
            *(float(differences.max()), float(differences.mean())),
        )
        before = one
    return found


def table(folder: Path, steps: int, names: list[str]) -> dict[str, dict[str, tuple[float, ...]]]:
    """Runs what is named, prints the table, returns its numbers."""
    results, reference = {}, folder / "0"
    launch(reference, steps, "1 process")
    print(f"{steps} steps a phase, torch {torch.__version__}; largest difference (mean difference)")
    print(f"| against 1 process | {' | '.join(f'{phase}: losses | weights' for phase in PHASES)} |")
    print("|---|" + "---|---|" * len(PHASES))
    for number, name in enumerate(names, start=1):
        launch(folder / str(number), steps, name)
        results[name] = compare(reference, folder / str(number))
        cells = (f"{a:.0e} ({b:.0e}) | {c:.0e} ({d:.0e})" for a, b, c, d in results[name].values())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.out, given.steps, *RUNS[given.worker][1:])
        leave()
    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder), given.steps, [name for name in RUNS if name != "1 process"])


if __name__ == "__main__":
    main()
