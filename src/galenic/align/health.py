"""When a run of alignment has gone astray: what its rows say, and what to do about it."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from galenic.align.config import LimitsConfig
from galenic.runtime import UserError

KEPT = "the last checkpoint is kept, and the same command with other settings needs another `out`"


def watchdog(limits: LimitsConfig, *, longest: int = 0) -> Callable[[Mapping[str, Any]], None]:
    """Makes what looks at each row of the metrics (`Trainer.train`'s `check`).

    Args:
        limits: what is allowed.
        longest: tokens at most in what is sampled, for `limits.length`.
    """
    divergences: deque[float] = deque(maxlen=limits.steps)
    lengths: deque[float] = deque(maxlen=limits.steps)
    same = 0

    def check(row: Mapping[str, Any]) -> None:
        nonlocal same
        step = row["step"]
        reward = row.get("reward")
        if reward is not None and not math.isfinite(reward):
            raise UserError(
                f"step {step}: the mean reward is {reward}; look at the rewards of its documents ({KEPT})"
            )
        if limits.kl is not None and "kl" in row:
            divergences.append(row["kl"])
            mean = sum(divergences) / len(divergences)
            if len(divergences) == limits.steps and not mean <= limits.kl:  # nor if it is not a number
                raise UserError(
                    f"step {step}: the policy is {mean:.3g} nats a token from its reference, more than limits.kl "
                    f"{limits.kl:g}: lower optim.lr, or raise what holds it back (kl, beta, alpha) ({KEPT})"
                )
        if limits.length is not None and longest and "length" in row:
            lengths.append(row["length"] / longest)
            mean = sum(lengths) / len(lengths)
            if len(lengths) == limits.steps and mean > limits.length:
                raise UserError(
                    f"step {step}: what is sampled has {mean:.0%} of the most tokens it may have, more than "
                    f"limits.length {limits.length:g}: answers no longer end; lower optim.lr, or start from a model "
                    f"that ends its turns ({KEPT})"
                )
        if limits.constant and "reward_deviation" in row:
            same = same + 1 if row["reward_deviation"] == 0 else 0
            if same >= limits.constant:
                raise UserError(
                    f"step {step}: all rewards of {same} steps in a row are the same, so nothing can be learnt: the "
                    f"tasks are too easy or too hard for this model, or the reward does not see its answers ({KEPT})"
                )

    return check
