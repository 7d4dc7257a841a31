"""What the short convolution is for: induction, associative recall and held-out loss, with it and without it.

    python benchmarks/induction.py [induction|recall|corpus] [--seeds 5] [--run runs/starter] [--out rows.jsonl]

* induction: random tokens, and once a token repeats its successor repeats (KV Shifting Attention, arXiv 2411.19574,
  appendix D). Scored on the tokens that are determined by those before.
* recall: multi-query associative recall (Zoology, arXiv 2312.04927): key-value pairs, then the keys again in another
  order, each to be answered by its value.
* corpus: a small language model on the starter corpus' token shards; the rows of Table 2 of the Baichuan-M1 report
  (arXiv 2502.12671).

Every variant of a task sees the same batches at the same seed. The learning rate is chosen from a small grid with a
seed of its own, which does not count in the table. Finished rows are appended to --out; a killed run continues.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.config import OptimConfig
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.pretrain.data.packing import best_fit, cut, phase_rows
from galenic.pretrain.optimizers import make_optimizer
from galenic.pretrain.schedules import cosine_decay, warmup
from galenic.runtime import append_jsonl, read_jsonl, torch_setup

Batch = dict[str, torch.Tensor]
TUNING_SEED = 1000  # chooses the learning rate, is in no table
SOLVED = 0.9  # accuracy at which a run counts as having learned the task
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by n


# ---------------------------------------------------------------------------- synthetic tasks


def induction_batch(
    random: np.random.Generator, *, rows: int = 32, length: int = 48, vocab: int = 128
) -> Batch:
    """Random tokens until one repeats; from then on every token is the successor its predecessor had before."""
    tokens = np.empty((rows, length), dtype=np.int64)
    labels = np.full((rows, length), IGNORE)
    successor = np.full((rows, vocab), -1)
    every = np.arange(rows)
    tokens[:, 0] = random.integers(vocab, size=rows)
    for t in range(1, length):
        known = successor[every, tokens[:, t - 1]]
        tokens[:, t] = np.where(known >= 0, known, random.integers(vocab, size=rows))
        labels[:, t] = np.where(known >= 0, known, IGNORE)
        successor[every, tokens[:, t - 1]] = tokens[:, t]
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def recall_batch(
    random: np.random.Generator, *, rows: int = 32, pairs: int = 12, keys: int = 64, values: int = 64
) -> Batch:
    """Pairs k1 v1 k2 v2 ..., then the same pairs in another order, whose values are to be predicted."""
    chosen = random.permuted(np.tile(np.arange(keys), (rows, 1)), axis=1)[:, :pairs]
    answers = random.integers(keys, keys + values, size=(rows, pairs))
    order = random.permuted(np.tile(np.arange(pairs), (rows, 1)), axis=1)
    shown = np.stack((chosen, answers), axis=2)
    asked = np.take_along_axis(shown, order[:, :, None], axis=1)
    tokens = np.concatenate((shown, asked), axis=1).reshape(rows, -1)
    labels = np.full_like(tokens, IGNORE)
    labels[:, 2 * pairs + 1 :: 2] = asked[:, :, 1]
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


# ---------------------------------------------------------------------------- starter corpus


def corpus_batches(tokenizer: Path, seed: int, *, steps: int, rows: int, context: int) -> Iterator[Batch]:
    """Training batches of all sources by their size, packed as in pre-training."""
    sources = read_meta(tokenizer)["sources"]
    shards = {source: read_shard(tokenizer, source, "train") for source in sources}
    mixture = {source: counts["train"]["tokens"] for source, counts in sources.items()}
    tokens = int(1.05 * steps * rows * context)
    laid = phase_rows(shards, mixture, tokens=tokens, context=context, seed=seed, name="induction")
    for step in range(steps):
        pieces = laid[step * rows : (step + 1) * rows]
        yield collate([[_text(shards[p.source], p) for p in row] for row in pieces], context, PAD)


def corpus_heldout(tokenizer: Path, *, rows: int, context: int, per_source: int = 3000) -> Iterator[Batch]:
    """The first held-out documents of every source, packed."""
    shards, pieces = {}, []
    for source in sorted(read_meta(tokenizer)["sources"]):
        shard = shards[source] = read_shard(tokenizer, source, "heldout")
        for index in range(int(np.searchsorted(shard.offsets[1:], per_source, side="right"))):
            pieces += cut(source, index, int(shard.offsets[index + 1] - shard.offsets[index]), context)
    laid = [[pieces[i] for i in row] for row in best_fit([piece.length for piece in pieces], context)]
    for first in range(0, len(laid), rows):
        chosen = laid[first : first + rows]
        yield collate([[_text(shards[p.source], p) for p in row] for row in chosen], context, PAD)


def _text(shard: Any, piece: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = shard.document(piece.document)[piece.start : piece.start + piece.length]
    return ids, ids


# ---------------------------------------------------------------------------- tasks and variants


@dataclass(frozen=True, kw_only=True)
class Task:
    """One table: what is trained, how long, in which variants."""

    steps: int
    shape: dict[str, Any]
    """The network all variants share, as fields of `BaichuanM1Config`."""
    variants: dict[str, dict[str, Any]]
    """Name -> what differs ("steps" too); the first is what the others are compared with."""
    rates: tuple[float, ...]
    """Learning rates to choose from."""
    rate_of: dict[str, str]
    """Variants that take the rate chosen for another one."""
    warmup: int = 50


SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 2,  # not used: every layer is global
    "num_swa_key_value_heads": 2,
    "sliding_window_layers": [],
    "rope_theta": 1e4,
    "initializer_range": 0.125,  # 1 / sqrt(width)
    "max_position_embeddings": 48,
}
ONE_OR_TWO_LAYERS = {
    "1 layer, convolution": {"num_hidden_layers": 1, "conv_window": 2},
    "1 layer, none": {"num_hidden_layers": 1, "conv_window": 1},
    "2 layers, none": {"num_hidden_layers": 2, "conv_window": 1},
    "2 layers, convolution": {"num_hidden_layers": 2, "conv_window": 2},
}
TASKS = {
    "induction": Task(
        steps=1000,
        shape=SMALL,
        variants=ONE_OR_TWO_LAYERS
        | {
            "2 layers, none, three times the steps": {
                "num_hidden_layers": 2,
                "conv_window": 1,
                "steps": 3000,
            },
            "1 layer, three taps": {"num_hidden_layers": 1, "conv_window": 3},
        },
        rates=(3e-3, 1e-2),
        rate_of={
            "2 layers, convolution": "1 layer, convolution",
            "2 layers, none, three times the steps": "2 layers, none",
            "1 layer, three taps": "1 layer, convolution",
        },
    ),
    "recall": Task(
        steps=400,
        shape=SMALL,
        variants=ONE_OR_TWO_LAYERS,
        rates=(3e-3, 1e-2),
        rate_of={"2 layers, convolution": "1 layer, convolution"},
    ),
    "corpus": Task(
        steps=120,
        shape={
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_swa_attention_heads": 4,
            "num_swa_key_value_heads": 2,
            "sliding_window": 64,
            "initializer_range": 0.088,
            "max_position_embeddings": 256,
        },
        variants={
            "Baichuan-M1": {},
            "small heads everywhere": {"num_attention_heads": 4, "num_key_value_heads": 2},
            "75% sliding window": {"sliding_window_layers": [1, 2, 3]},
            "no sliding window": {"sliding_window_layers": []},
            "no convolution": {"conv_window": 1},
            "Baichuan-M1, four times the steps": {"steps": 480},
            "no convolution, four times the steps": {"conv_window": 1, "steps": 480},
        },
        rates=(4e-3, 8e-3),
        rate_of={
            "small heads everywhere": "Baichuan-M1",
            "75% sliding window": "Baichuan-M1",
            "no sliding window": "Baichuan-M1",
            "Baichuan-M1, four times the steps": "Baichuan-M1",
            "no convolution, four times the steps": "no convolution",
        },
    ),
}
ROWS = 4  # of a batch in the corpus task


# ---------------------------------------------------------------------------- one run


def train(name: str, variant: str, seed: int, lr: float, steps: int, tokenizer: Path) -> dict[str, Any]:
    """Trains one network and returns its row."""
    started = time.monotonic()
    task, corpus = TASKS[name], name == "corpus"
    torch_setup(seed)
    shape = task.shape | task.variants[variant]
    shape.pop("steps", None)
    if corpus:
        shape |= {"vocab_size": read_meta(tokenizer)["vocab_size"]}
    model = BaichuanM1ForCausalLM(BaichuanM1Config(**shape)).train()
    optimizer = make_optimizer(model, OptimConfig(lr=lr))
    accuracies: list[float] = []
    for step, batch in enumerate(_batches(name, steps, seed, tokenizer)):
        output = model(**batch, skip_logits=corpus)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decayed = cosine_decay((step + 1) / steps, start=lr, end=lr / 10)
        for group in optimizer.param_groups:
            group["lr"] = min(lr * warmup(step, task.warmup), decayed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not corpus:  # batches never repeat, so this is accuracy on unseen sequences
            accuracies.append(score(output.logits.detach(), batch["labels"])[1])

    return {
        "task": name,
        "variant": variant,
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **evaluate(model.eval(), _heldout(name, tokenizer)),
        "taps": {
            key.removeprefix("model.layers."): parameter.flatten(0, 3).tolist()  # [head][tap]
            for key, parameter in model.named_parameters()
            if "conv_" in key
        },
        "solved": first_solved(accuracies),
        "seconds": round(time.monotonic() - started, 1),
    }


def _batches(task: str, steps: int, seed: int, tokenizer: Path) -> Iterator[Batch]:
    if task == "corpus":
        context = TASKS[task].shape["max_position_embeddings"]
        return corpus_batches(tokenizer, seed, steps=steps, rows=ROWS, context=context)
    make = induction_batch if task == "induction" else recall_batch
    random = np.random.default_rng(seed)
    return (make(random) for _ in range(steps))


def _heldout(task: str, tokenizer: Path) -> Iterator[Batch]:
    if task == "corpus":
        context = TASKS[task].shape["max_position_embeddings"]
        return corpus_heldout(tokenizer, rows=ROWS, context=context)
    make = induction_batch if task == "induction" else recall_batch
    random = np.random.default_rng(2**32)  # no training seed
    return (make(random) for _ in range(16))


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Returns (number of targets, share predicted right)."""
    targets = labels[:, 1:]
    counted = targets != IGNORE
    right = (logits[:, :-1].argmax(-1) == targets) & counted
    return float(counted.sum()), float(right.sum() / counted.sum())


