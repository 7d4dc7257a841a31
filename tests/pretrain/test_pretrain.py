import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from galenic.model import load
from galenic.pretrain import loop, pretrain
from galenic.pretrain.checkpoints import checkpoints, export
from galenic.pretrain.config import (
    ArchitectureConfig,
    CheckpointConfig,
    GuardConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    PretrainConfig,
    WatchConfig,
)
from galenic.pretrain.watching import heldout
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


def make_config(out, tokenizer_step, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    phases = [
        PhaseConfig(name="phase-1", tokens=1200, mixture={"general": 1.0}, context=32, rows=2),
        PhaseConfig(
            name="phase-2",
            tokens=1600,
            mixture={"general": 1.0, "medical": 3.0},
            context=64,
            rows=2,
            rope_theta=1e6,
            final_lr=1e-4,
        ),
    ]
    values = {
        "out": str(out),
        "tokenizer": str(tokenizer_step),
        "phases": phases,
        "architecture": ARCHITECTURE,
        "optim": OptimConfig(lr=1e-2, warmup_steps=4),
        "guard": GuardConfig(history=5),
        "heldout_tokens": 200,
        "checkpoints": CheckpointConfig(seconds=0.0),
    }
    return PretrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_step):
    out = tmp_path_factory.mktemp("pretrain") / "30-pretrain"
    config = make_config(out, tokenizer_step)
    pretrain.run(config)
    return out


def losses(out):
    return [row["loss"] for row in rows(out, "train")]


def rows(out, kind):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def test_phases_follow_each_other_under_one_optimizer(trained):
    train = rows(trained, "train")
    assert [row["step"] for row in train] == list(range(1, len(train) + 1))
    assert [row["phase"] for row in train] == sorted(row["phase"] for row in train)
    assert [row["lr"] for row in train[:4]] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert {row["lr"] for row in train if row["phase"] == "phase-1" and row["step"] > 4} == {1e-2}
    assert train[-1]["lr"] == pytest.approx(1e-4)
    assert not list(trained.glob("checkpoint-*"))


def test_each_phase_leaves_a_model_and_held_out_losses(trained):
    heldout = rows(trained, "heldout")
    assert [row["phase"] for row in heldout] == ["phase-1", "phase-2"]
    # Phase two introduces the medical source: it must help there.
    assert heldout[1]["bits_per_byte"]["medical"] < heldout[0]["bits_per_byte"]["medical"]
    first, second = load(trained / "phase-1"), load(trained / "phase-2")
    assert (first.config.rope_theta, second.config.rope_theta) == (1e5, 1e6)
    assert (first.config.max_position_embeddings, second.config.max_position_embeddings) == (32, 64)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def same_models(one, other):
    for phase in ("phase-1", "phase-2"):
        a, b = (load_file(folder / phase / "model.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_the_licences_of_what_a_phase_has_read_are_on_its_card(tmp_path, tokenizer_step):
    step = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_step, step)
    meta = json.loads((step / "tokens/meta.json").read_text())
    for source in meta["sources"]:
        meta["sources"][source]["licence"] = f"licence of {source}"
    (step / "tokens/meta.json").write_text(json.dumps(meta))
    config = make_config(tmp_path / "out", step)
    pretrain.run(config)
    told = [
        json.loads((tmp_path / "out" / phase / "galenic.json").read_text())
        for phase in ("phase-1", "phase-2")
    ]
    general = {"general": "licence of general"}
    assert [one["licences"] for one in told] == [general, general | {"medical": "licence of medical"}]
    assert "* medical: licence of medical" in (tmp_path / "out/phase-2/README.md").read_text()


def test_killed_anywhere_it_ends_with_the_same_bytes(trained, tmp_path, tokenizer_step):
    out = tmp_path / "30-pretrain"
    config = make_config(out, tokenizer_step)
    values = dataclasses.asdict(config)
    code = (
        "import json, sys, torch\ntorch.set_num_threads(1)\nfrom galenic.cli import parse_config\n"
        "from galenic.pretrain import pretrain\n"
        "config, _ = parse_config('pretrain', json.loads(sys.argv[1]))\n"
        "print('ready', flush=True)\npretrain.run(config)\n"
    )
    total = len(rows(trained, "train"))
    kills = 0
    for target in (0, 5, 18, total - 1):
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(values)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()
        metrics = out / "metrics.jsonl"
        while process.poll() is None:
            seen = metrics.read_bytes().count(b'"train"') if metrics.exists() else 0
            if seen >= target:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        process.stdout.close()
    assert kills >= 3
    pretrain.run(config)
    same_models(trained, out)
    assert [row["loss"] for row in rows(out, "train")] == [row["loss"] for row in rows(trained, "train")]
    assert len(rows(out, "heldout")) == 2


class Cut(Exception):
    """Ends a run where a test wants it."""


def cut_before(monkeypatch, module, name, call=1):
    """Ends the run before the `call`-th call of a function."""
    original, calls = getattr(module, name), []

    def cut(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Cut(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, cut)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (heldout, "heldout_bits", 1),  # all steps of a phase are done, nothing of its end is
        (checkpoints.Checkpoints, "wait", 1),  # the phase's checkpoint is being written
        (export, "export_model", 1),  # it is there, the model folder is not
        (loop.Trainer, "train", 2),  # both are; the next phase has not begun
        (loop.Trainer, "finish", 1),  # all is done but for the checkpoints
    ],
)
def test_cut_at_a_phase_s_end_it_goes_on_to_the_same_bytes(
    trained, tmp_path, tokenizer_step, monkeypatch, module, name, call
):
    config = make_config(tmp_path, tokenizer_step, checkpoints=CheckpointConfig(seconds=1e9))
    with monkeypatch.context() as patch:
        cut_before(patch, module, name, call)
        with pytest.raises(Cut):
            pretrain.run(config)
    pretrain.run(config)
    same_models(trained, tmp_path)
    assert losses(tmp_path) == losses(trained)
    assert [row["step"] for row in rows(tmp_path, "heldout")] == [
        row["step"] for row in rows(trained, "heldout")
    ]
    assert not list(tmp_path.glob("*checkpoint-*"))


