"""vLLM with our plugin: same folder, same greedy tokens as transformers, however vLLM cuts, caches or throws out."""

import json
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from parity_helpers import (
    ANSWERS,
    DRIVERS,
    TOLERANCE,
    drive,
    executable,
    our_greedy,
    random_folder,
    random_tokens,
)
from test_serve import server

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]

NEW = 24
# vLLM's CPU attention takes heads of 32, 64, 80, 96, 112, 128, ... Proportions as in the 14B: a sliding layer holds
# twice a global layer's numbers for each token, so vLLM gives the two kinds blocks of different lengths.
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 8,
    "num_swa_key_value_heads": 4,
    "sliding_window": 48,
    "max_position_embeddings": 512,
}
LENGTHS = [1, 2, 3, 7, 16, 31, 32, 33, 47, 48, 49, 50, 63, 64, 65, 80, 95, 96, 97, 100, 127, 128, 129, 150]
LENGTHS += [160, 191, 192, 193, 200, 255, 256, 300]
PROMPTS = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
EAGER = {"enforce_eager": True, "max_model_len": 512, "block_size": 32, "skip_tokenizer_init": True}


def compare(model, prompts, tokens) -> tuple[int, float]:
    """Returns at how many prompts the tokens part from transformers' greedy ones, and the largest lead given up.

    Where they part, vLLM's token must be as likely as the best one but for rounding.
    """
    ties, largest = 0, 0.0
    for prompt, theirs in zip(prompts, tokens.tolist(), strict=True):
        ours, _ = our_greedy(model, prompt, len(theirs))
        if ours == theirs:
            continue
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ours[:first]])).logits[0, -1].log_softmax(-1)
        lead = float(logits.max() - logits[theirs[first]])
        assert lead < TOLERANCE, f"prompt of {len(prompt)} tokens, token {first}: {lead:.1e} less likely"
        ties, largest = ties + 1, max(largest, lead)
    return ties, largest


def continuations(tmp_path, setups: dict) -> dict:
    """Runs vLLM with each of the setups {name: (options, rounds of prompts)}."""
    jobs = {name: {"options": options, "rounds": rounds} for name, (options, rounds) in setups.items()}
    return drive("vllm", "with_vllm", tmp_path / "vllm", seconds=1500, new_tokens=NEW, setups=jobs)


def test_same_tokens_however_they_are_scheduled(tmp_path):
    model = random_folder(tmp_path / "model", **SIZES)
    # PROMPTS again, and more; the last first, which few blocks still remember.
    longer = [prompt + random_tokens(20, 100 + i) for i, prompt in enumerate(PROMPTS)][::-1]
    common = EAGER | {"model": str(tmp_path / "model")}
    few, alone = {"num_gpu_blocks_override": 64}, {"enable_prefix_caching": False}
    setups = {
        "whole prompts": (common | alone | {"enable_chunked_prefill": False}, [PROMPTS]),
        "chunks of 40": (common | alone | {"max_num_batched_tokens": 40, "max_num_seqs": 8}, [PROMPTS]),
        "prefixes from the cache": (common, [PROMPTS, longer]),
        "chunks and prefixes": (
            common | {"max_num_batched_tokens": 72, "max_num_seqs": 16},
            [PROMPTS, longer],
        ),
        "few blocks": (common | alone | few, [PROMPTS]),
        "few blocks and prefixes": (common | {"num_gpu_blocks_override": 160}, [PROMPTS, longer]),
    }
    found = continuations(tmp_path, setups)
    for name, (_, rounds) in setups.items():
        tokens, cached = found[f"{name}/tokens"], found[f"{name}/cached"]
        ties, largest = compare(model, list(chain(*rounds)), tokens)
        preempted = int(found[f"{name}/preempted"])
        print(
            f"{name}: {len(tokens)} prompts, {ties} part at a tie (lead {largest:.1e}), {cached.sum()} tokens"
        )
        print(f"    from the cache in {np.count_nonzero(cached)} prompts, {preempted} times thrown out")
        assert len(np.unique(tokens)) > 100  # texts, not one word again and again
        assert ties <= 1
        assert (cached.sum() > 0) == ("prefixes" in name), name
        assert (preempted > 0) == ("few" in name), name


