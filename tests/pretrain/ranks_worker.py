"""A small training under `Parallel`, for the tests of checkpoints; `main` is what each rank runs.

A batch follows from its step, and each rank takes its share of the rows. At the end rank 0 writes the whole weights
and moments, rows in the official order, to `out`/state.safetensors.
"""

import errno
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.checkpoints.checkpoints import Checkpoints
from galenic.pretrain.checkpoints.export import export_model
from galenic.pretrain.config import CheckpointConfig, ParallelConfig
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.ranks import gathered, process_group, rank
from galenic.runtime import UserError

ROWS, CONTEXT = 6, 8


def make(parallel, seed=0):
    torch.manual_seed(seed)
    config = BaichuanM1Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_swa_attention_heads=4,
        num_swa_key_value_heads=2,
        sliding_window=4,
        sliding_window_layers=[1],
        max_position_embeddings=CONTEXT,
    )
    model = BaichuanM1ForCausalLM(config)
    parallel.apply(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)


def take_step(parallel, model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 37, (ROWS, CONTEXT), generator=generator)[parallel.rows(ROWS)]
    targets = ROWS * (CONTEXT - 1) / parallel.loss_scale
    model(input_ids=ids, labels=ids, num_items_in_batch=targets, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_state(parallel, model, optimizer):
    """Whole weights and moments in the official order; called by all ranks."""
    state = {}
    for name, parameter in model.named_parameters():
        for key, value in {"": parameter.detach(), **optimizer.state.get(parameter, {})}.items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            state[f"{key}.{name}"] = parallel.official_rows(name, value).clone()
    return state


def states(step):
    return {"schedule": {"lr": 0.1 * step}, "reader": {"row": 6 * step}, "run": {"tokens": 48 * step}}


def train(checkpoints, parallel, last, *, every=1, phase_ends=(), finish=False):
    """Trains up to a step, from the newest checkpoint; saves every so many steps, or with 0 when it is due."""
    model, optimizer = make(parallel)
    found = checkpoints.load(model, optimizer)
    step = found["step"] if found else 0
    if found:
        assert {name: found[name] for name in ("schedule", "reader", "run")} == states(step)
    while step < last:
        take_step(parallel, model, optimizer, step)
        step += 1
        due = step % every == 0 if every else checkpoints.due()
        assert len(set(gathered(due))) == 1
        if due:
            with torch.no_grad():  # as held-out scores do: FSDP2 then leaves weights whole
                model(input_ids=torch.zeros(1, CONTEXT, dtype=torch.int64), use_cache=False)
            end = f"phase-{step}" if step in phase_ends else None
            checkpoints.save(step, model=model, optimizer=optimizer, phase_end=end, **states(step))
    if finish:
        checkpoints.finish()
    return model, whole_state(parallel, model, optimizer)


def work(out, last, config=None, run=None, parallel=None, full=None, export=None, **options):
    if full:
        import torch.distributed.checkpoint.filesystem as filesystem

        def create(self, path, mode):
            step = int(Path(path).parent.parent.name.split("-")[1].split(".")[0])
            if rank() == full["rank"] and step >= full["step"]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return real(self, path, mode)

        real, filesystem.FileSystem.create_stream = filesystem.FileSystem.create_stream, create
    with process_group(60), Checkpoints(out, CheckpointConfig(**(config or {})), run=run) as checkpoints:
        spread = Parallel(ParallelConfig(**(parallel or {})))
        model, state = train(checkpoints, spread, last, **options)
        if export:
            export_model(model, spread, Path(export), None, {"verb": "test"})
    if rank() == 0:
        save_file(state, os.path.join(out, "state.safetensors"))


def main(options):
    """Trains; mistakes of the user end it as they end the command line."""
    try:
        work(**options)
    except UserError as error:
        print(f"galenic: error: {error}", file=sys.stderr)
        return 2
    return 0