def test_another_configuration_does_not_go_on_from_a_checkpoint(tmp_path, tokenizer_step, monkeypatch):
    with monkeypatch.context() as patch:
        cut_before(patch, export, "export_model")
        with pytest.raises(Cut):
            pretrain.run(make_config(tmp_path, tokenizer_step))
    with pytest.raises(UserError, match=r"seed: 1 .*0 "):
        pretrain.run(make_config(tmp_path, tokenizer_step, seed=1))


def test_held_out_documents_are_scored_in_between_and_once(tmp_path, tokenizer_step, trained, monkeypatch):
    config = make_config(
        tmp_path,
        tokenizer_step,
        watch=WatchConfig(heldout_steps=7),
        checkpoints=CheckpointConfig(seconds=1e9),
    )
    with monkeypatch.context() as patch:
        cut_before(patch, export, "export_model")
        with pytest.raises(Cut):
            pretrain.run(config)
    pretrain.run(config)
    steps = [row["step"] for row in rows(tmp_path, "heldout")]
    ends = [row["step"] for row in rows(trained, "heldout")]
    assert steps == sorted({*range(7, ends[-1] + 1, 7), *ends})
    same_models(trained, tmp_path)  # to score changes nothing


def test_rows_tell_losses_and_repeats_of_each_domain(trained, tokenizer_step):
    train = rows(trained, "train")
    assert {tuple(row["domains"]) for row in train if row["phase"] == "phase-1"} == {("general",)}
    both = [row for row in train if len(row["domains"]) == 2]
    assert both
    for row in both:
        assert min(row["domains"].values()) <= row["loss"] <= max(row["domains"].values())
    sizes = json.loads((tokenizer_step / "tokens/meta.json").read_text())["sources"]
    last = train[-1]["repeats"]
    # All of phase one and a quarter of phase two, padding and the rest of the last batch left out.
    assert last["general"] == pytest.approx(1600 / sizes["general"]["train"]["tokens"], rel=0.05)
    assert last["medical"] == pytest.approx(1200 / sizes["medical"]["train"]["tokens"], rel=0.05)
    skipped = [row for row in train if row["skipped"]]
    assert all(row["documents"] and ":" in row["documents"][0] for row in skipped)


