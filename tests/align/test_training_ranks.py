"""Two processes (FSDP2 over gloo) align as one does: losses, measures, weights, and one folder that is written once."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from align_helpers import our_folder, pairs, rows, write_lines
from rank_helpers import Ranks

CALL = "galenic.cli:main"
COMMON = {
    "optim": {"lr": 3e-3, "warmup_steps": 1},
    "checkpoints": {"seconds": 0, "asynchronous": False},
}
CLOCK = ("tokens_per_second", "seconds", "memory_gb")


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(
        "galenic.cli", "galenic.align.sft", "galenic.align.tdpo", "galenic.pretrain.loop", "peft", folder="align"
    )
    yield started
    started.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_step, llama_folder, conversations):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "ours": str(our_folder(folder / "ours", tokenizer_step)),
        "llama": str(llama_folder),
        "pairs": write_lines(folder / "pairs.jsonl", pairs()),
        "conversations": str(conversations),
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


VERBS = {"sft": sft, "tdpo": tdpo}


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
    "offloaded": {"reference": {"offload": True}},
    "parts": {"parallel": {"micro_rows": 1}},
}
QUICK = [("tdpo", "llama", "lora"), ("tdpo", "ours", "offloaded"), ("sft", "llama", "full")]
SLOW = [
    ("sft", "ours", "full"),
    ("sft", "ours", "lora"),
    ("sft", "ours", "parts"),
    ("sft", "llama", "lora"),
    ("tdpo", "ours", "full"),
    ("tdpo", "ours", "lora"),
    ("tdpo", "ours", "parts"),
    ("tdpo", "llama", "full"),
    ("tdpo", "llama", "offloaded"),
]


@pytest.mark.parametrize(
    ("verb", "model", "variant"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_two_processes_align_as_one(ranks, inputs, tmp_path, verb, model, variant):
    outs = [tmp_path / str(count) for count in (1, 2)]
    for count, out in enumerate(outs, start=1):
        run(ranks, count, words(verb, inputs, model, out, **VARIANTS[variant]))
    start = load_file(Path(inputs[model]) / "model.safetensors")
    if variant in ("full", "offloaded", "parts"):
        assert all((weights(outs[1])[name] - start[name]).abs().max() > 1e-4 for name in start)
    assert_alike(*outs)


def test_rows_that_do_not_divide_stop_all_with_a_line(ranks, inputs, tmp_path):
    out = tmp_path / "out"
    started_by = words("tdpo", inputs, "llama", out, rows=3)
    out.mkdir()
    codes, text = ranks.run(2, CALL, started_by)
    assert codes == [2, 2] and text.count("rows: 3 in a batch do not divide among 2 processes") == 2
    assert "Traceback" not in text and not (out / "model").exists()