def published(folder, remote):
    """Makes of our folder one as it was published: another code file, and none of our own fields or files."""
    shutil.copytree(folder, remote)
    for name in ("modeling_baichuan_m1.py", "galenic.json"):
        (remote / name).unlink()
    config = json.loads((remote / "config.json").read_text())
    del config["norm_head"], config["transformers_version"]
    config["auto_map"] = {
        "AutoConfig": "configuration_baichuan.BaichuanM1Config",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanM1ForCausalLM",
    }
    (remote / "config.json").write_text(json.dumps(config))
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        (remote / name).write_text('raise ImportError("this code must not run")\n')


CONFIGURATIONS = {
    "one page size": {"num_swa_attention_heads": 8, "num_key_value_heads": 2},
    "global layers only": {"sliding_window_layers": []},
    "sliding layers only, first": {"sliding_window_layers": [0, 1, 2, 3]},
    "more sliding layers than global": {"num_hidden_layers": 5, "sliding_window_layers": [0, 1, 3]},
    "no convolution, plain head": {"conv_window": 1, "norm_head": False},
    "window of two": {"sliding_window": 2},
}


def test_other_configurations_and_ways_to_run(tmp_path):
    models, setups = {}, {}
    prompts = PROMPTS[::4]
    for name, changes in CONFIGURATIONS.items():
        folder = tmp_path / name
        models[name] = random_folder(folder, **(SIZES | changes))
        setups[name] = (
            EAGER | {"model": str(folder), "max_num_batched_tokens": 72, "max_num_seqs": 8},
            [prompts],
        )
    folder = tmp_path / "model"
    model = random_folder(folder, **SIZES)
    published(folder, tmp_path / "published")
    ways = {
        "as published": {"model": str(tmp_path / "published"), "trust_remote_code": True},
        "two ranks": {"tensor_parallel_size": 2, "max_num_batched_tokens": 72, "max_num_seqs": 8},
        "compiled": {"enforce_eager": False},
    }
    for name, options in ways.items():
        models[name] = model
        setups[name] = (EAGER | {"model": str(folder)} | options, [prompts, prompts])
    found = continuations(tmp_path, setups)
    for name, (_, rounds) in setups.items():
        ties, largest = compare(models[name], list(chain(*rounds)), found[f"{name}/tokens"])
        print(f"{name}: {len(found[f'{name}/tokens'])} prompts, {ties} part at a tie (lead {largest:.1e})")
        assert ties <= 1


def vllm_serve(folder, **options):
    """Returns the command of a server with no more than it needs."""
    command = [executable("vllm"), DRIVERS / "vllm_cli.py", "serve", folder, "--enforce-eager"]
    command += ["--dtype", "float32"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def test_openai_server_answers_a_client(wide_chat_folder, tmp_path):
    command = vllm_serve(wide_chat_folder, max_model_len=128, block_size=32)
    with server(wide_chat_folder, tmp_path, command, seconds=600) as url:
        job = {"url": url, "folder": wide_chat_folder, "questions": list(ANSWERS), "new_tokens": 24}
        theirs = drive("vllm", "with_openai", tmp_path / "client", **job)
    for index, (question, answer) in enumerate(ANSWERS.items()):
        assert theirs["whole"][index][:2].tolist() == [answer, "stop"]
        assert theirs["streamed"][index][:2].tolist() == [answer, "stop"]
        assert int(theirs["streamed"][index][2]) > 2  # it came in pieces
        cut, end = theirs["cut"][index]
        assert answer.startswith(cut.strip()) and cut.strip() and end == "length"
        print(f"user: {question}\nassistant: {theirs['whole'][index][0]}")


def test_sixteen_requests_at_once(tmp_path):
    model = random_folder(tmp_path / "model", **SIZES)
    prompts = PROMPTS[::-2]
    options = {"max_num_seqs": 16, "max_num_batched_tokens": 96, "block_size": 32, "max_model_len": 512}
    command = [*vllm_serve(tmp_path / "model", **options), "--skip-tokenizer-init"]
    with server(tmp_path / "model", tmp_path, command, seconds=600) as url:
        job = {"url": url, "folder": tmp_path / "model", "prompts": prompts, "new_tokens": NEW}
        theirs = drive("vllm", "with_requests", tmp_path / "client", **job)
    ties, largest = compare(model, prompts, theirs["tokens"])
    running = int(theirs["running"])
    print(
        f"{len(prompts)} requests, up to {running} seen running at once, {ties} part at a tie ({largest:.1e})"
    )
    assert len(prompts) == 16 and running > 4 and ties <= 1
