"""Verb `sft`: a model and conversations in, an expert out.

Packed samples cannot see each other (positions restart, attention and convolution stay inside a sample) and only
the assistant's tokens carry loss. The loss is told for each category of conversations. Source: Baichuan-M1 report,
section 5.1.

Models of other architectures are trained too, with their own chat template. transformers keeps packed samples apart by
their positions in most of them; it is tried on the model itself, and one that mixes samples gets one a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from galenic.align.config import SftConfig, ShiftConfig
from galenic.align.data.conversations import Encoded, Sample, count_categories, read_conversations
from galenic.align.training import opened, planned
from galenic.corpus.tokens.chat_format import PAD
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.pretrain.data.packing import best_fit
from galenic.ranks import rank
from galenic.runtime import Plan, UserError, human, write_jsonl


def plan(config: SftConfig) -> Plan:
    """What the verb would do."""
    count, categories = count_categories(config.conversations)
    size = f"{config.rows} x {config.context} tokens"
    steps = config.budget // (config.context * config.rows)
    length = f"{steps} steps of {size}" if config.rounds is None else f"{config.rounds} rounds, {size} a step"
    facts = {"conversations": human(count)}
    if categories:
        facts["categories"] = categories
    if config.shift:
        facts["shifts"] = _times(config.shift, steps)
    return planned(config, facts, length=length)


def _times(shift: ShiftConfig, total: int) -> str:
    """Says when layers are shifted; without a number of steps, in shares of them."""
    if not total:
        return f"after {shift.start:.0%} of the steps and each {shift.every} later"
    steps = shift.steps(total)
    when = (
        f"after step {steps[0]} and each {steps.step} later" if len(steps) > 1 else f"after step {steps[0]}"
    )
    return f"{len(steps)}, {when}"


def encode_samples(path: str, tokenizer: Any, context: int) -> tuple[list[Sample], int]:
    """Encodes a file of conversations; returns the samples and how many were longer than `context`.

    Raises:
        UserError: a line that is no conversation; an empty file.
    """
    found = read_conversations(path, tokenizer, context)
    return found.samples, found.too_long


def pack_samples(
    samples: list[Sample],
    *,
    context: int,
    seed: int,
    tokens: int = 0,
    rounds: int | None = None,
    rows: int = 1,
    alone: bool = False,
) -> list[list[int]]:
    """Packs whole conversations, round after round in a new order, into rows of `context` tokens.

    Args:
        samples: encoded conversations.
        context: tokens in a row.
        seed: of the order.
        tokens: of all rows together, filling included.
        rounds: instead, times that each conversation is read. The last batch is filled up with one round more.
        rows: of a batch, for `rounds`.
        alone: one conversation a row.

    Returns:
        Indices of the samples in each row, in training order.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5F7]))
    lengths = [context if alone else len(ids) for ids, _ in samples]

    def read_once() -> list[list[int]]:
        order = generator.permutation(len(samples)).tolist()
        packed = best_fit([lengths[i] for i in order], context)
        return [[order[i] for i in packed[j]] for j in generator.permutation(len(packed))]

    found: list[list[int]] = []
    if rounds is not None:
        for _ in range(rounds):
            found += read_once()
        wanted = -(-len(found) // rows) * rows
    else:
        wanted = max(1, tokens // context)
    while len(found) < wanted:
        found += read_once()
    return found[:wanted]


class Conversations:
    """The batches of a fine-tuning run (`galenic.pretrain.loop.Batches`)."""

    def __init__(self, encoded: Encoded, packed: list[list[int]], rows: int, context: int, name: str) -> None:
        self.encoded, self.packed, self.rows, self.context, self.name = encoded, packed, rows, context, name
        self.steps = len(packed) // rows
        self.domains = encoded.names
        numbers = {category: number for number, category in enumerate(self.domains)}
        self.of = [numbers.get(category, -1) for category in encoded.categories]

    def laid_rows(self, step: int) -> list[list[Sample]]:
        """Returns the samples of each row of a batch."""
        return [[self.encoded.samples[i] for i in row] for row in self._chosen(step)]

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, Any]:
        """Returns these rows of a batch."""
        import torch

        laid = self.laid_rows(step)
        batch = collate([laid[row] for row in rows], self.context, PAD)
        if self.domains:
            chosen, domains = self._chosen(step), np.full((len(rows), self.context), -1, dtype=np.int64)
            for place, row in enumerate(rows):
                lengths = [len(ids) for ids, _ in laid[row]]
                domains[place, : sum(lengths)] = np.repeat([self.of[i] for i in chosen[row]], lengths)
            batch["domains"] = torch.from_numpy(domains)
        return batch

    def documents(self, step: int) -> list[str]:
        """Names the conversations of a batch by file and line."""
        return [f"{self.name}:{self.encoded.lines[i]}" for row in self._chosen(step) for i in row]

    def state(self, step: int) -> dict[str, Any]:
        """Where the reader stands before a step."""
        return {"row": step * self.rows}

    def _chosen(self, step: int) -> list[list[int]]:
        return self.packed[step * self.rows : (step + 1) * self.rows]


def keeps_apart(model: Any, sample: Sample) -> bool:
    """Whether the model keeps packed samples apart: another first sample must not change what the second one gives."""
    import torch

    ids = sample[0]
    outputs = []
    for first in (ids, ids[::-1].copy()):
        batch = collate([[(first, first), (ids, ids)]], 2 * len(ids), PAD)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            # With a cache, transformers would not look for packed samples.
            outputs.append(model(**inputs, use_cache=False).logits[0, len(ids) :].float())
    return torch.allclose(*outputs, rtol=1e-3, atol=1e-3)


def answer_loss(model: Any, samples: list[Sample], context: int, alone: bool = False) -> float:
    """Mean negative log-likelihood of the answers' tokens, nats per token."""
    import torch
    import torch.nn.functional as F

    from galenic.model import BaichuanM1ForCausalLM
    from galenic.model.foreign import plain

    ours = isinstance(plain(model), BaichuanM1ForCausalLM)
    rows = best_fit([context if alone else len(ids) for ids, _ in samples], context)
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            batch = collate([[samples[i] for i in row] for row in rows[start : start + 8]], context, PAD)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            targets = batch["labels"][:, 1:]
            wanted = targets != IGNORE
            if ours:
                loss = model(**batch, num_items_in_batch=1, skip_logits=True, use_cache=False).loss
            else:
                del batch["labels"]
                logits = model(**batch, use_cache=False).logits[:, :-1][wanted]
                loss = F.cross_entropy(logits.float(), targets[wanted], reduction="sum")
            total += float(loss)
            count += int(wanted.sum())
    return total / count


def answer_losses(
    model: Any, encoded: Encoded, context: int, name: str, alone: bool = False
) -> dict[str, float]:
    """Mean loss of all answers' tokens under the file's name, and those of each category as `file: category`."""
    groups: dict[str, list[Sample]] = {}
    for sample, category in zip(encoded.samples, encoded.categories, strict=True):
        groups.setdefault(category, []).append(sample)
    losses = {category: answer_loss(model, group, context, alone) for category, group in groups.items()}
    tokens = {c: sum(int((labels[1:] != IGNORE).sum()) for _, labels in group) for c, group in groups.items()}
    whole = sum(losses[c] * tokens[c] for c in groups) / sum(tokens.values())
    short = name.removesuffix(".heldout")
    return {name: whole, **{f"{short}: {category}": losses[category] for category in encoded.names}}


def run(config: SftConfig) -> None:
    """Fine-tunes; continues where a killed run stopped, to the same bytes."""
    from galenic.model import BaichuanM1ForCausalLM
    from galenic.model.foreign import plain

    with opened("sft", config, packed=True) as run:
        if run is None:
            return
        run.check_context(config.context)
        encoded = read_conversations(
            config.conversations, run.tokenizer, config.context, bad_lines=config.bad_lines
        )
        samples, ledger = encoded.samples, encoded.ledger
        if ledger and rank() == 0:
            write_jsonl(run.out / "ledger.jsonl", ledger)
        ours = isinstance(plain(run.model), BaichuanM1ForCausalLM)
        alone = not ours and not keeps_apart(run.model, samples[0])
        packed = pack_samples(
            samples,
            context=config.context,
            seed=config.seed,
            tokens=config.budget,
            rounds=config.rounds,
            rows=config.rows,
            alone=alone,
        )
        batches = Conversations(encoded, packed, config.rows, config.context, Path(config.conversations).name)
        if not batches.steps:
            raise UserError(
                f"{config.conversations}: fewer than {config.rows} rows of {config.context} tokens"
            )
        score = None
        if config.heldout:
            heldout = read_conversations(config.heldout, run.tokenizer, config.context)
            heldout, name = heldout.first(config.heldout_conversations), Path(config.heldout).stem

            def score() -> dict[str, Any]:
                return {"answers": answer_losses(run.model, heldout, config.context, name, alone)}

        after = None
        if shift := config.shift:

            def after(trainer: Any) -> Callable[[int], None]:
                from galenic.align.shifting import shifter

                return shifter(shift, trainer, shift.steps(batches.steps), batches.laid_rows)

        run.fit(batches, None, steps=batches.steps, score=score, after=after)
        run.write(
            {
                "conversations": len(samples),
                "categories": {name: encoded.categories.count(name) for name in encoded.names},
                "longer_than_context": encoded.too_long,
                "bad_lines": len(ledger) - encoded.too_long,
                "packed": not alone,
            },
            conversations=Path(config.conversations).name,
            **({"shift": asdict(shift)} if shift else {}),
        )
