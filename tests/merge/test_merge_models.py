"""Merging what the model room writes."""

import json

import torch

from galenic.merge import merge
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, load, save


def test_model_folders_merge_into_a_model_that_loads_and_runs(tmp_path):
    torch.manual_seed(0)
    config = BaichuanM1Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_swa_attention_heads=4,
        num_swa_key_value_heads=2,
        sliding_window=8,
    )
    model = BaichuanM1ForCausalLM(config).eval()
    save(model, tmp_path / "base", tokenizer=None, provenance={"license": "apache-2.0"}, parents=[])
    states = []
    for name in ("medical", "code"):
        expert = load(tmp_path / "base")
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        save(expert, tmp_path / f"41-sft-{name}/model", tokenizer=None, provenance={}, parents=["base"])
        states.append(expert.state_dict())
    models = [{"model": str(tmp_path / f"41-sft-{name}/model")} for name in ("medical", "code")]
    out = merge(
        {"merge_method": "linear", "base_model": str(tmp_path / "base"), "models": models}, tmp_path / "out"
    )
    merged = load(out)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    assert merged(torch.arange(6)[None]).logits.shape == (1, 6, 40)
    written = {path.name for path in out.iterdir()}
    assert {"modeling_baichuan_m1.py", "generation_config.json", "README.md", "galenic.json"} <= written
    assert "license: apache-2.0" in (out / "README.md").read_text()
    assert json.loads((tmp_path / "out/merge.json").read_text())["experts"] == [
        "41-sft-medical",
        "41-sft-code",
    ]
