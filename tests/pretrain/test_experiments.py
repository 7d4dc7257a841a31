"""The experiments of pre-training: what they inject, how they count, that forks and scores are what they say."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import corruption
import curriculum
import guard
import small
import units

from galenic.corpus.tokens.shards import Shard, read_meta, read_shard
from galenic.evaluate.bits_per_byte import bits_per_byte, document
from galenic.pretrain.config import ArchitectureConfig, OptimConfig, PhaseConfig, PretrainConfig
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.pretrain.data.stages import stages_of
from galenic.pretrain.guard import GradientGuard
from galenic.pretrain.pretrain import build_model
from galenic.runtime import read_json, write_json

# ---------------------------------------------------------------------------- corruption


class Letters:
    """A tokenizer of single characters, ids from 10 on."""

    def decode(self, ids):
        return "".join(chr(int(i) + 87) for i in ids)

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [10 + ord(letter) % 80 for letter in text]


def batch(lengths=((7, 5), (9, 3)), context=14):
    rows = [[(np.arange(10, 10 + n), np.arange(10, 10 + n)) for n in row] for row in lengths]
    return collate(rows, context, pad=3)


def test_text_read_in_another_encoding_is_the_well_known_accident():
    assert corruption.misread("Bush hid the facts") == "畂桳栠摩琠敨映捡獴"
    assert corruption.misread("odd") == "摯"  # a last single byte is lost


@pytest.mark.parametrize("kind", corruption.KINDS)
def test_corruption_replaces_the_text_and_nothing_else(kind):
    clean, bad = batch(), corruption.Corruption(Letters(), 90, 10, seed=1)
    spoilt = bad.apply(clean, kind, 5, [0, 1])
    starts = clean["position_ids"] == 0
    padding = torch.tensor([[False] * 12 + [True] * 2] * 2)
    assert torch.equal(spoilt["position_ids"], clean["position_ids"])
    assert torch.equal(spoilt["input_ids"][starts | padding], clean["input_ids"][starts | padding])
    counted = clean["labels"] != IGNORE
    assert torch.equal(spoilt["labels"] != IGNORE, counted)
    assert torch.equal(spoilt["labels"][counted], spoilt["input_ids"][counted])
    assert (spoilt["input_ids"] != clean["input_ids"]).float().mean() > 0.5
    assert spoilt["input_ids"].min() >= 3 and spoilt["input_ids"].max() < 90
    # Rows that another process asks for on their own are the same rows.
    alone = bad.apply({name: tensor[1:] for name, tensor in clean.items()}, kind, 5, [1])
    assert torch.equal(alone["input_ids"], spoilt["input_ids"][1:])


def test_isolated_bad_steps_have_no_neighbour_and_bursts_have_their_length():
    for seed in range(20):
        alone = corruption.isolated(600, 0.06, seed)
        assert len(alone) == 36 and min(np.diff(sorted(alone))) >= 2
        runs = corruption.bursts(600, 0.06, 4, seed)
        assert len(runs) == 36
        gaps = np.diff(sorted(runs))
        assert sorted(set(gaps))[0] == 1 and (gaps > 1).sum() == 8 and min(gaps[gaps > 1]) >= 5
        for chosen in (alone, runs):
            assert max(chosen) < 600
            assert [list(chosen.values()).count(kind) for kind in corruption.KINDS] == [12, 12, 12]
    assert corruption.isolated(600, 0.06, 0) != corruption.isolated(600, 0.06, 1)


def test_injected_batches_keep_the_names_of_their_documents():
    clean = batch()
    inner = SimpleNamespace(
        rows=2,
        context=14,
        domains=[],
        batch=lambda step, rows: {name: tensor[rows] for name, tensor in clean.items()},
        documents=lambda step: [f"s:{step}"],
        state=lambda step: {"row": step},
    )
    spoilt = guard.Injected(inner, {3: "stuck"}, corruption.Corruption(Letters(), 90, 10, seed=0))
    assert torch.equal(spoilt.batch(2, [0, 1])["input_ids"], clean["input_ids"])
    assert not torch.equal(spoilt.batch(3, [0, 1])["input_ids"], clean["input_ids"])
    assert spoilt.documents(3) == ["s:3"] and spoilt.state(3) == {"row": 3}


# ---------------------------------------------------------------------------- counting


def test_skips_are_counted_by_what_the_batch_was():
    unit = {
        "loss": [1.0] * 200,
        "kinds": {"50": "stuck", "120": "stuck", "121": "stuck", "122": "stuck", "150": "wrong encoding"},
        "skipped": [120, 122, 160],
        "injected": {"120": ["a:1", "a:2"], "150": ["b:1"]},
        "named": [{"step": 120, "documents": ["a:1", "a:2"]}, {"step": 160, "documents": ["c:9"]}],
    }
    assert guard.caught(unit) == {"early": (0, 1), "first": (2, 3), "second": (0, 1), "clean": (1, 96)}
    assert guard.caught(unit, "wrong encoding")["first"] == (0, 1)
    assert guard.found_by_name(unit) == (2, 3, 3)
    # The smoothed loss leaves corrupt batches out.
    unit["loss"] = [9.0 if str(step) in unit["kinds"] else 1.0 for step in range(200)]
    assert np.allclose(guard.smooth(unit), 1.0)


def test_the_drawn_limit_is_the_guards_own():
    random = np.random.default_rng(0)
    norms = np.where(random.random(600) < 0.1, 3.0, 1.0) + 0.1 * random.random(600)
    real = GradientGuard()
    skipped = {step for step, norm in enumerate(norms) if not real.accept(float(norm))}
    limits = guard.limit_line(list(norms), skipped)
    expected, before = set(), False
    for step, norm in enumerate(norms):
        before = bool(norm > limits[step]) and not before  # false while the limit is not a number
        if before:
            expected.add(step)
    assert skipped == expected and len(skipped) > 20 and np.isnan(limits[:100]).all()


def test_intervals_are_students():
    found = units.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.margin == pytest.approx(2.776445 * math.sqrt(0.5), abs=1e-5)
    shifted = units.paired([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert shifted.mean == 0.5 and shifted.margin == 0 and shifted.decided
    assert units.interval([1.0]).margin == math.inf
    mean, low, high = units.band([[1.0, 5.0], [3.0, 5.0]])
    assert mean.tolist() == [2, 5] and high[0] - 2 == 2 - low[0] > 0 == high[1] - low[1]


def test_units_are_made_once_and_again_when_their_settings_change(tmp_path):
    work = {"one": {"x": 1}, "two": {"x": 2}}
    first = units.run_units(dict, work, tmp_path, workers=1, settings="a")
    assert [unit["x"] for unit in first.values()] == [1, 2] and all("seconds" in u for u in first.values())
    kept = read_json(tmp_path / "one.json")
    write_json(tmp_path / "one.json", kept | {"result": {"x": "as it was"}})
    (tmp_path / "two.json").unlink()
    again = units.run_units(dict, work, tmp_path, workers=1, settings="a")
    assert again["one"] == {"x": "as it was"} and again["two"]["x"] == 2
    assert units.run_units(dict, work, tmp_path, workers=1, settings="b")["one"]["x"] == 1


def noted(file: str, name: str) -> dict:
    with open(file, "a") as lines:
        lines.write(name + "\n")
    return {}


def test_units_begin_when_what_they_need_is_done(tmp_path):
    order = tmp_path / "order"
    work = {name: {"file": str(order), "name": name} for name in ("last", "first", "second")}
    needs = {"last": ["second"], "second": ["first"]}
    units.run_units(noted, work, tmp_path / "out", workers=2, needs=needs)
    assert order.read_text().split() == ["first", "second", "last"]
    with pytest.raises(ValueError, match="need each other"):
        units.run_units(noted, work, tmp_path / "ring", workers=2, needs=needs | {"first": ["last"]})


def test_figures_are_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        with units.figure(tmp_path / f"{name}.svg") as axes:
            units.draw_band(axes, 0, "loss", [1, 2, 3], [[1.0, 2.0, 3.0], [1.5, 2.5, 3.5]])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


# ---------------------------------------------------------------------------- curriculum


def test_the_mixture_of_all_phases_weighs_them_by_tokens():
    one = PhaseConfig(name="one", tokens=3000, context=10, rows=1, mixture={"a": 1, "b": 1})
    two = PhaseConfig(name="two", tokens=1000, context=10, rows=1, mixture={"b": 5})
    assert curriculum.mixed([one, two]) == {"a": 0.375, "b": 0.625}


def test_orders_go_by_the_scores_they_name():
    count = 40
    shard = Shard(
        tokens=np.zeros(10 * count, dtype=np.uint16),
        offsets=np.arange(count + 1) * 10,
        bytes=np.full(count, 30),
        weights=np.ones(count, dtype=np.float32),
    )
    quality = np.random.default_rng(0).random(count)  # no two equally hard: chance decides among those
    scores = {"quality": {"s": quality.tolist()}, "difficulty": {"s": (1 - quality).tolist()}}

    def order(arm):
        found = curriculum.with_scores({"s": shard}, arm, scores)["s"]
        return [set(stage.tolist()) for stage in stages_of(found, "s", 4, 0)]

    best = np.argsort(-quality)
    assert order("easy to hard") == [set(best[i : i + 10].tolist()) for i in range(0, 40, 10)]
    scores["difficulty"]["s"] = quality.tolist()  # now the best are the most difficult
    assert order("easy to hard, quality")[0] == set(best[:10].tolist())
    assert order("easy to hard")[0] != set(best[:10].tolist())
    scores["quality"]["s"][best[0]] = None  # unknown: neither easy nor hard
    assert best[0] not in order("easy to hard, quality")[0] | order("easy to hard, quality")[3]


def test_losses_are_taken_from_a_step_of_the_run():
    whole = {"first": 1, "loss": [5.0, 4.0, 3.0, 2.0]}
    branch = {"first": 3, "loss": [3.5, 2.5]}
    assert curriculum.losses_from(whole, 3).tolist() == [3.0, 2.0]
    assert curriculum.losses_from(branch, 3).tolist() == [3.5, 2.5]


@pytest.fixture
def run(tokenizer_step, tmp_path):
    phases = [
        PhaseConfig(name="first", tokens=32 * 2 * 4, context=32, rows=2, mixture={"general": 1}),
        PhaseConfig(
            name="last",
            tokens=64 * 4,
            context=64,
            rows=1,
            mixture={"medical": 1},
            rope_theta=1e6,
            final_lr=1e-4,
        ),
    ]
    config = PretrainConfig(
        out=str(tmp_path / "run"),
        tokenizer=str(tokenizer_step),
        phases=phases,
        architecture=ArchitectureConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=16
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        precision="float32",
    )
    return small.Run(config, small.training_shards(tokenizer_step, phases))


def test_a_fork_goes_on_as_the_run_itself_does(run, tmp_path):
    run.train(0)
    other = run.fork(replace(run.config, out=str(tmp_path / "other")))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    other.train(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    run.train(1)
    assert all(
        torch.equal(tensor, other.model.state_dict()[name]) for name, tensor in run.model.state_dict().items()
    )
    steps = [row["step"] for row in run.rows()]
    assert steps == list(range(1, len(steps) + 1))
    assert [row["loss"] for row in other.rows()] == [
        row["loss"] for row in run.rows() if row["phase"] == "last"
    ]


def test_scores_are_bits_per_byte_by_source_and_by_position(run, tokenizer_step):
    model, folder = run.model, Path(tokenizer_step)
    documents = small.heldout(folder, ["general", "medical"], 10**6)
    found = small.score(model, documents, folder, context=256)
    assert (
        sum(found["general"][band][1] for band in found["general"] if band != "whole")
        == found["general"]["whole"][1]
    )
    assert model.training and model.config.max_position_embeddings == 32  # as it was
    model.config.max_position_embeddings = 256
    everything = []
    for source in ("general", "medical"):
        shard = read_shard(folder, source, "heldout")
        texts = [document(shard.document(i), int(shard.bytes[i])) for i in range(len(shard))]
        everything += texts
        expected, _ = bits_per_byte(model.eval(), texts, context=256, batch_tokens=4096)
        assert small.by_source(found)[source] == pytest.approx(expected, rel=1e-6)
    assert max(len(text.ids) for text in everything) < 96  # so that one band holds all
    total, _ = bits_per_byte(model, everything, context=256, batch_tokens=4096)
    assert small.by_position(found, ["general", "medical"]) == {"1-96": pytest.approx(total, rel=1e-6)}
    base = small.score(model, documents, folder, 256, rope_theta=10.0)
    assert (
        small.by_source(base) != small.by_source(found)
        and model.config.rope_theta == run.config.phases[0].rope_theta
    )


def test_probing_leaves_the_model_as_it_is(run, tokenizer_step):
    bad = corruption.Corruption(Letters(), read_meta(tokenizer_step)["vocab_size"], 10, seed=0)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    kinds = guard.probe(run.model, run.batches[0], bad, step=1, mean=1.0, at=0)
    assert len(kinds) == len(corruption.KINDS) * 4
    clean = {probe["norm"] for probe in kinds if probe["rows"] == 0}
    assert len(clean) == 1 and all(probe["norm"] > 0 for probe in kinds)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_small_curriculum_is_the_starters(tokenizer_step):
    phases = small.phases(Path(__file__).parents[2] / "recipes" / "starter")
    assert [phase.rope_theta for phase in phases] == [1e5, 1e5, 1e6]
    assert [phase.final_lr for phase in phases] == [None, None, small.FINAL_LR]
    assert {phase.context * phase.rows for phase in phases} == {768}
    with torch.device("meta"):
        model = build_model(small.ARCHITECTURE, read_meta(tokenizer_step), phases[0])
    assert model.config.hidden_size == small.WIDTH
