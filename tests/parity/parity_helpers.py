"""What every test here needs: an environment of somebody else's software, and a random model folder for it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, load, save

ROOT = Path(__file__).parents[2]
DRIVERS = Path(__file__).parent / "drivers"
TOLERANCE = 1e-4  # of logits in float32

ANSWERS = {
    "What is asthma?": "asthma chronic lung.",
    "What follows fever?": "fever cough mild.",
    "Which drug?": "drug dose daily child.",
}


def executable(environment: str, name: str = "python") -> Path:
    file = ROOT / ".venvs" / environment / "bin" / name
    if not file.is_file():
        pytest.fail(f"{file.relative_to(ROOT)} is missing: run `make peers`", pytrace=False)
    return file


def surroundings(cache: Path) -> dict[str, str]:
    """Environment variables under which nothing leaves this machine and nothing here is imported."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
    silent = dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"), "1")
    # Whatever asks for the network all the same meets a closed port.
    walls = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    open_doors = dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1")
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
    # vLLM takes 90% of the machine's memory unless told otherwise, and binds its threads to cores.
    vllm = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(cache),
    }
    return {**kept, **offline, **silent, **walls, **open_doors, **threads, **vllm, "HF_HOME": str(cache)}


def drive(environment: str, driver: str, workspace: Path, seconds: int = 280, **job) -> dict:
    """Runs drivers/DRIVER.py in .venvs/ENVIRONMENT with `job` as JSON; returns the arrays and values it saved."""
    workspace.mkdir(parents=True, exist_ok=True)
    out = workspace / "out.npz"
    out.unlink(missing_ok=True)
    (workspace / "job.json").write_text(json.dumps({**job, "out": str(out)}, default=str))
    # -I: neither PYTHONPATH nor the current folder; galenic is not to be found there.
    command = [executable(environment), "-I", DRIVERS / f"{driver}.py", workspace / "job.json"]
    done = subprocess.run(
        command,
        env=surroundings(workspace / "cache"),
        cwd=workspace,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        pytest.fail(f"{driver} in {environment}:\n{done.stdout}\n{done.stderr}", pytrace=False)
    with np.load(out) as arrays:
        return {name: arrays[name] for name in arrays.files}


SIZES = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 4,
    "num_swa_key_value_heads": 2,
    "sliding_window": 16,
    "rope_theta": 10000.0,
}


def random_model(seed: int = 0, **changes) -> BaichuanM1ForCausalLM:
    """Returns a model with large weights, taps of either sign and gains off one, so that every mistake shows."""
    model = BaichuanM1ForCausalLM(BaichuanM1Config(**(SIZES | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3, generator=generator)
            elif "conv" in name:
                parameter.normal_(0.5, 0.7, generator=generator)
            else:
                parameter.normal_(0.0, 1.4 * parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def random_folder(folder: Path, tokenizer: Path | None = None, seed: int = 0, **changes):
    """Saves a random model and returns it as `galenic.model.load` reads it."""
    save(random_model(seed, **changes), folder, tokenizer=tokenizer, provenance={"title": "Random"})
    return load(folder)


def random_tokens(count: int, seed: int = 1, vocabulary: int = SIZES["vocab_size"]) -> list[int]:
    """Returns token ids without the special ones."""
    return torch.randint(10, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def our_logits(model: BaichuanM1ForCausalLM, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens])).logits[0].numpy()


@torch.no_grad()
def our_greedy(model: BaichuanM1ForCausalLM, tokens: list[int], new_tokens: int) -> tuple[list[int], float]:
    """Returns the greedy continuation and the smallest lead of a chosen token over the second best."""
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )
    best = model(out).logits[0, len(tokens) - 1 : -1].topk(2).values
    return out[0, len(tokens) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def clear_prompt(model: BaichuanM1ForCausalLM, length: int, new_tokens: int) -> tuple[list[int], list[int]]:
    """Returns a prompt and its greedy continuation in which no two tokens are so close that rounding decides."""
    for seed in range(20):
        prompt = random_tokens(length, seed)
        greedy, lead = our_greedy(model, prompt, new_tokens)
        if lead > 2 * TOLERANCE:
            return prompt, greedy
    raise AssertionError("every prompt has a tie")
