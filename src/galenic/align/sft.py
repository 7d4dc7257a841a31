"""Verb `sft`: a model and conversations in, an expert out.

Packed samples cannot see each other (positions restart, attention and convolution stay inside a sample) and only
the assistant's tokens carry loss. Source: Baichuan-M1 report, section 5.1.

Models of other architectures are trained too, with their own chat template. transformers keeps packed samples apart by
their positions in most of them; it is tried on the model itself, and one that mixes samples gets one a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from galenic.align.config import SftConfig
from galenic.align.training import opened
from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.pretrain.data.packing import best_fit
from galenic.runtime import Plan, UserError, human, read_jsonl


def plan(config: SftConfig) -> Plan:
    """What the verb would do."""
    for path in config.reads():
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder")
    count = sum(1 for _ in read_jsonl(config.conversations))
    steps = config.tokens // (config.context * config.rows)
    return Plan(
        reads=config.reads(),
        writes=[f"{config.out}/model"],
        facts={
            "conversations": human(count),
            "training": f"{steps} steps of {config.rows} x {config.context} tokens, learning rate "
            f"{config.optim.lr:g} to {config.final_lr:g} on a cosine",
            "trains": f"a LoRA adapter of rank {config.lora.rank}" if config.lora else "the whole model",
            **({"shifts": _times(config.shift.steps(steps))} if config.shift else {}),
        },
    )


def _times(steps: range) -> str:
    """Says when layers are shifted."""
    when = (
        f"after step {steps[0]} and each {steps.step} later" if len(steps) > 1 else f"after step {steps[0]}"
    )
    return f"{len(steps)}, {when}"


Sample = tuple[np.ndarray, np.ndarray]
"""Token ids and labels of one conversation, both (length,) int64; labels are IGNORE outside answers."""


def encode_samples(path: str, tokenizer: Any, context: int) -> tuple[list[Sample], int]:
    """Encodes a file of conversations; returns the samples and how many were longer than `context`.

    Raises:
        UserError: a line without messages, with roles out of order or without an answer; an empty file.
    """
    samples: list[Sample] = []
    too_long = 0
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            ids, answers = encode_chat(tokenizer, row["messages"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: not a conversation ({error})") from None
        if not any(answers):
            raise UserError(f"{path}:{number}: a conversation without an answer has nothing to learn")
        if len(ids) > context:
            too_long += 1
            continue
        tokens = np.array(ids, dtype=np.int64)
        samples.append((tokens, np.where(answers, tokens, IGNORE)))
    if not samples:
        raise UserError(f"{path}: no conversation fits {context} tokens")
    return samples, too_long


def pack_samples(
    samples: list[Sample], *, tokens: int, context: int, seed: int, alone: bool = False
) -> list[list[int]]:
    """Packs whole conversations, epoch after epoch in a new order, into rows of `context` tokens.

    Args:
        samples: encoded conversations.
        tokens: of all rows together, filling included.
        context: tokens in a row.
        seed: of the order.
        alone: one conversation a row.

    Returns:
        Indices of the samples in each row, in training order, enough rows for `tokens`.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5F7]))
    lengths = [context if alone else len(ids) for ids, _ in samples]
    rows: list[list[int]] = []
    while len(rows) * context < tokens:
        order = generator.permutation(len(samples)).tolist()
        packed = best_fit([lengths[i] for i in order], context)
        rows += [[order[i] for i in packed[j]] for j in generator.permutation(len(packed))]
    return rows[: max(1, tokens // context)]


class Conversations:
    """The batches of a fine-tuning run (`galenic.pretrain.loop.Batches`)."""

    def __init__(self, samples: list[Sample], packed: list[list[int]], rows: int, context: int) -> None:
        self.samples, self.packed, self.rows, self.context = samples, packed, rows, context
        self.steps = len(packed) // rows
        self.domains: list[str] = []

    def laid_rows(self, step: int) -> list[list[Sample]]:
        """Returns the samples of each row of a batch."""
        chosen = self.packed[step * self.rows : (step + 1) * self.rows]
        return [[self.samples[i] for i in row] for row in chosen]

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, Any]:
        """Returns these rows of a batch."""
        laid = self.laid_rows(step)
        return collate([laid[row] for row in rows], self.context, PAD)

    def documents(self, step: int) -> list[str]:
        """Names the conversations of a batch by their place among those that were not too long, from 0."""
        chosen = self.packed[step * self.rows : (step + 1) * self.rows]
        return [f"conversation:{i}" for row in chosen for i in row]

    def state(self, step: int) -> dict[str, Any]:
        """Where the reader stands before a step."""
        return {"row": step * self.rows}


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


def run(config: SftConfig) -> None:
    """Fine-tunes; continues where a killed run stopped, to the same bytes."""
    from galenic.model import BaichuanM1ForCausalLM
    from galenic.model.foreign import plain

    with opened("sft", config, packed=True) as run:
        if run is None:
            return
        run.check_context(config.context)
        samples, too_long = encode_samples(config.conversations, run.tokenizer, config.context)
        ours = isinstance(plain(run.model), BaichuanM1ForCausalLM)
        alone = not ours and not keeps_apart(run.model, samples[0])
        rows = pack_samples(
            samples, tokens=config.tokens, context=config.context, seed=config.seed, alone=alone
        )
        batches = Conversations(samples, rows, config.rows, config.context)
        if not batches.steps:
            raise UserError(
                f"{config.conversations}: fewer than {config.rows} rows of {config.context} tokens"
            )
        score = None
        if config.heldout:
            heldout = encode_samples(config.heldout, run.tokenizer, config.context)[0]
            heldout, name = heldout[: config.heldout_conversations], Path(config.heldout).stem

            def score() -> dict[str, Any]:
                return {"answers": {name: answer_loss(run.model, heldout, config.context, alone)}}

        after = None
        if shift := config.shift:

            def after(trainer: Any) -> Callable[[int], None]:
                from galenic.align.shifting import shifter

                return shifter(shift, trainer, shift.steps(batches.steps), batches.laid_rows)

        run.fit(batches, None, steps=batches.steps, score=score, after=after)
        run.write(
            {"conversations": len(samples), "longer_than_context": too_long, "packed": not alone},
            conversations=Path(config.conversations).name,
            **({"shift": asdict(shift)} if shift else {}),
        )
