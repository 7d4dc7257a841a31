"""Preference pairs for the tests of TDPO and of reward models."""

import json
from pathlib import Path

import torch

from align_helpers import WORDS
from galenic.align.pairs import Pair


def drawn_pairs(count, vocabulary, seed=0) -> list[Pair]:
    """Pairs of random tokens of every length, some with a margin."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most):
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    pairs = []
    for number in range(count):
        prompt = tokens(6)
        pairs.append(
            Pair(
                id=f"drawn:{number}",
                chosen=prompt + tokens(7),
                rejected=prompt + tokens(7),
                prompt=len(prompt),
                margin=number % 3 / 2,
            )
        )
    return pairs


def question(index) -> str:
    return f"What follows {WORDS[index % len(WORDS)]} {WORDS[(index * 3) % len(WORDS)]}?"


def write_pairs(path: Path, count=60, **more) -> Path:
    """Pairs that one word tells apart: what is preferred says `mild`, the other `severe`."""
    with open(path, "w") as file:
        for index in range(count):
            word = WORDS[(index + 1) % len(WORDS)]
            row = {"prompt": question(index), "chosen": f"{word} mild.", "rejected": f"{word} severe."}
            file.write(json.dumps(row | more) + "\n")
    return path
