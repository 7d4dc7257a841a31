"""Model folders: round trips, other people's loaders, and damaged folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, load, load_tokenizer, save
from galenic.runtime import UserError

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<B_SYS>", "<B_USYS>", "<C_Q>", "<C_A>", "<B_FUNC>", "<B_CODE>"]
PROVENANCE = {"title": "Tiny", "recipe": {"steps": 3, "seed": 0}, "licence note": "测试"}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<C_Q>{{ m.content }}{% endfor %}<C_A>"
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (folder / "notes.txt").write_text("stays behind")
    return folder


def tiny(**changes) -> BaichuanM1ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_swa_attention_heads": 4}
    return BaichuanM1ForCausalLM(
        BaichuanM1Config(**(sizes | {"num_swa_key_value_heads": 2, "sliding_window": 4} | changes))
    )


@pytest.fixture(scope="module")
def saved(tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny(), folder, tokenizer=tokenizer_folder, provenance=PROVENANCE, parents=["parent-a", "parent-b"])
    return folder


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_folder_holds_what_was_promised(saved):
    expected = {"config.json", "generation_config.json", "model.safetensors", "galenic.json", "README.md"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert set(contents(saved)) == expected | {"modeling_baichuan_m1.py"}
    assert not list(saved.parent.glob(".*"))
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["BaichuanM1ForCausalLM"] and config["model_type"] == "baichuan_m1"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_baichuan_m1.BaichuanM1ForCausalLM"
    assert str(saved.parent) not in (saved / "config.json").read_text()
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert json.loads((saved / "galenic.json").read_text()) == PROVENANCE


def test_card(saved):
    import yaml

    _, front, body = (saved / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == ["parent-a", "parent-b"] and values["language"] == ["en", "zh"]
    assert values["library_name"] == "transformers" and values["pipeline_tag"] == "text-generation"
    assert "merge" in values["tags"] and values["license"] == "other"
    assert body.startswith("\n# Tiny\n") and "not medical advice" in body and '"steps": 3' in body
    assert "* parent-b" in body and "Texts it learned from" not in body


def test_card_names_the_licences_of_the_texts(tmp_path, tokenizer_folder):
    told = PROVENANCE | {"licences": {"notes": "hospital {only}", "papers": "CC BY 4.0"}}
    save(tiny().eval(), tmp_path / "model", tokenizer=tokenizer_folder, provenance=told)
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert "## Texts it learned from\n\n* notes: hospital {only}\n* papers: CC BY 4.0\n" in card


@pytest.mark.parametrize("changes", [{}, {"norm_head": False}, {"conv_window": 1}])
def test_round_trip_twice_gives_the_same_bytes(tmp_path, tokenizer_folder, changes):
    model = tiny(**changes).eval()
    folders = [tmp_path / "one", tmp_path / "two"]
    save(model, folders[0], tokenizer=tokenizer_folder, provenance=PROVENANCE)
    again = load(folders[0])
    save(again, folders[1], tokenizer=folders[0], provenance=PROVENANCE)
    assert contents(folders[0]) == contents(folders[1])
    save(again, folders[0], tokenizer=folders[0], provenance=PROVENANCE)  # over the folder it was read from
    assert contents(folders[0]) == contents(folders[1])
    assert not again.training and {t.dtype for t in again.state_dict().values()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    torch.nn.utils.parameters_to_vector(again.parameters()).sum().backward()  # trainable


def test_dtypes_and_attention(tmp_path, saved):
    half = load(saved, dtype=torch.bfloat16)
    save(half, tmp_path / "half", tokenizer=None, provenance={})
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert load(tmp_path / "half").lm_head.weight.dtype == torch.float32
    assert not (tmp_path / "half" / "tokenizer.json").exists()
    assert load(saved, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(saved).config._attn_implementation == "sdpa"
    assert load(saved).generation_config.eos_token_id == 2


def test_writing_through_the_loaded_model_leaves_the_file_alone(saved):
    before = contents(saved)
    model = load(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert contents(saved) == before


def test_shards_are_read(saved, broken):
    whole = load_file(saved / "model.safetensors")
    names = sorted(whole)
    (broken / "model.safetensors").unlink()
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: whole[name] for name in part}, broken / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load(broken).state_dict().items())
    (broken / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors"):
        load(broken)


def test_tokenizer(saved, tmp_path):
    tokenizer = load_tokenizer(saved)
    assert tokenizer.encode("ab<C_A>", add_special_tokens=False) == [10, 11, 7]
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 3
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<C_Q>hi<C_A>"
    )
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        save(tiny(), tmp_path / "x", tokenizer=tmp_path, provenance={})
    assert not (tmp_path / "x").exists()
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a usable tokenizer"):
        load_tokenizer(tmp_path)


def test_auto_class_opens_our_folders_when_galenic_is_here(saved):
    model = AutoModelForCausalLM.from_pretrained(saved, local_files_only=True)
    assert isinstance(model, BaichuanM1ForCausalLM)


STRANGER = """
import sys, warnings
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "galenic":
            raise ImportError("galenic is not here")
