"""Verb `sft`: a model and conversations in, an expert out.

Packed samples cannot see each other (positions restart, attention and convolution stay inside a sample) and only
the assistant's tokens carry loss. Source: Baichuan-M1 report, section 5.1.
"""

from pathlib import Path
from typing import Any

import numpy as np

from galenic.align.config import SftConfig
from galenic.corpus.chat_format import PAD, encode_conversation
from galenic.pretrain.packing import IGNORE, best_fit, collate
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
        },
    )


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
            ids, answers = encode_conversation(tokenizer, row["messages"])
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


def pack_samples(samples: list[Sample], *, tokens: int, context: int, seed: int) -> list[list[int]]:
    """Packs whole conversations, epoch after epoch in a new order, into rows of `context` tokens.

    Returns:
        Indices of the samples in each row, in training order, enough rows for `tokens`.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5F7]))
    lengths = [len(ids) for ids, _ in samples]
    rows: list[list[int]] = []
    while len(rows) * context < tokens:
        order = generator.permutation(len(samples)).tolist()
        packed = best_fit([lengths[i] for i in order], context)
        rows += [[order[i] for i in packed[j]] for j in generator.permutation(len(packed))]
    return rows[: max(1, tokens // context)]


def answer_loss(model: Any, samples: list[Sample], context: int) -> float:
    """Mean negative log-likelihood of the answers' tokens, nats per token."""
    import torch

    rows = best_fit([len(ids) for ids, _ in samples], context)
    total = count = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), 8):
            batch = collate([[samples[i] for i in row] for row in rows[start : start + 8]], context, PAD)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            output = model(**batch, num_items_in_batch=1, skip_logits=True, use_cache=False)
            total += float(output.loss)
            count += int((batch["labels"][:, 1:] != IGNORE).sum())
    return total / count


def run(config: SftConfig) -> None:
    """Fine-tunes; continues where a killed run stopped, to the same bytes."""
    from galenic.model import load, load_tokenizer, save
    from galenic.pretrain.loop import Trainer, cosine_decay, warmup_stable_decay

    torch_setup(config.seed)
    out = Path(config.out)
    if (out / "model").exists():
        return
    model, tokenizer = load(config.model), load_tokenizer(config.model)
    if config.context > model.config.max_position_embeddings:
        raise UserError(
            f"context: {config.context} tokens, but {config.model} was made for "
            f"{model.config.max_position_embeddings} (max_position_embeddings in its config.json)"
        )

    # ---- data
    samples, too_long = encode_samples(config.conversations, tokenizer, config.context)
    rows = pack_samples(samples, tokens=config.tokens, context=config.context, seed=config.seed)
    steps = len(rows) // config.rows
    if not steps:
        raise UserError(f"{config.conversations}: fewer than {config.rows} rows of {config.context} tokens")

    def batch(step: int) -> dict[str, Any]:
        chosen = rows[step * config.rows : (step + 1) * config.rows]
        return collate([[samples[i] for i in row] for row in chosen], config.context, PAD)

    heldout: list[Sample] = []
    if config.heldout:
        heldout = encode_samples(config.heldout, tokenizer, config.context)[0][: config.heldout_conversations]

    def score(step: int) -> None:
        """Appends the held-out answers' loss, unless a run before this one did."""
        seen = [row["step"] for row in trainer.rows() if row["kind"] == "heldout"]
        if heldout and step not in seen:
            model.eval()
            answers = {Path(str(config.heldout)).stem: answer_loss(model, heldout, config.context)}
            append_jsonl(out / "metrics.jsonl", {"kind": "heldout", "step": step, "answers": answers})

    # ---- training
    trainer = Trainer(model, config.optim, config.guard, out, config.checkpoint_seconds)
    trainer.resume()
    if trainer.step == 0:
        score(0)

    def lr(step: int) -> float:
        warm = warmup_stable_decay(step, peak=config.optim.lr, warmup=config.optim.warmup_steps)
        return min(warm, cosine_decay((step + 1) / steps, start=config.optim.lr, end=config.final_lr))

    with progress(steps * config.rows * config.context, out.name, "tokens") as bar:
        bar.update(trainer.step * config.rows * config.context)
        trainer.train(batch, first=0, last=steps, lr=lr, bar=bar)
    score(steps)

    # ---- result
    model.eval()
    write_json(
        out / "data.json", {"conversations": len(samples), "longer_than_context": too_long, "steps": steps}
    )
    provenance = {
        "verb": "sft",
        "conversations": Path(config.conversations).name,
        "steps": steps,
        "base": read_json(Path(config.model) / "galenic.json")
        if (Path(config.model) / "galenic.json").exists()
        else None,
    }
    save(
        model,
        out / "model",
        tokenizer=config.model,
        provenance=provenance,
        parents=[folder_name(config.model)],
    )
    trainer.finish()
