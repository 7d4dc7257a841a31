r"""Multiple choice by likelihood: the option the model finds likeliest after the prompt.

    plain:  <s>Question: {question}\nAnswer: {option}
    chat:   <B_SYS>{system}<C_Q>{question}<C_A>{option}      (or the chat template of a tokenizer that is not ours)

Three scores of an option o after a prompt x, from one pass over it:

    total     log p(o | x)
    per_byte  log p(o | x) / UTF-8 bytes of o               long options are not punished for their length
    pmi       log p(o | x) - log p(o | bare prompt)         common options are not favoured for being common
              (Holtzman et al. 2021, arXiv 2104.08315; the bare prompt is `<s>Answer:`, or a chat that asks `Answer:`)

Where the option begins: prompt and option are tokenized together, as the model met them in training, and the
option's tokens are those from the first one on that differs from the prompt tokenized alone. A token that straddles
the boundary so counts whole as the option's, instead of forcing a split the model never saw. The chat form ends in
a marker, where no token can straddle. Markers written in a question are spelled out, never taken as special tokens.

What the options of a question have in common, the prompt and perhaps their first words, is computed once: its keys and
values are cached, repeated for the options, and only what differs is run again. An option that is one token is read off
the prompt's own pass. What all prompts of a batch begin with, such as examples, is computed once for all.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from galenic.corpus.tokens.chat_format import BOS, encode_text
from galenic.corpus.tokens.chat_template import encode_chat, is_ours
from galenic.runtime import UserError

from .likelihood import Advance

SCORINGS = ("total", "per_byte", "pmi")
BARE = "Answer:"
# Prompts of a batch are equally long, so that nothing in the cache is padded. A batch of fewer than so many takes
# prompts that are up to so many tokens longer; what is too much of them is run with each option.
_FEW, _SLACK = 4, 4
# What one more pass costs, in tokens: as much as it has to save.
_PASS = 64


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """One prompt with its options as token ids."""

    shared: list[int]
    """Tokens that all options begin with, those of the prompt first; run once."""
    rest: list[list[int]]
    """For each option its remaining tokens, at least one."""
    lengths: list[int]
    """How many of the last tokens of each row (shared and rest) are the option's."""
    truncated: bool = False
    """The prompt's beginning was cut to fit the context."""

    @classmethod
    def of(cls, rows: Sequence[list[int]], lengths: Sequence[int], *, truncated: bool = False) -> "Prompted":
        """Divides rows of tokens, each a prompt and an option, into what they share and what not."""
        cut = min(_common(min(rows), max(rows)), min(map(len, rows)) - 1)
        return cls(
            shared=list(rows[0][:cut]),
            rest=[list(row[cut:]) for row in rows],
            lengths=list(lengths),
            truncated=truncated,
        )


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a question becomes a prompt."""

    name: Literal["plain", "chat"] = "plain"
    system: str | None = None
    """System message of the chat form; none takes the chat format's own."""

    def parts(self, tokenizer: Any, question: str | None) -> tuple[list[int], str]:
        """Returns the prompt as token ids and the text after them, which is tokenized together with the option.

        Args:
            tokenizer: the models' tokenizer.
            question: the question; none gives the bare prompt of the pmi score.
        """
        if self.name == "plain":
            return _start(tokenizer), BARE if question is None else f"Question: {question}\n{BARE}"
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages.append({"role": "user", "content": BARE if question is None else question})
        try:
            return encode_chat(tokenizer, messages)[0], ""
        except ValueError as error:
            raise UserError(f"a question cannot be put: {error}") from None

    @property
    def join(self) -> str:
        """What stands between the prompt and the option."""
        return " " if self.name == "plain" else ""


def _start(tokenizer: Any) -> list[int]:
    """Returns what a text begins with: `<s>`, or what another tokenizer puts there by itself, which may be nothing."""
    if is_ours(tokenizer):
        return [BOS]
    return [index for index in tokenizer("")["input_ids"] if index != tokenizer.eos_token_id]