sys.meta_path.insert(0, Wall())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["ab", "a longer one"], return_tensors="pt", padding=True, padding_side="left",
                   return_token_type_ids=False)
out = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=None)
assert "galenic" not in sys.modules
model.save_pretrained(sys.argv[2])
print(out.tolist())
"""


def test_folder_works_without_galenic(saved, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", STRANGER, str(saved), str(tmp_path / "theirs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    tokenizer = load_tokenizer(saved)
    inputs = tokenizer(["ab", "a longer one"], return_tensors="pt", padding=True, padding_side="left")
    ours = load(saved).generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
    )
    assert ours.tolist() == theirs
    assert load_file(tmp_path / "theirs" / "model.safetensors").keys() == load(saved).state_dict().keys()
    assert load(tmp_path / "theirs").config.norm_head  # what another tool saved comes back


# ---------------------------------------------------------------------------- damage


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path, size: int) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), "no such model folder"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "model_type is None"),
        (lambda f: change_config(f, model_type="llama"), "model_type is 'llama'"),
        (lambda f: change_config(f, num_key_value_heads=3), "num_key_value_heads=3 must divide"),
        (lambda f: (f / "model.safetensors").unlink(), r"no weights \(model\.safetensors"),
        (lambda f: cut(f, 5), r"model\.safetensors: damaged or cut off"),
        (lambda f: cut(f, 9000), r"model\.safetensors: damaged or cut off"),
        (lambda f: change_config(f, num_hidden_layers=3), r"lack tensor model\.layers\.2\.\S+ and \d more"),
        (
            lambda f: change_config(f, conv_window=1),
            r"tensor model\.layers\.0\.self_attn\.conv_k does not belong",
        ),
        (
            lambda f: change_config(f, vocab_size=41),
            r"tensor \S+ has shape \(40, 16\), config\.json asks for \(41, 16\)",
        ),
        (lambda f: change_weights(f, lambda t: t.pop("lm_head.weight")), r"lack tensor lm_head\.weight;"),
        (
            lambda f: change_weights(f, lambda t: t.update({"lm_head.wieght": torch.zeros(1)})),
            r"lm_head\.wieght does not belong to this model \(did you mean 'lm_head\.weight'",
        ),
        (
            lambda f: (f / "generation_config.json").write_text("{"),
            r"generation_config\.json: not valid JSON",
        ),
    ],
)
def test_damaged_folders_are_refused_in_one_line(broken, damage, words):
    damage(broken)
    with pytest.raises(UserError, match=words) as caught:
        load(broken)
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)


def test_loading_and_saving_are_silent(saved, tmp_path, capfd, tokenizer_folder):
    save(load(saved), tmp_path / "copy", tokenizer=tokenizer_folder, provenance={})
    load_tokenizer(tmp_path / "copy")
    assert capfd.readouterr() == ("", "")
