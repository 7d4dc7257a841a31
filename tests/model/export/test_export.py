"""What is exported: the same model, in another dtype, with a plain head, with an adapter in it, in fewer bits."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from galenic import build
from galenic import model as model_room
from galenic.chat import chat
from galenic.chat.config import ChatConfig
from galenic.cli import main
from galenic.corpus.tokens.chat_format import SYSTEM_PROMPT
from galenic.corpus.tokens.shards import write_meta, write_shard
from galenic.corpus.tokens.tokenizer import save_tokenizer, train_bpe
from galenic.model.export import export, losses
from galenic.model.export.config import NO_GGUF, ExportConfig
from galenic.model.export.quantize import is_quantized, load_quantized
from galenic.model.export.text import TEXT
from galenic.runtime import NO_SPACE, UserError, read_json

IDS = torch.tensor([[5, 17, 200, 31, 8, 99, 150, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a NormHead whose rows differ much in length, and a licence beside it."""
    root = tmp_path_factory.mktemp("export")
    save_tokenizer(
        train_bpe(list(TEXT) * 2, vocab_size=512, character_coverage=0.98, max_characters=200),
        root,
        SYSTEM_PROMPT,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    torch.manual_seed(0)
    config = model_room.BaichuanM1Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=16,
        max_position_embeddings=96,
        initializer_range=0.1,
    )
    model = model_room.BaichuanM1ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.rand(len(tokenizer), 1) * 5 + 0.1)
        model.model.norm.weight.mul_(6)
    provenance = {"title": "Small", "license": "cc0-1.0", "verb": "sft"}
    model_room.save(model, root / "model", tokenizer=root, provenance=provenance)
    (root / "model" / "LICENSE").write_text("CC0")
    return root / "model"


def logits(folder, **options):
    """By transformers' own way in."""
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_baichuan_m1.BaichuanM1ForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, **options
    ).eval()
    with torch.inference_mode():
        return model(IDS).logits.float()


def run(folder, out, **options):
    config = ExportConfig(model=str(folder), out=str(out), **options)
    build.run_verb("export", config)
    return out / "model"


def test_a_copy_is_the_model(folder, tmp_path):
    copy = run(folder, tmp_path / "out")
    assert torch.equal(logits(copy), logits(folder))
    planned = {"model.safetensors", *export.companion_names(folder)}
    assert {file.name for file in copy.iterdir()} == planned
    assert (copy / "LICENSE").read_text() == "CC0"
    assert model_room.load(copy).config.norm_head
    card = (copy / "README.md").read_text()
    assert card.startswith((folder / "README.md").read_text()) and "## This copy" in card
    record = read_json(copy / "galenic.json")
    assert record["license"] == "cc0-1.0" and record["parent"]["verb"] == "sft"


def test_a_plain_head_gives_the_same_logits(folder, tmp_path):
    copy = run(folder, tmp_path / "out", plain_head=True)
    config = read_json(copy / "config.json")
    assert config["norm_head"] is False
    torch.testing.assert_close(logits(copy), logits(folder), rtol=1e-5, atol=1e-5)
    with safe_open(copy / "model.safetensors", "pt") as file:
        torch.testing.assert_close(
            file.get_tensor("lm_head.weight").norm(dim=1), torch.ones(config["vocab_size"])
        )
    assert "plain linear head" in (copy / "README.md").read_text()


