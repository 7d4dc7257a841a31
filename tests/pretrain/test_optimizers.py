import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.config import OptimConfig
from galenic.pretrain.optimizers import COEFFICIENTS, Muon, make_optimizer, orthogonalised


def network():
    torch.manual_seed(0)
    config = BaichuanM1Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=8,
        sliding_window_layers=[1],
    )
    return BaichuanM1ForCausalLM(config)


def names(model, group):
    known = {id(p): name for name, p in model.named_parameters()}
    return {".".join(known[id(p)].split(".")[-2:]) for p in group["params"]}


SPARED = {
    *("embed_tokens.weight", "lm_head.weight", "norm.weight", "input_layernorm.weight"),
    *("post_attention_layernorm.weight", "self_attn.conv_k", "self_attn.conv_v"),
}


def test_decay_spares_norms_taps_embedding_and_head():
    model = network()
    decayed, spared = make_optimizer(model, OptimConfig()).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert names(model, spared) == SPARED
    assert {p.ndim for p in decayed["params"]} == {2}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = network()
    optimizer = make_optimizer(model, OptimConfig(name="muon"))
    matrices, rest = optimizer.param_groups
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert names(model, rest) == SPARED
    ids = torch.arange(12).view(1, 12)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    keys = [{tuple(sorted(optimizer.state[p])) for p in group["params"]} for group in (matrices, rest)]
    assert keys == [{("momentum_buffer",)}, {("exp_avg", "exp_avg_sq", "step")}]
    assert all(torch.is_tensor(v) for state in optimizer.state.values() for v in state.values())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_muon_alone_where_only_an_adapters_matrices_are_trained():
    model = network().requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert len(make_optimizer(model, OptimConfig(name="muon")).param_groups) == 1


def test_steps_equal_adamw_written_out_in_float64():
    torch.manual_seed(1)
    net = torch.nn.Linear(9, 6, bias=False)
    optimizer = make_optimizer(net, OptimConfig())
    w = net.weight.detach().double()
    m = v = torch.zeros_like(w)
    for step in range(1, 6):
        gradient = torch.randn(6, 9)
        lr = 1e-2 * step
        optimizer.param_groups[0]["lr"] = lr
        net.weight.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - lr * 0.1) - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(net.weight.detach().double(), w, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------- Muon


def polynomial(values):
    """What five Newton-Schulz steps do to singular values."""
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (8, 8), (1, 6)])
def test_newton_schulz_maps_the_singular_values_and_nothing_else(shape):
    torch.manual_seed(2)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    expected = u @ torch.diag(polynomial(s / s.norm())) @ v
    torch.testing.assert_close(orthogonalised(matrix), expected, rtol=1e-9, atol=1e-10)
    found = torch.linalg.svdvals(orthogonalised(torch.randn(64, 256)))
    assert 0.6 < found.min() and found.max() < 1.25


def test_a_matrix_of_zeros_stays():
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_steps_equal_muon_written_out_in_float64():
    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(6, 10))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.1)
    w, b = weight.detach().double(), torch.zeros(6, 10, dtype=torch.float64)
    for step in range(4):
        gradient, lr = torch.randn(6, 10), 0.02 * (step + 1)
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        b = 0.95 * b + 0.05 * g
        u, s, v = torch.linalg.svd(0.05 * g + 0.95 * b, full_matrices=False)
        update = u @ torch.diag(polynomial(s / s.norm())) @ v
        w = w * (1 - 0.1 * lr) - 0.2 * lr * math.sqrt(10) * update
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_muon_is_torchs_up_to_its_bfloat16():
    torch.manual_seed(4)
    start, gradients = torch.randn(32, 48), torch.randn(5, 32, 48)
    weights = []
    for make in (
        lambda p: Muon([p], lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.Muon([p], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make(weight)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        weights.append(weight.detach())
    moved = [weight - start for weight in weights]
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.02
    assert float(moved[0].norm() / start.norm()) > 0.02


@pytest.mark.slow
def test_sharded_parameters_take_the_steps_of_whole_ones():
    """Four processes: FSDP over four, and over two with tensor parallelism over two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cases = ["adamw:1", "adamw:2", "muon:1", "muon:2"]
    base = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("optimizers_worker.py")), *cases],
            env={**base, "RANK": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    lines = [line.split() for line in told[0].splitlines()]
    assert [line[0] for line in lines] == cases
    assert all(float(number) < 1e-6 for line in lines for number in line[1:]), told[0]
