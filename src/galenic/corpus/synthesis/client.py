"""A client of OpenAI-compatible endpoints: answers kept on disk, paced, within a budget, patient.

    complete -> in the cache? -> budget -> pace -> POST -> answer into the cache
                                             ^-- wait, retry: 429 (Retry-After), 5xx, timeout, lost connection

It stands on httpx2, which huggingface_hub brings along: the endpoint's contract is one POST, and retries, budget and
pace have to be ours in any case, since each attempt counts.
"""

import asyncio
import importlib
import json
import os
import random
import time
from dataclasses import asdict, dataclass, field, fields
from email.utils import parsedate_to_datetime
from typing import Any

from galenic.corpus.synthesis.budget import Budget, Cost, Pace
from galenic.corpus.synthesis.cache import Cache, digest
from galenic.corpus.synthesis.synthesise_config import BudgetConfig, EndpointConfig
from galenic.runtime import UserError, duration

MOST_BYTES = 8 * 2**20
"""Of an answer; what goes on beyond is cut off and counts as a failure."""
LONGEST_WAIT = 3600.0
"""Seconds; an endpoint that asks to wait longer ends the run."""

Message = dict[str, str]


class RequestFailed(Exception):
    """The endpoint refused one request or failed it for good; the item goes to the ledger.

    Attributes:
        status: of the last answer; None if there was none.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _Transient(Exception):
    """Worth another try, after `wait` seconds if the endpoint says so."""

    def __init__(self, reason: str, wait: float | None = None, status: int | None = None) -> None:
        super().__init__(reason)
        self.wait, self.status = wait, status


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer."""

    text: str
    finish: str
    """`stop`, `length`, `content_filter` ..."""
    prompt_tokens: int
    completion_tokens: int
    log_probs: list[float] | None = None
    """Of the answer's tokens, nats, if they were asked for (`extra: {logprobs: true}`) and told."""


@dataclass
class Usage:
    """What a client did: answers used, and what of it was asked for now."""

    answers: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    """Of all answers used, cached ones too."""
    completion_tokens: int = 0
    sent: int = 0
    """Requests, retries included."""
    retries: dict[str, int] = field(default_factory=dict)
    """Reason -> how often a request was sent again."""


def count_tokens(text: str) -> int:
    """Estimates tokens without a tokenizer: three bytes of UTF-8 each, a Chinese character or a short English word."""
    return len(text.encode("utf-8", "replace")) // 3 + 1


