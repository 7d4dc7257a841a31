"""One process that scores held-out documents: `heldout_worker.py TOKENIZER CONTEXT JOBS OUT`.

JOBS is a list of `parallel` settings in JSON; each process writes a list of scores to OUT.<rank>.
"""

import json
import os
import sys

import torch

from galenic.corpus.tokens.shards import read_meta
from galenic.pretrain.config import ArchitectureConfig, ParallelConfig, PhaseConfig, PretrainConfig
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.pretrain.pretrain import build_model
from galenic.pretrain.watching.heldout import heldout_bits
from galenic.ranks import leave, process_group

SHAPE = ArchitectureConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_swa_attention_heads=2,
    num_swa_key_value_heads=2,
    sliding_window=8,
    initializer_range=0.3,
)


def configured(tokenizer, context, /, **parallel):
    phase = PhaseConfig(name="p", tokens=1024, mixture={"general": 1.0}, context=context, rows=4)
    return PretrainConfig(
        out="nowhere",
        tokenizer=str(tokenizer),
        phases=[phase],
        architecture=SHAPE,
        heldout_tokens=150,
        parallel=ParallelConfig(**parallel),
    )


def network(config):
    torch.manual_seed(0)
    return build_model(config.architecture, read_meta(config.tokenizer), config.phases[0])


def main(tokenizer, context, jobs, out):
    torch.set_num_threads(1)
    found = []
    with process_group():
        for job in jobs:
            config = configured(tokenizer, context, **job)
            parallel = Parallel(config.parallel, device="cpu")
            model = network(config)
            parallel.apply(model)
            found.append(heldout_bits(model, config, context, parallel))
    with open(f"{out}.{os.environ['RANK']}", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
    leave()
