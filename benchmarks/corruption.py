"""Corrupt text as it happens, laid over packed batches: what `guard.py` injects.

wrong tokenizer   shards that another tokenizer wrote: ids by chance
wrong encoding    UTF-8 text read as UTF-16, so that two bytes become one rare character
stuck             one token over and over, as a broken export or a file of zeros gives
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from galenic.pretrain.data.collate import IGNORE

KINDS = ("wrong tokenizer", "wrong encoding", "stuck")


def wrong_tokenizer(ids: np.ndarray, random: np.random.Generator, vocabulary: int, first: int) -> np.ndarray:
    """Returns as many ids by chance from [first, vocabulary)."""
    return random.integers(first, vocabulary, size=len(ids))


def stuck(ids: np.ndarray, random: np.random.Generator, vocabulary: int, first: int) -> np.ndarray:
    """Returns one id of [first, vocabulary), repeated."""
    return np.full(len(ids), random.integers(first, vocabulary))


def wrong_encoding(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Returns the first ids of the text whose UTF-8 bytes are read as UTF-16 (little endian)."""
    garbled = tokenizer.encode(misread(tokenizer.decode(ids)), add_special_tokens=False)
    return np.resize(np.array(garbled or list(ids), dtype=np.int64), len(ids))


def misread(text: str) -> str:
    """Reads UTF-8 as UTF-16: `Bush hid the facts` becomes nine Chinese characters."""
    data = text.encode()
    return data[: len(data) // 2 * 2].decode("utf-16-le", errors="replace")


# ---------------------------------------------------------------------------- batches


def segments(positions: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each document of a packed row; positions restart at 0 with each."""
    starts = np.flatnonzero(positions == 0)
    yield from zip(starts.tolist(), [*starts[1:].tolist(), len(positions)], strict=True)


@dataclass(frozen=True)
class Corruption:
    """Makes batches corrupt: what is drawn follows from the seed, the step and the row."""

    tokenizer: Any
    vocabulary: int
    first: int
    """Id of the first ordinary token, behind the special ones."""
    seed: int

    def apply(
        self, batch: dict[str, torch.Tensor], kind: str, step: int, rows: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Returns the batch with every document's text replaced; its `<s>`, its length and its row's padding stay.

        Args:
            batch: {"input_ids", "position_ids", "labels"}, each (rows, context), and others that are passed on.
            kind: one of `KINDS`.
            step: the batch's, for the draw.
            rows: numbers of the batch's rows in the global batch.
        """
        ids, labels = batch["input_ids"].numpy().copy(), batch["labels"].numpy().copy()
        for place, row in enumerate(rows):
            random = np.random.default_rng([self.seed, step, row])
            for start, end in segments(batch["position_ids"][place].numpy()):
                text = slice(start + 1, end)
                if not (labels[place, text] != IGNORE).any():
                    continue  # the padding at a row's end
                ids[place, text] = self._text(ids[place, text], kind, random)
                labels[place, text] = np.where(labels[place, text] != IGNORE, ids[place, text], IGNORE)
        return batch | {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def _text(self, ids: np.ndarray, kind: str, random: np.random.Generator) -> np.ndarray:
        if kind == "wrong encoding":
            return wrong_encoding(ids, self.tokenizer)
        draw = {"wrong tokenizer": wrong_tokenizer, "stuck": stuck}[kind]
        return draw(ids, random, self.vocabulary, self.first)


# ---------------------------------------------------------------------------- where


def isolated(steps: int, share: float, seed: int) -> dict[int, str]:
    """Draws single bad steps, never two in a row: step -> kind, the kinds equally often."""
    random = np.random.default_rng([seed, 1])
    bad = set(random.permutation(np.arange(0, steps - 1, 2))[: round(share * steps)].tolist())
    # Odd and even steps alike: a bad step may move on by one if the one after next stays good.
    moved = sorted(
        step + 1 if step + 2 not in bad and random.random() < 0.5 else step for step in sorted(bad)
    )
    return dict(zip(moved, _kinds(len(moved), random), strict=True))


def bursts(steps: int, share: float, length: int, seed: int) -> dict[int, str]:
    """Draws runs of `length` bad steps of one kind, at least as far apart, as many bad steps in all: step -> kind."""
    random = np.random.default_rng([seed, 2])
    count = round(share * steps / length)
    starts = np.sort(random.permutation(steps // (2 * length))[:count]) * 2 * length
    kinds = _kinds(count, random)
    return {int(s) + i: kind for s, kind in zip(starts, kinds, strict=True) for i in range(length)}


def _kinds(count: int, random: np.random.Generator) -> list[str]:
    return [KINDS[i % len(KINDS)] for i in random.permutation(count)]
