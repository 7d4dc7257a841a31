"""Rollouts from an OpenAI-compatible server (vLLM, `transformers serve`) instead of this process.

The server has a copy of the model and knows nothing of training: unless something brings it the new weights, its
answers are those of another model, which `stale` tells if it says what each token's probability was (`extra:
{logprobs: true}`). It answers with text, whose tokens are looked up here; a text is cut where `stop` says so here too,
so that any server will do. Answers are kept on disk: a resumed run repeats them.
"""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galenic.align.rollouts import Rollout, Stop
from galenic.align.tasks import Messages
from galenic.corpus.synthesis.cache import Cache
from galenic.corpus.synthesis.client import Client, Reply, RequestFailed
from galenic.corpus.synthesis.synthesise_config import EndpointConfig
from galenic.corpus.tokens.chat_format import encode_text
from galenic.runtime import UserError


class Server:
    """A server that samples.

    Args:
        endpoint: where it is and how it is asked.
        kept: file of its answers.
    """

    def __init__(self, endpoint: EndpointConfig, kept: Path) -> None:
        self.endpoint, self.kept = endpoint, kept

    def rollouts(
        self,
        conversations: Sequence[Messages],
        *,
        keys: Sequence[tuple[int, ...]],
        tokenizer: Any,
        end: int,
        max_new_tokens: int,
        temperature: float,
        stop: Stop | None = None,
    ) -> list[Rollout]:
        """Asks for the next turn of each conversation.

        Args:
            conversations: ending with the user's turn.
            keys: (seed, step, number, copy) of each.
            tokenizer: the policy's.
            end: token that ends a turn.
            max_new_tokens: at most, by the server's count.
            temperature: of sampling.
            stop: where to cut a text, given its tokens so far.

        Raises:
            UserError: the server refused, failed, or answered nothing.
        """

        async def ask(client: Client, messages: Messages, key: tuple[int, ...]) -> Rollout:
            _, step, number, copy = key
            place = f"{self.endpoint.base_url}: asked {self.endpoint.model}"
            asked = f"{place} for answer {copy} to prompt {number} of step {step}"
            try:
                reply = await client.complete(
                    messages, key=repr(key), temperature=temperature, max_tokens=max_new_tokens
                )
            except RequestFailed as error:
                raise UserError(
                    f"{asked}, which failed ({error}); what it has answered is kept: mend it and run the same command"
                ) from None
            rollout = rollout_of(reply, tokenizer, end, stop)
            if not rollout.ids:
                raise UserError(f"{asked}, which said nothing (finish reason '{reply.finish}')")
            return rollout

        async def ask_all() -> list[Rollout]:
            async with Client(self.endpoint, cache) as client:
                return await asyncio.gather(*map(ask, [client] * len(keys), conversations, keys))

        cache = Cache(self.kept)
        try:
            return asyncio.run(ask_all())
        finally:
            cache.close()


def rollout_of(reply: Reply, tokenizer: Any, end: int, stop: Stop | None = None) -> Rollout:
    """Turns a server's answer into a rollout.

    Its log-probabilities are kept if there are as many as the text has tokens here; that of the end is not a number
    where a server leaves it out.

    Args:
        reply: the answer.
        tokenizer: the policy's.
        end: token that ends a turn.
        stop: where to cut the text, given its tokens so far.
    """
    finished = reply.finish == "stop"
    ids = [*encode_text(tokenizer, reply.text), *([end] if finished else [])]
    told = list(reply.log_probs or [])
    if finished and len(told) == len(ids) - 1:
        told.append(math.nan)
    log_probs = told if len(told) == len(ids) else []
    for length in range(1, len(ids) + 1):
        if stop is not None and stop(ids[:length]):
            return Rollout(ids=ids[:length], ended=True, log_probs=log_probs[:length])
    return Rollout(ids=ids, ended=finished, log_probs=log_probs)
