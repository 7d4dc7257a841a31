"""A process of a small sharded training, for the tests of checkpoints: one argument, JSON.

    {"out": folder, "last": step, "kind": "rows" or "plain", ...}

The model is a tiny network under FSDP2 (alone: plain), the batches follow from the step, and each rank takes its share
of their rows. At the end rank 0 writes the whole weights and moments to `out`/state-<ranks>.safetensors.
"""

import json
import os
import sys

import torch
import torch.distributed as distributed
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.checkpoints import Checkpoints
from galenic.pretrain.config import CheckpointConfig
from galenic.ranks import process_group, rank, ranks
from galenic.runtime import UserError

ROWS = 6


def make_model(seed=0):
    torch.manual_seed(seed)
    config = BaichuanM1Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=4,
        sliding_window_layers=[1],
        max_position_embeddings=8,
    )
    model = BaichuanM1ForCausalLM(config)
    if ranks() > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def take_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 37, (ROWS, 8), generator=generator)[rank() :: ranks()]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model, optimizer):
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = whole(parameter.detach()).clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}.{name}"] = whole(value).clone()
    return state


def states(step):
    return {"schedule": {"lr": 0.1 * step}, "reader": {"row": 6 * step}, "run": {"tokens": 48 * step}}


def train(out, last, *, checkpoints, every=1, phase_ends=(), finish=False, abandon=False):
    model = make_model()
    optimizer = make_optimizer(model)
    found = checkpoints.load(model, optimizer)
    step = found["step"] if found else 0
    if found:
        assert {name: found[name] for name in ("schedule", "reader", "run")} == states(step)
    while step < last:
        take_step(model, optimizer, step)
        step += 1
        if step % every == 0:
            end = f"phase-{step}" if step in phase_ends else None
            checkpoints.save(step, model=model, optimizer=optimizer, phase_end=end, **states(step))
    if finish:
        checkpoints.finish()
    return whole_state(model, optimizer)


def main(out, last, config=None, run=None, fault=None, **options):
    if fault:  # on one rank, at the moment when its part is on disk
        from galenic.pretrain import checkpoints as module

        flush = module.flush
        seen = []

        def failing(path):
            seen.append(path)
            if rank() == fault["rank"] and len(seen) == fault["call"]:
                os.kill(os.getpid(), 9)
            flush(path)

        module.flush = failing
    with process_group(), Checkpoints(out, CheckpointConfig(**(config or {})), run=run) as checkpoints:
        state = train(out, last, checkpoints=checkpoints, **options)
    if rank() == 0:
        save_file(state, os.path.join(out, f"state-{ranks()}.safetensors"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(**json.loads(sys.argv[1]))
    except UserError as error:
        print(f"galenic: error: {error}", file=sys.stderr)
        sys.exit(2)
