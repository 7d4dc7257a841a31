"""Intervals and averages: pure functions on numbers."""

import math
from collections.abc import Mapping

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion.

    The set of p whose normal approximation would not reject the observed share at level z: the roots of
    (share - p)^2 = z^2 p (1 - p) / n. Unlike share +- z sqrt(share (1 - share) / n) it stays inside [0, 1] and has a
    width when every answer is right.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), pages 209-212.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n > 0")
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the roots are 0 and 1 exactly; rounding would leave them beside the share.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def normalised_average(scores: Mapping[str, float], experts: Mapping[str, float]) -> float | None:
    """Returns the mean over benchmarks of score / score of that benchmark's own expert.

    None when there are no experts or an expert scores 0, where the ratio has no meaning.

    Args:
        scores: benchmark -> the model's score.
        experts: benchmark -> the score of the expert of its domain.

    Source: MetaGPT (arXiv 2406.11385), section 4, "normalized average"; reproduces its Tables 1-3.
    """
    if not experts or any(score == 0 for score in experts.values()):
        return None
    return math.fsum(scores[name] / expert for name, expert in experts.items()) / len(experts)
