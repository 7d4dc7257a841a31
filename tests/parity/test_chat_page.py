"""The page of `galenic chat --web` over a real `transformers serve`: answers, and a child that never outlives us."""

import http.client
import json
import os
import signal
import subprocess
import time
from urllib.parse import urlsplit

import pytest
from parity_helpers import ANSWERS, ROOT, executable, surroundings

pytestmark = pytest.mark.parity
CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in what a shell runs in the background
from galenic.chat import chat
from galenic.chat.config import ChatConfig
chat.run(ChatConfig(model=sys.argv[1], web=True))
"""


def ask(address, question):
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=120)
    sampling = {"temperature": 0, "max_new_tokens": 24}
    body = {"messages": [{"role": "user", "content": question}], "sampling": sampling}
    connection.request("POST", parts.path + "chat", json.dumps(body).encode())
    lines = [json.loads(line) for line in connection.getresponse().read().decode().split("\n") if line]
    connection.close()
    return "".join(line.get("text", "") for line in lines), lines[-1], len(lines)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_answers_and_the_end(chat_folder, tmp_path, end):
    process = subprocess.Popen(
        [executable("newest"), "-c", CODE, chat_folder],
        env=surroundings(tmp_path / "cache") | {"PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("the page is at"):
                break
        address = said[-1].split()[4]
        for question, answer in ANSWERS.items():
            text, last, pieces = ask(address, question)
            assert (text, last) == (answer, {"finish": "stop"}) and pieces > 2
            if end != signal.SIGINT:
                break
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            children = file.read().split()
        assert children
        process.send_signal(end)
        process.wait(30)
        deadline = time.monotonic() + 30
        while any(os.path.exists(f"/proc/{child}") for child in children):
            assert time.monotonic() < deadline, "the child goes on without us"
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
