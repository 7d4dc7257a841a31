"""A model behind an OpenAI-compatible address: answers as they are written.

POST {url}/chat/completions {"stream": true, ...} -> data: {"choices": [{"delta": {"content": "..."}}]} ...
"""

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from galenic.chat.config import Sampling
from galenic.corpus.synthesis.client import http_library, secret_of
from galenic.runtime import UserError

CHARACTERS_PER_TOKEN = 64
"""More than this, and a server does not keep to the tokens it was asked for."""
MOST_LINE_BYTES = 1 << 20


class Failed(Exception):
    """One answer did not come; the conversation can go on."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer, and why it ended (`stop`, `length`) on the last one."""

    text: str = ""
    finish: str | None = None


class Endpoint:
    """An address and the model asked there.

    Args:
        url: base address; one without a path gets `/v1`.
        model: name of the model there; None: the first that the server lists.
        api_key_env: environment variable with the key; empty: no key is sent.
        generation_config: the server is `transformers serve`, which takes sampling options in a field of this name
            (and samples only where told to).

    Raises:
        UserError: the variable holds no key, the server cannot be reached, or lists no model.
    """

    def __init__(
        self, url: str, model: str | None = None, api_key_env: str = "", generation_config: bool = False
    ) -> None:
        library = http_library()
        host = url.split("://", 1)[1]
        self.url = url.rstrip("/") if "/" in host.rstrip("/") else url.rstrip("/") + "/v1"
        self._secret = secret_of(api_key_env, "api_key_env")
        self._generation_config = generation_config
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        self._http = library.Client(
            headers=headers,
            timeout=library.Timeout(300.0, connect=10.0),
            trust_env=False,
            follow_redirects=False,
        )
        self._library = library
        self.model = model or self._first_model()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _first_model(self) -> str:
        place = f"{self.url}/models"
        try:
            response = self._http.get(place)
        except (self._library.HTTPError, self._library.InvalidURL) as error:
            raise UserError(f"url: no server answers at {self.url} ({self._hide(str(error))})") from None
        if response.status_code != 200:
            said = self._said(response.status_code, response.content)
            raise UserError(f"url: {place} answers {said}; name the model with --model")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise UserError(f"url: {place} lists no models; name the model with --model") from None

    def answer(
        self,
        history: list[dict[str, str]],
        sampling: Sampling,
        write: Callable[[str], None],
        note: Callable[[str], None],
    ) -> tuple[str, str]:
        """As `Local.answer`; nothing is dropped from the conversation, as the server's limits are not known.

        Raises:
            Failed: see `stream`.
        """
        text, finish = "", "stop"
        pieces = self.stream(history, sampling)
        try:
            for piece in pieces:
                text += piece.text
                write(piece.text)
                finish = piece.finish or finish
        except KeyboardInterrupt:
            finish = "interrupted"
        except Failed as error:
            if not text:
                raise
            note(f"[{error}]")  # what came is kept
            finish = "failed"
        finally:
            pieces.close()
        write("\n")
        return text, finish

    def body(self, messages: list[dict[str, str]], sampling: Sampling) -> dict[str, Any]:
        """Returns the request: OpenAI's fields, and those of others only where they change something."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if self._generation_config:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            settings: dict[str, Any] = {"do_sample": sampling.temperature > 0}
            settings |= drawn if sampling.temperature > 0 else {}
            for name in ("temperature", "top_p"):
                body.pop(name)
            settings["repetition_penalty"] = sampling.repetition_penalty
            return body | {"generation_config": json.dumps(settings)}
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        return body

    def stream(self, messages: list[dict[str, str]], sampling: Sampling) -> Generator[Piece]:
        """Yields an answer in pieces; the last one tells why it ended. Closing the iterator ends the request.

        Raises:
            Failed: no connection, a refusal, or an answer that is none.
        """
        request = json.dumps(self.body(messages, sampling), ensure_ascii=False).encode("utf-8", "replace")
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        place, most = f"{self.url}/chat/completions", CHARACTERS_PER_TOKEN * sampling.max_new_tokens
        try:
            with self._http.stream("POST", place, content=request, headers=headers) as response:
                if response.status_code != 200:
                    said = self._said(response.status_code, response.read())
                    raise Failed(f"{self.url} answers {said}")
                length = 0
                for piece in self._pieces(response):
                    length += len(piece.text)
                    yield piece if length <= most else Piece(text=piece.text, finish="length")
                    if piece.finish or length > most:
                        return
        except self._library.TimeoutException:
            raise Failed(f"{self.url} does not answer in time") from None
        except (self._library.HTTPError, self._library.InvalidURL) as error:
            said = self._hide(str(error)) or type(error).__name__
            raise Failed(f"{self.url}: the connection failed ({said})") from None

    def _pieces(self, response: Any) -> Iterator[Piece]:
        if "text/event-stream" not in response.headers.get("content-type", ""):
            yield self._piece(response.read(), "message")  # a server that does not stream
            return
        said = False
        for line in _lines(response.iter_bytes()):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            piece = self._piece(data, "delta")
            yield piece
            said = said or bool(piece.text)
            if piece.finish:
                return
        else:
            raise Failed("the connection ended before the answer did")
        yield Piece(finish="stop")

    def _piece(self, data: bytes, part: str) -> Piece:
        try:
            value = json.loads(data)
            if value.get("error"):
                said = value["error"]
                said = said.get("message", said) if isinstance(said, dict) else said
                raise Failed(self._hide(f"{self.url}: {said}")[:400])
            choices = value.get("choices") or [{}]
            text = (choices[0].get(part) or {}).get("content") or ""
            finish = choices[0].get("finish_reason")
            if part == "message":
                finish = finish or "stop"
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Failed(f"{self.url}: what came is no chat completion") from None
        return Piece(text=self._hide(text).encode("utf-8", "replace").decode(), finish=finish and str(finish))

    def _said(self, status: int, content: bytes) -> str:
        """Describes a refusal in a line."""
        text = " ".join(content[:2000].decode("utf-8", "replace").split())
        try:
            value = json.loads(content)
            said = value.get("error") or value.get("detail") or text
            text = str(said.get("message", said) if isinstance(said, dict) else said)
        except (ValueError, AttributeError, RecursionError):
            pass
        hint = "; is the key in --api_key_env right?" if status in (401, 403) else ""
        return self._hide(f"{status}: {text[:300]}{hint}")

    def _hide(self, text: str) -> str:
        """A server may repeat the key."""
        return text.replace(self._secret, "***") if self._secret else text


def _lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Splits bytes at line feeds only: an answer may hold what text calls ends of lines."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
        if len(rest) > MOST_LINE_BYTES:
            raise Failed("the server sends a line without end")
    if rest:
        yield rest
