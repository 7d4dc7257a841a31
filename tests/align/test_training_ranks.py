"""Two processes (FSDP2 over gloo) align as one does: losses, measures, weights, and one folder that is written once."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from align_helpers import MODULES, foreign, rows, verbs_inputs
from galenic.model.foreign import copy_companions
from rank_helpers import Ranks

CALL = "galenic.cli:main"
COMMON = {
    "optim": {"lr": 3e-3, "warmup_steps": 1},
    "checkpoints": {"seconds": 0, "asynchronous": False},
}
CLOCK = ("tokens_per_second", "seconds", "memory_gb")


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(*MODULES, folder="align")
    yield started
    started.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_step, llama_folder, conversations):
    folder = tmp_path_factory.mktemp("inputs")
    size = {"vocab_size": 512, "max_position_embeddings": 256}
    for name, model in (
        ("untied", foreign("llama", tie_word_embeddings=False, **size)),
        ("capped", foreign("gemma2", **size)),
        ("gpt2", foreign("gpt2", **size)),
    ):
        model.save_pretrained(folder / name)
        copy_companions(llama_folder, folder / name)
    return {
        **verbs_inputs(folder, tokenizer_step, llama_folder, conversations),
        **{name: str(folder / name) for name in ("untied", "capped", "gpt2")},
    }


def sft(inputs):
    return {
        "conversations": inputs["conversations"],
        "heldout": inputs["conversations"],
        "tokens": 2560,
        "context": 128,
        "rows": 4,
    }


def tdpo(inputs):
    return {"pairs": inputs["pairs"], "heldout_share": 0.2, "rows": 4, "context": 64}


def reward(inputs):
    return {**tdpo(inputs), "epochs": 2}


def elo(inputs):
    return {
        "tasks": inputs["tasks"],
        "heldout": inputs["tasks"],
        "heldout_tasks": 5,
        "steps": 4,
        "rows": 4,
        "samples": 2,
        "context": 128,
        "answer_term": True,
        "kl": 0.1,
        "sampling": {"max_new_tokens": 8},
    }


def ppo(inputs):
    return {
        "tasks": inputs["tasks"],
        "heldout": inputs["tasks"],
        "heldout_tasks": 5,
        "rollouts": 2,
        "rows": 8,
        "minibatches": 2,
        "epochs": 2,
        "context": 128,
        "kl_target": 1.0,
        "sampling": {"max_new_tokens": 8},
        "rewards": {"cut_off": -0.5},
    }


VERBS = {"sft": sft, "tdpo": tdpo, "reward": reward, "elo": elo, "ppo": ppo}


def words(verb, inputs, model, out, **changes):
    """Writes the configuration of a small run; returns the words that start it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, "model": inputs[model], **VERBS[verb](inputs), **changes}
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(config))  # JSON is YAML
    return [verb, "--config", str(file), "--out", str(out)]


def run(ranks, count, started_by):
    Path(started_by[-1]).mkdir(exist_ok=True)
    codes, text = ranks.run(count, CALL, started_by)
    assert codes == [0] * count, text


def weights(out):
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def assert_alike(one, other):
    """All that is told and written is the same but for rounding."""
    for kind in ("train", "heldout"):
        pairs = list(zip(rows(one, kind), rows(other, kind), strict=True))
        assert pairs
        for a, b in pairs:
            assert a.keys() == b.keys()
            for name in a.keys() - set(CLOCK):
                if isinstance(a[name], float):
                    assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-5), (a["step"], name)
                elif isinstance(a[name], dict):
                    assert b[name] == pytest.approx(a[name], rel=1e-3), (a["step"], name)
                else:
                    assert a[name] == b[name], (a["step"], name)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and len(a) > 4
    for name in a:
        if name.endswith("c_attn.bias"):
            continue  # attention does not see a bias of its keys: its gradient is rounding, which Adam enlarges
        difference = (a[name] - b[name]).abs()
        assert difference.max() < 2e-3 and difference.mean() < 1e-5, name
    files = [sorted(path.name for path in (out / "model").iterdir()) for out in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        if not name.endswith(".safetensors"):
            assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in one.iterdir())


