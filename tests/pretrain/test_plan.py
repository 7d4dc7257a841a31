"""Every number of the plan of a tiny curriculum, worked out by hand here."""

import dataclasses

import numpy as np
import pytest

from galenic import cli
from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.pretrain import pretrain
from galenic.pretrain.config import (
    ArchitectureConfig,
    ClusterConfig,
    ExpectedCorpus,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    PretrainConfig,
)
from galenic.pretrain.planning.estimate import has_shards, machines, phase_plans
from galenic.pretrain.planning.plan import days, plan, preview
from galenic.runtime import UserError

ARCHITECTURE = ArchitectureConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    num_swa_attention_heads=2,
    num_swa_key_value_heads=1,
    sliding_window=8,
)
# W_pack, o_proj and three matrices of the feed-forward layer: 32 x (32 + 64), 32 x (32 + 32), 3 x 32 x 64
LAYERS = 32 * 96 + 32 * 32 + 32 * 64 + 32 * 32 + 2 * 3 * 32 * 64
VOCABULARY = 1000


def make_config(**changes):
    phases = [
        PhaseConfig(name="phase-1", tokens=1_300, mixture={"general": 1.0}, context=32, rows=4),
        PhaseConfig(
            name="phase-2",
            tokens=2_600,
            mixture={"general": 1.0, "medical": 3.0},
            context=64,
            rows=4,
            rope_theta=1e6,
            final_lr=1e-4,
        ),
    ]
    values = {
        "out": "out",
        "tokenizer": "nowhere",
        "phases": phases,
        "architecture": ARCHITECTURE,
        "optim": OptimConfig(lr=1e-2, warmup_steps=12),
        "precision": "bfloat16",
        "expected": ExpectedCorpus(vocab_size=VOCABULARY, tokens={"general": 1000, "medical": 500}),
        "cluster": ClusterConfig(devices=4, device="Test", peak_tflops=1e-6, memory_gb=1, mfu=0.5),
        "parallel": ParallelConfig(replicate=2, micro_rows=1),
    }
    return PretrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def phases():
    config = make_config()
    return phase_plans(config, machines(config))


