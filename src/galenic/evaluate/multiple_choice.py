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

A question's prompt is computed once: its keys and values are cached, repeated for the options, and only the
options' own tokens are run again.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from galenic.corpus.tokens.chat_format import BOS, encode_text
from galenic.corpus.tokens.chat_template import encode_chat, is_ours
from galenic.runtime import UserError

from .likelihood import Advance, target_log_probs

SCORINGS = ("total", "per_byte", "pmi")
BARE = "Answer:"
# Prompts are cut at a multiple of this and the rest is run with each option: prompts of nearly equal length share a
# batch without any padding in the cache.
GRAIN = 4


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """One prompt with its options as token ids."""

    shared: list[int]
    """Tokens common to all options; run once."""
    rest: list[list[int]]
    """For each option its remaining tokens: the end of the prompt, at least one token, then the option."""
    lengths: list[int]
    """How many of the last tokens of each row are the option's."""
    truncated: bool = False
    """The prompt's beginning was cut to fit the context."""


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
    cut = max(0, (min(starts) - 1) // GRAIN * GRAIN)
    longest = max(len(row) for row in rows) - cut
    if longest > context:
        raise UserError(
            f"an option of {longest} tokens does not fit the model's context of {context}: {options!r}"
        )
    shared, truncated = alone[:cut], cut + longest > context
    if truncated:
        room = (context - longest) // GRAIN * GRAIN
        shared = shared[:1] + shared[cut - room + 1 :] if room else []
    return Prompted(
        shared=shared,
        rest=[row[cut:] for row in rows],
        lengths=[len(row) - start for row, start in zip(rows, starts, strict=True)],
        truncated=truncated,
    )


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

    def shape(index: int) -> tuple[int, int]:
        return len(prompts[index].shared), len(prompts[index].rest)

    def longest(index: int) -> int:
        return max(len(row) for row in prompts[index].rest)

    order = sorted(range(len(prompts)), key=lambda i: (*shape(i), longest(i), i))
    while order:
        length, options = shape(order[0])
        batch: list[int] = []
        for index in order:
            tokens = (len(batch) + 1) * max(length, options * longest(index))
            if batch and (shape(index) != (length, options) or tokens > batch_tokens):
                break
            batch.append(index)
        order = order[len(batch) :]
        for index, values in zip(batch, _run(model, [prompts[i] for i in batch]), strict=True):
            scores[index] = values
        if advance:
            advance(len(batch))
    return scores


def _run(model: torch.nn.Module, prompts: Sequence[Prompted]) -> list[list[tuple[float, bool]]]:
    """Scores prompts whose shared parts are equally long and that have equally many options."""
    device = next(model.parameters()).device
    options = len(prompts[0].rest)
    cache = None
    if prompts[0].shared:
        shared = torch.tensor([prompt.shared for prompt in prompts], device=device)
        cache = model(input_ids=shared, use_cache=True, logits_to_keep=1).past_key_values
    rows = [row for prompt in prompts for row in prompt.rest]
    lengths = [length for prompt in prompts for length in prompt.lengths]
    scores = [(0.0, True)] * len(rows)
    # Short and long options apart: together the short ones would be half padding.
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    middle = len(order) // 2
    for part in (order[:middle], order[middle:]):
        if not part:
            continue
        past = copy.deepcopy(cache)
        if past is not None:
            # reorder_cache takes convolution states along; batch_repeat_interleave leaves them behind.
            past.reorder_cache(torch.tensor([index // options for index in part], device=device))
        ids = torch.zeros(len(part), len(rows[part[-1]]), dtype=torch.long)
        for place, index in enumerate(part):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
        ids = ids.to(device)
        # What follows the last token is nobody's question.
        logits = model(input_ids=ids[:, :-1], past_key_values=past, use_cache=past is not None).logits
        log_probs = target_log_probs(logits, ids[:, 1:]).double().cpu().numpy()
        likeliest = (logits.argmax(-1) == ids[:, 1:]).cpu().numpy()
        for place, index in enumerate(part):
            end = len(rows[index]) - 1
            own = slice(end - lengths[index], end)
            scores[index] = float(log_probs[place, own].sum()), bool(likeliest[place, own].all())
    return [scores[start : start + options] for start in range(0, len(scores), options)]


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
