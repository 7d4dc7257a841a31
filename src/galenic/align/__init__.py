"""Room 4: alignment on the loop of pre-training: one method a file.

    conversations ──> sft ──┬──> elo ──> tdpo ──> ppo ──> model folder (or LoRA adapter), metrics.jsonl
                            │   tasks    pairs    tasks
                    pairs ──└──> reward ───────────┘

* `sft.py`, `reward.py`, `elo.py`, `tdpo.py`, `ppo.py`: a verb each: its objective on tensors with the equation beside
  it, and a thin driver.
* `training.py` is what they share: open, train, score, write. `policy.py` and `token_statistics.py`: log-likelihoods
  and divergences of policy and reference without logits of a whole batch. `lora.py`, `health.py`, `shifting.py`.
* `data/` reads conversations, pairs and tasks; `rollouts/` samples text; `rewards/` says what an answer is worth.

In: a model folder, ours or of any causal language model that transformers knows. Out: the same, aligned.
Paper: Baichuan-M1 report (arXiv 2502.12671), section 5.
"""

from typing import Any

LOSSES = {"elo_loss": "elo", "tdpo_loss": "tdpo", "ppo_loss": "ppo"}
"""Pure functions on tensors -> the file they are in."""


def __getattr__(name: str) -> Any:
    """Imports a method only when its loss is used."""
    if name not in LOSSES:
        raise AttributeError(f"module 'galenic.align' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"galenic.align.{LOSSES[name]}"), name)
