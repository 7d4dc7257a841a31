"""vLLM with our plugin: same folder, same greedy tokens as transformers, however vLLM cuts, caches or throws out."""

import numpy as np
import pytest
import torch
from parity_helpers import TOLERANCE, drive, our_greedy, random_folder, random_tokens

from galenic.model import load

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
WHOLE = {"enable_chunked_prefill": False, "enable_prefix_caching": False}


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


def test_same_tokens_however_they_are_scheduled(tmp_path):
    model = random_folder(tmp_path / "model", **SIZES)
    # PROMPTS again, and more; the last first, which few blocks still remember.
    longer = [prompt + random_tokens(20, 100 + i) for i, prompt in enumerate(PROMPTS)][::-1]
    setups = {
        "whole prompts": (EAGER | WHOLE, [PROMPTS]),
        "chunks of 40": (
            EAGER | {"max_num_batched_tokens": 40, "max_num_seqs": 8, "enable_prefix_caching": False},
            [PROMPTS],
        ),
        "prefixes from the cache": (EAGER | {"enable_prefix_caching": True}, [PROMPTS, longer]),
        "chunks and prefixes": (
            EAGER | {"max_num_batched_tokens": 72, "max_num_seqs": 16, "enable_prefix_caching": True},
            [PROMPTS, longer],
        ),
        "few blocks": (EAGER | {"num_gpu_blocks_override": 64, "enable_prefix_caching": False}, [PROMPTS]),
        "few blocks and prefixes": (EAGER | {"num_gpu_blocks_override": 160}, [PROMPTS, longer]),
    }
    found = drive(
        "vllm",
        "with_vllm",
        tmp_path / "vllm",
        seconds=1500,
        folder=tmp_path / "model",
        new_tokens=NEW,
        setups={name: {"options": options, "rounds": rounds} for name, (options, rounds) in setups.items()},
    )
    for name, (_, rounds) in setups.items():
        prompts = sum(rounds, [])
        tokens, cached = found[f"{name}/tokens"], found[f"{name}/cached"]
        ties, largest = compare(model, prompts, tokens)
        preempted = int(found[f"{name}/preempted"])
        print(f"{name}: {len(prompts)} prompts, {ties} part at a tie (lead {largest:.1e}), {cached.sum()} tokens")
        print(f"    from the cache in {np.count_nonzero(cached)} prompts, {preempted} times thrown out")
        assert len(np.unique(tokens)) > 100  # texts, not one word again and again
        assert ties <= 1
        assert (cached.sum() > 0) == ("prefixes" in name), name
        assert (preempted > 0) == ("few" in name), name
