"""Alignment killed with SIGKILL, anywhere, again and again: it ends with the bytes of a run that nobody disturbed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from align_helpers import MODULES, files, told, verbs_inputs
from kill_helpers import steps
from rank_helpers import Ranks

CALL = "galenic.cli:main"
COMMON = {
    "optim": {"lr": 3e-3, "warmup_steps": 1},
    "checkpoints": {"seconds": 0},
    "watch": {"to": []},
}
WHERE = ("step", "while writing", "before the rename", "model folder", "any time")


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(*MODULES, folder="faults")
    yield started
    started.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_step, llama_folder, conversations):
    folder = tmp_path_factory.mktemp("inputs")
    return verbs_inputs(folder, tokenizer_step, llama_folder, conversations)


def sft(inputs):
    heldout = {"heldout": inputs["conversations"]}
    return {
        "conversations": inputs["conversations"],
        **heldout,
        "tokens": 256 * 24,
        "context": 128,
        "rows": 2,
    }


def tdpo(inputs):
    return {"pairs": inputs["pairs"], "heldout_share": 0.2, "rows": 2, "context": 64, "epochs": 2}


def elo(inputs):
    return {
        "tasks": inputs["tasks"],
        "heldout": inputs["tasks"],
        "heldout_tasks": 4,
        "steps": 24,
        "rows": 2,
        "samples": 2,
        "context": 128,
        "kl": 0.1,
        "sampling": {"max_new_tokens": 6},
    }


def ppo(inputs):
    return {
        "tasks": inputs["tasks"],
        "heldout": inputs["tasks"],
        "heldout_tasks": 4,
        "rollouts": 6,
        "rows": 4,
        "minibatches": 2,
        "epochs": 2,
        "context": 128,
        "kl_target": 1.0,
        "sampling": {"max_new_tokens": 6},
        "rewards": {"cut_off": -0.5},
    }


VERBS = {"sft": sft, "tdpo": tdpo, "reward": tdpo, "elo": elo, "ppo": ppo}
CASES = {
    "sft-full": ("sft", "ours", {}),
    "sft-lora": ("sft", "ours", {"lora": {"rank": 4}}),
    "tdpo-full": ("tdpo", "ours", {}),
    "tdpo-lora": ("tdpo", "llama", {"lora": {"rank": 4}}),
    "tdpo-offloaded": ("tdpo", "llama", {"reference": {"offload": True}}),
    "reward-full": ("reward", "ours", {}),
    "reward-lora": ("reward", "llama", {"lora": {"rank": 4}}),
    "elo-full": ("elo", "ours", {}),
    "elo-lora": ("elo", "llama", {"lora": {"rank": 4}}),
    "ppo-full": ("ppo", "ours", {"reference": {"offload": True}}),
    "ppo-lora": ("ppo", "llama", {"lora": {"rank": 4}}),
}
SAMPLE = (("sft-lora", 2), ("tdpo-full", 1), ("reward-lora", 2), ("elo-full", 1), ("ppo-full", 2))
"""(case, processes) that CI runs: a verb each, `make test-long` all."""


def words(inputs, case, out):
    verb, model, changes = CASES[case]
    out.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps({**COMMON, "model": inputs[model], **VERBS[verb](inputs), **changes}))
    return [verb, "--config", str(file), "--out", str(out)]


def reached(where, out, step, deadline):
    """Whether a run is where it shall be killed."""
    if where == "any time":
        return time.monotonic() >= deadline
    if where == "model folder":
        return any(out.glob(".model.partial")) or (out / "model").exists()
    if steps(out) < step:
        return False
    pattern = {"while writing": "*/*", "before the rename": "run.json"}.get(where)
    return pattern is None or any(out.glob(f".checkpoint-*.partial/{pattern}"))


def killed_until_done(ranks, count, started_by, total, kills, seed):
    """Kills a run at places drawn from `seed`, then lets it end; returns how often it was really cut."""
    draw, out, cut = random.Random(seed), Path(started_by[-1]), 0
    for kill in range(kills):
        where = WHERE[(kill + seed) % len(WHERE)]
        step = min(total - 1, int(total * (kill + draw.random()) / kills))
        job = ranks.start(count, CALL, started_by)
        deadline = time.monotonic() + draw.uniform(0.1, 2.0)
        victims = job.pids if draw.random() < 0.5 else [draw.choice(job.pids)]
        while not job.ended():
            if reached(where, out, step, deadline):
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                end = time.monotonic() + 30
                while not job.ended() and time.monotonic() < end:
                    time.sleep(0.01)
                for pid in set(job.pids) - set(victims) if not job.ended() else ():
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.0005)
        codes = job.wait()
        assert all(code in (0, 2, -signal.SIGKILL) for code in codes), job.stderr()
        if -signal.SIGKILL not in codes:
            break  # it was through before
        cut += 1
    codes, text = ranks.run(count, CALL, started_by)
    assert codes == [0] * count, text
    return cut


def survives(ranks, inputs, tmp_path, case, count, kills, seed=0):
    whole = tmp_path / "whole"
    codes, text = ranks.run(count, CALL, words(inputs, case, whole))
    assert codes == [0] * count, text
    total = steps(whole)
    assert total >= 24
    cut, outs = 0, []
    while cut < kills and len(outs) < kills:  # a run may be through before it is hit
        out = tmp_path / f"out-{len(outs)}"
        started_by = words(inputs, case, out)
        cut += killed_until_done(ranks, count, started_by, total, kills - cut, seed + 1000 * len(outs))
        outs.append(out)
        assert files(out / "model") == files(whole / "model")
        for kind in ("train", "heldout"):
            assert told(out, kind) == told(whole, kind)
        left = [sorted(path.name for path in folder.iterdir()) for folder in (out, whole)]
        assert left[0] == left[1]
    print(f"{case}: {cut} kills of {count} processes in {len(outs)} runs")
    assert cut >= kills - 1


def test_killed_inside_saves_it_ends_with_the_same_bytes(ranks, inputs, tmp_path):
    survives(ranks, inputs, tmp_path, "tdpo-lora", 1, 2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "count"),
    [
        pytest.param(case, count, marks=() if (case, count) in SAMPLE else pytest.mark.long)
        for case in CASES
        for count in (1, 2)
    ],
)
def test_killed_many_times(ranks, inputs, tmp_path, case, count):
    survives(ranks, inputs, tmp_path, case, count, 6, seed=count)
