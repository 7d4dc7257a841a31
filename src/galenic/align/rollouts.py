"""Text sampled from the policy, batched and with the model's own cache.

    conversations -> prompts -sorted, padded on the left-> [ pass -> a token for each row -> ended? leave ] -> rollouts

A draw follows from its row's key and its place in the text alone: a uniform number, looked up in the distribution. The
same weights so give the same text in whatever batch, up to the rounding of the network's own products, and a resumed
run repeats its rollouts.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galenic.align.config import SamplingConfig
from galenic.align.policy import plain
from galenic.align.tasks import Messages
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.ranks import gathered, rank, ranks
from galenic.runtime import UserError

if TYPE_CHECKING:
    from galenic.align.training import Run

STEPS = 2**48
"""Probabilities are counted in parts of this size: sums of whole numbers do not depend on their order."""


@dataclass(kw_only=True)
class Rollout:
    """What was sampled after one prompt."""

    ids: list[int] = field(default_factory=list)
    """New tokens, the one that ended the text included."""
    ended: bool = False
    """Whether it ended by itself, and not at the most tokens that it may have."""
    log_probs: list[float] = field(default_factory=list)
    """Of each token under the distribution it was drawn from, nats (greedy ones: at temperature 1). Empty if a server
    did not tell them; not a number where it left one out."""


Stop = Callable[[list[int]], bool]
"""Whether a text, given its tokens so far, ends with the last one."""


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """Returns the (count,) float64 numbers in [0, 1) of a key; more of them begin with the same ones."""
    digest = hashlib.sha256(repr(tuple(map(int, key))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16]))).random(count)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws a token for each row: the first v with u < p(0) + ... + p(v).

    Args:
        probabilities: (rows, vocabulary), each row's sum 1.
        uniform: (rows,) float64 in [0, 1).

    Returns:
        (rows,) int64; never a token whose probability is below 1 / (2 STEPS).
    """
    bounds = (probabilities.double() * STEPS).round().long().cumsum(-1)
    total = bounds[:, -1]
    place = (uniform * total).long().minimum(total - 1)
    return torch.searchsorted(bounds, place[:, None], right=True)[:, 0]


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    end: Collection[int],
    temperature: float = 1.0,
    stop: Stop | None = None,
    batch: int = 64,
    together: Callable[[bool], bool] | None = None,
) -> list[Rollout]:
    """Samples a continuation of each prompt; the model is left in the mode it was in.

    Args:
        model: a causal language model that keeps a cache, with an adapter or without, spread or not.
        prompts: token ids, none empty; equal ones of a batch are read once.
        keys: of each prompt's draws.
        max_new_tokens: at most, of each.
        end: tokens that end a text.
        temperature: of the distribution; 0 takes the likeliest token.
        stop: ends a text too.
        batch: prompts at a time.
        together: processes that share the model's weights have to take equally many passes: told before each pass
            whether this process is done, it says whether all are.

    Raises:
        UserError: the model keeps no cache, or its logits are not numbers.
    """
    # Neighbours in this order are of about the same length, and equal prompts stand together.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), list(prompts[i]), i))
    found = [Rollout() for _ in prompts]
    with _at_rest(model), _weights_ready(model):
        passes = _Passes(model, together)
        for first in range(0, len(order), batch):
            places = order[first : first + batch]
            noise = torch.from_numpy(np.stack([uniforms(keys[i], max_new_tokens) for i in places]))
            _sample_batch(
                passes,
                [prompts[i] for i in places],
                [found[i] for i in places],
                noise,
                end,
                temperature,
                stop,
            )
        passes.wait()
    return found


