"""Memory of a training step: what the plan's formulas say against what a CPU process takes.

    python benchmarks/memory.py [--small]

Three sizes, with and without activation checkpointing, each in a process of its own, float32, two steps of one
micro-batch with AdamW (only the second has moments). Two measures: `live`, the largest sum of tensors alive at once, as
torch's memory profiler counts allocations; `RSS`, the growth of the process' peak resident memory, with glibc told to
give every freed block above 64 kB back at once. A GPU's allocator rounds and caches on top of `live`: how much is not
tried here.
"""

import argparse
import json
import os
import subprocess
import sys

SIZES = {
    "4M": {"hidden": 128, "inner": 384, "layers": 4, "vocab": 12000},
    "14M": {"hidden": 256, "inner": 832, "layers": 6, "vocab": 16000},
    "38M": {"hidden": 384, "inner": 1280, "layers": 8, "vocab": 32000},
}
ROWS, CONTEXT, DOCUMENT = 4, 512, 256


def network(size):
    """Makes a configuration in the 14B's proportions."""
    from galenic.model import BaichuanM1Config

    config = BaichuanM1Config(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=2,
        num_key_value_heads=1,
        num_swa_attention_heads=4,
        num_swa_key_value_heads=2,
        sliding_window=128,
        max_position_embeddings=CONTEXT,
    )
    config._attn_implementation = "sdpa"
    return config


def prepare(size, recompute):
    """Makes model, optimizer and batch."""
    import torch

    from galenic.model import BaichuanM1ForCausalLM
    from galenic.pretrain.parallelism.recompute import recompute as forget

    model = BaichuanM1ForCausalLM(network(size)).train()
    for layer in model.model.layers:
        forget(layer, recompute)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(size["vocab"], (ROWS, CONTEXT))
    positions = (torch.arange(CONTEXT) % DOCUMENT)[None].expand(ROWS, -1).contiguous()
    return model, optimizer, {"input_ids": ids, "position_ids": positions, "labels": ids}


def step(model, optimizer, batch):
    """Takes one."""
    model(**batch, skip_logits=True).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def most_alive(run):
    """Returns the largest growth of live tensor bytes while `run` runs, by torch's memory profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def predicted(size, recompute):
    """Returns the peak that the plan's formulas give."""
    from galenic.pretrain.planning import memory

    return memory.memory(
        network(size),
        memory.ALONE,
        rows=ROWS,
        micro=ROWS,
        context=CONTEXT,
        recompute=recompute,
        bfloat16=False,
        kernel="documents",
        document=DOCUMENT,
    ).peak


def worker(name, recompute, measure):
    """Prints predicted and measured bytes of one case."""
    import resource
    from pathlib import Path

    import torch

    from galenic.runtime import peak_memory_bytes

    torch.set_num_threads(1)
    tiny = {"hidden": 64, "inner": 64, "layers": 2, "vocab": 600}
    step(*prepare(tiny, recompute))  # what kernels set up once is not the model's
    size = SIZES[name]
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model, optimizer, batch = prepare(size, recompute)
    step(model, optimizer, batch)
    if measure == "live":
        found = most_alive(lambda: step(model, optimizer, batch))
        found += sum(p.nbytes for p in model.parameters())
        found += sum(m.nbytes for one in optimizer.state.values() for m in one.values())
    else:
        step(model, optimizer, batch)
        found = peak_memory_bytes() - before
    print(json.dumps({"predicted": predicted(size, recompute), "measured": found}))


def measure(name, recompute, how):
    """Runs `worker` in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [sys.executable, __file__, "--worker", name, recompute, how]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="the smallest size only")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    print(f"{ROWS} rows of {CONTEXT} tokens, float32, one thread, AdamW; megabytes")
    print(f"{'size':<6}{'recompute':<12}{'predicted':>10}{'live':>10}{'error':>8}{'RSS':>10}{'error':>8}")
    for name in list(SIZES)[: 1 if arguments.small else None]:
        for recompute in ("none", "selective", "full"):
            live, rss = (measure(name, recompute, how) for how in ("live", "rss"))
            said = live["predicted"]
            line = f"{name:<6}{recompute:<12}{said / 1e6:>10.1f}"
            for one in (live, rss):
                line += f"{one['measured'] / 1e6:>10.1f}{said / one['measured'] - 1:>8.1%}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
