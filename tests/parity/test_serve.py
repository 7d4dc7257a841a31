"""`transformers serve` on an exported folder, by way of `galenic.model.serve`, asked through OpenAI's client."""

import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from parity_helpers import ANSWERS, ROOT, drive, executable, surroundings

pytestmark = pytest.mark.parity


@contextmanager
def server(folder, workspace, command=None, seconds=60):
    """Serves `folder` on a free port of this machine and ends the process whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command or [executable("newest"), "-m", "galenic.model.serve", folder, "--device", "cpu"]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    log = workspace / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            env=surroundings(workspace / "cache") | {"PYTHONPATH": str(ROOT / "src")},
            cwd=workspace,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(4 * seconds):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.25)
        else:
            raise AssertionError(f"the server does not answer:\n{log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_openai_client_gets_the_answers(chat_folder, tmp_path):
    with server(chat_folder, tmp_path) as url:
        job = {"url": url, "folder": chat_folder, "questions": list(ANSWERS), "new_tokens": 24}
        theirs = drive("newest", "with_openai", tmp_path / "client", **job)
    for index, (question, answer) in enumerate(ANSWERS.items()):
        assert theirs["whole"][index][:2].tolist() == [answer, "stop"]
        assert theirs["streamed"][index][:2].tolist() == [answer, "stop"]
        assert int(theirs["streamed"][index][2]) > 2  # it came in pieces
        cut, end = theirs["cut"][index]
        assert answer.startswith(cut.strip()) and cut.strip() and end == "length"
        print(f"user: {question}\nassistant: {theirs['whole'][index][0]}")