def tokenize(
    tokenizer: Any, prompt: PromptFormat, question: str | None, options: Sequence[str], context: int
) -> Prompted:
    """Tokenizes a question with its options; the module's docstring says where an option begins.

    Args:
        tokenizer: the models' tokenizer.
        prompt: how the question is put.
        question: its text; none gives the bare prompt.
        options: the options' texts.
        context: most tokens the model takes; a longer prompt loses its beginning (all but its first token).

    Raises:
        UserError: an option alone is longer than the context.
    """
    head, prefix = prompt.parts(tokenizer, question)
    alone = head + encode_text(tokenizer, prefix)
    rows = [head + encode_text(tokenizer, prefix + prompt.join + option) for option in options]
    starts = [_common(alone, row) for row in rows]
    excess = max(0, max(map(len, rows)) - context)
    if excess and excess >= min(starts):
        longest = max(len(row) - start for row, start in zip(rows, starts, strict=True))
        raise UserError(
            f"an option of {longest} tokens does not fit the model's context of {context}: {options!r}"
        )
    lengths = [len(row) - start for row, start in zip(rows, starts, strict=True)]
    return Prompted.of([row[:1] + row[1 + excess :] for row in rows], lengths, truncated=excess > 0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def option_log_probs(
    model: torch.nn.Module, prompts: Sequence[Prompted], *, batch_tokens: int, advance: Advance | None = None
) -> list[list[float]]:
    """Returns log p(option | prompt) in nats for every option of every prompt; see `option_scores`."""
    found = option_scores(model, prompts, batch_tokens=batch_tokens, advance=advance)
    return [[value for value, _ in values] for values in found]


@torch.inference_mode()
def option_scores(
    model: torch.nn.Module, prompts: Sequence[Prompted], *, batch_tokens: int, advance: Advance | None = None
) -> list[list[tuple[float, bool]]]:
    """Returns for every option log p(option | prompt) in nats, and whether each of its tokens is the likeliest.

    Args:
        model: a Hugging Face causal language model with a cache.
        prompts: tokenized prompts; each may have any number of options.
        batch_tokens: most tokens of one forward pass.
        advance: called with the number of prompts after each batch.
    """
    scores: list[list[tuple[float, bool]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (*_size(prompts[i]), i))
    while order:
        options, length, _ = _size(prompts[order[0]])
        batch: list[Prompted] = []
        for index in order:
            more, own, longest = _size(prompts[index])
            tokens = (len(batch) + 1) * max(length, options * (longest + own - length - 1))
            slack = _SLACK if len(batch) < _FEW else 0
            if batch and (more != options or own > length + slack or tokens > batch_tokens):
                break
            batch.append(_cut(prompts[index], length))
        done, order = order[: len(batch)], order[len(batch) :]
        for index, values in zip(done, _run(model, batch), strict=True):
            scores[index] = values
        if advance:
            advance(len(batch))
    return scores


def _size(prompt: Prompted) -> tuple[int, int, int]:
    """Returns how many options a prompt has, how long its shared part is, and its longest rest."""
    return len(prompt.rest), len(prompt.shared), max(map(len, prompt.rest))


def _cut(prompt: Prompted, length: int) -> Prompted:
    """Returns a prompt of which fewer tokens are shared."""
    tail = prompt.shared[length:]
    return replace(prompt, shared=prompt.shared[:length], rest=[tail + row for row in prompt.rest])


def _shared(model: torch.nn.Module, prompts: Sequence[Prompted], keep: int) -> tuple[Any, torch.Tensor]:
    """Runs the prompts' shared parts, which are equally long; returns their cache and the logits of the last `keep`."""
    device = next(model.parameters()).device
    first, last = min(prompt.shared for prompt in prompts), max(prompt.shared for prompt in prompts)
    begin, cache = min(_common(first, last), len(first) - keep), None
    if begin * (len(prompts) - 1) > _PASS:
        ids = torch.tensor([first[:begin]], device=device)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        # reorder_cache takes convolution states along; batch_repeat_interleave leaves them behind.
        cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long, device=device))
    ids = torch.tensor([prompt.shared[0 if cache is None else begin :] for prompt in prompts], device=device)
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return output.past_key_values, output.logits[:, -keep:]


