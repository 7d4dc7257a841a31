"""Merges against mergekit, where it is right, and LoRA adapters against the models PEFT makes of them."""

import os
import subprocess

import pytest
import torch
import yaml
from parity_helpers import drive, executable, surroundings
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from galenic.merge import merge, merge_state_dicts
from galenic.merge.adapters import Adapter
from galenic.merge.config import MethodParameters
from galenic.merge.io import Checkpoint

pytestmark = pytest.mark.parity

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=60,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def llamas(folder, experts, dtype, size):
    """A base and experts on disk; task vectors share a direction and grow with the expert's number."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG).state_dict()
    common = {name: torch.randn_like(tensor) for name, tensor in base.items()}
    states, folders = [], []
    for t in range(experts + 1):
        model = LlamaForCausalLM(CONFIG)
        state = {
            name: (tensor + t * size * (common[name] + torch.randn_like(tensor))).to(dtype)
            for name, tensor in base.items()
        }
        model.to(dtype).load_state_dict(state)
        folders.append(folder / ("base" if t == 0 else f"expert{t}"))
        model.save_pretrained(folders[-1])
        states.append(state)
    return folders, states


def mergekit(folder, folders, method, models, parameters=None, dtype="float32"):
    """Runs mergekit on a recipe; `models` are the parameters of each expert."""
    recipe = {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [
            {"model": str(path), "parameters": numbers}
            for path, numbers in zip(folders[1:], models, strict=True)
        ],
        "dtype": dtype,
    }
    if method == "linear":
        del recipe["base_model"]
    if parameters:
        recipe["parameters"] = parameters
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    out = folder / f"mergekit-{method}"
    done = subprocess.run(
        [executable("mergekit", "mergekit-yaml"), file, out, "--allow-crimes"],
        env=surroundings(folder / "cache") | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}


CASES = {
    "linear": ([{"weight": 0.2}, {"weight": 0.5}], None, {"weights": [0.2, 0.5]}),
    "task_arithmetic": (
        [{"weight": 0.3}, {"weight": 0.6}],
        {"lambda": 0.8},
        {"weights": [0.3, 0.6], "parameters": MethodParameters(scale=0.8)},
    ),
    "slerp": ([{}], {"t": 0.3}, {"parameters": MethodParameters(t=0.3)}),
    "ties": (
        [{"weight": 1.0, "density": 0.5}, {"weight": 2.0, "density": 0.5}],
        None,
        {"weights": [1.0, 2.0], "density": 0.5},
    ),
    "breadcrumbs": (
        [{"weight": 0.5, "density": 0.6, "gamma": 0.05}, {"weight": 0.7, "density": 0.6, "gamma": 0.05}],
        None,
        {"weights": [0.5, 0.7], "parameters": MethodParameters(density=0.6, gamma=0.05)},
    ),
    "model_stock": ([{}, {}], None, {}),
    "sce": ([{}, {}], None, {}),
}


@pytest.mark.parametrize("method", CASES)
def test_same_as_mergekit_in_float32(method, tmp_path):
    """Tensor by tensor: mergekit trims every tensor by itself, and so do we where a model is one tensor."""
    models, parameters, ours = CASES[method]
    folders, (base, *experts) = llamas(tmp_path, len(models), torch.float32, size=0.02)
    theirs = mergekit(tmp_path, folders, method, models, parameters)
    assert set(theirs) == set(base)
    different = total = 0
    for name, tensor in base.items():
        merged = merge_state_dicts(
            {name: tensor}, [{name: expert[name]} for expert in experts], method, **ours
        )
        apart = (merged[name] - theirs[name]).abs() > 1e-6 + 1e-5 * theirs[name].abs()
        different, total = different + int(apart.sum()), total + apart.numel()
    print(f"{method}: {different} of {total} entries differ")
    # At a threshold mergekit breaks ties by position and compares float32 differences; a handful may fall otherwise.
    assert different <= (2 * len(base) if method in ("ties", "breadcrumbs") else 0)


def test_mergekits_task_arithmetic_in_bfloat16_is_not_correctly_rounded_and_ours_is(tmp_path):
    folders, (base, *experts) = llamas(tmp_path, 2, torch.bfloat16, size=0.002)
    models = [{"weight": 0.3}, {"weight": 0.6}]
    theirs = mergekit(tmp_path, folders, "task_arithmetic", models, dtype="bfloat16")
    ours = merge_state_dicts(base, experts, "task_arithmetic", weights=[0.3, 0.6])
    wrong = {"ours": 0, "mergekit": 0}
    for name, tensor in base.items():
        origin = tensor.double()
        exact = origin + sum(
            w * (e[name].double() - origin) for w, e in zip([0.3, 0.6], experts, strict=True)
        )
        nearest = (exact - exact.bfloat16().double()).abs()
        for who, values in (("ours", ours), ("mergekit", theirs)):
            wrong[who] += int(((exact - values[name].double()).abs() > nearest).sum())
    total = sum(tensor.numel() for tensor in base.values())
    print(f"not correctly rounded of {total}: {wrong}")
    assert wrong["ours"] == 0 and wrong["mergekit"] > 0.01 * total


LINEAR = ["q_proj", "down_proj"]
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "stabilised": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEAR,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"q_proj": 3, r"model\.layers\.0\.mlp\.down_proj": 5},
    },
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]},
}


def test_adapters_are_what_peft_makes_of_them(tmp_path):
    folders, _ = llamas(tmp_path, 0, torch.float32, size=0.0)
    drive(
        "newest", "with_peft_adapters", tmp_path / "job", base=folders[0], folder=tmp_path, adapters=ADAPTERS
    )
    for name in ADAPTERS:
        expected = load_file(tmp_path / name / "whole" / "model.safetensors")
        with (
            Checkpoint(folders[0], "base") as base,
            Adapter(tmp_path / name / "adapter", base, name) as adapter,
        ):
            assert set(adapter.tensors) == set(expected)
            changed = 0
            for key, info in adapter.tensors.items():
                values = adapter.read(key, 0, info.numel).view(info.shape)
                torch.testing.assert_close(values.float(), expected[key], rtol=1e-5, atol=1e-6)
                changed += not torch.equal(values.float(), base.read(key, 0, info.numel).view(info.shape))
            assert changed >= 3
    models = [{"model": str(tmp_path / name / "adapter"), "name": name} for name in ADAPTERS]
    merge({"base_model": str(folders[0]), "models": models}, tmp_path / "merged")
