"""A fake OpenAI-compatible server, and Chromium driven through a pipe."""

import base64
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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


class Browser:
    """A page in headless Chromium, spoken to by the DevTools protocol over a pipe (no port, no other library)."""

    def __init__(self, folder, width=1280, height=800):
        there, ours = os.pipe(), os.pipe()  # we write to the first, read from the second

        def place():
            # Chromium reads from 3 and writes to 4; move out of the way what may lie there.
            reads, writes = os.dup(there[0]), os.dup(ours[1])
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        command = [CHROMIUM, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        self._log = open(folder / "browser.log", "wb")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=place,
            pass_fds=(3, 4, there[0], ours[1]),
        )
        os.close(there[0])
        os.close(ours[1])
        self._to, self._from = open(there[1], "wb", buffering=0), open(ours[0], "rb", buffering=0)
        self._rest, self._count, self.complaints = b"", 0, []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def call(self, method, **parameters):
        """Calls a method of the protocol; remembers what the page complains about on the way."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = self._from.read(1 << 16)
                assert part, "the browser is gone"
                self._rest += part
            line, self._rest = self._rest.split(b"\0", 1)
            said = json.loads(line)
            kind = said.get("method", "")
            if kind in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.complaints.append(said["params"])
            if said.get("id") == self._count:
                assert "error" not in said, said
                return said["result"]

    def run(self, script):
        """Returns the value of a JavaScript expression, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script, seconds=20):
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width, height, mobile=False):
        settings = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **settings)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, shift=False):
        """Presses Enter or Escape, as a hand does."""
        code, text = {"Enter": (13, "\r"), "Escape": (27, "")}[key]
        settings = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **settings)
        self.call("Input.dispatchKeyEvent", type="keyUp", **settings)

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self._process.kill()
        self._process.wait()
        for file in (self._to, self._from, self._log):
            file.close()