def test_steps_warm_up_and_rates(phases):
    one, two = phases
    assert (one.steps, two.steps) == (1300 // 128, 2600 // 256) == (10, 10)
    assert (one.tokens, two.tokens) == (1280, 2560)
    assert (one.warmup, two.warmup) == (10, 2)  # of 12 in all
    assert one.rates == (pytest.approx(1e-2 / 12), pytest.approx(1e-2 * 10 / 12))
    assert two.rates == (pytest.approx(1e-2 * 11 / 12), pytest.approx(1e-4))


def test_repeats(phases):
    assert phases[0].repeats == {"general": (1.0, pytest.approx(1.3))}
    assert phases[1].repeats == {
        "general": (0.25, pytest.approx(0.65)),
        "medical": (0.75, pytest.approx(3.9)),
    }


def test_flops(phases):
    one, two = phases
    for phase, context in ((one, 32), (two, 64)):
        assert phase.flops.matrices == 2 * LAYERS
        assert phase.flops.head == 2 * 32 * VOCABULARY
        windowed = (8 * 9 / 2 + (context - 8) * 8) / context
        assert phase.flops.attention == pytest.approx(4 * 32 * ((context + 1) / 2 + windowed))
        assert phase.flops.convolution == 2 * 2 * (64 + 32)  # two taps; keys and values of both layers
        assert phase.hardware_flops == phase.flops.trained == 3 * phase.flops.forward
        assert phase.work == phase.tokens * phase.flops.trained


def test_time(phases):
    for phase in phases:
        assert phase.seconds == pytest.approx(phase.work / (4 * 1e6 * 0.5))
        assert phase.tokens_per_second == pytest.approx(phase.tokens / phase.seconds)


def test_memory(phases):
    """Two copies in two shards each; every first dimension is even but that of the taps, which rank 0 has."""
    everything = LAYERS + 2 * 32 * VOCABULARY + 5 * 32
    assert everything == sum(
        p.numel() for p in _model().parameters() if p.ndim != 5
    )  # the built model's, without taps
    weights = 4 * (everything // 2 + 2 * 2 + 2 * 2)
    found = phases[0].memory
    assert (found.state.weights, found.state.gradients, found.state.moments) == (
        weights,
        weights,
        2 * weights,
    )
    layer = 32 * 96 + 32 * 32 + 3 * 32 * 64 + 2 * 32 + 4
    root = 2 * 32 * VOCABULARY + 32
    assert found.gathered == 2 * (root + 2 * layer)
    assert found.reduced == (2 + 4) * root
    assert not found.accumulates  # one row for each of four devices


def _model():
    import torch

    meta = {"vocab_size": VOCABULARY, "sources": {}}
    with torch.device("meta"):
        return pretrain.build_model(ARCHITECTURE, meta, make_config().phases[0])


def test_the_plan_says_it_all(capsys):
    told = plan(make_config())
    cli.print_plan("30-pretrain", told)
    shown = capsys.readouterr().out
    facts = told.facts
    assert facts["parameters"].startswith(f"{sum(p.numel() for p in _model().parameters()):,}: layers")
    assert facts["machines"].startswith("4 x Test: 1e-06 TFLOP/s and 1GB each, 50%")
    assert facts["layout"].startswith("replicate 2 x shard 2 x context 1 x tensor 1\n")
    assert facts["phase-1"].startswith(
        "10 steps of 4 x 32 tokens, 1.28k tokens\nrate       0.000833 to 0.00833;"
    )
    assert "warm-up 10 steps, 1.28k tokens" in facts["phase-1"]
    assert "RoPE base 1,000,000, 64 tokens" in facts["phase-2"]
    assert "general 25.0% (0.65x), medical 75.0% (3.9x)" in facts["phase-2"]
    assert "tokens     3.84k in 20 steps" in facts["total"] and "medical 3.9x, general 2x" in facts["total"]
    assert "device hours" in facts["total"]
    # Aligned: what belongs to a block stands below its first line.
    lines = shown.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  phase-1 "))
    column = lines[first].index("10 steps")
    assert lines[first - 1] == "" and lines[first + 1].index("rate") == column
    assert max(map(len, lines)) <= 110


def test_activation_checkpointing_costs_its_recomputation():
    config = make_config(parallel=ParallelConfig(replicate=2, micro_rows=1, activation_checkpointing="full"))
    one = phase_plans(config, machines(config))[0]
    again = one.flops.matrices - 2 * 2 * 32 * 64 + one.flops.attention + one.flops.convolution
    assert one.hardware_flops == pytest.approx(one.flops.trained + again)
    assert "full activation checkpointing computes" in plan(config).facts["phase-1"]


# ---------------------------------------------------------------------------- with shards


def test_shards_count_before_expectations(tokenizer_step):
    """Steps and packing are those of the run, attention that of the documents' mean length."""
    config = make_config(tokenizer=str(tokenizer_step), most_repeats=100.0)
    assert has_shards(config)
    one = phase_plans(config, machines(config))[0]
    counts = read_meta(tokenizer_step)["sources"]["general"]["train"]
    assert one.repeats["general"] == (1.0, pytest.approx(1300 / counts["tokens"]))
    lengths = np.diff(read_shard(tokenizer_step, "general", "train").offsets)
    assert one.flops.attention < phase_plans(make_config(), machines(config))[0].flops.attention
    mean = lengths.mean()
    windowed = (36 + (mean - 8) * 8) / mean
    assert one.flops.attention == pytest.approx(4 * 32 * ((mean + 1) / 2 + windowed))
    from galenic.pretrain.data.curriculum import PhaseBatches, open_shards

    batches = PhaseBatches(config, config.phases[0], open_shards(config))
    assert one.steps == batches.steps and one.packing.startswith("truncated 0 documents")
    assert preview(config) and preview(make_config()) == []


def test_this_machine_is_measured():
    on = machines(make_config(cluster=None))
    assert on.devices == 1 and 1e-4 < on.peak_tflops < 1e4 and on.memory > 1e8


# ---------------------------------------------------------------------------- what would stop the run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"most_repeats": 3.0}, "'medical' would be read 3.9 times, above the cap of 3"),
        ({"expected": ExpectedCorpus(vocab_size=9, tokens={"general": 1, "medicla": 5})}, "did you mean"),
        ({"expected": None}, "no token shards"),
        ({"parallel": ParallelConfig(shard=3)}, "parallel: .* takes 3 devices, but there are 4"),
        ({"parallel": ParallelConfig(shard=8)}, "needs 8 devices, there are 4, fewer than asked"),
        (
            {"parallel": ParallelConfig(context=4, tensor=1), "shrink": 36},
            "does not divide into 2 x 4 chunks",
        ),
        (
            {"architecture": dataclasses.replace(ARCHITECTURE, num_attention_heads=3)},
            "must divide hidden_size",
        ),
    ],
)
def test_what_the_run_refuses_the_plan_refuses(changes, says):
    if context := changes.pop("shrink", None):
        phase = PhaseConfig(name="p", tokens=1300, mixture={"general": 1.0}, context=context, rows=4)
        changes = {**changes, "phases": [phase]}
    with pytest.raises(UserError, match=says):
        plan(make_config(**changes))


def test_rows_that_do_not_divide_are_refused():
    phase = PhaseConfig(name="p", tokens=1300, mixture={"general": 1.0}, context=32, rows=6)
    with pytest.raises(UserError, match="6 rows do not divide among 4"):
        plan(make_config(phases=[phase]))


def test_long_times_are_told_in_fitting_units():
    assert [days(s) for s in (30, 90, 7200, 200_000)] == [
        "0.5 minutes",
        "1.5 minutes",
        "2 hours",
        "2.31 days",
    ]
