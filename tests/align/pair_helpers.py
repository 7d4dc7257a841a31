"""Small models and preference pairs for the tests of TDPO and of reward models."""

import json
from pathlib import Path

import torch

from conftest import WORDS
from galenic.align.pairs import Pair
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, save


def small(seed=0, spread=1.0, **changes) -> BaichuanM1ForCausalLM:
    """A network whose weights are large enough that every mistake shows."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_swa_attention_heads": 2,
        "num_swa_key_value_heads": 1,
        "sliding_window": 8,
        "max_position_embeddings": 128,
    }
    model = BaichuanM1ForCausalLM(BaichuanM1Config(**(sizes | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, spread * parameter.shape[-1] ** -0.5)
    return model


def save_base(folder: Path, tokenizer: Path) -> Path:
    save(small(), folder, tokenizer=tokenizer, provenance={"verb": "test"})
    return folder


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


def rows_of(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
