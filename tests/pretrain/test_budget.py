"""The formulas against what they are formulas of: the built model, torch's FLOP counter, autograd's saved tensors,
FSDP2's shards."""

import importlib.util
import os
import socket
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.parallelism.parallel import Degrees
from galenic.pretrain.planning import budget, memory
from galenic.pretrain.planning.memory import ALONE

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 4,
    "num_swa_key_value_heads": 2,
    "sliding_window": 16,
    "max_position_embeddings": 64,
}
WIDER = {**SMALL, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 700}


def make_config(attention="eager", **changes):
    config = BaichuanM1Config(**{**SMALL, **changes})
    config._attn_implementation = attention
    return config


def packed(batch=2, length=64, document=32):
    ids = torch.arange(batch * length).view(batch, length) % 512
    positions = (torch.arange(length) % document)[None].expand(batch, -1)
    return {"input_ids": ids, "position_ids": positions}


# ---------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("changes", [{}, {"conv_window": 1}, {"conv_window": 3}, WIDER])
def test_shapes_are_those_of_the_built_model(changes):
    config = make_config(**changes)
    with torch.device("meta"):
        model = BaichuanM1ForCausalLM(config)
    assert budget.shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert budget.parameters(config).total == sum(p.numel() for p in model.parameters())


def test_the_14b_has_the_parameters_of_the_published_checkpoint():
    found = budget.parameters(BaichuanM1Config())
    assert found.total == 14_470_764_320
    assert (found.embedding, found.head, found.taps) == (681_574_400, 681_574_400, 800)
    assert len(budget.shapes(BaichuanM1Config())) == 363


# ---------------------------------------------------------------------------- FLOPs


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("changes", [{}, WIDER])
def test_flops_are_those_torch_counts(changes, recompute):
    """Exact; torch counts every pair of attention, hidden or not, and no elementwise work."""
    config = make_config(**changes)
    model = BaichuanM1ForCausalLM(config).train()
    if recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = packed()["input_ids"]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    found = budget.flops(config, 64)
    all_pairs = 4 * config.hidden_size * 64 * config.num_hidden_layers
    times = 4 if recompute == "full" else 3
    again = found.computed(recompute) - found.trained - (times - 3) * (found.attention + found.convolution)
    assert counts["aten.mm"] == 128 * (3 * (found.matrices + found.head) + round(again))
    assert counts["aten.bmm"] == 128 * all_pairs * times


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 7), (7, 3), (40, 16)])
def test_mean_keys_counts_what_the_mask_shows(length, window):
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (key <= query) & (query - key < (window or length))
    assert budget.mean_keys(length, window) == pytest.approx(float(seen.sum()) / length)


def test_documents_see_less_than_rows():
    config = make_config()
    whole, cut = budget.flops(config, 64), budget.flops(config, 64, 32)
    assert cut.attention == 4 * 64 * (2 * 16.5 + 2 * budget.mean_keys(32, 16))
    assert whole.attention == 4 * 64 * (2 * 32.5 + 2 * budget.mean_keys(64, 16))
    assert budget.flops(config, 64, 1e9).trained == whole.trained
    assert whole.trained == 3 * (whole.matrices + whole.head + whole.attention + whole.convolution)


def test_the_convolution_counts_its_taps():
    per_layer = 2 * 2 * 2 * 32 + 2 * 2 * 2 * 2 * 16  # 2 taps, keys and values; global and window layer
    assert budget.flops(make_config(), 64).convolution == 2 * per_layer
    assert budget.flops(make_config(conv_window=1), 64).convolution == 0


def test_seconds():
    assert budget.seconds(1e15, devices=5, peak_tflops=100, mfu=0.5) == pytest.approx(4.0)


# ---------------------------------------------------------------------------- memory


def test_the_state_of_one_device_is_that_of_its_tensors():
    config = make_config()
    model = BaichuanM1ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(**packed(), labels=packed()["input_ids"]).loss.backward()
    optimizer.step()
    found = memory.state(config, ALONE)
    assert found.weights == found.gradients == sum(p.nbytes for p in model.parameters())
    moments = [value for one in optimizer.state.values() for key, value in one.items() if key != "step"]
    assert found.moments == sum(moment.nbytes for moment in moments)
    assert memory.checkpoint_bytes(config) == found.saved == 12 * budget.parameters(config).total


def test_muon_keeps_one_moment_for_matrices():
    config, found = make_config(), budget.parameters(make_config())
    assert memory.state(config, ALONE, "muon").moments == 8 * found.total - 4 * found.matrices


SHARDED = """
import json, os, sys, torch
import torch.distributed as distributed
from torch.distributed.fsdp import fully_shard
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.planning import memory
from galenic.pretrain.parallelism.parallel import Degrees
from galenic.ranks import leave
distributed.init_process_group("gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()
mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
config = BaichuanM1Config(**json.loads(sys.argv[1]))
model = BaichuanM1ForCausalLM(config)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.arange(64)[None] % 512
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
def local(tensor):
    return tensor.to_local().nbytes
weights = sum(local(p) for p in model.parameters())
gradients = sum(local(p.grad) for p in model.parameters())
moments = sum(local(v) for one in optimizer.state.values() for k, v in one.items() if k != "step")
found = memory.state(config, Degrees(1, ranks, 1, 1), rank=rank)
assert (weights, gradients, moments) == (found.weights, found.gradients, found.moments), (rank, found)
other = memory.state(config, Degrees(1, ranks, 1, 1), rank=0)
assert other.total >= found.total and (rank == 0 or other.total > found.total)
distributed.destroy_process_group()
leave()
"""