def _run(model: torch.nn.Module, prompts: Sequence[Prompted]) -> list[list[tuple[float, bool]]]:
    """Scores prompts whose shared parts are equally long and that have equally many options.

    Token t of a row is told by the logits behind token t - 1. So those of the shared part give the option's tokens in
    it and the first one of its rest, and the rest is run without its last token.
    """
    device = next(model.parameters()).device
    options, length = len(prompts[0].rest), len(prompts[0].shared)
    rows = [row for prompt in prompts for row in prompt.rest]
    lengths = [count for prompt in prompts for count in prompt.lengths]
    scores, cache = [(0.0, True)] * len(rows), None

    def add(index: int, log_probs: np.ndarray, likeliest: np.ndarray) -> None:
        total, greedy = scores[index]
        scores[index] = total + float(log_probs.sum()), greedy and bool(likeliest.all())

    if length:
        # Of each option: how many of its tokens stand in the shared part, behind the first.
        inside = [max(0, min(length - 1, n - len(row))) for n, row in zip(lengths, rows, strict=True)]
        keep = 1 + max(inside)
        cache, logits = _shared(model, prompts, keep)
        ids = [
            [
                *([token] * options for token in prompt.shared[length - keep + 1 :]),
                [r[0] for r in prompt.rest],
            ]
            for prompt in prompts
        ]
        log_probs, likeliest = _told(logits, torch.tensor(ids, device=device))
        for index, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            own = slice(keep - 1 - inside[index], keep if n >= len(row) else keep - 1)
            where = index // options, own, index % options
            add(index, log_probs[where], likeliest[where])
    longer = [index for index, row in enumerate(rows) if len(row) > 1]
    for places in by_length([len(rows[index]) for index in longer]):
        part = [longer[place] for place in places]
        past = copy.deepcopy(cache)
        if past is not None:
            past.reorder_cache(torch.tensor([index // options for index in part], device=device))
        ids = torch.zeros(len(part), len(rows[part[-1]]), dtype=torch.long)
        for place, index in enumerate(part):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
        ids = ids.to(device)
        output = model(input_ids=ids[:, :-1], past_key_values=past, use_cache=past is not None)
        log_probs, likeliest = _told(output.logits, ids[:, 1:, None])
        for place, index in enumerate(part):
            end = len(rows[index]) - 1
            own = slice(max(0, end - lengths[index]), end)
            add(index, log_probs[place, own], likeliest[place, own])
    return [scores[start : start + options] for start in range(0, len(scores), options)]


def _told(logits: torch.Tensor, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p of tokens in nats, and which are the likeliest of their place.

    Args:
        logits: (rows, places, vocabulary), any float dtype; reduced in float32.
        ids: (rows, places, tokens) int64: one or several tokens that may stand at a place.

    Returns:
        (rows, places, tokens) each: float64 and bool.
    """
    logits = logits.float()
    log_probs = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    likeliest = logits.argmax(-1, keepdim=True) == ids
    return log_probs.double().cpu().numpy(), likeliest.cpu().numpy()


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Divides rows into parts, each padded to its longest row and run in one pass, at the least cost.

    The parts are runs of the rows in the order of their length. With l(1) < l(2) < ... the distinct lengths and n(i)
    the number of rows up to l(i), the cheapest way to run the rows up to l(j) is
    cost(j) = min over i < j of cost(i) + (n(j) - n(i)) l(j) + the price of a pass.

    Args:
        lengths: of the rows, in tokens.

    Returns:
        The rows' places, part by part, shortest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    ends = [
        n for n in range(1, len(order) + 1) if n == len(order) or lengths[order[n]] > lengths[order[n - 1]]
    ]
    cost, begin = {0: 0}, {}
    for end in ends:
        longest = lengths[order[end - 1]]
        cost[end], begin[end] = min((cost[n] + (end - n) * longest + _PASS, n) for n in cost)
    parts, end = [], len(order)
    while end:
        parts.append(order[begin[end] : end])
        end = begin[end]
    return parts[::-1]


def scores(total: Sequence[float], bare: Sequence[float], options: Sequence[str]) -> dict[str, list[float]]:
    """Returns the three scores of each option; the highest is the pick, the first of equals.

    Args:
        total: log p(option | prompt), nats.
        bare: log p(option | bare prompt), nats.
        options: the options' text without the leading space.
    """
    return {
        "total": list(total),
        "per_byte": [value / len(text.encode()) for value, text in zip(total, options, strict=True)],
        "pmi": [value - prior for value, prior in zip(total, bare, strict=True)],
    }


def best(scores: Sequence[float]) -> int:
    """Returns the index of the highest score, the first of equals."""
    return int(np.argmax(scores))


def most_shared_words(question: str, options: Sequence[str]) -> int:
    """Returns the option with the most distinct words of the question in it, the first of equals.

    What a reader without any knowledge could do: a model has to be held against it, not only against chance.
    """
    asked = set(re.findall(r"\w+", question.lower()))
    return best([len(asked & set(re.findall(r"\w+", option.lower()))) for option in options])
