"""Whole merges of three 1.1B-parameter bfloat16 experts: ours, mergekit's and sd-mecha's, interleaved in one run.

    make peers
    python benchmarks/merging_speed.py [--repeats 3] [--folder DIR] [--slow-repeats 1]

Prints a table of wall time, processor time and peak memory of whole processes (start-up included), their ratios, the
time it takes only to read and write the same bytes (`cat`, then `sync`), the share of output elements that are not the
nearest to the exact result, start-up alone, and the plan of a 14B merge.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from timing import conditions, ratios, take_turns
from tqdm import tqdm

from galenic.merge.io import Checkpoint, TensorInfo
from galenic.merge.writer import safetensors_writer

ROOT = Path(__file__).parents[1]
HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS, KEYS = 2048, 5632, 32_000, 22, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
"""TinyLlama's shape, 1.1B parameters: an architecture that mergekit knows."""
MODELS = {"base": 0.0, "a": 4e-4, "b": 2e-4, "c": 8e-4}
"""Model -> standard deviation of its task vector; the base's weights have 0.02."""
RECIPES = {
    "metagpt": ({}, {}),
    "task_arithmetic": ({"weight": 0.3}, {}),
    "ties": ({"weight": 1.0, "density": 0.55}, {}),
    "dare_ties": ({"weight": 1.0, "density": 0.55}, {}),
}


class Cost(NamedTuple):
    """What a process took."""

    wall: float
    processor: float
    memory: float  # GB


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the tensors of the benchmark's model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {
            f"{layer}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}self_attn.k_proj.weight": (KEYS, HIDDEN),
            f"{layer}self_attn.v_proj.weight": (KEYS, HIDDEN),
            f"{layer}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{layer}input_layernorm.weight": (HIDDEN,),
            f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_models(folder: Path) -> None:
    """Writes the base and the experts, one file each, unless they are there."""
    if all((folder / name / "done").exists() for name in MODELS):
        return
    layout = {name: TensorInfo(dtype=torch.bfloat16, shape=shape) for name, shape in shapes().items()}
    with contextlib.ExitStack() as stack:
        writers = {}
        for name in MODELS:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(CONFIG))
            writers[name] = stack.enter_context(safetensors_writer(folder / name, layout))
        generator = torch.Generator().manual_seed(0)
        for tensor, info in tqdm(layout.items(), desc="making models", leave=False):
            base = torch.randn(info.numel, generator=generator).mul_(0.02)
            for name, size in MODELS.items():
                values = base + size * torch.randn(info.numel, generator=generator) if size else base
                writers[name].write(tensor, 0, values.bfloat16())
    for name in MODELS:
        (folder / name / "done").touch()


LAUNCHER = """
import json, os, sys, time
begin = time.perf_counter()
_, status, usage = os.wait4(os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - begin, usage.ru_utime + usage.ru_stime,
                  usage.ru_maxrss / 1e6]), file=os.fdopen(3, "w"))
"""
"""A process's peak memory begins with that of the one it was forked from, so a small one starts it."""


def measure(command: list[str], log: Path) -> Cost:
    """Runs a process to its end.

    Raises:
        SystemExit: it failed; the log says why.
    """
    told = log.with_suffix(".json")
    script = f'exec "$@" > {shlex.quote(str(log))} 2>&1 < /dev/null 3> {shlex.quote(str(told))}'
    subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-I", "-S", "-c", LAUNCHER, *command], check=True
    )
    code, *cost = json.loads(told.read_text())
    if code:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return Cost(*cost)