def test_muon_and_micro_batches_train_too(tmp_path, tokenizer_step, trained):
    optim = OptimConfig(name="muon", lr=1e-2, warmup_steps=4)
    config = make_config(tmp_path, tokenizer_step, optim=optim, parallel=ParallelConfig(micro_rows=1))
    pretrain.run(config)
    heldout_bits = [row["bits_per_byte"]["medical"] for row in rows(tmp_path, "heldout")]
    assert heldout_bits[1] < heldout_bits[0]
    assert not math.isclose(heldout_bits[1], rows(trained, "heldout")[1]["bits_per_byte"]["medical"])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(trained, tmp_path, tokenizer_step):
    pretrain.run(make_config(tmp_path / "a", tokenizer_step, checkpoints=CheckpointConfig(seconds=1e9)))
    same_models(trained, tmp_path / "a")
    pretrain.run(
        make_config(tmp_path / "b", tokenizer_step, checkpoints=CheckpointConfig(seconds=1e9), seed=1)
    )
    with pytest.raises(AssertionError):
        same_models(trained, tmp_path / "b")


def test_plan_counts_what_training_does(trained, tokenizer_step, tmp_path):
    config = make_config(tmp_path / "x", tokenizer_step)
    facts = pretrain.plan(config).facts
    model = load(trained / "phase-2")
    total = sum(p.numel() for p in model.parameters())
    assert facts["parameters"].startswith(f"{total:,}: ")
    for name in ("phase-1", "phase-2"):
        taken = [row for row in rows(trained, "train") if row["phase"] == name]
        assert facts[name].startswith(f"{len(taken)} steps of ")
        ends = re.search(r"^rate +(\S+) to ([\d.]+)", facts[name], re.MULTILINE)
        assert [float(end) for end in ends.groups()] == pytest.approx(
            [taken[0]["lr"], taken[-1]["lr"]], rel=1e-2
        )
    assert re.search(
        r"truncated 0 documents, split [\d.]+% \([\d.]+% of tokens\), padding [\d.]+%$", facts["phase-1"]
    )
    assert os.listdir(tmp_path / "x") == []


def test_unknown_source_and_missing_shards_are_refused(tmp_path, tokenizer_step):
    phase = PhaseConfig(name="p", tokens=128, mixture={"medicla": 1.0}, context=32, rows=2)
    config = make_config(tmp_path / "x", tokenizer_step, phases=[phase])
    with pytest.raises(UserError, match="medicla"):
        pretrain.plan(config)
    with pytest.raises(UserError, match="did you mean 'medical'"):
        pretrain.run(config)
    with pytest.raises(UserError, match="no token shards"):
        pretrain.run(make_config(tmp_path / "x", tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mixture": {}}, "needs shares above 0"),
        ({"mixture": {"a": -1.0}}, "needs shares above 0"),
        ({"tokens": 10}, "fewer than one batch"),
        ({"name": "a/b"}, "not a folder name"),
    ],
)
def test_contradictory_phases_are_refused(changes, says):
    values = {"name": "p", "tokens": 8192, "mixture": {"a": 1.0}}
    with pytest.raises(UserError, match=says):
        PhaseConfig(**{**values, **changes})


@pytest.mark.slow
def test_two_processes_train_what_one_does(trained, tmp_path, tokenizer_step):
    config = make_config(tmp_path, tokenizer_step, checkpoints=CheckpointConfig(seconds=1e9))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    code = (
        "import json, sys\nfrom galenic.cli import parse_config\nfrom galenic.pretrain import pretrain\n"
        "pretrain.run(parse_config('pretrain', json.loads(sys.argv[1]))[0])\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(dataclasses.asdict(config))],
            env={**base, "RANK": str(number), "OMP_NUM_THREADS": "1"},
        )
        for number in range(2)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    ours, theirs = rows(tmp_path, "train"), rows(trained, "train")
    for column in ("step", "tokens", "lr", "skipped", "repeats"):
        assert [row[column] for row in ours] == [row[column] for row in theirs]
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-4)
    for phase in ("phase-1", "phase-2"):
        a, b = (load_file(folder / phase / "model.safetensors") for folder in (tmp_path, trained))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-3)
    assert len(rows(tmp_path, "heldout")) == 2
    assert not list(tmp_path.glob("*checkpoint-*"))