def test_another_dtype_is_one_rounding(folder, tmp_path):
    copy = run(folder, tmp_path / "out", dtype="bfloat16")
    before, after = (model_room.load(place).state_dict() for place in (folder, copy))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.bfloat16().float())
    assert read_json(copy / "config.json")["dtype"] == "bfloat16"
    # The head is normalised before it is rounded.
    plain = run(folder, tmp_path / "plain", dtype="bfloat16", plain_head=True)
    rows = before["lm_head.weight"]
    expected = (rows / rows.norm(dim=1, keepdim=True)).bfloat16()
    found = model_room.load(plain, torch.bfloat16).lm_head.weight
    assert (found == expected).float().mean() > 0.999
    # What is stored in bfloat16 stays so where nothing is said.
    again = run(copy, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()


def test_an_adapter_is_merged_in(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = model_room.load(folder)
    settings = peft.LoraConfig(r=4, target_modules=["W_pack", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
        adapted = peft.get_peft_model(model, settings).eval()
        adapted.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        expected = adapted(IDS).logits
    copy = run(f"{folder}+{tmp_path / 'adapter'}", tmp_path / "out")
    torch.testing.assert_close(logits(copy), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is a LoRA adapter; write its base before it"):
        run(tmp_path / "adapter", tmp_path / "other")


def test_a_model_of_another_architecture(llama_folder, tmp_path, capsys):
    """Its tied head is stored once and tied again."""
    copy = run(llama_folder, tmp_path / "out", plain_head=True)
    assert "has a plain head already" in capsys.readouterr().err
    models = [AutoModelForCausalLM.from_pretrained(place).eval() for place in (llama_folder, copy)]
    with torch.inference_mode():
        assert torch.equal(*(model(IDS).logits for model in models))
    assert {file.name for file in copy.iterdir()} == {
        "model.safetensors",
        *export.companion_names(llama_folder),
    }


@pytest.mark.parametrize(("kind", "agreement"), [("int8", 0.93), ("int4", 0.45)])
def test_quantised_weights_are_read_by_transformers(folder, tmp_path, kind, agreement, capsys, monkeypatch):
    """What transformers makes of the folder is what the cost was measured on; nothing is pickled."""
    pytest.importorskip("compressed_tensors")
    copy = run(folder, tmp_path / "out", quantize=kind)
    said = capsys.readouterr().out
    assert "times smaller" in said and "bits per byte" in said and "(95%:" in said
    record = read_json(tmp_path / "out" / "export.json")
    same = record["cost"]["top_1_agreement"]
    assert agreement < same["low"] <= same["value"] <= same["high"]
    difference = record["cost"]["bits_per_byte"]["difference"]
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert record["bytes"]["after"] < record["bytes"]["before"] * 0.7
    assert not [file for file in copy.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    kinds = set()
    with safe_open(copy / "model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.W_pack.weight" not in file.keys()
        kinds = {str(file.get_slice(name).get_dtype()) for name in file.keys()}
    assert kinds == {"F32", "I32", "I64"}
    found = logits(copy)
    dense = model_room.load(folder)
    dense.materialize_norm_head()
    quantised, _ = losses_of(dense, kind)
    torch.testing.assert_close(found, quantised, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(folder), atol=1e-4)
    with pytest.raises(UserError, match="quant"):
        model_room.load(copy)
    assert f"stored in {kind}" in (copy / "README.md").read_text()
    with torch.inference_mode():
        torch.testing.assert_close(load_quantized(copy)(IDS).logits, quantised, rtol=1e-5, atol=1e-5)
    assert is_quantized(copy) and not is_quantized(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("Fever?\n"))
    chat.run(ChatConfig(model=str(copy), max_new_tokens=3))
    assert capsys.readouterr().out.endswith("\n")
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_quantized(copy)


def test_a_quantised_folder_needs_no_galenic(folder, tmp_path):
    """Another process, the code that lies in the folder, a batch with padding: what transformers' users do."""
    pytest.importorskip("compressed_tensors")
    copy = run(folder, tmp_path / "out", quantize="int4")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto").eval()
ids = torch.tensor([[5, 17, 200, 31, 8, 99, 150, 3]])
mask = torch.tensor([[0] * 2 + [1] * 6])
with torch.inference_mode():
    torch.save([model(ids).logits, model(ids, attention_mask=mask).logits], sys.argv[2])
assert type(model).__module__.startswith("transformers_modules")
assert not any(name.startswith("galenic") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, copy, tmp_path / "logits.pt"],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, padded = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(whole, logits(copy), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        alone = AutoModelForCausalLM.from_pretrained(copy, dtype="auto").eval()(IDS[:, 2:]).logits
    torch.testing.assert_close(padded[:, 2:], alone, rtol=1e-4, atol=1e-4)


def losses_of(model, kind):
    from galenic.model.export.quantize import quantize

    tensors, _ = quantize(model, kind)
    with torch.inference_mode():
        return model(IDS).logits, tensors


def test_quantising_a_tied_head_leaves_it_alone(llama_folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    copy = run(llama_folder, tmp_path / "out", quantize="int4", dtype="bfloat16")
    assert read_json(copy / "config.json")["quantization_config"]["ignore"] == ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(copy, dtype="auto").eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.isfinite(model(IDS).logits).all()


def test_scales_round_as_little_as_they_can():
    """Against a search of every scale of `SHRINKS`, one group at a time in float64; a row's scale is max / 127.5."""
    from galenic.model.export.quantize import SHRINKS, scales

    torch.manual_seed(0)
    weight = torch.randn(7, 32)
    weight[3] = 0
    found = scales(weight, 4, 16)
    assert found.shape == (7, 2)
    for row in (0, 1, 6):
        for group in (0, 1):
            part = weight[row, 16 * group : 16 * group + 16].double()
            tried = [part.abs().max() / 7.5 * share for share in SHRINKS]
            errors = [((part / s).round().clamp(-8, 7) * s - part).square().sum() for s in tried]
            assert float(found[row, group]) == pytest.approx(float(tried[int(np.argmin(errors))]), rel=1e-6)
    assert (found[3] > 0).all()
    torch.testing.assert_close(scales(weight, 8, None)[:, 0][[0, 1]], weight.abs().amax(1)[[0, 1]] / 127.5)


def test_the_cost_is_that_of_the_text_that_is_given(folder, tmp_path):
    """Lines or shards of the same documents: the same numbers. Each number against a plain computation."""
    pytest.importorskip("compressed_tensors")
    tokenizer = model_room.load_tokenizer(folder)
    texts = ["Fever is common.", "The lungs lie in the chest. " * 12, "高血压早期多无症状。"]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in [*texts, " "]))
    step = tmp_path / "step"
    (step / "tokens").mkdir(parents=True)
    shutil.copyfile(folder / "tokenizer.json", step / "tokenizer.json")
    rows = [
        ([1, *tokenizer.encode(text, add_special_tokens=False), 2], len(text.encode()), 1.0) for text in texts
    ]
    counts = write_shard(step / "tokens", "books", "heldout", rows, "uint16")
    sources = {"books": {"group": "general", "train": counts, "heldout": counts}}
    write_meta(step / "tokens", {"dtype": "uint16", "vocab_size": len(tokenizer), "sources": sources})
    costs = []
    for heldout in (lines, step):
        run(folder, tmp_path / f"out-{heldout.name}", quantize="int8", heldout=str(heldout))
        costs.append(read_json(tmp_path / f"out-{heldout.name}" / "export.json")["cost"])
    assert costs[0]["documents"] == costs[1]["documents"] == 3
    assert costs[0]["bits_per_byte"]["before"] == pytest.approx(costs[1]["bits_per_byte"]["before"], abs=1e-9)
    assert costs[0]["top_1_agreement"] == costs[1]["top_1_agreement"]
    other = train_bpe(list(TEXT), vocab_size=500, character_coverage=0.98, max_characters=200)
    save_tokenizer(other, step, SYSTEM_PROMPT)
    with pytest.raises(UserError, match="holds tokens of another tokenizer than the model's"):
        run(folder, tmp_path / "other", quantize="int8", heldout=str(step))
    model, bits = model_room.load(folder), 0.0
    with torch.inference_mode():
        for text in (texts[0], texts[2]):
            ids = torch.tensor([[1, *tokenizer.encode(text, add_special_tokens=False)]])
            table = model(ids).logits[0].double().log_softmax(-1)
            bits -= float(table[:-1].gather(1, ids[0, 1:, None]).sum()) / np.log(2)
    short = [losses._encoded(tokenizer, text) for text in (texts[0], texts[2])]

    class Bar:
        def update(self, n=1, note=""):
            pass

    assert losses.score(model, short, Bar()).bits.sum() == pytest.approx(bits, rel=1e-5)


def test_the_difference_is_paired_over_documents():
    texts = [losses.Text(ids=np.arange(4), bytes=10), losses.Text(ids=np.arange(3), bytes=30)]
    before = losses.Scores(bits=np.array([20.0, 30.0]), likeliest=[np.array([1, 2, 3]), np.array([4, 5])])
    after = losses.Scores(bits=np.array([22.0, 36.0]), likeliest=[np.array([1, 2, 0]), np.array([4, 5])])
    found = losses.compare(before, after, texts)
    assert found["bits_per_byte"]["before"] == 50 / 40 and found["bits_per_byte"]["after"] == 58 / 40
    # Each document alone differs by 0.2 a byte, so every resample does.
    difference = found["bits_per_byte"]["difference"]
    assert difference == {key: pytest.approx(0.2) for key in ("value", "low", "high")}
    assert found["top_1_agreement"]["value"] == 4 / 5


# ---------------------------------------------------------------------------- bad input


def test_what_cannot_be_exported_is_refused(folder, llama_folder, tmp_path):
    def refused(says, **options):
        with pytest.raises(UserError, match=says):
            run(options.pop("model", folder), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    refused("none: no such file or folder", model=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("is not a model folder", model=tmp_path / "empty")
    refused("nothing reads this architecture from GGUF", format="gguf")
    refused("heldout measures what quantising costs", heldout="x.jsonl")
    refused("'mine' is no repository; write it as USER/NAME", push_to_hub="mine")
    refused("'a/b@main' is no repository", push_to_hub="a/b@main")
    refused("private is about the Hub repository", private=True)
    refused("heldout_tokens is 0", heldout_tokens=0)
    pytest.importorskip("compressed_tensors")
    refused("no such file", quantize="int8", heldout=str(tmp_path / "none.jsonl"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": 5}\n')
    refused("lines.jsonl:1: 'text' must be a text", quantize="int8", heldout=str(lines))
    lines.write_text('{"text": " "}\n')
    refused("holds no text", quantize="int8", heldout=str(lines))
    lines.write_text('{"text": ""}\n{"text": "."}\n')
    bare = tmp_path / "bare"  # without a first token, one token predicts nothing
    shutil.copytree(llama_folder, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    refused("no text in it is longer than one token", model=bare, quantize="int8", heldout=str(lines))


def test_layers_of_odd_widths_take_int8_only(tmp_path, folder):
    from galenic.model.export.quantize import group_width

    assert group_width({"a": torch.nn.Linear(256, 3), "b": torch.nn.Linear(704, 3)}) == 64
    assert group_width({"a": torch.nn.Linear(5120, 3), "b": torch.nn.Linear(17408, 3)}) == 128
    with pytest.raises(UserError, match="multiples of 16; int8 takes any"):
        group_width({"a": torch.nn.Linear(56, 3)})


def test_the_missing_package_is_named(folder, tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def without(name, *rest):
        if name.startswith("compressed_tensors"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UserError, match=r"pip install 'galenic\[quantize\]'"):
        run(folder, tmp_path / "out", quantize="int8")


def test_a_model_without_tokenizer_is_quantised_unmeasured(folder, tmp_path, capsys):
    pytest.importorskip("compressed_tensors")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    run(bare, tmp_path / "out", quantize="int8")
    assert "the cost was not measured: the model has no tokenizer" in capsys.readouterr().out


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert NO_SPACE in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*"))
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_the_plan_tells_and_does_nothing(folder, tmp_path, capsys):
    words = ["export", str(folder), "--out", str(tmp_path / "out"), "--quantize", "int4"]
    assert main([*words, "--push-to-hub", "me/mine", "--private", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "int4 float32, a plain head" in said and "https://huggingface.co/me/mine (private)" in said
    for name in ("config.json", "LICENSE", "tokenizer.json", "README.md", "model.safetensors"):
        assert name in said
    assert not (tmp_path / "out").exists()
    assert main([*words[:4], "--format", "gguf"]) == 2
    assert NO_GGUF.split(":")[1].strip() in capsys.readouterr().err
