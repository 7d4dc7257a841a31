"""Which of so many things come when, and to which process."""

from typing import Any

import numpy as np

from galenic.pretrain.data.drawing import stable_hash


class Epochs:
    """An endless order of so many things: all of them before one comes again, in a new order each epoch.

    Args:
        count: of the things.
        seed: of the run.
        name: what else the order depends on.
    """

    def __init__(self, count: int, *, seed: int, name: str) -> None:
        self.count, self.seed, self.name = count, seed, name
        self._held: tuple[int, list[int]] = (-1, [])  # an epoch and its order

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, self.count)
        if self._held[0] != epoch:
            key = [self.seed, stable_hash(f"{self.name}/{epoch}")]
            order = np.random.Generator(np.random.Philox(key=key)).permutation(self.count)
            self._held = epoch, order.tolist()
        return self._held[1][within]


def own_share(count: int, parallel: Any) -> list[tuple[int, bool]]:
    """Shares things that are measured among processes: this one's, and whether each counts here.

    All processes take as many, as each of them has to take part in every pass: what some have over is the last thing
    once more, which does not count.

    Args:
        count: of the things.
        parallel: knows the processes (`galenic.pretrain.parallelism.Parallel`).
    """
    turns = range(-(-count // parallel.data_ranks))
    places = [turn * parallel.data_ranks + parallel.data_rank for turn in turns]
    return [(min(place, count - 1), place < count) for place in places]
