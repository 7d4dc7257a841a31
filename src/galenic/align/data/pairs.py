"""Preference pairs: a prompt with a better and a worse answer. For TDPO and reward models.

A line of a file: {"prompt", "chosen", "rejected"}, each a text or messages (`prompt` ends with the user's, the answers
are the assistant's one message); `margin` tells how much better, where that is known.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galenic.align.data.order import Epochs, own_share
from galenic.align.data.tasks import Messages, messages_of
from galenic.corpus.tokens.chat_format import PAD
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.pretrain.data.drawing import stable_hash
from galenic.runtime import UserError, numbered_jsonl, read_jsonl


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair as token ids, prompts included."""

    id: str
    """`file:line`."""
    chosen: list[int]
    """The prompt and the better answer, to the end of its turn."""
    rejected: list[int]
    """The prompt and the worse one."""
    prompt: int
    """Tokens of the prompt, the same in both."""
    margin: float = 0.0
    """How much better, in units of reward."""


def read_pairs(path: str, tokenizer: Any, context: int) -> tuple[list[Pair], dict[str, int]]:
    """Reads and encodes a file of pairs.

    Args:
        path: JSON lines; see above.
        tokenizer: of the model.
        context: tokens at most in a prompt with an answer.

    Returns:
        The pairs, and how many were left out, by reason.

    Raises:
        UserError: a line that is no pair, or whose answers are the same, named; no pair fits.
    """
    pairs, dropped = [], Counter()
    for number, row in numbered_jsonl(path):
        if isinstance(row, UserError):
            raise row
        try:
            pair = _encode(row, tokenizer, f"{Path(path).name}:{number}")
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a pair ({error})") from None
        if max(len(pair.chosen), len(pair.rejected)) > context:
            dropped["longer than context"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise UserError(f"{path}: no pair fits {context} tokens")
    return pairs, dict(dropped)


def _encode(row: dict[str, Any], tokenizer: Any, name: str) -> Pair:
    prompt = messages_of(row.get("prompt"))
    answers = {key: _answer(row.get(key), key) for key in ("chosen", "rejected")}
    if answers["chosen"].strip() == answers["rejected"].strip():
        raise ValueError("chosen and rejected are the same")
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"margin {margin!r} is not a number")
    asked = encode_chat(tokenizer, prompt)[0]
    ids = {
        key: encode_answered(tokenizer, [*prompt, {"role": "assistant", "content": text}])
        for key, text in answers.items()
    }
    if any(found[: len(asked)] != asked for found in ids.values()):
        raise ValueError("the tokenizer writes the prompt differently once an answer follows")
    return Pair(
        id=name, chosen=ids["chosen"], rejected=ids["rejected"], prompt=len(asked), margin=float(margin)
    )


def encode_answered(tokenizer: Any, messages: Messages) -> list[int]:
    """Encodes a conversation up to the end of the assistant's last turn, without what a template puts behind it.

    Raises:
        ValueError: the last message is not the assistant's; see `encode_chat`.
    """
    ids, answers = encode_chat(tokenizer, messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return ids[: len(answers) - answers[::-1].index(True)]


def _answer(value: Any, key: str) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        if value[0].get("role") != "assistant":
            raise ValueError(f"{key} is a message of role {value[0].get('role')!r}, not the assistant's")
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {key}: a text, or one message of the assistant's")
    return value


def set_aside(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs by a hash of their prompts: all pairs of one prompt fall on one side.

    Returns:
        (for training, held out), neither empty.

    Raises:
        UserError: there are too few.
    """
    limit = share * 2**64
    held = [pair for pair in pairs if stable_hash(f"{seed}/{pair.chosen[: pair.prompt]}") < limit]
    kept = [pair for pair in pairs if stable_hash(f"{seed}/{pair.chosen[: pair.prompt]}") >= limit]
    if not held or not kept:
        raise UserError(
            f"{len(pairs)} pairs are too few to set {share:.0%} aside; name a file of held-out pairs"
        )
    return kept, held


def trained_and_heldout(config: Any, tokenizer: Any) -> tuple[list[Pair], list[Pair], dict[str, int]]:
    """Reads the pairs of a run, `TdpoConfig`'s or `RewardConfig`'s.

    Returns:
        Those to train on, those held out and measured, and how many of the former were left out, by reason.
    """
    pairs, dropped = read_pairs(config.pairs, tokenizer, config.context)
    if config.heldout:
        heldout = read_pairs(config.heldout, tokenizer, config.context)[0]
    else:
        pairs, heldout = set_aside(pairs, config.heldout_share, config.seed)
    return pairs, heldout[: config.heldout_pairs], dropped


def steps_of(config: Any) -> tuple[int, int]:
    """Counts the lines of a run's pairs and, from them, its steps; for the plan, before any is understood."""
    count = sum(1 for _ in read_jsonl(config.pairs))
    trained = count if config.heldout else round(count * (1 - config.heldout_share))
    return count, int(config.epochs * trained) // config.rows


class Pairs:
    """The batches of a run over pairs (`galenic.pretrain.loop.Batches`), epoch after epoch in a new order.

    A batch of n pairs: `input_ids` (2n, longest), the chosen at even rows and the rejected behind each, filled up with
    `pad`; `answers`, of the same shape, bool, tokens of the answer; `margins` (n,) float32.
    """

    domains: Sequence[str] = ()

    def __init__(
        self, pairs: list[Pair], *, rows: int, epochs: float, context: int, seed: int, pad: int = PAD
    ) -> None:
        self.pairs, self.rows, self.context, self.pad = pairs, rows, context, pad
        self.steps = int(epochs * len(pairs)) // rows
        if not self.steps:
            raise UserError(
                f"rows: {len(pairs)} pairs, read {epochs:g} times, are fewer than a batch of {rows}"
            )
        self._order = Epochs(len(pairs), seed=seed, name="pairs")

    def _chosen(self, step: int, rows: Sequence[int]) -> list[Pair]:
        return [self.pairs[self._order[step * self.rows + row]] for row in rows]

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, Any]:
        """Returns these pairs of a batch."""
        return collate_pairs(self._chosen(step, rows), self.pad)

    def documents(self, step: int) -> list[str]:
        """Names the pairs of a batch."""
        return [pair.id for pair in self._chosen(step, range(self.rows))]

    def state(self, step: int) -> dict[str, Any]:
        """Where the reader stands before a step."""
        return {"pair": step * self.rows}


def collate_pairs(pairs: Sequence[Pair], pad: int = PAD) -> dict[str, Any]:
    """Lays pairs into tensors; see `Pairs`."""
    import torch

    from galenic.align.policy import laid

    sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    ids, answers = laid(sequences, [pair.prompt for pair in pairs for _ in range(2)], pad)
    return {
        "input_ids": ids,
        "answers": answers,
        "margins": torch.tensor([pair.margin for pair in pairs]),
    }


def in_order(margins: Any) -> float:
    """Counts the pairs whose margin (a tensor's entry) is positive; one of zero is a half."""
    return float((margins > 0).sum() + 0.5 * (margins == 0).sum())


def in_turn(pairs: Sequence[Pair], rows: int, parallel: Any) -> Iterator[tuple[slice, bool]]:
    """Shares pairs among processes, so many at a time: yields which ones, and whether they count here (`own_share`)."""
    starts = range(0, len(pairs), rows)
    for place, counts in own_share(len(starts), parallel):
        yield slice(starts[place], starts[place] + rows), counts