def recipe(folder: Path, method: str) -> Path:
    """Writes the recipe, the same for mergekit and for us."""
    own, common = RECIPES[method]
    values = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name)} | ({"parameters": own} if own else {}) for name in ("a", "b", "c")
        ],
        "dtype": "bfloat16",
    }
    if common:
        values["parameters"] = common
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def not_nearest(folder: Path, merged: Path, method: str) -> float:
    """Returns the share of elements that are not the nearest bfloat16 to the exact result, in a few tensors."""
    weights = [0.3] * 3
    if method == "metagpt":
        found = json.loads((merged / "merge.json").read_text())["coefficients"]
        weights, merged = [found[name] for name in ("a", "b", "c")], merged / "model"
    wrong = total = 0
    with contextlib.ExitStack() as stack:
        base, *experts, result = (
            stack.enter_context(Checkpoint(path, path.name))
            for path in (*(folder / name for name in MODELS), merged)
        )
        for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.20.mlp.up_proj.weight"):
            numel = base.tensors[name].numel
            origin, *parts, got = (model.read(name, 0, numel).double() for model in (base, *experts, result))
            exact = sum((w * part for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
            if method != "metagpt":
                exact = origin + sum(w * (part - origin) for w, part in zip(weights, parts, strict=True))
            nearest = (exact - exact.bfloat16().double()).abs()
            # The two-step rounding of the reference itself errs now and then, but never to be nearer.
            wrong += int(((exact - got).abs() > nearest).sum())
            total += numel
    return wrong / total


def contenders(folder: Path, costs: dict[str, list[Cost]]) -> dict[str, Callable[[], float]]:
    """Returns name -> function that runs one whole merge, notes what it took, and returns its wall time."""
    ours, peer = str(Path(sys.executable).parent / "galenic"), ROOT / ".venvs"
    files = [str(folder / name / "model.safetensors") for name in MODELS]
    out, log = folder / "out", folder / "log.txt"

    def contender(name: str, command: list[str]) -> Callable[[], float]:
        def run() -> float:
            shutil.rmtree(out, ignore_errors=True)
            for file in folder.glob("cache/statistics-*"):
                file.unlink()
            os.sync()
            cost = measure(command, log)
            costs.setdefault(name, []).append(cost)
            print(f"{name}: {cost.wall:.1f} s, {cost.memory:.2f} GB", file=sys.stderr, flush=True)
            return cost.wall

        return run

    found = {"cat of the bytes metagpt moves": contender("cat of the bytes metagpt moves", _cat(files, out))}
    for method in RECIPES:
        words = [ours, "merge", "--config", str(recipe(folder, method)), "--out", str(out)]
        found[f"galenic {method}"] = contender(f"galenic {method}", words)
        if method != "metagpt":
            words = [str(peer / "mergekit/bin/mergekit-yaml"), str(recipe(folder, method)), str(out)]
            found[f"mergekit {method}"] = contender(f"mergekit {method}", [*words, "--lazy-unpickle"])
    worker = [str(peer / "sd-mecha/bin/python"), str(Path(__file__).with_name("sd_mecha_worker.py"))]
    words = [*worker, str(out / "model.safetensors"), *files]
    found["sd-mecha task_arithmetic"] = contender(
        "sd-mecha task_arithmetic", ["sh", "-c", 'mkdir -p "$0"; exec "$@"', str(out), *words]
    )
    return found


def _cat(files: list[str], out: Path) -> list[str]:
    """Reads what both passes of MetaGPT read and writes what it writes, and sees it on the disk."""
    script = 'mkdir -p "$0"; cat "$@" > /dev/null; shift; cat "$@" > /dev/null; cat "$1" > "$0/copy"; sync "$0/copy"'
    return ["sh", "-c", script, str(out), *files]


def plan_of_14b(folder: Path) -> tuple[float, list[str]]:
    """Plans a merge of three models of the published 14B shape, from headers of files that hold nothing else."""
    from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM

    with torch.device("meta"):
        state = BaichuanM1ForCausalLM(BaichuanM1Config()).state_dict()
    header, begin = {}, 0
    for name, tensor in state.items():
        end = begin + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    for name in MODELS:
        place = folder / "14b" / name
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + begin)  # a hole: no disk is used
    file = recipe(folder / "14b", "metagpt")
    words = [
        str(Path(sys.executable).parent / "galenic"),
        "merge",
        "--config",
        str(file),
        "--out",
        "unused",
        "--plan",
    ]
    cost = measure(words, folder / "log.txt")
    return cost.wall, [line for line in (folder / "log.txt").read_text().splitlines() if "memory" in line]


def main() -> None:
    """Makes the models, takes turns, prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-repeats", type=int, default=1, help="turns of mergekit's ties and dare_ties")
    parser.add_argument(
        "--folder", type=Path, help="where models are made and kept; default: a temporary folder"
    )
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["GALENIC_CACHE"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        make_models(folder)
        print(conditions(torch.get_num_threads(), "mergekit 0.1.5", "sd-mecha 1.1.8"), flush=True)
        start = [
            measure(
                [
                    str(Path(sys.executable).parent / "galenic"),
                    "merge",
                    "--config",
                    str(recipe(folder, "metagpt")),
                    "--out",
                    str(folder / "out"),
                    "--plan",
                ],
                folder / "log.txt",
            ).wall
            for _ in range(5)
        ]
        memory = [line for line in (folder / "log.txt").read_text().splitlines() if "memory" in line]
        print(f"start-up and plan of the 1.1B merge: {sorted(start)[2]:.2f} s;{memory}")
        wall, planned = plan_of_14b(folder)
        print(f"plan of a 14B merge: {wall:.2f} s;{planned}", flush=True)

        costs: dict[str, list[Cost]] = {}
        every = contenders(folder, costs)
        for name in ("galenic metagpt", "galenic task_arithmetic", "mergekit task_arithmetic"):
            every[name]()
            method = name.split()[1]
            merged = folder / "out" / ("" if method == "metagpt" or "mergekit" in name else "model")
            print(f"not correctly rounded, {name}: {not_nearest(folder, merged, method):.2%}", flush=True)
        costs.clear()
        slow = {"mergekit ties", "mergekit dare_ties"}
        quick = {name: run for name, run in every.items() if name not in slow}
        times = take_turns(quick, arguments.repeats)
        for name in sorted(slow) if arguments.slow_repeats else []:
            pair = {
                name: every[name],
                name.replace("mergekit", "galenic"): every[name.replace("mergekit", "galenic")],
            }
            times |= {
                key: values for key, values in take_turns(pair, arguments.slow_repeats).items() if key in slow
            }
        shutil.rmtree(folder / "out", ignore_errors=True)

        print("\n| merge | wall, s | processor, s | peak memory, GB | turns |\n|---|--:|--:|--:|--:|")
        for name, taken in costs.items():
            walls = sorted(cost.wall for cost in taken)
            middle = taken[[cost.wall for cost in taken].index(walls[len(walls) // 2])]
            print(
                f"| {name} | {middle.wall:.1f} ({walls[0]:.1f} to {walls[-1]:.1f}) | {middle.processor:.1f} | "
                f"{max(cost.memory for cost in taken):.2f} | {len(taken)} |"
            )
        print("\n| ratio | times | target |\n|---|--:|--:|")
        for above, below, target in (
            ("mergekit task_arithmetic", "galenic metagpt", ">= 5"),
            ("mergekit ties", "galenic ties", ">= 10"),
            ("mergekit dare_ties", "galenic dare_ties", ">= 8"),
            ("sd-mecha task_arithmetic", "galenic task_arithmetic", ""),
            ("mergekit task_arithmetic", "galenic task_arithmetic", ""),
            ("galenic metagpt", "cat of the bytes metagpt moves", "<= 1.5"),
        ):
            if above in times and below in times:
                found = ratios(times[above], times[below])
                print(
                    f"| {above} / {below} | {found.median:.2f} ({found.low:.2f} to {found.high:.2f}) | {target} |"
                )


if __name__ == "__main__":
    main()
