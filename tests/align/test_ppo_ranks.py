"""PPO on two processes (FSDP2 over gloo): what one does, and killed, the same bytes again."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from ppo_helpers import TASKS
from safetensors.torch import load_file

from align_helpers import files, our_folder, told, write_lines
from rank_helpers import Ranks

CALL = "ppo_helpers:main"


@pytest.fixture(scope="module")
def ranks():
    names = ("cli", "align.ppo", "align.rollouts.experience", "pretrain.loop")
    started = Ranks(*(f"galenic.{name}" for name in names), "peft", folder="align")
    yield started
    started.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_step, llama_folder):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "ours": str(our_folder(folder / "ours", tokenizer_step)),
        "llama": str(llama_folder),
        "tasks": write_lines(folder / "tasks.jsonl", TASKS),
    }


def words(inputs, model, out, **changes):
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "model": inputs[model],
        "tasks": inputs["tasks"],
        "heldout": inputs["tasks"],
        "rollouts": 2,
        "rows": 8,
        "context": 64,
        "kl_target": 0.5,
        "sampling": {"max_new_tokens": 6},
        "optim": {"lr": 3e-3, "warmup_steps": 1},
        "checkpoints": {"seconds": 0, "asynchronous": False},
        **changes,
    }
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(config))  # JSON is YAML
    return ["ppo", "--config", str(file), "--out", str(out)]


LORA, OFFLOADED = {"lora": {"rank": 4}}, {"reference": {"offload": True}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("ours", {}),
        ("ours", LORA),
        pytest.param("llama", LORA, marks=pytest.mark.long),
        ("llama", OFFLOADED),
        pytest.param("llama", {"parallel": {"micro_rows": 1}}, marks=pytest.mark.long),
    ],
)
def test_two_processes_align_as_one(ranks, inputs, tmp_path, model, changes):
    for count in (1, 2):
        codes, text = ranks.run(count, CALL, words(inputs, model, tmp_path / str(count), **changes))
        assert codes == [0] * count, text
    for kind in ("train", "heldout"):
        for one, two in zip(*(told(tmp_path / name, kind) for name in "12"), strict=True):
            assert one.pop("kind") == two.pop("kind")
            assert two == pytest.approx(one, rel=1e-3, abs=2e-5)
    tensors = [load_file(next(Path(tmp_path / name / "model").glob("*.safetensors"))) for name in "12"]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        difference = (tensor - tensors[1][name]).abs()
        assert difference.max() < 2e-3 and difference.mean() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(("count", "changes"), [(1, {}), (2, {}), (2, LORA)])
def test_killed_anywhere_it_ends_with_the_same_bytes(ranks, inputs, tmp_path, count, changes):
    changes = {"rollouts": 6, **changes}
    codes, text = ranks.run(count, CALL, words(inputs, "llama", tmp_path / "whole", **changes))
    assert codes == [0] * count, text
    out, cut = tmp_path / "cut", 0
    for step in (2, 9, 15, 22):
        job = ranks.start(count, CALL, words(inputs, "llama", out, **changes))
        end = time.monotonic() + 60
        while not job.ended() and time.monotonic() < end:
            if (out / "metrics.jsonl").exists() and len(told(out)) >= step:
                for pid in job.pids:
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        cut += -signal.SIGKILL in job.wait()
    assert cut >= 3
    codes, text = ranks.run(count, CALL, words(inputs, "llama", out, **changes))
    assert codes == [0] * count, text
    assert files(out / "model") == files(tmp_path / "whole" / "model")
    for kind in ("train", "heldout"):
        assert told(out, kind) == told(tmp_path / "whole", kind)
