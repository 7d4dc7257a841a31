"""Logits and greedy tokens from mlx-lm's own baichuan_m1."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

job = json.loads(Path(sys.argv[1]).read_text())
model, _ = load_model(Path(job["folder"]))
tokens = job["tokens"]


def in_pieces(sizes: list[int]) -> np.ndarray:
    cache, logits, first = model.make_cache(), [], 0
    for size in sizes:
        logits.append(np.array(model(mx.array([tokens[first : first + size]]), cache=cache)[0]))
        first += size
    return np.concatenate(logits)


steps = generate_step(
    mx.array(job["prompt"]), model, max_tokens=job["new_tokens"], prefill_step_size=job["prefill_step_size"]
)
np.savez(
    job["out"],
    whole=np.array(model(mx.array([tokens]))[0]),
    prefill=in_pieces([len(tokens)]),
    chunks=in_pieces([5, 1, 30, len(tokens) - 36]),
    steps=in_pieces([1] * len(tokens)),
    greedy=np.array([int(token) for token, _ in steps]),
)
