"""A local endpoint that answers like a well-behaved model, and on demand fails, stalls, drops the line or lies."""

import hashlib
import itertools
import json
import random
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = {
    "en": "fever cough lung child dose kidney heart tumour vessel biopsy fracture relapse therapy".split(),
    "zh": "发热 咳嗽 肺炎 儿童 剂量 肾脏 心脏 肿瘤 血管 活检 骨折 复发 治疗".split(),
}


def prose(seed: str, language: str, count: int = 60) -> str:
    """Text of its own: never a copy of the prompt, in the prompt's language."""
    dice = random.Random(seed)
    words = [dice.choice(WORDS[language]) for _ in range(count)]
    if language == "zh":
        return "，".join(words) + "。"
    return " ".join(f"the {a} of {b} is with {dice.randrange(99)}" for a, b in itertools.pairwise(words))


def part(prompt: str, tag: str) -> str:
    found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)
    return found[1] if found else ""


def good(prompt: str, score: float = 9) -> str:
    """What a model that does as it is told replies."""
    language = "zh" if re.search("[\u4e00-\u9fff]", prompt.split("<")[0]) else "en"
    identity = re.search(r"ID: (\w+)", prompt)[1]
    seed = hashlib.sha256(prompt.encode()).hexdigest()
    short = prose(seed, language, 3)

    def reply(**fields):
        return json.dumps({"id": identity, **fields}, ensure_ascii=False)

    if '"richness"' in prompt:
        return reply(richness=8, points=[f"{i}. {prose(seed + str(i), language, 5)}" for i in range(3)])
    if '"explanation"' in prompt:
        name = re.search('["“]([^"”]+)["”]', prompt)[1]
        return reply(question=short, explanation=f"{name}: {prose(seed, language)}")
    if '"options"' in prompt:
        options = [f"{short} {i}" for i in range(4)]
        return reply(question=f"{short} 12.5 37?", options=options, answer=options[2])
    if '"presentation"' in prompt:
        first = part(prompt, "case").split("\n")[0]
        return reply(presentation=first, decisions=[f"{short} {i}" for i in range(3)])
    if '"for"' in prompt:
        count = len(part(prompt, "decisions").split("\n"))
        quote = re.match(r"(\S+ ){3}\S+|\w+", part(prompt, "case"))[0]
        return reply(evidence=[{"for": [quote], "against": []} for _ in range(count)])
    if '"conclusions"' in prompt:
        lines = part(prompt, "paper").split("\n")
        return reply(evidence=[lines[0]], conclusions=[lines[-1]])
    if '"score"' in prompt:
        return reply(score=score, feedback="Say more about the dose.")
    numbers = " ".join(re.findall(r"\d+(?:\.\d+)?", part(prompt, "question")))
    entry = re.search(r"<entry>\n# (.+)", prompt)
    return f"ID: {identity}\n{entry[1] if entry else ''} {prose(seed, language)} {numbers}"


class Server:
    """Counts requests; `fault(number, body)` may return what to do instead of a good answer.

    A fault is `("status", code, headers)`, `("text", text)`, `("raw", bytes)`, `("stall",)`, `("drop",)`,
    `("endless",)` or `("finish", reason, text)`.
    """

    def __init__(self) -> None:
        self.fault = lambda number, body: None
        self.answer = good
        self.delay = 0.0
        self.bodies, self.headers, self.times = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@contextmanager
def serving():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.now += 1
                state.most = max(state.most, state.now)
            try:
                self.respond(body, state.fault(number, body))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with state.lock:
                    state.now -= 1

        def respond(self, body, fault):
            time.sleep(state.delay)
            kind = fault[0] if fault else ""
            if kind == "stall":
                state.over.wait(30)
                self.close_connection = True
            elif kind == "drop":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.close_connection = True
            elif kind == "endless":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while not state.over.is_set():
                    self.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            elif kind == "status":
                self.send(fault[1], f"no: {self.headers.get('Authorization')}".encode(), *fault[2:])
            elif kind == "raw":
                self.send(200, fault[1])
            else:
                text = fault[-1] if fault else state.answer(body["messages"][0]["content"])
                finish = fault[1] if kind == "finish" else "stop"
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
                usage = {"prompt_tokens": 100, "completion_tokens": 50}
                self.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())

        def send(self, status, content, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_):
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
