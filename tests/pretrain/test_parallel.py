"""Training on several processes is training on one: weights, losses, norms, with packed documents and windows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import SHAPE, work
from safetensors.torch import load_file

from galenic.pretrain.config import ArchitectureConfig, ParallelConfig
from galenic.pretrain.parallelism.parallel import Degrees, Parallel, check, degrees, describe
from galenic.runtime import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

WORKER = Path(__file__).with_name("parallel_worker.py")
JOB = {"steps": 4, "rows": 4, "context": 48, "dtype": "float64"}


def read(folder):
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "weights.safetensors")


def alone(folder, **job):
    """Runs a job in this process."""
    try:
        work(JOB | job, folder)
    finally:
        if torch.distributed.is_initialized():  # bfloat16 goes through FSDP
            torch.distributed.destroy_process_group()
    return read(folder)


def together(folder, processes, jobs):
    """Runs jobs in several processes; returns what came of each."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps({name: JOB | job for name, job in jobs.items()}))
    launch = [sys.executable, str(WORKER), str(folder)]
    own = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            launch, env=os.environ | own | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    try:
        errors = [rank.communicate()[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(error[-3000:] for error in errors)
    return {name: read(folder / name) for name in jobs}


def furthest(one, other):
    """The largest difference of losses and norms, and of weights."""
    trace = max(abs(a - b) for x, y in zip(one[0], other[0], strict=True) for a, b in zip(x, y, strict=True))
    return trace, max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1])


def assert_same(one, other, tolerance=1e-11):
    trace, weights = furthest(one, other)
    assert trace < tolerance and weights < tolerance, (trace, weights)


# ---------------------------------------------------------------------------- processes


def test_two_processes_train_as_one(tmp_path):
    one = alone(tmp_path / "one")
    jobs = {name: {"parallel": {name: 2}} for name in ("shard", "context", "tensor")}
    for found in together(tmp_path / "two", 2, jobs).values():
        assert_same(one, found)
    assert one[0][0][0] > one[0][-2][0]  # it learns


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path):
    one = alone(tmp_path / "one")
    layouts = (
        {"shard": 4},
        {"replicate": 2, "shard": 2},
        {"shard": 2, "tensor": 2},
        {"shard": 2, "context": 2},
        {"context": 4},
        {"context": 2, "tensor": 2},
        {"tensor": 4},  # two key/value heads: attention whole, feed-forward layers split
    )
    jobs = {str(number): {"parallel": layout} for number, layout in enumerate(layouts)}
    odd = {"architecture": {"intermediate_size": 66}}  # 33 rows to a tensor rank, 17 + 16 to its shards
    jobs["odd"] = odd | {"parallel": {"shard": 2, "tensor": 2}}
    found = together(tmp_path / "four", 4, jobs)
    assert_same(alone(tmp_path / "odd", **odd), found.pop("odd"))
    for other in found.values():
        assert_same(one, other)


@pytest.mark.slow
def test_variants_train_as_one(tmp_path):
    """Every width of the convolution, kernels, recomputation, several rows at a time."""
    variants = {
        "plain-taps": {"architecture": {"conv_window": 1}},
        "three-taps": {"architecture": {"conv_window": 3}},
        "eager": {"parallel": {"attention": "eager"}},
        "row-by-row": {"micro_rows": 1},
        "selective": {"parallel": {"activation_checkpointing": "selective"}},
        "full": {"parallel": {"activation_checkpointing": "full"}},
    }
    jobs = {
        f"{name}-{split}": variant | {"parallel": variant.get("parallel", {}) | {split: 2}}
        for name, variant in variants.items()
        for split in ("shard", "context", "tensor")
    }
    found = together(tmp_path / "two", 2, jobs)
    for name, variant in variants.items():
        one = alone(tmp_path / name, **variant)
        for split in ("shard", "context", "tensor"):
            assert_same(one, found[f"{name}-{split}"])


