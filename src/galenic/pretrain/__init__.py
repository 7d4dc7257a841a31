"""Room 3: the three-phase curriculum (Baichuan-M1 report, section 4.2).

    20-tokenizer/tokens ──> mixture per phase ──> best-fit packing ──> steps ──> one model folder per phase
                            (documents)           (rows of tokens)     guard, AdamW, warm-up-stable-decay

In: token shards. Out: a Hugging Face folder at each phase's end and `metrics.jsonl`.
`loop.py` is the loop that fine-tuning shares; `guard.py` is the report's Algorithm 1.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "GradientGuard":
        from galenic.pretrain.guard import GradientGuard

        return GradientGuard
    raise AttributeError(f"module 'galenic.pretrain' has no attribute '{name}'")
