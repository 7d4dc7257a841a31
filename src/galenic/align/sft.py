"""Verb `sft`: a model and conversations in, an expert out.

Packed samples cannot see each other (positions restart, attention and convolution stay inside a sample) and only
the assistant's tokens carry loss. Source: Baichuan-M1 report, section 5.1.

Models of other architectures are trained too, with their own chat template. transformers keeps packed samples apart by
their positions in most of them; it is tried on the model itself, and one that mixes samples gets one a row.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from galenic.align.config import SftConfig
from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.pretrain.config import CheckpointConfig
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.pretrain.data.packing import best_fit
from galenic.runtime import (
    Plan,
    UserError,
    append_jsonl,
    folder_name,
    human,
    progress,
    read_json,
    read_jsonl,
    torch_setup,
    write_json,
)


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

    ours = isinstance(model, BaichuanM1ForCausalLM)
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
    from galenic.align.lora import add_adapter, save_adapter
    from galenic.model import BaichuanM1ForCausalLM, load_tokenizer
    from galenic.model.foreign import load_any, save_any
    from galenic.pretrain.checkpoints.checkpoints import Checkpoints
    from galenic.pretrain.loop import Trainer
    from galenic.pretrain.schedules import cosine_decay, warmup

    torch_setup(config.seed)
    out = Path(config.out)
    if (out / "model").exists():
        return
    model, tokenizer = load_any(config.model), load_tokenizer(config.model)
    most = getattr(model.config, "max_position_embeddings", config.context)
    if config.context > most:
        raise UserError(
            f"context: {config.context} tokens, but {config.model} was made for {most} "
            "(max_position_embeddings in its config.json)"
        )

    # ---- data
    samples, too_long = encode_samples(config.conversations, tokenizer, config.context)
    alone = not isinstance(model, BaichuanM1ForCausalLM) and not keeps_apart(model, samples[0])
    rows = pack_samples(samples, tokens=config.tokens, context=config.context, seed=config.seed, alone=alone)
    steps = len(rows) // config.rows
    if not steps:
        raise UserError(f"{config.conversations}: fewer than {config.rows} rows of {config.context} tokens")

    batches = Conversations(samples, rows, config.rows, config.context)

    heldout: list[Sample] = []
    if config.heldout:
        heldout = encode_samples(config.heldout, tokenizer, config.context)[0][: config.heldout_conversations]

    def score(step: int) -> None:
        """Appends the held-out answers' loss, unless a run before this one did."""
        seen = [row["step"] for row in trainer.rows() if row["kind"] == "heldout"]
        if heldout and step not in seen:
            model.eval()
            answers = {Path(str(config.heldout)).stem: answer_loss(model, heldout, config.context, alone)}
            append_jsonl(out / "metrics.jsonl", {"kind": "heldout", "step": step, "answers": answers})

    # ---- training
    if config.lora:
        model = add_adapter(model, config.lora, config.seed)
    saving = CheckpointConfig(seconds=config.checkpoint_seconds, asynchronous=False)
    paths = ("out", "model", "conversations", "heldout")  # the build knows whether these changed
    identity = {k: v for k, v in asdict(config).items() if k not in (*paths, "checkpoint_seconds")}
    checkpoints = Checkpoints(out, saving, run=identity)
    trainer = Trainer(model, config.optim, config.guard, out, checkpoints=checkpoints)
    after = None
    if config.shift:
        from galenic.align.shifting import shifter

        after = shifter(config.shift, trainer, config.shift.steps(steps), batches.laid_rows)
    trainer.resume()
    if trainer.step == 0:
        score(0)

    def lr(step: int) -> float:
        warm = config.optim.lr * warmup(step, config.optim.warmup_steps)
        return min(warm, cosine_decay((step + 1) / steps, start=config.optim.lr, end=config.final_lr))

    with progress(steps * config.rows * config.context, out.name, "tokens") as bar:
        bar.update(trainer.step * config.rows * config.context)
        trainer.train(batches, first=0, last=steps, lr=lr, bar=bar, after=after)
    score(steps)

    # ---- result
    model.eval()
    write_json(
        out / "data.json",
        {
            "conversations": len(samples),
            "longer_than_context": too_long,
            "steps": steps,
            "packed": not alone,
        },
    )
    made_of = Path(config.model) / "galenic.json"
    provenance = {
        "verb": "sft",
        "conversations": Path(config.conversations).name,
        "steps": steps,
        **({"lora": asdict(config.lora)} if config.lora else {}),
        **({"shift": asdict(config.shift)} if config.shift else {}),
        "base": read_json(made_of) if made_of.exists() else None,
    }
    write = save_adapter if config.lora else save_any
    write(
        model,
        out / "model",
        base=config.model,
        provenance=provenance,
        parents=[folder_name(config.model)],
    )
    trainer.finish()