@torch.no_grad()
def evaluate(model: BaichuanM1ForCausalLM, batches: Iterator[Batch]) -> dict[str, float]:
    """Loss (nats per target) and accuracy over all batches together."""
    count = loss = right = 0.0
    for batch in batches:
        output = model(**batch)
        targets, accuracy = score(output.logits, batch["labels"])
        count, loss, right = count + targets, loss + targets * float(output.loss), right + targets * accuracy
    return {"loss": loss / count, "accuracy": right / count}


def first_solved(accuracies: list[float], width: int = 10) -> int | None:
    """The first step at whose end the last `width` batches were answered with accuracy `SOLVED` on average."""
    for end in range(width, len(accuracies) + 1):
        if statistics.fmean(accuracies[end - width : end]) >= SOLVED:
            return end
    return None


# ---------------------------------------------------------------------------- all runs


def run(name: str, seeds: int, tokenizer: Path, out: Path) -> list[dict[str, Any]]:
    """Makes the rows that --out does not hold yet; returns the task's rows."""
    task = TASKS[name]
    rows = [row for row in read_jsonl(out) if row["task"] == name] if out.exists() else []

    def row(variant: str, seed: int, lr: float) -> dict[str, Any]:
        steps = task.variants[variant].get("steps", task.steps)
        for old in rows:
            if (old["variant"], old["seed"], old["lr"], old["steps"]) == (variant, seed, lr, steps):
                return old
        new = train(name, variant, seed, lr, steps, tokenizer)
        append_jsonl(out, new)
        rows.append(new)
        note = f"loss {new['loss']:.3f}, accuracy {new['accuracy']:.3f}, {new['seconds']:.0f} s"
        print(f"{name}: {variant}, seed {seed}, learning rate {lr:g}: {note}", file=sys.stderr)
        return new

    def best_rate(variant: str) -> float:
        return min(task.rates, key=lambda lr: row(variant, TUNING_SEED, lr)["loss"])

    rates = {variant: best_rate(task.rate_of.get(variant, variant)) for variant in task.variants}
    # Seed by seed, so that a run cut short has compared every variant equally often.
    return [row(v, seed, rates[v]) for seed in range(seeds) for v in task.variants]


