"""What a rank does in the test of sampling from a model whose weights are shared."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from test_rollouts import END, KEYS, PROMPTS, ours

from galenic.align.rollouts import sample
from galenic.pretrain.config import ParallelConfig
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.ranks import gathered, process_group, rank, ranks


def mixed(out: str) -> None:
    """Samples in bfloat16, trains a step and samples again; tells how often weights were cast."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    torch.set_num_threads(1)
    model, casts, told = ours().float(), [], []
    parallel = Parallel(ParallelConfig(), precision="bfloat16", device="cpu")
    parallel.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    cast = FSDPParamGroup.wait_for_unshard

    def counted(group):
        casts.append(group._sharded_state.name)
        cast(group)

    FSDPParamGroup.wait_for_unshard = counted
    ids = torch.tensor(PROMPTS[3])[None]
    for _ in range(2):
        casts.clear()
        found = sample(model, PROMPTS, keys=KEYS, max_new_tokens=8, end=END)
        told.append({"rollouts": [asdict(rollout) for rollout in found], "casts": casts.count("SHARDED")})
        plain = ours().float()
        plain.load_state_dict({name: tensor.full_tensor() for name, tensor in model.state_dict().items()})
        plain = plain.bfloat16()
        plain.config._attn_implementation = model.config._attn_implementation
        expected = sample(plain, PROMPTS, keys=KEYS, max_new_tokens=8, end=END)
        told[-1]["expected"] = [asdict(rollout) for rollout in expected]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    Path(out, "mixed.json").write_text(json.dumps(told))


def sampled(out: str) -> None:
    """Samples four prompts on the first process, two on the second; one after the other, so in six passes or more."""
    torch.set_num_threads(1)
    with process_group(60):
        model = ours().float()
        Parallel(ParallelConfig(), device="cpu").apply(model)
        own = range(len(PROMPTS)) if ranks() == 1 else [(0, 1, 2, 3), (4, 5)][rank()]
        found = sample(
            model,
            [PROMPTS[i] for i in own],
            keys=[KEYS[i] for i in own],
            max_new_tokens=6,
            end=END,
            batch=1,
            together=lambda done: all(gathered(done)),
        )
        Path(out, f"{ranks()}-{rank()}.json").write_text(json.dumps([asdict(rollout) for rollout in found]))
