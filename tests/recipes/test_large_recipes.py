"""The recipes of the report's sizes, planned as they are: no data, no devices, no weights."""

import dataclasses
import time
from pathlib import Path

import pytest

from galenic import cli
from galenic.build import read_recipe
from galenic.pretrain.planning import budget, estimate, plan
from galenic.runtime import UserError

RECIPES = Path(__file__).parents[2] / "recipes"


def config_of(name):
    steps = read_recipe(RECIPES / name, Path("/nowhere/run"))
    assert [step.name for step in steps] == ["10-corpus", "20-tokenizer", "30-pretrain"]
    return steps[-1].config


def planned(config):
    on = estimate.machines(config)
    return estimate.phase_plans(config, on), on


def test_the_14b_is_the_reports():
    config = config_of("baichuan-m1-14b")
    phases, on = planned(config)
    shape = estimate.model_config(config, estimate.meta_of(config))
    assert budget.parameters(shape).total == 14_470_764_320
    # ---- section 4.2
    assert [one.phase.tokens for one in phases] == [12e12, 6e12, 2e12]
    assert [one.phase.context for one in phases] == [8192, 8192, 32768]
    assert [one.phase.rope_theta for one in phases] == [1e5, 1e5, 1e6]
    assert {one.phase.rows * one.phase.context for one in phases} == {2**24}
    assert [one.steps for one in phases] == [715_255, 357_627, 119_209]
    assert [one.warmup for one in phases] == [2000, 0, 0]
    assert phases[0].warmup * 2**24 == 33_554_432_000  # 33.6B tokens
    assert [one.rates for one in phases][:2] == [(4e-4 / 2000, 4e-4), (4e-4, 4e-4)]
    assert phases[2].rates == (pytest.approx(4e-4, rel=1e-6), pytest.approx(2e-5))
    optim = config.optim
    assert (optim.name, optim.betas, optim.weight_decay, optim.clip) == ("adamw", (0.9, 0.95), 0.1, 1.0)
    guard = config.guard
    assert (guard.history, guard.factor, guard.offset, guard.max_skips) == (100, 1.2, 0.1, 1)
    # ---- what follows: 6 x parameters x tokens, and attention with the head counted
    assert 6 * 14_470_764_320 * 20e12 == pytest.approx(1.736e24, rel=1e-3)
    assert sum(one.work for one in phases) == pytest.approx(1.89e24, rel=5e-3)
    assert phases[2].flops.attention > 2.5 * phases[0].flops.attention
    assert on.devices == 1024 and max(one.memory.peak for one in phases) < 0.9 * 80e9


def test_the_14b_reads_the_languages_of_table_1():
    config = config_of("baichuan-m1-14b")
    read = {}
    for phase in config.phases:
        for source, share in phase.mixture.items():
            read[source] = read.get(source, 0) + phase.tokens * share / sum(phase.mixture.values())
        assert sum(phase.mixture.values()) == pytest.approx(phase.tokens / 1e9)  # as the file says
    english = ("english", "medical-english", "medical-synthetic-english", "stem-synthetic")
    chinese = ("chinese", "medical-chinese", "medical-synthetic-chinese")
    assert sum(read[source] for source in english) == pytest.approx(12e12)
    assert sum(read[source] for source in chinese) == pytest.approx(4e12)
    assert (read["multilingual"], read["code"]) == (pytest.approx(2e12), pytest.approx(2e12))


def test_the_1_5b_is_that_of_the_ablations():
    config = config_of("m1-1.5b")
    phases, on = planned(config)
    shape = estimate.model_config(config, estimate.meta_of(config))
    assert budget.parameters(shape).total == 1_498_491_096
    assert sum(one.phase.tokens for one in phases) == 200e9
    assert {one.phase.context for one in phases} == {8192} and shape.sliding_window == 2048
    big, small = (
        (shape.hidden_size // shape.num_attention_heads, shape.hidden_size // shape.num_swa_attention_heads),
        shape.intermediate_size / shape.hidden_size,
    )
    assert big == (256, 128) and small == pytest.approx(17408 / 5120, rel=0.01)
    assert [one.steps for one in phases] == [57_220, 28_610, 9_536]
    assert on.devices == 8 and max(one.memory.peak for one in phases) < 0.9 * 80e9


def test_the_1_5b_fits_one_device():
    config = config_of("m1-1.5b")
    alone = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, devices=1))
    eight, _ = planned(config)
    one, on = planned(alone)
    assert max(phase.memory.peak for phase in one) < 0.9 * on.memory
    assert one[0].memory.state.total == 16 * 1_498_491_096
    assert one[0].seconds == pytest.approx(8 * eight[0].seconds)


@pytest.mark.parametrize("name", ["m1-1.5b", "baichuan-m1-14b"])
def test_the_folder_is_planned_without_data(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["build", str(RECIPES / name), "--plan"]) == 0
    told = capsys.readouterr().out
    assert "10-corpus\n  needs      data/" in told
    assert "20-tokenizer\n  waits for  RUN/10-corpus" in told
    assert "30-pretrain\n" in told and " steps of " in told and "total" in told
    assert not list(tmp_path.iterdir())
    config = config_of(name)
    started = time.process_time()
    plan.plan(config)
    assert time.process_time() - started < 2


def test_memory_that_does_not_fit_is_warned_of_with_the_way_out():
    config = config_of("baichuan-m1-14b")
    small = dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, devices=8, memory_gb=80),
        parallel=dataclasses.replace(config.parallel, replicate=1, micro_rows=0),
    )
    facts = plan.plan(small).facts
    assert facts["!"].startswith("phase-1-general: ") and "parallel {micro_rows: 1} needs" in facts["!"]
    tiny = dataclasses.replace(small, cluster=dataclasses.replace(small.cluster, memory_gb=24))
    assert "share it among more devices" in plan.plan(tiny).facts["!"]


def test_layouts_that_do_not_divide_are_refused():
    config = config_of("baichuan-m1-14b")
    with pytest.raises(UserError, match=r"parallel: .* 1000"):
        planned(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, devices=1000)))
    wide = dataclasses.replace(config.parallel, shard=8, context=1)
    with pytest.raises(UserError, match="512 rows do not divide among 1024"):
        planned(dataclasses.replace(config, parallel=wide))
