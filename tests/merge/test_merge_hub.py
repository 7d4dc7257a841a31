import json
import shutil
import socket

import pytest

from galenic.cli import main
from galenic.merge import merge
from galenic.merge.hub import is_hub_id, local_folder
from galenic.runtime import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(monkeypatch):
    """Connections fail at once, and are counted."""
    tried = []

    def refuse(*address, **options):
        tried.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, family):
    """The family's models as the Hub's cache has them: org/base, org/expert0 ..."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for folder in family:
        repository = cache / f"models--org--{folder.name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
    return cache


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", True),
        ("org/name@v1.0", True),
        ("org/name@refs/pr/3", True),
        ("/org/name", False),
        ("name", False),
        ("a/b/c", False),
        ("../name", False),
        ("./name", False),
        ("org/na me", False),
    ],
)
def test_what_looks_like_a_hub_id(model, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(model) is expected


def test_local_folders_and_mistyped_ones_are_no_hub_ids(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert local_folder("runs/base").is_dir()
    assert not is_hub_id("runs/bsae") and not no_network


def test_models_of_the_hub_merge_like_folders(family, hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"base_model": "org/base", "models": [{"model": "org/expert0@main"}, {"model": "org/expert1"}]}
    out = merge(recipe, tmp_path / "hub-out")
    local = {"base_model": str(family[0]), "models": [{"model": str(f)} for f in family[1:3]]}
    same = merge(local, tmp_path / "local-out")
    assert (out / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    provenance = json.loads((out / "galenic.json").read_text())
    assert provenance["parents"] == ["org/base", "org/expert0@main", "org/expert1"]
    assert "- org/expert0\n" in (out / "README.md").read_text()


def test_hub_ids_on_the_command_line(hub_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.yaml").write_text("base_model: org/base\nmodels: [{model: org/expert0}]\nout: out\n")
    assert main(["merge", "--config", "merge.yaml"]) == 0
    assert main(["merge", "--config", "merge.yaml"]) == 0
    assert "already done" in capsys.readouterr().out
    (tmp_path / "merge.yaml").write_text("base_model: org/base\nmodels: [{model: org/other}]\nout: out2\n")
    assert main(["merge", "--config", "merge.yaml"]) == 2
    assert "org/other: no such folder, and as a Hub id: " in capsys.readouterr().err
    assert not list((tmp_path / "out2").iterdir())


def test_a_plan_downloads_nothing(tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.yaml").write_text("base_model: org/base\nmodels: [{model: org/a}]\nout: out\n")
    assert main(["merge", "--config", "merge.yaml", "--plan"]) == 2
    error = capsys.readouterr().err
    assert "org/base" in error and "hf download org/base" in error and error.count("\n") == 1
    assert not no_network


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"org/nothing: no such folder, and as a Hub id: "):
        local_folder("org/nothing")
    assert no_network