@pytest.mark.slow
def test_three_processes_share_unevenly(tmp_path):
    """No width of the network divides by three: 40 = 14 + 14 + 12 rows of a matrix, 2 = 1 + 1 + 0 ..."""
    shape = {
        **{"hidden_size": 40, "intermediate_size": 50, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"num_swa_attention_heads": 4, "num_swa_key_value_heads": 2},
    }
    job = {"architecture": shape, "rows": 6}
    one = alone(tmp_path / "one", **job)
    assert_same(one, together(tmp_path / "three", 3, {"shard": job})["shard"])


@pytest.mark.slow
def test_bfloat16(tmp_path):
    """Weights are kept in float32: training stays near float32's, whatever the processes."""
    job = {"dtype": "float32", "steps": 10}
    exact = alone(tmp_path / "exact", **job)
    half = alone(tmp_path / "half", **job, precision="bfloat16")
    plain = alone(tmp_path / "plain", steps=1, dtype="bfloat16")
    assert half[0][0][0] == plain[0][0][0]  # the forward pass of a model in bfloat16, to the bit
    jobs = {
        name: job | {"precision": "bfloat16", "parallel": {name: 2}}
        for name in ("shard", "context", "tensor")
    }
    for found in (half, *together(tmp_path / "two", 2, jobs).values()):
        assert all(tensor.dtype == torch.float32 for tensor in found[1].values())
        losses = [abs(a[0] - b[0]) for a, b in zip(exact[0][:-1], found[0][:-1], strict=True)]
        assert 0 < max(losses) < 0.02
        assert max(abs(a[1] - b[1]) / a[1] for a, b in zip(exact[0][:-1], found[0][:-1], strict=True)) < 0.03


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_steps_of_each_phase(tmp_path):
    """The trainer's own loop in float32: what drifts apart is rounding, and stays that small."""
    from equivalence import table

    names = ["1 process, 8 x 1 row", "shard 2", "replicate 2 x shard 2, 2 x 1 row"]
    names += ["shard 2 x context 2", "shard 2 x tensor 2"]
    for name, phases in table(tmp_path, 50, names).items():
        for phase, (loss, mean_loss, weight, mean_weight) in phases.items():
            assert loss < 2e-6 and mean_loss < 5e-7, (name, phase)
            assert weight < 1e-3 and mean_weight < 1e-5, (name, phase)


# ---------------------------------------------------------------------------- one process


def test_rows_at_a_time(tmp_path):
    assert_same(alone(tmp_path / "at-once"), alone(tmp_path / "one-by-one", micro_rows=1))


def test_recomputation_changes_no_bit(tmp_path):
    job = {"dtype": "float32", "steps": 2}
    kept = alone(tmp_path / "none", **job)
    for how in ("selective", "full"):
        again = alone(tmp_path / how, **job, parallel={"activation_checkpointing": how})
        assert furthest(kept, again) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers(tmp_path):
    job = {"dtype": "float32", "steps": 3}
    plain = alone(tmp_path / "plain", **job)
    for how in ("none", "selective"):
        fast = alone(tmp_path / how, **job, parallel={"compile": True, "activation_checkpointing": how})
        assert_same(plain, fast, 1e-4)
    jobs = {name: job | {"parallel": {"compile": True, name: 2}} for name in ("shard", "context", "tensor")}
    for found in together(tmp_path / "two", 2, jobs).values():
        assert_same(plain, found, 1e-4)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler looks at it
def test_layers_of_one_kind_compile_once():
    import torch._dynamo as dynamo
    from parallel_worker import network, packed

    from galenic.pretrain.parallelism.parallel import compile_layer
    from galenic.pretrain.parallelism.recompute import recompute

    dynamo.reset()
    dynamo.utils.counters.clear()
    model = network(SHAPE | {"num_hidden_layers": 20}, 16)
    for layer in model.model.layers:
        recompute(layer, "full", compiled=True)
        compile_layer(layer, "eager")
    model.train()
    ids = packed(1, 16, 0)["input_ids"]  # one document: on a CPU, attention of several is no part of a graph
    model(input_ids=ids, labels=ids, skip_logits=True, use_cache=False)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not dynamo.utils.counters["graph_break"]