class Client:
    """One endpoint; use as `async with Client(endpoint, cache) as client`."""

    def __init__(self, endpoint: EndpointConfig, cache: Cache, budget: Budget | None = None) -> None:
        self.endpoint, self.cache = endpoint, cache
        self.budget = budget or Budget(BudgetConfig())
        self.usage = Usage()
        self._secret = secret_of(endpoint.api_key_env, "endpoint.api_key_env")
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._requests = Pace(endpoint.requests_per_minute)
        self._tokens = Pace(endpoint.tokens_per_minute)
        self._resume = 0.0
        self._http: Any = None

    async def __aenter__(self) -> "Client":
        library = http_library()
        headers = {"Accept-Encoding": "identity"}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        self._http = library.AsyncClient(
            headers=headers,
            timeout=library.Timeout(self.endpoint.timeout),
            trust_env=self.endpoint.environment_proxies,
            follow_redirects=False,
            limits=library.Limits(max_connections=self.endpoint.concurrency),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def chat(self, messages: list[Message], *, key: str, **sampling: Any) -> str:
        """As `complete`, but returns the text.

        Raises:
            RequestFailed: also when the answer was cut off at `max_tokens`.
        """
        reply = await self.complete(messages, key=key, **sampling)
        if reply.finish == "length":
            raise RequestFailed("the answer was cut off at max_tokens")
        return reply.text

    async def complete(self, messages: list[Message], *, key: str, **sampling: Any) -> Reply:
        """Returns the answer to a conversation, from the cache if it was answered before.

        Args:
            messages: `{"role", "content"}` each.
            key: tells requests apart that would be equal otherwise, such as a second sample of the same prompt.
            **sampling: fields of the request that replace the endpoint's, such as `temperature`.

        Raises:
            UserError: the endpoint or the key is wrong.
            RequestFailed: the request was refused, or failed after all retries.
            BudgetSpent: nothing more may be spent.
        """
        name, settings = self._named(messages, key, sampling)
        row = self.cache.get(name)
        if row is None:
            body = {"model": self.endpoint.model, "messages": messages, **settings}
            reply = await self._patiently(body, random.Random(name))
            money = self._cost(reply.prompt_tokens, reply.completion_tokens)[2]
            told = {entry: value for entry, value in asdict(reply).items() if value is not None}
            self.cache.put(name, {"step": key, **told, "money": money})
        else:
            reply = Reply(**{f.name: row[f.name] for f in fields(Reply) if f.name in row})
            self.usage.cached += 1
        self.usage.answers += 1
        self.usage.prompt_tokens += reply.prompt_tokens
        self.usage.completion_tokens += reply.completion_tokens
        return reply

    def knows(self, messages: list[Message], *, key: str, **sampling: Any) -> bool:
        """True if `complete` would find the answer in the cache."""
        return self.cache.get(self._named(messages, key, sampling)[0]) is not None

    def _named(
        self, messages: list[Message], key: str, sampling: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Returns a request's name in the cache, and its settings."""
        settings = {"temperature": self.endpoint.temperature, "max_tokens": self.endpoint.max_tokens}
        settings |= self.endpoint.extra | sampling
        return digest(self.endpoint.model, messages, settings, key), settings

    async def _patiently(self, body: dict[str, Any], dice: random.Random) -> Reply:
        sent = {name: value for name, value in body.items() if value is not None}
        sent[self.endpoint.max_tokens_name] = sent.pop("max_tokens")
        content = json.dumps(sent, ensure_ascii=False).encode("utf-8", "replace")
        asked = sum(count_tokens(message["content"]) for message in body["messages"])
        tokens = asked + body["max_tokens"]
        held = self._cost(asked, body["max_tokens"])
        failure = _Transient("not sent")
        for attempt in range(self.endpoint.retries + 1):
            async with self._slots:
                await self.budget.hold(held)
                actual: Cost = (0, 0, 0.0)
                used = 0
                try:
                    while (wait := self._resume - time.monotonic()) > 0:
                        await asyncio.sleep(wait)
                    await self._requests.wait(1)
                    await self._tokens.wait(tokens)
                    self.usage.sent += 1
                    actual = (1, 0, 0.0)
                    reply = await self._post(content, asked)
                    actual = self._cost(reply.prompt_tokens, reply.completion_tokens)
                    used = actual[1]
                    return reply
                except _Transient as error:
                    if error.wait is not None:  # all requests wait
                        self._resume = max(self._resume, time.monotonic() + error.wait)
                    failure = error
                finally:
                    self._tokens.correct(tokens - used)
                    self.budget.settle(held, actual)
            if attempt < self.endpoint.retries:
                self.usage.retries[str(failure)] = self.usage.retries.get(str(failure), 0) + 1
                if failure.wait is None:
                    await asyncio.sleep(min(60.0, self.endpoint.backoff * 2**attempt) * (0.5 + dice.random()))
        raise RequestFailed(f"{failure}, {self.endpoint.retries + 1} times", failure.status)

    def _cost(self, prompt: int, completion: int) -> Cost:
        money = prompt * self.endpoint.price_prompt + completion * self.endpoint.price_completion
        return 1, prompt + completion, money / 1e6

    async def _post(self, content: bytes, asked: int) -> Reply:
        library, url = http_library(), self.endpoint.base_url.rstrip("/") + "/chat/completions"
        body = bytearray()
        try:
            # httpx times each read; an answer that trickles in for ever needs a deadline of its own.
            async with asyncio.timeout(self.endpoint.timeout):
                headers = {"Content-Type": "application/json"}
                async with self._http.stream("POST", url, content=content, headers=headers) as response:
                    async for piece in response.aiter_bytes():
                        body += piece
                        if len(body) > MOST_BYTES:
                            raise _Transient("an answer without end")
        except (TimeoutError, library.TimeoutException):
            raise _Transient("no answer in time") from None
        except library.ConnectError:
            raise _Transient("no connection") from None
        except library.TransportError:
            raise _Transient("connection lost") from None
        except library.DecodingError:
            raise _Transient("an answer that cannot be decoded") from None
        self._check_status(response, bytes(body))
        return self._parse(bytes(body), asked)

    def _check_status(self, response: Any, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = self._hide(body[:300].decode("utf-8", "replace").strip())
        place = f"{self.endpoint.base_url}: {status}"
        if status in (401, 403):
            way = f"check the key in {self.endpoint.api_key_env}" if self._secret else "set api_key_env"
            raise UserError(f"{place}, the endpoint does not let us in; {way}: {said}")
        if status == 404:
            raise UserError(
                f"{place}, no such address or no model '{self.endpoint.model}'; correct them: {said}"
            )
        if 300 <= status < 400:
            target = self._hide(response.headers.get("location", "elsewhere"))
            raise UserError(f"{place}, the endpoint sends us to {target}; give the final address as base_url")
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(response.headers.get("retry-after"))
            if wait is not None and wait > LONGEST_WAIT:
                raise UserError(
                    f"{place}, the endpoint asks to wait for {duration(wait)}; run the same command then to continue"
                )
            raise _Transient(f"status {status}", wait, status)
        raise RequestFailed(f"status {status}: {said}", status)

    def _parse(self, body: bytes, asked: int) -> Reply:
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            message = choice["message"]
            text = message.get("content") or message.get("refusal") or ""
            usage = answer.get("usage") or {}
            if not isinstance(text, str):
                raise TypeError
            tokens = (choice.get("logprobs") or {}).get("content") or []
            text = self._hide(text).encode("utf-8", "replace").decode()  # a lone surrogate is no text
            return Reply(
                text=text,
                finish=str(choice.get("finish_reason") or "stop"),
                prompt_tokens=max(0, int(usage.get("prompt_tokens") or asked)),
                completion_tokens=max(0, int(usage.get("completion_tokens") or count_tokens(text))),
                log_probs=[float(token["logprob"]) for token in tokens] or None,
            )
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise _Transient("an answer that is no chat completion") from None

    def _hide(self, text: str) -> str:
        """An endpoint may repeat the key."""
        return text.replace(self._secret, "***") if self._secret else text


def http_library() -> Any:
    """Returns httpx2, or the httpx of older releases of huggingface_hub."""
    try:
        return importlib.import_module("httpx2")
    except ModuleNotFoundError:
        return importlib.import_module("httpx")


def secret_of(variable: str, option: str) -> str:
    """Returns the key that an environment variable holds; none is named, none is used.

    Raises:
        UserError: it is not set, or holds what cannot be a key; `option` named it.
    """
    if not variable:
        return ""
    secret = os.environ.get(variable, "").strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        state = "holds what is no key" if secret else "is not set"
        raise UserError(f"{option}: the environment variable {variable} {state}")
    return secret


def retry_after(header: str | None) -> float | None:
    """Returns the seconds that a Retry-After header asks for: a number, or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
