"""The page: a server on 127.0.0.1 at an address nobody can guess, between the browser and the model.

    browser  --POST messages, options-->  this server  --OpenAI's request-->  `transformers serve`, our child, or a URL
             <--lines of JSON, as they come--          <--events--

The browser speaks with this server only, so another server's rules for foreign pages and its key are no matter. The
page holds the conversation; nothing of it is kept here.
"""

import http.server
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from galenic.chat.chat import NOTICE
from galenic.chat.config import ChatConfig, Sampling
from galenic.chat.endpoint import Endpoint, Failed
from galenic.runtime import UserError, device, folder_name, read_json

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 8 << 20
"""Of a request."""
START_SECONDS = 600.0
"""For the child to load its model."""


def run(config: ChatConfig) -> None:
    """Serves the page until it is interrupted.

    Raises:
        UserError: no model that can be talked to, no server at the address, the extra `serve` is missing, or the port
            is taken.
    """
    with _model(config) as (endpoint, shorten):
        try:
            server = PageServer(config, endpoint, shorten)
        except OSError as error:
            raise UserError(
                f"port: {config.port} cannot be used ({error.strerror}); 0 takes a free one"
            ) from None
        print(NOTICE, file=sys.stderr)
        print(
            f"the page is at {server.address} (only from this machine; Ctrl-C ends it)",
            file=sys.stderr,
            flush=True,
        )
        with server:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)


# ---------------------------------------------------------------------------- the model


