"""Learning rates: pure functions of where the run is.

A rate is a peak times the warm-up's share, or a way down from the peak. Steps count from 0 and a step's own rate counts
it as done: the last step of a decay has exactly its final rate, the last step of the warm-up exactly the peak.

Sources: Baichuan-M1 report, section 4.2 (linear warm-up, constant, cosine at the end); MiniCPM (arXiv 2404.06395) for
warm-up-stable-decay; "1 - sqrt" from Hägele et al. (arXiv 2405.18392).
"""

import math
from collections.abc import Sequence

from galenic.pretrain.config import PretrainConfig


def warmup(step: int, steps: int) -> float:
    """Share of the peak in a linear warm-up: (step + 1) / steps, then 1. Without steps it is 1."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def constant(progress: float, *, start: float, end: float) -> float:
    """Stays at `start`."""
    return start


def cosine_decay(progress: float, *, start: float, end: float) -> float:
    """Half a cosine from `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def one_minus_sqrt_decay(progress: float, *, start: float, end: float) -> float:
    """`end + (start - end) (1 - sqrt(progress))`: falls fast at first."""
    return end + (start - end) * (1 - math.sqrt(progress))


def linear_decay(progress: float, *, start: float, end: float) -> float:
    """A line from `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * (1 - progress)


DECAYS = {"cosine": cosine_decay, "1-sqrt": one_minus_sqrt_decay, "linear": linear_decay}


def wsd(step: int, steps: int, *, warm: int, start: float, end: float | None, decay: str) -> float:
    """Rate of one phase of warm-up-stable-decay, without the warm-up's share.

    Args:
        step: in the phase, from 0.
        steps: of the phase.
        warm: first steps of the phase that belong to the run's warm-up; the decay begins after them.
        start: rate before the decay.
        end: rate of the phase's last step; None: constant.
        decay: name in `DECAYS`.
    """
    if end is None or step < warm:
        return start
    return DECAYS[decay]((step + 1 - warm) / (steps - warm), start=start, end=end)


def rate(config: PretrainConfig, steps: Sequence[int], phase: int, step: int) -> float:
    """Learning rate of one step of a run; the same function trains and plans.

    `wsd`: a phase stands at its own `lr` (else `optim.lr`), or goes from there to its `final_lr`. `cosine`: one cosine
    from `optim.lr` after the warm-up to the last phase's `final_lr` at the end; the phases' own rates do not count.
    `constant`: `optim.lr`. All begin with the linear warm-up over `optim.warmup_steps`.

    Args:
        config: its `schedule`, `optim` and `phases`.
        steps: of each phase.
        phase: number of the phase, from 0.
        step: in the phase, from 0.
    """
    first = sum(steps[:phase])
    optim, now = config.optim, config.phases[phase]
    share = warmup(first + step, optim.warmup_steps)
    if config.schedule == "constant":
        return share * optim.lr
    if config.schedule == "cosine":
        begin, of, start, end, decay = 0, sum(steps), optim.lr, config.phases[-1].final_lr, "cosine"
    else:
        begin, of, start, end, decay = first, steps[phase], now.lr or optim.lr, now.final_lr, now.decay
    warm = max(0, optim.warmup_steps - begin)
    return share * wsd(first + step - begin, of, warm=warm, start=start, end=end, decay=decay)
