"""Runs mlx-lm's baichuan_m1 for `model.py`, in mlx-lm's own environment: `python mlx_worker.py MODEL_FOLDER`.

One line of JSON in, one out. In: {"rows", "context", "new"}. Out: {"seconds"}. The loops are those of `model.py`:
a prefill whose head sees the last token only, or a greedy token at a time. A context to decode after is read once per
task and copied for every turn, because only decoding counts. While it waits for a line it computes nothing.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path
from time import perf_counter

import mlx.core as mx
from mlx_lm.utils import load_model


def greedy(model, tokens: mx.array, cache: list) -> mx.array:
    token = model.lm_head(model.model(tokens, cache)[:, -1:]).argmax(-1)
    mx.eval(token)
    return token


def prefill(model, rows: int, context: int) -> tuple[mx.array, list]:
    tokens = mx.random.randint(0, model.config.vocab_size, (rows, context))
    cache = model.make_cache()
    return greedy(model, tokens, cache), cache


def decode(model, token: mx.array, cache: list, new: int) -> None:
    for _ in range(new):
        token = greedy(model, token, cache)


def main() -> None:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(sys.argv[1]))
    read: dict[tuple[int, int], tuple[mx.array, list]] = {}
    for line in sys.stdin:
        task = json.loads(line)
        rows, context, new = task["rows"], task["context"], task["new"]
        if new:
            if (rows, context) not in read:
                read[rows, context] = prefill(model, rows, context)
            token, cache = deepcopy(read[rows, context])
            start = perf_counter()
            decode(model, token, cache, new)
        else:
            start = perf_counter()
            prefill(model, rows, context)
        print(json.dumps({"seconds": perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
