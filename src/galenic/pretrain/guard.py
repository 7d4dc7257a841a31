"""The report's gradient guard: skip an isolated spike of the gradient norm, accept the second in a row."""

from collections import deque
from collections.abc import Iterable


class GradientGuard:
    """Decides from the global gradient norm, before clipping, whether a step is taken.

    With S the last `history` accepted norms and g the present one, a step is discarded when S is full and

        g > factor * mean(S) + offset

    unless the step before it was discarded too: an isolated spike is special data, two in a row are a steep place
    that must be walked. A discarded norm does not enter S; an accepted one, a second spike included, does.

    Source: Baichuan-M1 report (arXiv 2502.12671), Algorithm 1; its numbers are the defaults.

    Args:
        history: accepted norms kept; the guard is silent until there are that many.
        factor: multiple of their mean.
        offset: added to it.
        max_skips: steps discarded in a row at most.
        norms: accepted norms to start from, oldest first.
        skips: steps discarded just before.
    """

    def __init__(
        self,
        *,
        history: int = 100,
        factor: float = 1.2,
        offset: float = 0.1,
        max_skips: int = 1,
        norms: Iterable[float] = (),
        skips: int = 0,
    ) -> None:
        self.history, self.factor, self.offset, self.max_skips = history, factor, offset, max_skips
        self.norms: deque[float] = deque(norms, maxlen=history)
        self.skips = skips

    def accept(self, norm: float) -> bool:
        """Takes the step's gradient norm; returns whether the step is taken."""
        full = len(self.norms) >= self.history
        if full and norm > self.factor * sum(self.norms) / len(self.norms) + self.offset:
            if self.skips < self.max_skips:
                self.skips += 1
                return False
        self.skips = 0
        self.norms.append(norm)
        return True

    def state(self) -> dict[str, list[float] | int]:
        """What a resumed guard needs: keyword arguments `norms` and `skips`."""
        return {"norms": list(self.norms), "skips": self.skips}
