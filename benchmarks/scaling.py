"""What each size of model needs: the table of docs/scaling.md, from the plan's formulas.

    python benchmarks/scaling.py [--measure]

For GPUs, speed is peak x an assumed MFU: no GPU was at hand. `--measure` trains two small sizes here for a few steps
(one process, two threads, float32, packed rows) and prints tokens/s and MFU: the FLOPs that the formulas count against
a square matrix product of 1024 timed just before and after. Medians over the steps, with the smallest and largest.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

from galenic.build import read_recipe
from galenic.pretrain.config import ArchitectureConfig, PhaseConfig, PretrainConfig
from galenic.pretrain.planning import budget, estimate, memory, plan
from galenic.runtime import human

RECIPES = Path(__file__).parents[1] / "recipes"
GIGA = 1e9

MIDDLE = ArchitectureConfig(
    hidden_size=768,
    intermediate_size=2560,
    num_hidden_layers=12,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_swa_attention_heads=6,
    num_swa_key_value_heads=2,
    sliding_window=1024,
)
"""About 150M parameters with 32,768 entries: the 14B's proportions at 768."""

DEVICES = (8, 64, 1024)
PEAK, MFU = 989.0, 0.4
"""TFLOP/s of one H100 SXM in bfloat16, dense, by its data sheet; the share is assumed."""


def sizes():
    """Returns name -> (architecture, vocabulary, tokens, context)."""
    starter = _pretrain("starter")
    found = {
        "starter": (
            starter.architecture,
            6144,
            sum(phase.tokens for phase in starter.phases),
            starter.phases[-1].context,
        ),
        "150M": (MIDDLE, 32768, 3_000_000_000, 2048),
    }
    for name, recipe in (("1.5B", "m1-1.5b"), ("14B", "baichuan-m1-14b")):
        config = _pretrain(recipe)
        tokens = sum(phase.tokens for phase in config.phases)
        found[name] = (config.architecture, config.expected.vocab_size, tokens, config.phases[0].context)
    return found


def _pretrain(recipe):
    return next(s.config for s in read_recipe(RECIPES / recipe, Path("/run")) if s.verb == "pretrain")


def shape_of(architecture, vocabulary, context):
    """Makes the model's configuration."""
    phase = PhaseConfig(name="p", tokens=context, mixture={"x": 1}, context=context, rows=1)
    config = PretrainConfig(out="x", tokenizer="x", phases=[phase], architecture=architecture)
    return estimate.model_config(config, {"vocab_size": vocabulary})


def needs():
    """Prints parameters, FLOPs, state, checkpoint and days for each size."""
    columns = f"{'size':<9}{'parameters':>15}{'tokens':>8}{'GFLOP/token':>13}{'FLOPs':>10}"
    columns += f"{'state GB':>10}{'disk GB':>9}"
    print(columns + "".join(f"{f'{devices:,} x H100':>16}" for devices in DEVICES))
    for name, (architecture, vocabulary, tokens, context) in sizes().items():
        shape = shape_of(architecture, vocabulary, context)
        count, each = budget.parameters(shape).total, budget.flops(shape, context).trained
        state = memory.state(shape, memory.ALONE).total
        line = f"{name:<9}{count:>15,}{human(tokens):>8}{each / GIGA:>13.3g}{tokens * each:>10.2g}"
        line += f"{state / GIGA:>10.3g}{memory.checkpoint_bytes(shape) / GIGA:>9.3g}"
        for devices in DEVICES:
            took = budget.seconds(tokens * each, devices=devices, peak_tflops=PEAK, mfu=MFU)
            line += f"{plan.days(took) if took >= 60 else 'below 1 minute':>16}"
        print(line)


def fits():
    """Prints peak memory of one device for rows of 8k and 32k under each setting."""
    print("\npeak memory of one device in GB, bfloat16, one row at a time; recomputed:")
    print(
        f"{'size':<7}{'devices':>8}{'tokens':>8}{'context ranks':>15}{'none':>8}{'selective':>11}{'full':>7}"
    )
    for name, shards in (("1.5B", (1, 8)), ("14B", (8, 64, 512))):
        architecture, vocabulary, _, _ = sizes()[name]
        for context, ranks in ((8192, 1), (32768, 1), (32768, 4)):
            shape = shape_of(architecture, vocabulary, context)
            for shard in shards:
                if ranks > shard:
                    continue
                degrees = dataclasses.replace(memory.ALONE, shard=shard // ranks, context=ranks)
                rows = 8 * degrees.data
                peaks = [
                    memory.memory(shape, degrees, rows=rows, micro=1, context=context, recompute=how).peak
                    for how in ("none", "selective", "full")
                ]
                line = f"{name:<7}{shard:>8}{context:>8}{ranks:>15}"
                print(
                    line
                    + "".join(f"{peak / GIGA:>{w}.1f}" for peak, w in zip(peaks, (8, 11, 7), strict=True))
                )


def measure(name, architecture, vocabulary, rows, context, steps):
    """Trains a few steps here; prints speed and MFU."""
    import torch

    from galenic.model import BaichuanM1ForCausalLM
    from galenic.pretrain.watching.watch import matmul_peak
    from galenic.runtime import torch_setup

    torch_setup(0)
    torch.set_num_threads(2)
    shape = shape_of(architecture, vocabulary, context)
    shape._attn_implementation = "sdpa"
    model = BaichuanM1ForCausalLM(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(vocabulary, (rows, context))
    positions = (torch.arange(context) % 192)[None].expand(rows, -1).contiguous()
    before = matmul_peak("cpu", torch.float32)
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        model(input_ids=ids, position_ids=positions, labels=ids, skip_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    peak = statistics.mean([before, matmul_peak("cpu", torch.float32)])
    each = budget.flops(shape, context, 192).trained
    speeds = [rows * context / took for took in times[1:]]
    shares = [speed * each / peak for speed in speeds]
    count = budget.parameters(shape).total
    print(
        f"{name:<9}{count:>12,}  {rows} x {context}  {statistics.median(speeds):>8.0f} tokens/s "
        f"({min(speeds):.0f} to {max(speeds):.0f})  MFU {statistics.median(shares):.0%} "
        f"({min(shares):.0%} to {max(shares):.0%}) of {peak / 1e9:.0f} GFLOP/s",
        flush=True,
    )


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true", help="train the small sizes here, a few steps")
    if parser.parse_args().measure:
        starter = _pretrain("starter").architecture
        measure("starter", starter, 6144, 2, 768, 15)
        measure("13M", dataclasses.replace(starter, hidden_size=384, intermediate_size=1216), 6144, 2, 768, 8)
        return
    print(
        f"speed of a GPU: {PEAK:g} TFLOP/s x an assumed MFU of {MFU:.0%}; state and disk: of the whole model\n"
    )
    needs()
    fits()


if __name__ == "__main__":
    main()
