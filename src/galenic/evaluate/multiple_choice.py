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

What rows of tokens have in common is computed once, its keys and values cached and only what differs run again:

    what prompts begin with   each different beginning once, in a pass for each of a few lengths
    the rest of a prompt      with what all its options begin with; prompts of one length in a pass
    the rest of an option     options of about the same length in a pass

An option that is one token is read off the prompt's own pass.
"""

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from galenic.corpus.tokens.chat_format import BOS, encode_text
from galenic.corpus.tokens.chat_template import encode_chat, is_ours
from galenic.model.head import head_aside, head_is_product
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
    network = _Network(model, head_is_product(model))
    beginnings = _beginnings(network, prompts, batch_tokens)
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
        for index, values in zip(done, _run(network, batch, beginnings), strict=True):
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


@dataclass(frozen=True)
class _Network:
    """A model whose logits are made at the places that are asked for."""

    model: torch.nn.Module
    product: bool
    """What `head_is_product` says of it."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def cache(self, rows: Sequence[Sequence[int]], past: Any = None) -> Any:
        """Runs rows of tokens that are equally long; returns the cache."""
        ids = torch.tensor(rows, device=self.device)
        output = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return output.past_key_values

    def logits(
        self, rows: Sequence[Sequence[int]], past: Any, wanted: Sequence[slice], *, use_cache: bool
    ) -> tuple[torch.Tensor, Any]:
        """Runs rows of tokens; returns the logits behind those that are wanted, one row after another, and the cache.

        Args:
            rows: of tokens, the last of which may be shorter than others: they are filled up.
            past: cache of what is before them, or None.
            wanted: of each row.
            use_cache: whether a new cache is kept.
        """
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)
        first = torch.tensor([[own.start] for own in wanted], device=self.device)
        last = torch.tensor([[own.stop] for own in wanted], device=self.device)
        keep = longest - min(own.start for own in wanted)
        column = torch.arange(longest - keep, longest, device=self.device)
        places = (column >= first) & (column < last)
        inputs = {"input_ids": ids, "past_key_values": past, "use_cache": use_cache, "logits_to_keep": keep}
        if not self.product:
            output = self.model(**inputs)
            return output.logits[:, -keep:][places], output.past_key_values
        with head_aside(self.model) as head:
            output = self.model(**inputs)
        return head(output.logits[:, -keep:][places]), output.past_key_values


@dataclass(frozen=True)
class _Beginnings:
    """The first tokens of all prompts that are longer, each different beginning run once."""

    length: int
    rows: dict[tuple[int, ...], int]
    """Row of the cache by tokens."""
    cache: Any


def _beginnings(network: _Network, prompts: Sequence[Prompted], batch_tokens: int) -> list[_Beginnings]:
    """Runs what prompts begin with, shortest first, each length on from the one before it."""
    shared = [prompt.shared for prompt in prompts]
    found: list[_Beginnings] = []
    for length in beginning_lengths(shared, batch_tokens):
        rows: dict[tuple[int, ...], int] = {}
        for tokens in shared:
            if len(tokens) > length:
                rows.setdefault(tuple(tokens[:length]), len(rows))
        done, past = 0, None
        if found:
            done = found[-1].length
            past = _taken(found[-1].cache, [found[-1].rows[tokens[:done]] for tokens in rows], network.device)
        found.append(_Beginnings(length, rows, network.cache([tokens[done:] for tokens in rows], past)))
    return found


def beginning_lengths(rows: Sequence[list[int]], batch_tokens: int) -> list[int]:
    """Finds the lengths at which it saves most tokens to run what rows begin with only once.

    With s(l) = the rows longer than l, less the different ways in which they begin up to l, running them up to
    lengths l1 < l2 < ... saves s(l1) l1 + s(l2) (l2 - l1) + ... tokens, less the price of a pass for each length.

    Args:
        rows: of tokens.
        batch_tokens: most tokens of all beginnings of a length, unless there is but one.

    Returns:
        Lengths, shortest first; none if nothing would be saved.
    """
    ordered = sorted(rows)
    # Sorted, rows that begin alike are neighbours; one that is no longer than its beginning stands first and is none.
    alike = np.sort([min(_common(a, b), len(a) - 1) for a, b in itertools.pairwise(ordered)])
    sizes = np.sort([len(row) for row in ordered])
    longest = int(alike.max(initial=0))
    lengths = np.arange(1, longest + 1)
    if longest > batch_tokens:  # where only one beginning is allowed, which ends where rows part
        lengths = np.unique(np.append(lengths[:batch_tokens], alike[alike > batch_tokens]))
    saved = len(alike) - np.searchsorted(alike, lengths)
    different = len(sizes) - np.searchsorted(sizes, lengths, side="right") - saved
    fits = (different == 1) | (different * lengths <= batch_tokens)
    ends, saved = np.append(0, lengths[fits]), np.append(0, saved[fits])
    gains, before = np.zeros(len(ends)), [0] * len(ends)
    for place in range(1, len(ends)):
        after = gains[:place] + saved[place] * (ends[place] - ends[:place]) - _PASS
        before[place] = int(after.argmax())
        gains[place] = after.max()
    chosen, place = [], int(gains.argmax())
    while place:
        chosen.append(int(ends[place]))
        place = before[place]
    return chosen[::-1]


