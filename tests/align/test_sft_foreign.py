"""Fine-tuning of models that are not ours: a toy Llama, whole and by LoRA."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from galenic.align import sft
from galenic.align.config import LoraConfig, SftConfig
from galenic.evaluate.models import open_model
from galenic.merge import merge
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any
from galenic.pretrain.config import OptimConfig
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.runtime import UserError, read_json


def make_config(out, base, conversations, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    values = {
        "out": str(out),
        "model": str(base),
        "conversations": str(conversations),
        "heldout": str(conversations),
        "tokens": 3840,
        "context": 128,
        "rows": 2,
        "optim": OptimConfig(lr=1e-2, warmup_steps=1),
    }
    return SftConfig(**{**values, **changes})


def answers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["answers"]["medical.train"] for row in rows if row["kind"] == "heldout"]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=16)])
def test_an_expert_learns_and_reruns_to_the_same_bytes(llama_folder, conversations, tmp_path, lora):
    for name in ("a", "b"):
        sft.run(make_config(tmp_path / name, llama_folder, conversations, lora=lora))
    before, after = answers(tmp_path / "a")
    assert after < 0.8 * before
    files = sorted(file.name for file in (tmp_path / "a" / "model").iterdir())
    expected = {"README.md", "galenic.json"}
    expected |= (
        {"adapter_config.json", "adapter_model.safetensors"}
        if lora
        else {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    )
    assert expected <= set(files)
    for file in files:
        one, two = ((tmp_path / name / "model" / file).read_bytes() for name in ("a", "b"))
        assert one == two, file
    assert not list((tmp_path / "a").glob("checkpoint-*"))


def test_a_whole_expert_gives_the_scores_that_were_measured(llama_folder, conversations, tmp_path):
    sft.run(make_config(tmp_path / "a", llama_folder, conversations))
    model = load_any(tmp_path / "a" / "model")
    samples, _ = sft.encode_samples(str(conversations), load_tokenizer(tmp_path / "a" / "model"), 128)
    assert sft.answer_loss(model, samples, 128) == pytest.approx(answers(tmp_path / "a")[1], rel=1e-6)


def test_an_adapter_and_its_merge_give_the_scores_that_were_measured(llama_folder, conversations, tmp_path):
    sft.run(make_config(tmp_path / "a", llama_folder, conversations, lora=LoraConfig(rank=4)))
    adapter = tmp_path / "a" / "model"
    samples, _ = sft.encode_samples(str(conversations), load_tokenizer(llama_folder), 128)
    merged = merge({"base_model": str(llama_folder), "models": [{"model": str(adapter)}]}, tmp_path / "m")
    for model in (open_model(f"{llama_folder}+{adapter}"), load_any(merged)):
        assert sft.answer_loss(model, samples, 128) == pytest.approx(answers(tmp_path / "a")[1], rel=1e-4)


def test_an_adapter_trains_the_factors_alone(llama_folder, conversations, tmp_path):
    sft.run(make_config(tmp_path / "a", llama_folder, conversations, lora=LoraConfig(rank=2, alpha=2)))
    tensors = load_file(tmp_path / "a" / "model" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7 and all(".lora_" in name for name in tensors)
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    settings = read_json(tmp_path / "a" / "model" / "adapter_config.json")
    assert (settings["r"], settings["lora_alpha"]) == (2, 2)
    assert str(llama_folder.parent.parent) not in json.dumps(settings)


def test_an_adapter_is_trained_and_saved_without_a_network(
    llama_folder, conversations, tmp_path, monkeypatch
):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sft.run(make_config(tmp_path / "a", llama_folder, conversations, lora=LoraConfig(rank=2)))


def test_lora_targets_are_chosen_or_refused(llama_folder, conversations, tmp_path):
    chosen = LoraConfig(rank=2, targets=["q_proj"])
    sft.run(make_config(tmp_path / "a", llama_folder, conversations, lora=chosen))
    names = load_file(tmp_path / "a" / "model" / "adapter_model.safetensors")
    assert len(names) == 4 and all("q_proj" in name for name in names)
    with pytest.raises(UserError, match=r"lora.targets: .*no_proj"):
        wrong = LoraConfig(targets=["no_proj"])
        sft.run(make_config(tmp_path / "b", llama_folder, conversations, lora=wrong))


def test_without_peft_the_way_out_is_named(llama_folder, conversations, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'galenic\[lora\]'"):
        sft.run(make_config(tmp_path / "a", llama_folder, conversations, lora=LoraConfig()))


def test_packed_samples_cannot_see_each_other(llama_folder, conversations):
    model = load_any(llama_folder)
    samples, _ = sft.encode_samples(str(conversations), load_tokenizer(llama_folder), 128)
    packed, alone = collate([[samples[0], samples[1]]], 128, 3), collate([[samples[1]]], 128, 3)
    start, length = len(samples[0][0]), len(samples[1][0])
    with torch.no_grad():
        both, one = (
            model(b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits
            for b in (packed, alone)
        )
    torch.testing.assert_close(both[0, start : start + length], one[0, :length], atol=1e-4, rtol=1e-4)
    assert sft.keeps_apart(model, samples[0])


class Mixing(torch.nn.Module):
    """A model that ignores the positions, and so lets samples see each other."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.device = model.device

    def forward(self, input_ids, position_ids, use_cache):
        return self.model(input_ids, use_cache=use_cache)