def test_the_state_under_fsdp2_is_that_of_its_tensors():
    """An odd vocabulary and inner width: the shards are not of one size."""
    import json

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    values = json.dumps({**SMALL, "vocab_size": 513, "intermediate_size": 97})
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, values],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_tensor_parallelism_splits_what_the_heads_allow():
    config = BaichuanM1Config()
    whole = budget.shapes(config)

    def split(name, tensor):
        return memory.split_shape(config, name, whole[name], tensor)

    assert split("model.layers.0.self_attn.W_pack.weight", 2) == (3072, 5120)
    assert split("model.layers.0.self_attn.W_pack.weight", 4) == (6144, 5120)  # 2 global KV heads
    assert split("model.layers.0.self_attn.conv_k", 4) == (1, 1, 2, 1, 2)
    assert split("model.layers.1.self_attn.W_pack.weight", 4) == (1792, 5120)
    assert split("model.layers.1.self_attn.o_proj.weight", 4) == (5120, 1280)
    assert split("model.layers.1.self_attn.conv_v", 4) == (1, 1, 2, 1, 2)
    assert split("model.layers.1.mlp.down_proj.weight", 4) == (5120, 4352)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"):
        assert split(name, 4) == whole[name]
    full, quarter = memory.state(config, ALONE), memory.state(config, Degrees(1, 1, 1, 4))
    assert quarter.weights < full.weights * 0.4
    assert quarter.weights == 4 * sum(prod(split(name, 4)) for name in whole)


def saved_bytes(model, batch):
    """Bytes of what autograd keeps, each storage once, parameters and ids not."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {
        x.untyped_storage().data_ptr() for x in batch.values()
    }
    found, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(model.model(**batch).last_hidden_state)
    return sum(found.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, WIDER, {"conv_window": 1, "num_key_value_heads": 2}])
def test_activations_are_what_autograd_keeps(changes, precision):
    """Within 2%: inverse norms, ages and masked taps, a few numbers a token, are left out."""
    config = make_config("sdpa", **changes)
    model = BaichuanM1ForCausalLM(config).to(precision).train()
    bfloat16 = precision == torch.bfloat16
    kept = saved_bytes(model, packed(batch=3))
    found = memory.memory(
        config, ALONE, rows=3, micro=3, context=64, bfloat16=bfloat16, kernel="documents", document=32
    ).activations
    last_norm = 3 * 64 * (memory.norm_bytes(config, precision.itemsize) - 64 * precision.itemsize)
    assert kept == pytest.approx(found + last_norm, rel=0.02)


def test_memory_adds_up_and_reacts():
    config = BaichuanM1Config()
    spread = Degrees(1, 64, 1, 1)

    def of(spread=spread, **changes):
        return memory.memory(config, spread, **{"rows": 256, "micro": 1, "context": 8192, **changes})

    plain, selective, full = of(), of(recompute="selective"), of(recompute="full")
    assert plain.activations > selective.activations > full.activations
    assert plain.recomputed == 0 < selective.recomputed < full.recomputed
    rotary = 8192 * 8 * (128 + 256)
    assert full.activations == 8192 * 40 * 5120 * 2 + rotary
    assert of(micro=2, recompute="full").activations == 2 * full.activations
    halved = of(Degrees(1, 32, 2, 1), recompute="full")
    assert (halved.activations, halved.state) == (full.activations // 2, full.state)
    assert of().accumulates and not of(rows=64).accumulates
    assert full.peak > full.at_loss - 1 and full.peak > full.state.total
    assert full.peak == max(full.at_loss, full.at_backward)


@pytest.fixture(scope="module")
def bench():
    """`benchmarks/memory.py`."""
    path = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("size", [(64, 192, 3, 3000), (96, 128, 2, 20000)], ids=["activations", "vocabulary"])
def test_the_peak_is_that_of_the_tensors_alive(bench, size, recompute):
    """Within 3%: a whole step, forward, loss in chunks, backward and optimizer, as torch's profiler counts it."""
    size = dict(zip(("hidden", "inner", "layers", "vocab"), size, strict=True))
    model, optimizer, batch = bench.prepare(size, recompute)
    bench.step(model, optimizer, batch)
    live = bench.most_alive(lambda: bench.step(model, optimizer, batch))
    live += sum(p.nbytes for p in model.parameters())
    live += sum(m.nbytes for one in optimizer.state.values() for m in one.values())
    assert bench.predicted(size, recompute) == pytest.approx(live, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_peak_is_that_of_the_process(bench, recompute):
    """Within 5%: growth of peak resident memory in a process of its own."""
    found = bench.measure("4M", recompute, "rss")
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.05)