class Shorten:
    """Drops the oldest turns that a model's context has no room for.

    Args:
        folder: of the model.

    Raises:
        UserError: the folder holds no model, or one without a chat format.
    """

    def __init__(self, folder: str) -> None:
        from galenic.chat.local import talking_tokenizer

        self.tokenizer = talking_tokenizer(folder)
        self.context = int(read_json(Path(folder) / "config.json").get("max_position_embeddings") or 4096)

    def __call__(self, messages: list[dict[str, str]], sampling: Sampling) -> tuple[Sampling, int]:
        """Shortens `messages` in place; returns the sampling whose answer fits, and how many turns were dropped.

        Raises:
            Failed: the last question alone does not fit, or the chat template refuses the conversation.
        """
        from galenic.chat.local import fit

        length = min(sampling.max_new_tokens, self.context // 2)
        try:
            ids, dropped = fit(self.tokenizer, messages, self.context - length)
        except ValueError as error:
            raise Failed(str(error)) from None
        if not ids:
            raise Failed(f"too long: the model reads at most {self.context - length} tokens")
        return replace(sampling, max_new_tokens=length), dropped


@contextmanager
def _model(config: ChatConfig) -> Iterator[tuple[Endpoint, Shorten | None]]:
    """Yields who answers; a folder's server lives as long as the context."""
    if config.url is not None:
        with closing(Endpoint(config.url, config.model, config.api_key_env)) as endpoint:
            yield endpoint, None
        return
    folder = str(config.model)
    shorten = Shorten(folder)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UserError("web: the page's model runs in `transformers serve`: pip install 'galenic[serve]'")
    with _served(folder) as url:
        with closing(Endpoint(url, folder, generation_config=True)) as endpoint:
            yield endpoint, shorten


@contextmanager
def _served(folder: str) -> Iterator[str]:
    """Starts `transformers serve` on a free port of this machine; yields its address; ends it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "galenic.chat.child", folder, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [*command, "--device", device()], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait(child, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            assert child.stdin
            child.stdin.close()


def _wait(child: subprocess.Popen[bytes], port: int, log: Any) -> None:
    """Waits until the child listens."""
    print("starting `transformers serve` ...", file=sys.stderr, flush=True)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            log.seek(0)
            said = log.read().decode("utf-8", "replace").strip().splitlines() or ["nothing"]
            raise UserError(f"web: `transformers serve` ended at its start; its last words: {said[-1][:300]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise UserError(f"web: `transformers serve` did not listen within {START_SECONDS:.0f} s")


# ---------------------------------------------------------------------------- the page


class PageServer(http.server.ThreadingHTTPServer):
    """Serves the page and what it asks.

    Args:
        config: the verb's; its options are what the page begins with.
        endpoint: who answers.
        shorten: drops turns the model has no room for; None: not known.
    """

    daemon_threads = True

    def __init__(self, config: ChatConfig, endpoint: Endpoint, shorten: Shorten | None = None) -> None:
        self.config, self.endpoint, self.shorten = config, endpoint, shorten
        self.token = secrets.token_urlsafe(18)
        super().__init__(("127.0.0.1", config.port), _Handler)
        port = self.server_address[1]
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.address = f"http://127.0.0.1:{port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def page(self, nonce: str) -> bytes:
        """Returns the page with the options it begins with."""
        name = self.endpoint.model
        settings = {
            "model": name if self.config.url else folder_name(name),
            "system": self.config.system or "",
            **asdict(self.config.sampling()),
        }
        text = json.dumps(settings).replace("<", "\\u003c")  # it stands inside a script element
        page = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        return page.replace("{{settings}}", text).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    """GET /TOKEN/ is the page, POST /TOKEN/chat an answer: lines of JSON, the last one with `finish` or `error`."""

    protocol_version = "HTTP/1.1"
    server: PageServer  # pyrefly: ignore[bad-override-mutable-attribute]

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: questions are nobody's business."""

    def do_GET(self) -> None:
        """Sends the page."""
        if not self._expected("/"):
            return
        nonce = secrets.token_urlsafe(12)
        policy = f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'"
        self._begin(200, "text/html; charset=utf-8", f"{policy}; script-src 'nonce-{nonce}'")
        content = self.server.page(nonce)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        """Sends an answer as it is written."""
        if not self._expected("/chat"):
            return
        try:
            messages, sampling = _request(self._read())
        except (UserError, ValueError) as error:
            self._refuse(400, str(error))
            return
        self._begin(200, "application/x-ndjson; charset=utf-8", "default-src 'none'")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._answer(messages, sampling)
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the reader pressed stop, or left

    def _answer(self, messages: list[dict[str, str]], sampling: Sampling) -> None:
        try:
            if self.server.shorten:
                sampling, dropped = self.server.shorten(messages, sampling)
                if dropped:
                    self._line({"dropped": dropped})
            # Closing the pieces ends the request: a model need not write what nobody reads.
            with closing(self.server.endpoint.stream(messages, sampling)) as pieces:
                for piece in pieces:
                    if piece.text:
                        self._line({"text": piece.text})
                    if piece.finish:
                        self._line({"finish": piece.finish})
        except Failed as error:
            self._line({"error": str(error)})

    def _expected(self, path: str) -> bool:
        """Whether a request is the page's own; another is refused.

        A foreign page in the same browser can send requests here, also under a name that it made to mean this machine.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        ours = host in self.server.hosts and origin in (None, f"http://{host}")
        if ours and secrets.compare_digest(self.path.encode(), f"/{self.server.token}{path}".encode()):
            return True
        self._refuse(404 if ours else 403, "nothing here")
        return False

    def _read(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True  # what follows is not read
            raise ValueError(f"a request needs a length, of at most {MOST_BYTES} bytes")
        return self.rfile.read(int(length))

    def _refuse(self, status: int, text: str) -> None:
        self.close_connection = True
        content = json.dumps({"error": text}).encode()
        self._begin(status, "application/json", "default-src 'none'")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _begin(self, status: int, kind: str, policy: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "same-origin")
        sealed = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self.send_header("Content-Security-Policy", f"{policy}; {sealed}")

    def version_string(self) -> str:
        """Names no versions."""
        return "galenic"

    def _line(self, value: dict[str, Any]) -> None:
        content = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()


def _request(content: bytes) -> tuple[list[dict[str, str]], Sampling]:
    """Checks what the page sent.

    Raises:
        ValueError: it is no conversation, or an option is out of range (a `UserError`).
    """
    value = json.loads(content)
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ValueError("'messages' must be a list of role and content")
    options = value.get("sampling", {})
    whole = ("max_new_tokens", "top_k", "seed")
    for name, kept in options.items() if isinstance(options, dict) else ():
        number = isinstance(kept, int if name in whole else int | float) and not isinstance(kept, bool)
        if name not in asdict(Sampling()) or not (number or (name == "seed" and kept is None)):
            raise ValueError(f"{name} is {kept!r}; it must be a {'whole ' if name in whole else ''}number")
    return [{k: message[k] for k in ("role", "content")} for message in messages], Sampling(**options)
