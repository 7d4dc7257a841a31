"""Steps of an optimizer on sharded parameters beside the same on whole ones; run by `test_optimizers.py`.

Prints for each case (optimizer:tensor degree) the largest differences after three steps.
"""

import sys

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from galenic.pretrain.config import OptimConfig
from galenic.pretrain.optimizers import make_optimizer
from galenic.ranks import leave


class Net(torch.nn.Module):
    """Matrices of odd sizes, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(7, 12, bias=False)
        self.down = torch.nn.Linear(12, 7, bias=False)
        self.norm = torch.nn.RMSNorm(7)
        self.last = torch.nn.Linear(7, 5, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.down(torch.tanh(self.up(x)))))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(name, tensor):
    """Returns the largest difference of a weight, and of an entry of the state."""
    plain, spread = Net(), Net()
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size // tensor, tensor), mesh_dim_names=("shard", "tensor"))
    if tensor > 1:
        parallelize_module(spread, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in (spread.up, spread.down):
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(spread, mesh=mesh["shard"])
    nets = plain, spread
    optimizers = [make_optimizer(net, OptimConfig(name=name, lr=0.02)) for net in nets]
    for step in range(3):
        x = torch.randn(9, 7, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip(nets, optimizers, strict=True):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    weights = state = 0.0
    with torch.no_grad():
        for one, other in zip(plain.parameters(), spread.parameters(), strict=True):
            weights = max(weights, float((one - whole(other)).abs().max()))
            mine, theirs = (o.state[p] for o, p in zip(optimizers, (one, other), strict=True))
            assert mine.keys() == theirs.keys()
            state = max(state, *(float((mine[k] - whole(theirs[k])).abs().max()) for k in mine))
    return weights, state


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for case in sys.argv[1:]:
        optimizer, degree = case.split(":")
        differences = compare(optimizer, int(degree))
        if distributed.get_rank() == 0:
            print(case, *differences, flush=True)
    distributed.barrier()
    distributed.destroy_process_group()
    leave()
