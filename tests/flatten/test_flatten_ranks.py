"""Statistics of several processes are those of one, and a failure of one is the failure of all."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from galenic.flatten import collect

PROGRAM = """
import sys, torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from test_flatten_ranks import data, network
from galenic.flatten import collect
from galenic.ranks import leave, process_group, rank
from galenic.runtime import UserError

mode = sys.argv[3]
with process_group():
    batches = data()[rank() :: 3] if mode != "few" else data()[:2][rank() : rank() + 1]
    if mode == "nan" and rank() == 1:
        batches[0][:] = torch.nan
    found = {}
    for method in ("gram", "qr"):
        try:
            statistics = collect(network(), batches, method=method, min_rows=2, across_ranks=True)
        except UserError as error:
            print(f"refused {error}")
            continue
        for layer in statistics.owner:
            for group in range(len(statistics.sums[statistics.owner[layer]])):
                found[f"{method}.{layer}.{group}"] = statistics.gram(layer, group).clone()
            found[f"{method}.{layer}.rank"] = torch.tensor(statistics.spectrum(layer).rank)
            found[f"{method}.{layer}.sums"] = statistics.sums[statistics.owner[layer]].clone()
            found[f"{method}.{layer}.rows"] = torch.tensor(statistics.count(layer))
    save_file(found, f"{sys.argv[2]}/{rank()}.safetensors")
leave()
"""


class Network(nn.Module):
    """A grouped convolution, two layers of one input, and an expert that only some batches reach."""

    def __init__(self):
        super().__init__()
        self.taps = nn.Conv1d(4, 6, 2, groups=2)
        self.gate, self.up = nn.Linear(12, 20), nn.Linear(12, 20)
        self.expert = nn.Linear(20, 3)

    def forward(self, x):
        hidden = self.taps(x).flatten(1)
        hidden = self.gate(hidden) * self.up(hidden)
        chosen = hidden[x[:, 0, 0] > 1]
        return self.expert(chosen) if len(chosen) else None


def network():
    torch.manual_seed(0)
    return Network().double()


def data():
    """Seven batches of unequal sizes; only the first sends rows to the expert."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2 + i % 3, 4, 3, generator=generator, dtype=torch.float64) for i in range(7)]
    for batch in batches:
        batch[:, 0, 0] = 0
    batches[0][:, 0, 0] = 2
    return batches


def launch(tmp_path, mode):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    return subprocess.run(
        [*launcher, str(program), os.path.dirname(__file__), str(tmp_path), mode],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )


@pytest.mark.parametrize("mode", ["all", "few"])
def test_three_processes_have_the_statistics_of_one(tmp_path, mode):
    done = launch(tmp_path, mode)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(3)]
    for method in ("gram", "qr"):
        one = collect(network(), data() if mode == "all" else data()[:2], method=method, min_rows=2)
        assert set(one.owner) == {"taps", "gate", "up", "expert"}
        for part in parts:
            for layer, owner in one.owner.items():
                for group in range(len(one.sums[owner])):
                    gram, found = one.gram(layer, group), part[f"{method}.{layer}.{group}"]
                    assert float((found - gram).norm()) <= 1e-12 * float(gram.norm())
                torch.testing.assert_close(
                    part[f"{method}.{layer}.sums"], one.sums[owner], rtol=1e-12, atol=1e-12
                )
                assert int(part[f"{method}.{layer}.rows"]) == one.count(layer)
                assert int(part[f"{method}.{layer}.rank"]) == one.spectrum(layer).rank
    assert all(set(part) == set(parts[0]) for part in parts)
    assert all(torch.equal(part[key], parts[0][key]) for part in parts for key in part)  # to the last bit


def test_what_one_process_finds_wrong_all_refuse(tmp_path):
    done = launch(tmp_path, "nan")
    assert done.returncode == 0, done.stderr[-2000:]
    # Lines of processes may run into each other.
    assert done.stdout.count("inputs of layer 'taps' hold NaN") == 6
