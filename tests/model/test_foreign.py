"""Folders of other architectures: what is loaded, and what is refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from galenic.model import load_tokenizer
from galenic.model.foreign import load_any, save_any
from galenic.runtime import UserError


@pytest.fixture
def copied(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "model")


def test_a_folder_is_saved_and_loaded_with_all_that_belongs_to_it(copied, tmp_path):
    (copied / "LICENSE").write_text("do as you like")
    model = load_any(copied)
    for name in ("a", "b"):
        save_any(model, tmp_path / name, base=copied, provenance={"verb": "test"}, parents=["parent"])
    again = load_any(tmp_path / "a")
    assert again.config.tie_word_embeddings and not again.training
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert load_tokenizer(tmp_path / "a").get_vocab() == load_tokenizer(copied).get_vocab()
    assert {"LICENSE", "chat_template.jinja", "galenic.json", "README.md"} <= {
        file.name for file in (tmp_path / "a").iterdir()
    }
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_what_cannot_be_loaded_is_refused(copied, tmp_path):
    def refused(says):
        with pytest.raises(UserError, match=says) as error:
            load_any(copied)
        assert "\n" not in str(error.value)

    config, weights = copied / "config.json", copied / "model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    save_file({n: t for n, t in tensors.items() if "norm" not in n}, weights, metadata={"format": "pt"})
    refused("5 missing tensors in the weights, such as model.layers.0")
    save_file(tensors | {"model.x": torch.zeros(2)}, weights, metadata={"format": "pt"})
    refused("1 unexpected tensors in the weights, such as model.x")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("cannot be loaded")
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(settings | {"vocab_size": 9}))
    refused("cannot be loaded")
    config.write_text(json.dumps(settings | {"model_type": "unheard_of"}))
    refused("cannot be loaded")
    config.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    refused("quantised")
    config.unlink()
    refused("no config.json")
    (copied / "adapter_config.json").write_text("{}")
    refused("is a LoRA adapter")
    with pytest.raises(UserError, match="galenic convert"):
        load_any(tmp_path / "x.gguf")


def test_code_in_a_folder_is_not_run(copied, tmp_path):
    settings = json.loads((copied / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (copied / "config.json").write_text(json.dumps(settings | {"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_any(copied)
    assert not (tmp_path / "ran").exists()
