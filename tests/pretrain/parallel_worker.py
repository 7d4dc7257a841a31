"""One process of small training runs, for the tests of parallelism: `parallel_worker.py FOLDER`.

`FOLDER/jobs.json` holds {name: {"parallel", "architecture", "steps", "rows", "context", "precision", "dtype",
"micro_rows", "lr"}}. For each, process 0 writes into `FOLDER/name` `losses.json`, loss and gradient norm of every step,
and `weights.safetensors`: the whole weights in the official order. The last of the losses is the sum over a batch
not trained on, in evaluation.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.config import ArchitectureConfig, ParallelConfig
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.ranks import leave

VOCABULARY = 96
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 6,
    "num_swa_key_value_heads": 2,
    "sliding_window": 7,
    "initializer_range": 0.1,
}


def network(shape, context, seed=0):
    torch.manual_seed(seed)
    config = BaichuanM1Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=context,
        sliding_window_layers=list(range(1, shape["num_hidden_layers"], 2)),
        rope_theta=1e4,
        **shape,
    )
    return BaichuanM1ForCausalLM(config)


def packed(rows, context, step):
    """A batch of documents of uneven lengths; a third of the labels is ignored, and one row holds no label at all."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCABULARY, (rows, context), generator=generator)
    starts = torch.rand(rows, context, generator=generator) < 0.08
    starts[:, 0] = True
    index = torch.arange(context)
    positions = index - torch.cummax(index * starts, dim=1).values
    ignored = (torch.rand(rows, context, generator=generator) < 0.3) | starts
    ignored[-1] |= rows > 1
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(ignored, -100)}


def train(job, model, parallel):
    """Plain AdamW over the job's steps; returns [loss, norm] of each."""
    groups = {}  # fused AdamW takes DTensors of one mesh at a time
    for parameter in model.parameters():
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups.values()], lr=job.get("lr", 3e-3), fused=True
    )
    trace, size = [], job.get("micro_rows", 0)
    model.train()
    for step in range(job["steps"]):
        batch = packed(job["rows"], job["context"], step)
        targets = int((batch["labels"][:, 1:] != -100).sum())
        own, total = parallel.rows(job["rows"]), torch.zeros((), dtype=torch.float64)
        for first in range(0, len(own), size or len(own)):
            chosen = own[first : first + (size or len(own))]
            part = parallel.local({name: tensor[chosen] for name, tensor in batch.items()})
            loss = model(
                **part, skip_logits=True, use_cache=False, num_items_in_batch=targets / parallel.loss_scale
            ).loss
            loss.backward()
            total += loss.detach().double() / parallel.loss_scale
        norm = parallel.norm(model.parameters())
        scale = min(1.0, 1.0 / norm)
        for parameter in model.parameters():
            getattr(parameter.grad, "_local_tensor", parameter.grad).mul_(scale)
        optimizer.step()
        optimizer.zero_grad()
        trace.append([float(parallel.added(total)), norm])
    return trace


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def work(job, out):
    """Trains one job and lets process 0 write what came of it into a new folder."""
    shape = SHAPE | job.get("architecture", {})
    model = network(shape, job["context"]).to(getattr(torch, job.get("dtype", "float32")))
    parallel = Parallel(ParallelConfig(**job.get("parallel", {})), precision=job.get("precision", "float32"))
    parallel.check(ArchitectureConfig(**shape), job["rows"], job["context"])
    parallel.apply(model)
    trace = train(job, model, parallel)
    model.eval()
    with torch.no_grad():
        batch, own = packed(job["rows"], job["context"], 999), parallel.rows(job["rows"])
        part = parallel.local({name: tensor[own] for name, tensor in batch.items()})
        losses = model(**part, skip_logits=True, num_items_in_batch=1).token_losses
        trace.append([float(parallel.added(losses.double().sum())), 0.0])
    weights = {
        name: parallel.official_rows(name, whole(tensor)).contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    if int(os.environ.get("RANK", "0")) == 0:
        out.mkdir()
        save_file(weights, out / "weights.safetensors")
        (out / "losses.json").write_text(json.dumps(trace))


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    numbers = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", **numbers)
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        work(job, folder / name)
    distributed.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
