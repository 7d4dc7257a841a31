"""The starter's curriculum at a size that fits five seeds of many arms: what `guard.py` and `curriculum.py` train.

The starter's corpus, tokenizer, mixtures and phase proportions; a network of 96 instead of 256 dimensions and a
seventh of the tokens; contexts of 192 and then 768 tokens, the report's ratio (8K, then 32K).
"""

import argparse
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
import yaml

from galenic.corpus.tokens.shards import Shard, read_meta, read_shard
from galenic.evaluate.likelihood import token_log_probs
from galenic.pretrain.checkpoints.checkpoints import Checkpoints
from galenic.pretrain.config import (
    ArchitectureConfig,
    CheckpointConfig,
    OptimConfig,
    PhaseConfig,
    PretrainConfig,
)
from galenic.pretrain.data.curriculum import PhaseBatches
from galenic.pretrain.guard import GradientGuard
from galenic.pretrain.loop import Silent, Trainer
from galenic.pretrain.pretrain import build_model, set_context
from galenic.pretrain.schedules import rate
from galenic.runtime import torch_setup

WIDTH = 96
ARCHITECTURE = ArchitectureConfig(
    hidden_size=WIDTH,
    intermediate_size=264,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_swa_attention_heads=4,
    num_swa_key_value_heads=2,
    sliding_window=64,
    initializer_range=0.1,  # about 1 / sqrt(width)
)
OPTIM = OptimConfig(lr=4e-3, warmup_steps=50)
FINAL_LR = 2e-4  # a twentieth of the peak, as in the report
SHAPES = ((192, 4), (192, 4), (768, 1))
"""(context, rows) of the three phases: 768 tokens a batch in all."""
SHARE = 0.14
"""Of the starter's tokens."""
BANDS = ((1, 96), (96, 192), (192, 384), (384, 768))
"""Positions in a document, of the predicted token."""


def phases(recipes: Path) -> list[PhaseConfig]:
    """Returns the starter's three phases at this size, constant learning rate, then a cosine in the last."""
    recipe = yaml.safe_load((recipes / "30-pretrain.yaml").read_text(encoding="utf-8"))
    return [
        PhaseConfig(
            name=phase["name"],
            mixture=phase["mixture"],
            tokens=round(SHARE * phase["tokens"] / 768) * 768,
            context=context,
            rows=rows,
            rope_theta=float(phase["rope_theta"]),
            final_lr=FINAL_LR if "final_lr" in phase else None,
        )
        for phase, (context, rows) in zip(recipe["phases"], SHAPES, strict=True)
    ]


def config(tokenizer: Path, out: Path, phases: list[PhaseConfig], seed: int, **more: Any) -> PretrainConfig:
    """Returns what `galenic pretrain` would be given."""
    settings = {"optim": OPTIM, "precision": "float32"} | more
    return PretrainConfig(
        out=str(out),
        tokenizer=str(tokenizer),
        architecture=ARCHITECTURE,
        phases=phases,
        seed=seed,
        **settings,
    )


def training_shards(tokenizer: Path, phases: Sequence[PhaseConfig]) -> dict[str, Shard]:
    """Opens the sources of the phases."""
    names = sorted({source for phase in phases for source in phase.mixture})
    return {source: read_shard(tokenizer, source, "train") for source in names}


# ---------------------------------------------------------------------------- held-out documents


@cache
def token_bytes(tokenizer: Path) -> np.ndarray:
    """Returns (vocabulary,) int64: UTF-8 bytes that each token stands for; special ones stand for none."""
    from galenic.model.folder import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    special = set(loaded.all_special_tokens)
    names = loaded.convert_ids_to_tokens(list(range(read_meta(tokenizer)["vocab_size"])))
    sizes = [0 if name in special else 1 if _is_byte(name) else len(name.encode()) for name in names]
    return np.array(sizes, dtype=np.int64)


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def heldout(tokenizer: Path, sources: Sequence[str], most: int) -> list[tuple[str, np.ndarray]]:
    """Returns (source, ids) of the first held-out documents of each source, `most` tokens of a source at most."""
    found = []
    for source in sources:
        shard = read_shard(tokenizer, source, "heldout")
        count = max(1, int(np.searchsorted(shard.offsets[1:], most, side="right")))
        found += [(source, shard.document(index)) for index in range(min(count, len(shard)))]
    return found


Scores = dict[str, dict[str, tuple[float, int]]]


def score(
    model: Any,
    documents: list[tuple[str, np.ndarray]],
    tokenizer: Path,
    context: int,
    rope_theta: float | None = None,
) -> Scores:
    """Scores documents in windows of `context` tokens: bits and bytes by source and position in the document.

    The model may be asked for a longer context than it was trained for, or for another RoPE base; it stays as it was.

    Returns:
        Source -> {"whole": (bits, bytes), "192-384": (bits, bytes), ...}; `</s>` is not text and left out.
    """
    was = model.training, model.config.max_position_embeddings, model.config.rope_theta
    model.eval()
    model.config.max_position_embeddings, model.config.rope_theta = context, rope_theta or was[2]
    logs = token_log_probs(model, [ids for _, ids in documents], context=context, batch_tokens=4096)
    model.train(was[0])
    model.config.max_position_embeddings, model.config.rope_theta = was[1:]
    sizes = token_bytes(tokenizer)
    parts = {"whole": slice(None)} | {f"{low}-{high}": slice(low - 1, high - 1) for low, high in BANDS}
    found: Scores = {}
    for (source, ids), log in zip(documents, logs, strict=True):
        columns = np.stack([-log[:-1] / np.log(2), sizes[ids[1:-1]]])  # positions 1, 2, ... without </s>
        sums = found.setdefault(source, dict.fromkeys(parts, (0.0, 0)))
        for name, part in parts.items():
            bits, count = columns[:, part].sum(axis=1).tolist()
            sums[name] = (sums[name][0] + bits, sums[name][1] + int(count))
    return found