# ---------------------------------------------------------------------------- tables


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and the half-width of its 95% interval (Student's t)."""
    n = len(values)
    half = T975[n] * statistics.stdev(values) / math.sqrt(n) if n in T975 else math.nan
    return statistics.fmean(values), half


def by_variant(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups rows by variant, in the task's order; seeds in order."""
    return {
        variant: sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"])
        for variant in TASKS[rows[0]["task"]].variants
    }


def accuracy_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines: accuracy and how soon the task was learned."""
    yield "| variant | parameters | learning rate | accuracy, % | solved | steps to 90%, median | n |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for variant, group in by_variant(rows).items():
        mean, half = interval([100 * row["accuracy"] for row in group])
        # A run that never got there counts as slower than any that did.
        median = statistics.median_high([row["solved"] or math.inf for row in group])
        solved = sum(row["solved"] is not None for row in group)
        yield (
            f"| {variant} | {group[0]['parameters']:,} | {group[0]['lr']:g} | {mean:.1f} ± {half:.1f} "
            f"| {solved} of {len(group)} | {'never' if math.isinf(median) else median} | {len(group)} |"
        )


def loss_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines: held-out loss and its difference to the first variant of as many steps at the same seed."""
    groups = by_variant(rows)
    yield "| variant | parameters | learning rate | held-out loss | perplexity | difference | n |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for variant, group in groups.items():
        reference = next(other for other in groups.values() if other[0]["steps"] == group[0]["steps"])
        mean, half = interval([row["loss"] for row in group])
        paired = interval([a["loss"] - b["loss"] for a, b in zip(group, reference, strict=True)])
        difference = "" if group is reference else f"{paired[0]:+.4f} ± {paired[1]:.4f}"
        yield (
            f"| {variant} | {group[0]['parameters']:,} | {group[0]['lr']:g} | {mean:.4f} ± {half:.4f} "
            f"| {math.exp(mean):.1f} | {difference} | {len(group)} |"
        )


def taps_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines: what became of the taps, which start positive with sum 1, over all heads of all runs.

    A head is an induction head by its taps if keys come from the token before and values from the token itself, the
    other tap of each being less than a tenth of that one.
    """
    yield "| variant | sum of key taps | sum of value taps | heads with a negative tap | runs with an induction head |"
    yield "|---|---|---|---:|---:|"
    for variant, group in by_variant(rows).items():
        runs = [_heads(row["taps"]) for row in group if row["taps"]]
        heads = [head for run in runs for head in run]
        if heads:
            found = sum(any(_shifts_keys_only(*head) for head in run) for run in runs)
            negative = sum(min(*key, *value) < 0 for key, value in heads)
            key_sums, value_sums = (_range([sum(head[i]) for head in heads]) for i in (0, 1))
            yield (
                f"| {variant} | {key_sums} | {value_sums} | {negative} of {len(heads)} | {found} of {len(runs)} |"
            )


def _heads(taps: dict[str, list[list[float]]]) -> list[tuple[list[float], list[float]]]:
    """Returns (key taps, value taps) of every KV head of a network."""
    names = [name for name in taps if name.endswith("conv_k")]
    return [pair for name in names for pair in zip(taps[name], taps[name[: -len("k")] + "v"], strict=True)]


def _shifts_keys_only(key: list[float], value: list[float]) -> bool:
    return 10 * abs(key[-1]) < abs(key[-2]) and 10 * abs(value[-2]) < abs(value[-1])


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}, median {statistics.median(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=TASKS, help="one of the three; all when left out")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant, 2 to 10")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/starter"), help="a starter run (for its tokens)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/induction.jsonl"), help="finished rows")
    arguments = parser.parse_args()
    tokenizer = arguments.run / "20-tokenizer"
    names = [arguments.task] if arguments.task else list(TASKS)
    if arguments.seeds not in T975:
        parser.error(f"--seeds {arguments.seeds}: an interval needs 2 to 10")
    if "corpus" in names and not (tokenizer / "tokens" / "meta.json").is_file():
        parser.error(f"{tokenizer}: no token shards; run `make starter` first, or give --run RUN_DIR")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        rows = run(name, arguments.seeds, tokenizer, arguments.out)
        table: Callable = loss_table if name == "corpus" else accuracy_table
        print(f"\n{name}\n", *table(rows), "", *taps_table(rows), sep="\n")


if __name__ == "__main__":
    main()