def _taken(cache: Any, rows: Sequence[int], device: torch.device) -> Any:
    """Returns these rows of a cache, which stays as it is."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    # Taking rows puts new tensors in the place of old ones. States of convolutions stand in dicts, and
    # batch_repeat_interleave would leave them behind.
    for layer in taken.layers:
        dicts = {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)}
        vars(layer).update(dicts)
    taken.reorder_cache(torch.tensor(rows, device=device))
    return taken


def _shared(
    network: _Network, prompts: Sequence[Prompted], keep: Sequence[int], beginnings: Sequence[_Beginnings]
) -> tuple[Any, torch.Tensor]:
    """Runs the prompts' shared parts, which are equally long.

    Args:
        network: the model.
        prompts: of a batch.
        keep: behind how many last tokens of each the logits are wanted.
        beginnings: what has been run.

    Returns:
        The cache, and logits (sum of keep, vocabulary).
    """
    shared = [prompt.shared for prompt in prompts]
    done, rows, cache = 0, [0] * len(prompts), None
    most = len(shared[0]) - max(keep)
    usable = [known for known in beginnings if known.length <= most]
    if usable:
        longest = usable[-1]
        done, cache = longest.length, longest.cache
        rows = [longest.rows[tuple(tokens[:done])] for tokens in shared]
    begin = min(_common(min(shared), max(shared)), most)
    if (begin - done) * (len(prompts) - 1) > _PASS:  # a batch whose prompts begin alike for longer
        past = None if cache is None else _taken(cache, rows[:1], network.device)
        cache = network.cache([shared[0][done:begin]], past)
        done, rows = begin, [0] * len(prompts)
    past = None if cache is None else _taken(cache, rows, network.device)
    length = len(shared[0]) - done
    wanted = [slice(length - count, length) for count in keep]
    logits, cache = network.logits([tokens[done:] for tokens in shared], past, wanted, use_cache=True)
    return cache, logits


def _run(
    network: _Network, prompts: Sequence[Prompted], beginnings: Sequence[_Beginnings]
) -> list[list[tuple[float, bool]]]:
    """Scores prompts whose shared parts are equally long and that have equally many options.

    Token t of a row is told by the logits behind token t - 1. So those of the shared part give the option's tokens in
    it and the first one of its rest, and the rest is run without its last token.
    """
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
        keep = [1 + max(inside[first : first + options]) for first in range(0, len(rows), options)]
        cache, logits = _shared(network, prompts, keep, beginnings)
        ids = []
        for prompt, count in zip(prompts, keep, strict=True):
            ids += [[token] * options for token in prompt.shared[length - count + 1 :]]
            ids.append([row[0] for row in prompt.rest])
        log_probs, likeliest = _told(logits, torch.tensor(ids, device=network.device))
        ends = list(itertools.accumulate(keep))
        for index, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            end = ends[index // options]  # behind the place that tells the rest's first token
            own = slice(end - 1 - inside[index], end if n >= len(row) else end - 1)
            where = own, index % options
            add(index, log_probs[where], likeliest[where])
    longer = [index for index, row in enumerate(rows) if len(row) > 1]
    for places in by_length([len(rows[index]) for index in longer]):
        part = [longer[place] for place in places]
        past = None if cache is None else _taken(cache, [index // options for index in part], network.device)
        run = [rows[index][:-1] for index in part]
        own = [slice(max(0, len(rows[index]) - 1 - lengths[index]), len(rows[index]) - 1) for index in part]
        logits, _ = network.logits(run, past, own, use_cache=past is not None)
        ids = [[token] for index, at in zip(part, own, strict=True) for token in rows[index][1:][at]]
        log_probs, likeliest = _told(logits, torch.tensor(ids, device=network.device))
        first = 0
        for index, at in zip(part, own, strict=True):
            last = first + at.stop - at.start
            add(index, log_probs[first:last], likeliest[first:last])
            first = last
    return [scores[start : start + options] for start in range(0, len(scores), options)]


def _told(logits: torch.Tensor, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p of tokens in nats, and which are the likeliest of their place.

    Args:
        logits: (places, vocabulary), any float dtype; reduced in float32. Written over.
        ids: (places, tokens) int64: one or several tokens that may stand at a place.

    Returns:
        (places, tokens) each: float64 and bool.
    """
    logits = logits.float()
    own, most = logits.gather(-1, ids), logits.amax(-1, keepdim=True)
    log_probs = own - most - logits.sub_(most).exp_().sum(-1, keepdim=True).log()
    likeliest = own == most  # argmax, which also says where, takes many times as long
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