def by_source(scores: Scores) -> dict[str, float]:
    """Returns the bits per byte of each source."""
    return {source: bits / count for source, parts in scores.items() for bits, count in [parts["whole"]]}


def by_position(scores: Scores, sources: Sequence[str]) -> dict[str, float]:
    """Returns the bits per byte of each band of positions, over the texts of all sources named."""
    found = {}
    for low, high in BANDS:
        bits, count = np.sum([scores[source][f"{low}-{high}"] for source in sources], axis=0)
        if count:
            found[f"{low}-{high}"] = float(bits / count)
    return found


def groups(tokenizer: Path) -> dict[str, list[str]]:
    """Returns group -> its sources, in the order of the phases that introduce them."""
    found: dict[str, list[str]] = {"general": [], "medical-basic": [], "medical-advanced": []}
    for source, facts in read_meta(tokenizer)["sources"].items():
        found.setdefault(facts["group"], []).append(source)
    return {group: sources for group, sources in found.items() if sources}


def by_group(bits: dict[str, float], known: dict[str, list[str]]) -> dict[str, float]:
    """Returns the mean bits per byte over each group's sources, and over all sources."""
    means = {
        group: float(np.mean([bits[source] for source in of if source in bits]))
        for group, of in known.items()
    }
    return means | {"all": float(np.mean(list(bits.values())))}


# ---------------------------------------------------------------------------- training


class Run:
    """A network on its way through the phases, by the functions of `galenic pretrain`.

    Attributes:
        trainer: the loop with its state.
        batches: of each phase.
    """

    def __init__(self, config: PretrainConfig, shards: dict[str, Shard]) -> None:
        torch_setup(config.seed)
        self.config, self.shards = config, shards
        self.batches: list[Any] = [PhaseBatches(config, phase, shards) for phase in config.phases]
        self.trainer = self._trainer(
            build_model(config.architecture, read_meta(config.tokenizer), config.phases[0])
        )

    def _trainer(self, model: Any) -> Trainer:
        Path(self.config.out).mkdir(parents=True, exist_ok=True)
        never = CheckpointConfig(seconds=1e9)
        checkpoints = Checkpoints(Path(self.config.out), never, run={})
        return Trainer(
            model, self.config.optim, self.config.guard, Path(self.config.out), checkpoints=checkpoints
        )

    @property
    def model(self) -> Any:
        return self.trainer.model

    def train(self, number: int, until: int | None = None) -> None:
        """Trains through phase `number`, or up to its step `until`."""
        steps = [batches.steps for batches in self.batches]
        first, phase = sum(steps[:number]), self.config.phases[number]
        set_context(self.model, phase)
        self.trainer.train(
            self.batches[number],
            first=first,
            last=first + (steps[number] if until is None else until),
            lr=lambda step: rate(self.config, steps, number, step),
            bar=Silent(),
            phase=phase.name,
        )

    def fork(self, config: PretrainConfig) -> "Run":
        """Returns a run that goes on from here, weights and optimizer state, under another configuration."""
        other = Run(config, self.shards)
        old, new = self.trainer, other.trainer
        new.model.load_state_dict(old.model.state_dict())
        new.optimizer.load_state_dict(deepcopy(old.optimizer.state_dict()))
        guard = asdict(config.guard)
        new.guard = GradientGuard(**guard, **old.guard.state())
        new.step, new.tokens, new.read = old.step, old.tokens, dict(old.read)
        return other

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the steps taken."""
        return [row for row in self.trainer.rows() if row["kind"] == "train"]


# ---------------------------------------------------------------------------- command line


def settings(recipes: Path) -> list[Any]:
    """What every unit's result depends on."""
    curriculum = [asdict(phase) for phase in phases(recipes)]
    return [curriculum, asdict(ARCHITECTURE), asdict(OPTIM), FINAL_LR, BANDS]


def arguments(description: str, out: str) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/starter"), help="a starter run (for its tokens)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm, 2 or more")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="finished runs; a killed script continues"
    )
    parser.add_argument("--figures", type=Path, default=Path("docs/img"), help="where the figures go")
    parser.add_argument("--recipes", type=Path, default=Path("recipes/starter"), help="the starter's recipe")
    found = parser.parse_args()
    found.tokenizer = found.run / "20-tokenizer"
    if found.seeds < 2:
        parser.error(f"--seeds {found.seeds}: an interval needs 2 at least")
    if not (found.tokenizer / "tokens" / "meta.json").is_file():
        parser.error(f"{found.tokenizer}: no token shards; run `make starter` first, or give --run RUN_DIR")
    return found


def conditions(given: argparse.Namespace, results: Iterable[list[dict[str, Any]]]) -> str:
    """The line above the tables: date, machine, versions, runs."""
    runs = [unit for units in results for unit in units]
    seconds = sum(unit["seconds"] for unit in runs)
    return timing.conditions(
        1, f"{len(runs)} runs, {given.seeds} seeds, {seconds:.0f} s of one thread in all"
    )


def size(given: argparse.Namespace) -> str:
    """What is trained, in words: parameters, and each phase's tokens and batches."""
    found = phases(given.recipes)
    with torch.device("meta"):
        model = build_model(ARCHITECTURE, read_meta(given.tokenizer), found[0])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    each = [f"{phase.tokens:,} tokens in batches of {phase.rows} x {phase.context}" for phase in found]
    return f"{parameters:,} parameters; the phases of the curriculum: {'; '.join(each)}"
