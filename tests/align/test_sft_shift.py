"""Optimum shifting while fine-tuning: at steps known from the config, and a killed run ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from galenic.align import sft, shifting, training
from galenic.align.config import LoraConfig, SftConfig, ShiftConfig
from galenic.flatten import TrainingShift
from galenic.pretrain.config import CheckpointConfig, OptimConfig
from galenic.pretrain.loop import Trainer
from galenic.runtime import UserError, read_json


def make_config(out, base, conversations, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    values = {
        "out": str(out),
        "model": str(base),
        "conversations": str(conversations),
        "tokens": 2560,  # ten steps
        "context": 128,
        "rows": 2,
        "optim": OptimConfig(lr=1e-2, warmup_steps=1),
    }
    return SftConfig(**{**values, **changes})


def metrics(folder, kind):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize(
    ("start", "every", "total", "steps"),
    [(0.5, 2, 10, [5, 7, 9]), (0.0, 4, 10, [1, 5, 9]), (1.0, 1, 10, [10]), (0.25, 100, 10, [3])],
)
def test_the_steps_follow_from_the_config(start, every, total, steps):
    assert list(ShiftConfig(start=start, every=every).steps(total)) == steps


def test_it_shifts_at_its_steps_and_tells(llama_folder, conversations, tmp_path, monkeypatch):
    shift = ShiftConfig(layers=["*.down_proj"], every=3, start=0.4, batches=2, rank=5)
    ranks = []
    save = Trainer.save

    def watch(trainer):
        weight = trainer.model.get_parameter("model.layers.1.mlp.down_proj.weight")
        moment = trainer.optimizer.state[weight]["exp_avg"]
        ranks.append([int(torch.linalg.matrix_rank(m.detach(), rtol=1e-4)) for m in (weight, moment)])
        save(trainer)

    monkeypatch.setattr(Trainer, "save", watch)
    config = make_config(
        tmp_path / "a", llama_folder, conversations, shift=shift, checkpoints=CheckpointConfig(seconds=0)
    )
    assert sft.plan(config).facts["shifts"] == "3, after step 4 and each 3 later"
    sft.run(config)
    # A checkpoint holds the shifted weights and moments; Adam's next step leaves the span again.
    assert [step for step, found in enumerate(ranks, 1) if found == [5, 5]] == [4, 7]
    assert all(found[0] > 5 for step, found in enumerate(ranks, 1) if step not in (4, 7))
    rows = metrics(tmp_path / "a", "shift")
    assert [row["step"] for row in rows] == [4, 7, 10]
    for number, row in enumerate(rows):
        assert list(row["layers"]) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
        share = 0.999 if number else 0.9  # most goes with the first one
        assert all(layer["norm_after"] < share * layer["norm_before"] for layer in row["layers"].values())
        assert all(layer["dimension"] == 64 for layer in row["layers"].values())
    weight = load_file(tmp_path / "a/model/model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert int(torch.linalg.matrix_rank(weight, rtol=1e-4)) == 5  # the last step was one
    assert read_json(tmp_path / "a/model/galenic.json")["shift"]["rank"] == 5


def test_anchored_to_the_start_the_task_vector_gets_shorter(llama_folder, conversations, tmp_path):
    start = load_file(llama_folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    lengths, spans = {}, {}
    for anchored in (False, True):
        out = tmp_path / str(anchored)
        shift = ShiftConfig(layers=[name], start=1.0, rank=3, anchored=anchored)
        sft.run(make_config(out, llama_folder, conversations, shift=shift))
        task = load_file(out / "model/model.safetensors")[f"{name}.weight"] - start[f"{name}.weight"]
        row = metrics(out, "shift")[0]["layers"][name]
        lengths[anchored], spans[anchored] = (
            float(task.norm()),
            int(torch.linalg.matrix_rank(task, rtol=1e-4)),
        )
    assert (
        lengths[True] == pytest.approx(row["norm_after"], rel=1e-4) and row["norm_after"] < row["norm_before"]
    )
    assert spans == {False: 32, True: 3}
    assert lengths[True] < lengths[False]


def test_without_the_section_all_is_as_ever_and_an_exact_no_op_changes_nothing(
    llama_folder, conversations, tmp_path
):
    # The inputs span everything on so many tokens: the exact shift finds nothing to take away.
    exact = ShiftConfig(layers=["*.q_proj"], every=2, output_budget=0.0)
    for name, shift in (("plain", None), ("exact", exact)):
        sft.run(make_config(tmp_path / name, llama_folder, conversations, shift=shift))
    plain, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "exact"))
    assert all(torch.equal(plain[key], other[key]) for key in plain)
    assert not metrics(tmp_path / "plain", "shift") and len(metrics(tmp_path / "exact", "shift")) == 3
    assert "shift" not in read_json(tmp_path / "plain/model/galenic.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": []}, "shift.layers: name at least one"),
        ({"every": 0}, "shift.every: 0 is less than 1"),
        ({"batches": 0}, "shift.batches: 0"),
        ({"start": 1.5}, r"shift.start: 1.5 is not in \[0, 1\]"),
        ({"output_budget": 1.0}, r"shift.output_budget: 1.0 is not in \[0, 1\)"),
        ({"rank": 0}, "shift.rank: 0 keeps nothing"),
        ({"rank": 3, "output_budget": 0.1}, "shift: give output_budget or rank"),
    ],
)
def test_contradictions_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        ShiftConfig(**changes)


def test_adapters_and_unknown_layers_are_refused(llama_folder, conversations, tmp_path):
    with pytest.raises(UserError, match="shift: an adapter's layers are not the model's"):
        make_config(tmp_path, llama_folder, conversations, lora=LoraConfig(), shift=ShiftConfig())
    unknown = ShiftConfig(layers=["model.layers.0.mlp.down_prj"])
    with pytest.raises(UserError, match=r"did you mean 'model\.layers\.0\.mlp\.down_proj'"):
        sft.run(make_config(tmp_path, llama_folder, conversations, shift=unknown))


@pytest.mark.parametrize(
    "point", ["before the shift", "before its row", "before the checkpoint", "at the end"]
)
def test_cut_anywhere_around_a_shift_it_ends_with_the_same_bytes(
    llama_folder, conversations, tmp_path, monkeypatch, point
):
    shift = ShiftConfig(layers=["*.down_proj"], every=3, start=0.4, batches=2, rank=5, anchored=True)

    def run(name):
        sft.run(
            make_config(
                tmp_path / name,
                llama_folder,
                conversations,
                shift=shift,
                checkpoints=CheckpointConfig(seconds=0),
            )
        )

    owner, name = {
        "before the shift": (TrainingShift, "shift"),
        "before its row": (shifting, "append_jsonl"),
        "before the checkpoint": (Trainer, "save"),
        "at the end": (training, "write_json"),
    }[point]
    real, calls = getattr(owner, name), []

    def cut(*arguments):
        calls.append(0)
        if len(calls) == {"save": 7, "write_json": 1}.get(name, 2):  # step 7, the second shift's
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    run("cut")
    run("whole")
    for file in sorted((tmp_path / "whole/model").iterdir()):
        assert file.read_bytes() == (tmp_path / "cut/model" / file.name).read_bytes(), file.name
    assert metrics(tmp_path / "cut", "shift") == metrics(tmp_path / "whole", "shift")
    assert [row["step"] for row in metrics(tmp_path / "cut", "shift")] == [4, 7, 10]


def test_a_killed_run_ends_with_the_same_bytes(llama_folder, conversations, tmp_path):
    command = [sys.executable, "-m", "galenic.cli", "sft", "--model", str(llama_folder)]
    command += ["--conversations", str(conversations), "--tokens", "10240", "--context", "128", "--rows", "2"]
    command += ["--checkpoints.seconds", "0", "--shift.every", "4", "--shift.start", "0.1"]
    command += ["--shift.anchored", "true", "--shift.batches", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    cut = tmp_path / "cut"
    process = subprocess.Popen([*command, "--out", str(cut)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoint-*1[0-9]")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    for out in (cut, tmp_path / "whole"):
        subprocess.run([*command, "--out", str(out)], env=environment, check=True, capture_output=True)
    for file in sorted((tmp_path / "whole" / "model").iterdir()):
        assert file.read_bytes() == (cut / "model" / file.name).read_bytes(), file.name
    assert metrics(cut, "shift") == metrics(tmp_path / "whole", "shift")
    assert [row["step"] for row in metrics(cut, "shift")] == list(range(4, 41, 4))
    losses = [[(r["step"], r["loss"]) for r in metrics(out, "train")] for out in (cut, tmp_path / "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 40