def _sample_batch(
    passes: "_Passes",
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    noise: torch.Tensor,
    end: Collection[int],
    temperature: float,
    stop: Stop | None,
) -> None:
    """Fills in the rollouts of a batch; `noise`: (rows, most new tokens) float64."""
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids, mask = _left_padded(list(distinct))
    logits, cache = passes(ids, mask, None)
    logits, mask = _rows(cache, [distinct[tuple(prompt)] for prompt in prompts], logits, mask)
    left, most = list(range(len(prompts))), noise.shape[1]  # rows whose text has not ended
    for place in range(most):
        tokens, log_probs = _next(logits, noise[left, place], temperature)
        going = []
        for at, (token, log_prob) in enumerate(zip(tokens.tolist(), log_probs.tolist(), strict=True)):
            rollout = rollouts[left[at]]
            rollout.ids.append(token)
            rollout.log_probs += [log_prob]
            rollout.ended = token in end or (stop is not None and stop(rollout.ids))
            going += [] if rollout.ended else [at]
        if not going or place == most - 1:
            return
        if len(going) < len(left):
            tokens, mask = _rows(cache, going, tokens, mask)
            left = [left[at] for at in going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits, cache = passes(tokens[:, None], mask, cache)


def _rows(
    cache: Any, rows: list[int], values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes rows of a batch, some more than once: those of its cache, in place, of its values and of its mask."""
    index = torch.tensor(rows)
    # Not batch_select_indices, which leaves convolution states behind.
    cache.reorder_cache(index.to(values.device))
    return values[index.to(values.device)], mask[index]


def _next(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the next token of each row and its log-probability, (rows,) each; see `sample`."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = (exact / (temperature or 1.0)).log_softmax(-1)
    if bool(log_probs.isnan().any()):
        raise UserError(
            "the model's logits are not numbers, so nothing can be sampled: its weights are broken, or training has "
            "gone astray; go back to an earlier checkpoint and lower optim.lr"
        )
    tokens = draw(log_probs.exp(), noise.to(logits.device)) if temperature else log_probs.argmax(-1)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lays prompts into (rows, longest) int64, filled up on the left; returns the ids and where they are real."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


class _Passes:
    """Forward passes of a model that other processes may share."""

    def __init__(self, model: Any, together: Callable[[bool], bool] | None) -> None:
        self.model, self.together = model, together
        self.device = next(model.parameters()).device
        known = inspect.signature(plain(model).forward).parameters
        self.positions = "position_ids" in known
        self.only_last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Feeds the tokens that follow the cache; returns the last ones' logits (rows, vocabulary) and the cache."""
        if self.together is not None:
            self.together(False)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if self.positions:  # most count padding too if they are not told
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
            inputs["position_ids"] = positions[:, -ids.shape[1] :]
        output = self.model(**inputs, past_key_values=cache, use_cache=True, **self.only_last)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise UserError(
                f"{type(plain(self.model)).__name__} keeps no cache that rows can leave, so it cannot be sampled from "
                "here; let a server sample: sampling.endpoint"
            )
        return output.logits[:, -1], cache

    def wait(self) -> None:
        """Takes empty passes until the other processes are done."""
        while self.together is not None and not self.together(True):
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)


@contextmanager
def _at_rest(model: Any) -> Iterator[None]:
    """Puts a model into the mode in which it is used, for a while."""
    training, inner = model.training, plain(model)
    attention = getattr(inner.config, "_attn_implementation", None)
    model.eval()
    if attention == "flex_attention":  # compiled anew for each length of the cache
        inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if attention == "flex_attention":
            inner.set_attn_implementation(attention)
        model.train(training)


@contextmanager
def _weights_ready(model: Any) -> Iterator[None]:
    """Keeps the weights of a process of its own as they are computed with; else FSDP casts them anew for each token.

    Where processes share the weights, they share them because all of them would be too much for one.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in model.modules() if isinstance(part, FSDPModule)] if ranks() == 1 else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # FSDP's own default


# ---------------------------------------------------------------------------- of a run


def end_tokens(tokenizer: Any, model: Any) -> list[int]:
    """Returns the tokens that end the model's turn, the one of its chat format first.

    Raises:
        UserError: the tokenizer's chat template does not mark where the model's turn ends.
    """
    try:
        ids, answers = encode_chat(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
    except ValueError as error:
        raise UserError(f"nothing can be sampled: {error}") from None
    last = max(place for place, answer in enumerate(answers) if answer)
    turn = [ids[last]] if ids[last] in tokenizer.added_tokens_decoder else []
    settings = getattr(plain(model), "generation_config", None)
    more = getattr(settings, "eos_token_id", None)
    found = [*turn, tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    found = list(dict.fromkeys(int(index) for index in found if index is not None))
    if not found:
        raise UserError(
            "nothing can be sampled: no token ends the model's turn; set eos_token in the tokenizer's files"
        )
    return found


class Sampler:
    """Samples the policy's answers to conversations, here or on a server.

    Args:
        run: whose model is sampled from.
        config: how.
    """

    def __init__(self, run: "Run", config: SamplingConfig) -> None:
        self.run, self.config = run, config
        self.end = end_tokens(run.tokenizer, run.model)
        self.server: Any = None
        if config.endpoint is not None:
            from galenic.align.endpoint import Server

            self.server = Server(config.endpoint, run.out / f"rollouts-{rank()}.jsonl")

    def __call__(
        self,
        conversations: Sequence[Messages],
        *,
        step: int,
        numbers: Sequence[int],
        copies: int = 1,
        stop: str | None = None,
        greedy: bool = False,
    ) -> list[list[Rollout]]:
        """Samples the next turn of each conversation; with several processes each asks for its own, possibly none.

        Args:
            conversations: ending with the user's turn.
            step: of training; with a conversation's number it decides what is drawn.
            numbers: of the conversations, in the step's batch.
            copies: rollouts of each.
            stop: text that ends a rollout as well; it is kept.
            greedy: take the likeliest tokens of the model here, even if a server samples: it measures what has been
                trained.

        Returns:
            (conversations) x (copies).

        Raises:
            UserError: a prompt leaves no room, or the server fails.
        """
        config, seed = self.config, self.run.config.seed
        keys = [(seed, step, number, copy) for number in numbers for copy in range(copies)]
        stops = ends_with(self.run.tokenizer, stop) if stop else None
        most = config.max_new_tokens
        if self.server is not None and not greedy:
            found = self.server.rollouts(
                [messages for messages in conversations for _ in range(copies)],
                keys=keys,
                tokenizer=self.run.tokenizer,
                end=self.end[0],
                max_new_tokens=most,
                temperature=config.temperature,
                stop=stops,
            )
        else:
            prompts = [self._prompt(messages) for messages in conversations]
            found = sample(
                self.run.model,
                [prompt for prompt in prompts for _ in range(copies)],
                keys=keys,
                max_new_tokens=most,
                end=set(self.end),
                temperature=0.0 if greedy else config.temperature,
                stop=stops,
                batch=config.batch,
                together=(lambda done: all(gathered(done))) if ranks() > 1 else None,
            )
        return [found[first : first + copies] for first in range(0, len(found), copies)]

    def _prompt(self, messages: Messages) -> list[int]:
        ids = encode_chat(self.run.tokenizer, messages)[0]
        room = getattr(plain(self.run.model).config, "max_position_embeddings", None)
        if room is not None and len(ids) + self.config.max_new_tokens > room:
            raise UserError(
                f"sampling.max_new_tokens: {self.config.max_new_tokens} after a prompt of {len(ids)} tokens are more "
                f"than the model was made for, {room} (max_position_embeddings in its config.json)"
            )
        return ids

    def text(self, rollout: Rollout) -> str:
        """Returns the text of a rollout, without the token that ended the turn."""
        return str(self.run.tokenizer.decode(rollout.ids, skip_special_tokens=True))


def ends_with(tokenizer: Any, marker: str) -> Stop:
    """Makes what looks whether a marker's last character stands in a text's last token."""
    most = len(marker.encode()) + 4  # each token holds a byte of it; the first decoded ones may lose some

    def stop(ids: list[int]) -> bool:
        return marker in tokenizer.decode(ids[-most:])

    return stop


def stale(rollout: Rollout, log_probs: Sequence[float]) -> tuple[float, int]:
    """Returns how far a server's distribution was from the policy's: sum of |log q(y) - log p(y)|, and tokens.

    Args:
        rollout: with the server's log-probabilities log q; without them nothing is counted.
        log_probs: the policy's log p of the same tokens, nats.
    """
    pairs = zip(rollout.log_probs, log_probs, strict=bool(rollout.log_probs))
    distances = [abs(q - p) for q, p in pairs if not math.isnan(q)]
    return math.fsum(distances), len(distances)


def health(rollouts: Sequence[Rollout]) -> Mapping[str, tuple[float, float]]:
    """Returns length and ended of rollouts, each as a sum and the number it is a mean over."""
    count = len(rollouts)
    return {
        "length": (float(sum(len(rollout.ids) for rollout in rollouts)), count),
        "ended": (float(sum(rollout.ended for rollout in rollouts)), count),
    }