VARIANTS = {
    "full": {},
    "lora": {"lora": {"rank": 4}},
    "head": {"lora": {"rank": 4, "targets": ["q_proj", "lm_head"]}},
    "offloaded": {"reference": {"offload": True}},
    "parts": {"parallel": {"micro_rows": 1}},
    "copies": {"lora": {"rank": 4}},
    "shift": {"shift": {"layers": ["*.down_proj"], "start": 0.2, "every": 2, "rank": 20, "anchored": True}},
}
COPIES = {**VARIANTS["copies"], "parallel": {"replicate": 2, "micro_rows": 1}}
QUICK = [
    ("tdpo", "llama", "lora"),
    ("tdpo", "ours", "offloaded"),
    ("sft", "llama", "full"),
    ("reward", "ours", "full"),
]
SLOW = [
    ("sft", "ours", "parts"),
    ("sft", "ours", "shift"),
    ("sft", "capped", "lora"),
    ("tdpo", "ours", "copies"),
    ("tdpo", "untied", "head"),
    ("tdpo", "capped", "full"),
    ("reward", "llama", "lora"),
    ("elo", "gpt2", "full"),
    ("elo", "ours", "offloaded"),
    ("ppo", "ours", "lora"),
    ("ppo", "gpt2", "offloaded"),
]
LONG = [
    ("sft", "ours", "full"),
    ("sft", "ours", "lora"),
    ("sft", "llama", "lora"),
    ("tdpo", "ours", "full"),
    ("tdpo", "ours", "lora"),
    ("tdpo", "ours", "parts"),
    ("tdpo", "gpt2", "lora"),
    ("sft", "gpt2", "full"),
    ("ppo", "capped", "lora"),
    ("tdpo", "llama", "full"),
    ("tdpo", "llama", "offloaded"),
    ("reward", "ours", "lora"),
    ("reward", "ours", "parts"),
    ("reward", "llama", "full"),
    ("elo", "ours", "full"),
    ("elo", "llama", "lora"),
    ("elo", "llama", "parts"),
    ("ppo", "ours", "full"),
    ("ppo", "ours", "parts"),
    ("ppo", "llama", "full"),
    ("ppo", "llama", "offloaded"),
    ("ppo", "llama", "lora"),
]
MARKED = [
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    *(pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.long]) for case in LONG),
]
"""In CI each verb, each kind of model and each variant once; the others in `make test-long`."""


@pytest.mark.parametrize(("verb", "model", "variant"), [*QUICK, *MARKED])
def test_two_processes_align_as_one(ranks, inputs, tmp_path, verb, model, variant):
    outs = [tmp_path / str(count) for count in (1, 2)]
    for count, out in enumerate(outs, start=1):
        changes = COPIES if variant == "copies" and count == 2 else VARIANTS[variant]
        run(ranks, count, words(verb, inputs, model, out, **changes))
    start = load_file(Path(inputs[model]) / "model.safetensors")
    if variant in ("full", "offloaded", "parts"):
        trained = weights(outs[1])
        shared = start.keys() & trained.keys()  # a reward model has another head
        assert len(start.keys() - shared) <= (verb == "reward")
        assert all((trained[name] - start[name]).abs().max() > 1e-4 for name in shared)
    assert_alike(*outs)


def test_rows_that_do_not_divide_stop_all_with_a_line(ranks, inputs, tmp_path):
    out = tmp_path / "out"
    started_by = words("tdpo", inputs, "llama", out, rows=3)
    out.mkdir()
    codes, text = ranks.run(2, CALL, started_by)
    assert codes == [2, 2] and text.count("rows: 3 in a batch do not divide among 2 processes") == 2
    assert "Traceback" not in text and not (out / "model").exists()


@pytest.mark.parametrize(
    ("verb", "model"),
    [
        ("elo", "ours"),
        *(
            pytest.param(
                verb, model, marks=[pytest.mark.slow, *([pytest.mark.long] if model == "llama" else [])]
            )
            for verb in VERBS
            for model in ("ours", "llama")
            if (verb, model) != ("elo", "ours")
        ),
    ],
)
def test_row_by_row_is_all_at_once(ranks, inputs, tmp_path, verb, model):
    outs = [tmp_path / name for name in ("whole", "parts")]
    for out in outs:
        run(ranks, 1, words(verb, inputs, model, out, **(VARIANTS["parts"] if out.name == "parts" else {})))
    assert_alike(*outs)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "lora"])
def test_in_half_precision_it_stays_near(ranks, inputs, tmp_path, variant):
    """Weights, moments and reductions stay float32; products, and a reference of its own, are bfloat16."""
    losses = {}
    for precision, count in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2)):
        out = tmp_path / f"{precision}-{count}"
        run(ranks, count, words("tdpo", inputs, "ours", out, precision=precision, **VARIANTS[variant]))
        losses[precision, count] = [row["loss"] for row in rows(out)]
        assert all(str(tensor.dtype) == "torch.float32" for tensor in weights(out).values())
    exact, *others = losses.values()
    for other in others:
        assert other == pytest.approx(exact, abs=0.05) and other != exact
        assert other[0] == pytest.approx(
            0.6931, abs=2e-3
        )  # the policy is its reference, in this precision too


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(ranks, inputs, tmp_path, first, then):
    whole, out = tmp_path / "whole", tmp_path / "out"
    changes = {"lora": {"rank": 4}, "epochs": 4}
    run(ranks, 1, words("tdpo", inputs, "llama", whole, **changes))
    started_by = words("tdpo", inputs, "llama", out, **changes)
    out.mkdir()
    job = ranks.start(first, CALL, started_by)
    while not list(out.glob("checkpoint-0000001*")) and not job.ended():
        time.sleep(0.001)
    for pid in job.pids:
        os.kill(pid, signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL] * first, job.stderr()
    run(ranks, then, started_by)
    assert len(rows(out)) > 20
    assert_alike(whole, out)
