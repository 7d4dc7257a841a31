"""Two processes shift as one does, replicated (DDP) and sharded (fully_shard); what one finds wrong both refuse."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from galenic.flatten import TrainingShift

PROGRAM = """
import sys, torch
import torch.distributed as distributed
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from test_flatten_training_ranks import OPTIMIZERS, data, network, train_and_shift
from galenic.flatten import TrainingShift
from galenic.flatten.apply import whole
from galenic.ranks import leave, rank
from galenic.runtime import UserError

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
batches = data()[rank()::2]

def ddp():
    return DistributedDataParallel(network())

def fsdp(layers=("body", "middle")):
    model = network()
    for name in layers:
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)  # the head is the outermost's own

found = {}
for kind, make in (("ddp", ddp), ("fsdp", fsdp)):
    for label, (optimizer, options) in OPTIMIZERS.items():
        model = make()
        optimizer = train_and_shift(model, optimizer, options, batches)
        inner = getattr(model, "module", model)
        if kind == "fsdp":
            for module in (inner.body, inner.middle, inner):
                module.reshard()
        for name, parameter in inner.named_parameters():
            found[f"{kind}.{label}.{name}"] = whole(parameter.detach()).clone()
            for key, value in optimizer.state[parameter].items():
                if value.numel() > 1:
                    found[f"{kind}.{label}.{name}.{key}"] = whole(value).clone()
save_file({k: v.contiguous() for k, v in found.items()}, f"{sys.argv[2]}/{rank()}.safetensors")

def refused(label, model, batches):
    try:
        TrainingShift(model, accuracy=None).shift(batches)
    except UserError as error:
        print(f"<{label}: {error}>", flush=True)

refused("unequal", fsdp(), batches if rank() else batches[:1])
broken = [batch.clone() for batch in batches]
if rank():
    broken[0][0, 0] = torch.nan
refused("nan", fsdp(), broken)
refused("nan", ddp(), broken)
refused("empty", fsdp(), [])
torch.manual_seed(0)
parallel = network()
parallelize_module(parallel, mesh, {"body": ColwiseParallel()})
refused("tensor parallel", parallel, batches)
import os
os.environ["WORLD_SIZE"] = "1"  # as under another launcher, which says nothing
refused("unsaid", ddp(), batches)
distributed.destroy_process_group()
leave()
"""

OPTIMIZERS = {
    "sgd": (
        lambda p: torch.optim.SGD(p, 0.2, momentum=0.9),
        {"output_budget": 0.0, "method": "qr", "free_bias": True},
    ),
    "adam": (lambda p: torch.optim.AdamW(p, 0.01), {"rank": 5}),
}


def network():
    """Widths that two processes cannot halve."""
    torch.manual_seed(0)
    return Network().double()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(5, 13), nn.Linear(13, 11), nn.Linear(11, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.middle(torch.tanh(self.body(x)))))


def data():
    """Four batches of two rows, an even number for each of two processes; fewer rows than inputs of a layer."""
    return list(torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def train_and_shift(model, make, options, batches):
    """Trains, shifts, trains on; one step takes all batches."""
    optimizer = make(model.parameters())
    shift = TrainingShift(model, accuracy=None, **options)
    x = torch.cat(batches)
    for step in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :3].sin()).backward()
        optimizer.step()
        if step % 2:
            done = shift.shift(batches, optimizer)
            assert done["head"].norm_after < 0.999 * done["head"].norm_before
    return optimizer


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*launcher, str(program), os.path.dirname(__file__), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=250,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process.stdout


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("label", OPTIMIZERS)
def test_two_processes_shift_as_one(done, kind, label):
    parts = [load_file(done[0] / f"{rank}.safetensors") for rank in range(2)]
    model = network()
    optimizer = train_and_shift(model, *OPTIMIZERS[label], data())
    moments = 0
    for name, parameter in model.named_parameters():
        expected = {name: parameter.detach()}
        expected |= {f"{name}.{k}": v for k, v in optimizer.state[parameter].items() if v.numel() > 1}
        moments += len(expected) - 1
        for key, value in expected.items():
            ours, theirs = (part[f"{kind}.{label}.{key}"] for part in parts)
            assert torch.equal(ours, theirs), key
            torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12)
    assert moments == (6 if label == "sgd" else 12)


@pytest.mark.parametrize(
    ("label", "says", "times"),
    [
        ("unequal", "batches: of a sharded model every process needs equally many", 2),
        ("nan", "the inputs of layer 'body' hold NaN", 4),
        ("empty", "the loader is empty", 2),
        ("tensor parallel", "layer 'body' is split by tensor parallelism", 2),
        ("unsaid", "there are 2 processes, but WORLD_SIZE says 1", 2),
    ],
)
def test_what_one_process_finds_wrong_both_refuse(done, label, says, times):
    assert done[1].count(f"<{label}: {says}") == times
