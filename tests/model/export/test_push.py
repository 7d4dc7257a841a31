"""The upload, against a fake Hub on this machine: what is sent, with which key, and every way it can fail."""

import base64
import http.server
import json
import socket
import threading

import pytest

from galenic.model.export import push as room
from galenic.runtime import UserError

TOKEN = "hf_" + "secretsecretsecretsecretsecretsec"


class FakeHub(http.server.ThreadingHTTPServer):
    """Takes one commit to one repository; remembers what came."""

    daemon_threads = True

    def __init__(self):
        self.asked, self.keys, self.files, self.repositories = [], set(), {}, {}
        self.status = {}  # path's last part -> status to answer with
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        server = self.server
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        server.asked.append(path)
        server.keys.add(self.headers.get("Authorization"))
        last = path.rsplit("/", 1)[-1]
        for part in path.split("/"):
            if part in server.status:
                return self._send(server.status[part], {"error": f"no: {TOKEN[:3]}..."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in server.repositories:
                return self._send(409, {"error": "exists", "url": f"{server.url}/{name}"})
            server.repositories[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self._send(200, {"url": f"{server.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if "preupload" in path:
            files = json.loads(body)["files"]
            kept = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self._send(200, {"files": kept})
        if "commit" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{server.url}/{'/'.join(path.split('/')[3:5])}/commit/{'0' * 40}"
            return self._send(200, {"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None})
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in server.repositories:
                return self._send(404, {"error": "no repository"})
            return self._send(
                200, {"id": name, "private": server.repositories[name], "sha": "0" * 40, "siblings": []}
            )
        return self._send(404, {"error": last})

    def _send(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    from huggingface_hub import constants
    from huggingface_hub.hf_api import HfApi

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=server.url, token=TOKEN))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("README.md", "config.json", "model.safetensors", "LICENSE"):
        (folder / name).write_text(f"{name} of mine")
    (folder / ".secret").write_text("no")
    return folder


def test_the_folder_is_uploaded_in_one_commit(hub, folder, capfd):
    assert room.push(folder, "me/mine", private=True) == f"{hub.url}/me/mine"
    assert hub.repositories == {"me/mine": True}
    names = ("README.md", "config.json", "model.safetensors", "LICENSE")
    assert hub.files == {name: f"{name} of mine".encode() for name in names}
    assert sum("/commit/" in path for path in hub.asked) == 1
    assert hub.keys == {f"Bearer {TOKEN}"}
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err


def test_a_public_repository_is_left_alone_where_private_was_asked(hub, folder):
    hub.repositories["me/mine"] = False
    with pytest.raises(
        UserError, match="exists and is public, and --private was given; nothing was uploaded"
    ):
        room.push(folder, "me/mine", private=True)
    assert not hub.files
    room.push(folder, "me/mine", private=False)
    assert hub.files


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"create": 401}, "run `hf auth login`"),
        ({"create": 403}, "your token may not write there"),
        ({"commit": 403}, "your token may not write there"),
        ({"commit": 400}, "the Hub answers 400"),
    ],
)
def test_refusals(hub, folder, status, says):
    hub.status = status
    with pytest.raises(UserError, match=says) as caught:
        room.push(folder, "me/mine", private=False)
    assert TOKEN not in str(caught.value) and f"the export in {folder} is whole" in str(caught.value)
    assert not hub.files


def test_without_card_or_login_or_network(hub, folder, monkeypatch):
    from huggingface_hub.hf_api import HfApi

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=hub.url, token=True))
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(UserError, match="you are not logged in: run `hf auth login` first"):
        room.push(folder, "me/mine", private=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=closed, token=TOKEN))
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        room.push(folder, "me/mine", private=False)
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"no README\.md; a model goes to the Hub with a card"):
        room.push(folder, "me/mine", private=False)
    assert not hub.asked


def test_a_finished_export_is_uploaded_without_being_made_again(tmp_path, monkeypatch, llama_folder):
    from galenic import build
    from galenic.model.export import export
    from galenic.model.export.config import ExportConfig

    pushed, made, real = [], [], export.run
    monkeypatch.setattr(room, "push", lambda folder, name, private: pushed.append((folder, name, private)))
    monkeypatch.setattr(export, "run", lambda config: made.append(real(config)))
    out = tmp_path / "out"
    build.run_verb("export", ExportConfig(model=str(llama_folder), out=str(out)))
    assert len(made) == 1 and not pushed
    for _ in range(2):
        config = ExportConfig(model=str(llama_folder), out=str(out), push_to_hub="me/mine", private=True)
        build.run_verb("export", config)
    assert len(made) == 1 and pushed == [(out / "model", "me/mine", True)] * 2
