"""What a rank does in the test of sampling from a model whose weights are shared."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from test_rollouts import END, KEYS, PROMPTS, ours

from galenic.pretrain.config import ParallelConfig
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.ranks import gathered, process_group, rank, ranks

from galenic.align.rollouts import sample


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
            end={END},
            batch=1,
            together=lambda done: all(gathered(done)),
        )
        Path(out, f"{ranks()}-{rank()}.json").write_text(json.dumps([asdict(rollout) for rollout in found]))
