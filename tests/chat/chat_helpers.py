"""A fake OpenAI-compatible server."""

import http.server
import json
import threading
import time
from contextlib import contextmanager


class FakeOpenAI(http.server.ThreadingHTTPServer):
    """Answers with `pieces(body)`: texts, or whole lines of the wire as bytes. Remembers what it was asked."""

    daemon_threads = True

    def __init__(self, pieces):
        self.pieces, self.bodies, self.keys = pieces, [], []
        self.status, self.streams, self.finish, self.pause = 200, True, "stop", 0.0
        self.models = {"data": [{"id": "fake-model"}]}
        self.left = threading.Event()  # someone hung up before the end
        super().__init__(("127.0.0.1", 0), _FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeOpenAI

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(200 if self.server.models else 404, json.dumps(self.server.models).encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        server.keys.append(self.headers.get("Authorization"))
        pieces = server.pieces(body)
        if server.status != 200:
            self._send(server.status, pieces[0].encode())
        elif not server.streams:
            choice = {"message": {"content": "".join(pieces)}, "finish_reason": server.finish}
            self._send(200, json.dumps({"choices": [choice]}).encode())
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for piece in pieces:
                    self._event(piece)
                    time.sleep(server.pause)
                if server.finish:
                    self._event(
                        b'data: {"choices": [{"delta": {}, "finish_reason": "%s"}]}' % server.finish.encode()
                    )
                    self._event(b"data: [DONE]")
            except (BrokenPipeError, ConnectionResetError):
                server.left.set()

    def _event(self, piece):
        if isinstance(piece, str):
            choice = {"delta": {"content": piece}, "finish_reason": None}
            piece = b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode()
        self.wfile.write(piece + b"\n\n")
        self.wfile.flush()

    def _send(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(server):
    """Serves in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