def test_a_single_process_stays_plain():
    from parallel_worker import network

    model, parallel = network(SHAPE, 16), Parallel()
    parallel.apply(model)
    assert type(model).__name__ == "BaichuanM1ForCausalLM" and not torch.distributed.is_initialized()
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    assert parallel.rows(4) == [0, 1, 2, 3] and parallel.loss_scale == 1
    batch = {"input_ids": torch.zeros(1, 4)}
    assert parallel.local(batch) is batch


def test_norm_of_one_process_is_torchs(tmp_path):
    parameters = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters.append(torch.nn.Parameter(torch.randn(2)))  # without gradient
    assert Parallel().norm(parameters) == float(torch.nn.utils.clip_grad_norm_(parameters, 1e9))


# ---------------------------------------------------------------------------- what divides


def test_degrees():
    assert degrees(ParallelConfig(), 1) == Degrees(1, 1, 1, 1)
    assert degrees(ParallelConfig(tensor=2, context=2), 16) == Degrees(1, 4, 2, 2)
    assert degrees(ParallelConfig(replicate=2, shard=3), 6).data == 6


@pytest.mark.parametrize(
    "asked, processes, words",
    [
        ({"tensor": 4}, 2, "needs 4 devices, there are 2, fewer than asked"),
        ({"shard": 8}, 4, "needs 8 devices, there are 4"),
        ({"context": 4}, 6, "takes 4 devices, but there are 6"),
        ({"shard": 2}, 4, "set parallel.shard to 0"),
    ],
)
def test_other_numbers_of_devices(asked, processes, words):
    with pytest.raises(UserError, match=words):
        degrees(ParallelConfig(**asked), processes)


BIG = ArchitectureConfig(
    hidden_size=5120,
    intermediate_size=17408,
    num_hidden_layers=40,
    num_attention_heads=20,
    num_key_value_heads=2,
    num_swa_attention_heads=40,
    num_swa_key_value_heads=8,
)


@pytest.mark.parametrize(
    "split, rows, context, words",
    [
        (Degrees(2, 2, 1, 1), 6, 512, "6 rows do not divide among 4 data ranks"),
        (Degrees(1, 1, 4, 1), 4, 500, "a context of 500 tokens does not divide into 2 x 4 chunks"),
        (Degrees(1, 1, 1, 3), 4, 512, "parallel.tensor: 3 divides neither the key/value heads"),
    ],
)
def test_what_does_not_divide(split, rows, context, words):
    with pytest.raises(UserError, match=words):
        check(split, BIG, rows, context)


def test_what_divides():
    check(Degrees(2, 4, 2, 4), BIG, 16, 512)


def test_flex_attention_needs_cuda():
    with pytest.raises(UserError, match="cannot train on a CPU"):
        Parallel(ParallelConfig(attention="flex_attention"))


def test_plan_of_the_large_model():
    lines = describe(Degrees(2, 4, 2, 4), BIG)
    assert (
        "attention of the 20 global layers: whole on each device: 2 key/value heads do not divide by 4"
        in lines
    )
    assert "attention of the 20 sliding-window layers: split 4 ways, 2 key/value heads each" in lines
    assert any("2 copies, each in 8 shards" in line for line in lines)
    assert describe(Degrees(1, 1, 1, 1), BIG) == []


def test_rows_without_targets_have_gradients():
    """FSDP adds up what every process has; one without a gradient would leave the others waiting."""
    from parallel_worker import network, packed

    model, batch = network(SHAPE, 16), packed(1, 16, 0)
    batch["labels"].fill_(-100)
    model(**batch, skip_logits=True, use_cache=False).loss.backward()
    assert all(bool((parameter.grad == 0).all()) for parameter in model.parameters())