def test_a_model_that_mixes_samples_gets_one_a_row(llama_folder, conversations, tmp_path, monkeypatch):
    model = load_any(llama_folder)
    samples, _ = sft.encode_samples(str(conversations), load_tokenizer(llama_folder), 128)
    assert not sft.keeps_apart(Mixing(model), samples[0])
    rows = sft.pack_samples(samples, tokens=128 * 30, context=128, seed=0, alone=True)
    assert len(rows) == 30 and all(len(row) == 1 for row in rows)
    packed, alone = (sft.answer_loss(model, samples, 128, alone=a) for a in (False, True))
    assert packed == pytest.approx(alone, rel=1e-5)
    monkeypatch.setattr(sft, "keeps_apart", lambda model, sample: False)
    sft.run(make_config(tmp_path / "a", llama_folder, conversations))
    assert read_json(tmp_path / "a" / "data.json")["packed"] is False


def test_answer_loss_equals_one_by_one(llama_folder, conversations):
    model = load_any(llama_folder)
    samples = sft.encode_samples(str(conversations), load_tokenizer(llama_folder), 128)[0][:5]
    total = count = 0
    for ids, labels in samples:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor(ids)[None]).logits[0].double().log_softmax(-1)
        for position in np.flatnonzero(labels != IGNORE):
            total -= float(scores[position - 1, ids[position]])
            count += 1
    assert sft.answer_loss(model, samples, 128) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_killed_run_ends_with_the_same_bytes(llama_folder, conversations, tmp_path, lora):
    command = [sys.executable, "-m", "galenic.cli", "sft", "--model", str(llama_folder)]
    command += ["--conversations", str(conversations), "--tokens", "25600", "--context", "128", "--rows", "2"]
    command += ["--checkpoints.seconds", "0", *(["--lora.rank", "2"] if lora else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    cut = tmp_path / "cut"
    process = subprocess.Popen([*command, "--out", str(cut)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoint-0000001*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    for out in (cut, tmp_path / "whole"):
        subprocess.run([*command, "--out", str(out)], env=environment, check=True, capture_output=True)
    for file in sorted((tmp_path / "whole" / "model").iterdir()):
        assert file.read_bytes() == (cut / "model" / file.name).read_bytes(), file.name

    def steps(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]

    assert steps(cut) == steps(tmp_path / "whole") and len(steps(cut)) == 100
