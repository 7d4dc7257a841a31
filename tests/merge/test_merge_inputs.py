"""Inputs that are not plain: tied heads written out, 8-bit floats, quantised models, GGUF, NaN where it is allowed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from galenic.merge import merge, merge_state_dicts
from galenic.merge.config import MergeConfig, MergeModel
from galenic.merge.gguf import gguf_file
from galenic.merge.merge import plan
from galenic.runtime import UserError
from gguf_helpers import llama_tensors, write_gguf

TIED = {"model_type": "llama", "dtype": "float32", "tie_word_embeddings": True}


def recipe(folders, **changes):
    models = [{"model": str(folder)} for folder in folders[1:]]
    return {"base_model": str(folders[0]), "models": models} | changes


# ---------------------------------------------------------------------------- tied heads


def tied(states, write, tmp_path, written_out):
    """A family of tied models; those at the given places hold the head as well."""
    base, experts = states(experts=2)
    folders, lean = [], []
    for place, state in enumerate([base, *experts]):
        state = {name: value for name, value in state.items() if name != "lm_head.weight"}
        lean.append(state)
        copy = {"lm_head.weight": state["model.embed_tokens.weight"].clone()} if place in written_out else {}
        folders.append(write(tmp_path / f"m{place}", state | copy, config=TIED))
    return folders, lean


@pytest.mark.parametrize("written_out", [(), (0,), (1,), (0, 1, 2)])
def test_a_tied_head_counts_once_and_stays_tied(states, write, tmp_path, written_out):
    folders, (base, *experts) = tied(states, write, tmp_path, written_out)
    out = merge(recipe(folders), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    expected = merge_state_dicts(base, experts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    notes = json.loads((tmp_path / "out" / "merge.json").read_text()).get("vocabulary", [])
    assert len([note for note in notes if "lm_head.weight" in note]) == len(written_out)


def test_a_head_of_its_own_beside_tied_models_is_refused(states, write, tmp_path):
    folders, _ = tied(states, write, tmp_path, ())
    _, [own, _] = states(experts=2)
    other = write(tmp_path / "untied", own, config=TIED | {"tie_word_embeddings": False})
    with pytest.raises(UserError, match=r"in addition 'lm_head.weight'"):
        merge(recipe([*folders[:2], other]), tmp_path / "out")


def test_untied_models_keep_their_heads(family, tmp_path):
    assert "lm_head.weight" in load_file(merge(recipe(family), tmp_path / "out") / "model.safetensors")


# ---------------------------------------------------------------------------- 8-bit floats, quantised models


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_read_exactly_and_written_in_bfloat16(write, tmp_path, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = torch.where(every.float().isfinite(), every.float(), 0.0).to(dtype)
    turned = every.view(torch.uint8).flip(0).view(dtype)
    states = [{"w": every}, {"w": turned}]
    folders = [write(tmp_path / str(i), state) for i, state in enumerate(states)]
    found = load_file(merge(recipe(folders, merge_method="linear"), tmp_path / "out") / "model.safetensors")
    assert found["w"].dtype == torch.bfloat16
    assert torch.equal(found["w"].float(), turned.float())
    planned = plan(
        MergeConfig(
            out=str(tmp_path / "o"), base_model=str(folders[0]), models=[MergeModel(model=str(folders[1]))]
        )
    )
    # The Gram pass reads both models, the second the expert: 256 bytes each, as they are stored.
    assert planned.facts["to read"] == "768B"


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_models_are_refused_by_name(family, tmp_path, nested):
    found = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config = {"model_type": "llama"} | ({"text_config": found} if nested else found)
    (family[2] / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"expert1/config.json: the weights are quantised \(gptq\)"):
        merge(recipe(family), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


# ---------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("method", ["metagpt", "ties", "linear", "della"])
def test_what_is_not_finite_in_an_expert_may_be_the_bases(states, write, tmp_path, method):
    base, experts = states(experts=2)
    broken = {name: value.clone() for name, value in experts[1].items()}
    mended = {name: value.clone() for name, value in experts[1].items()}
    name = "model.layers.0.self_attn.o_proj.weight"
    for place, value in [((0, 0), torch.nan), ((3, 7), torch.inf), ((23, 23), -torch.inf)]:
        broken[name][place], mended[name][place] = value, base[name][place]
    folders = [
        write(tmp_path / label, state)
        for label, state in [("base", base), ("a", experts[0]), ("b", broken), ("c", mended)]
    ]
    with pytest.raises(UserError, match=rf"'{name}' holds NaN or infinity \(element 0\).*allow_non_finite"):
        merge(recipe(folders[:3], merge_method=method), tmp_path / "refused")
    allowed = recipe(folders[:3], merge_method=method, allow_non_finite=True)
    repaired = recipe([*folders[:2], folders[3]], merge_method=method)
    repaired["models"][1]["name"] = "b"  # the same random numbers
    found = load_file(merge(allowed, tmp_path / "allowed") / "model.safetensors")
    expected = load_file(merge(repaired, tmp_path / "repaired") / "model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    states = {"a": experts[0], "b": broken}
    with pytest.raises(UserError, match="holds NaN or infinity"):
        merge_state_dicts(base, states, method)
    found = merge_state_dicts(base, states, method, allow_non_finite=True)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_base_that_is_not_finite_is_refused_even_then(states, write, tmp_path):
    base, experts = states(experts=1)
    base["scale"] = torch.tensor(torch.nan)
    folders = [write(tmp_path / "base", base), write(tmp_path / "a", experts[0])]
    with pytest.raises(UserError, match="'scale' holds NaN"):
        merge(recipe(folders, allow_non_finite=True), tmp_path / "out")


# ---------------------------------------------------------------------------- GGUF


def test_which_gguf_file_a_path_means(tmp_path, family):
    (tmp_path / "g").mkdir()
    assert gguf_file(tmp_path / "g") is None and gguf_file(family[0]) is None
    (tmp_path / "g" / "x.gguf").touch()
    assert gguf_file(tmp_path / "g") == gguf_file(tmp_path / "g" / "x.gguf") == tmp_path / "g" / "x.gguf"
    (tmp_path / "g" / "y.gguf").touch()
    with pytest.raises(UserError, match="holds 2 GGUF files; name one"):
        gguf_file(tmp_path / "g")
    save_file({"w": torch.zeros(1)}, tmp_path / "g" / "model.safetensors")
    assert gguf_file(tmp_path / "g") is None


@pytest.mark.filterwarnings("ignore")
def test_gguf_models_are_dequantised_once_and_merged(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("GALENIC_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / f"{name}.gguf" for name in ("base", "a", "b")]
    stored = [llama_tensors(seed) for seed in range(3)]
    for file, tensors in zip(files, stored, strict=True):
        write_gguf(file, tensors)
    config = recipe(files, merge_method="linear")
    with pytest.raises(UserError, match="the merge makes them"):
        plan(
            MergeConfig(
                out="o", base_model=str(files[0]), models=[MergeModel(model=str(file)) for file in files[1:]]
            )
        )
    found = load_file(merge(config, tmp_path / "out") / "model.safetensors")
    made = sorted((tmp_path / "cache").glob("gguf-*"))
    assert len(made) == 3
    kind = gguf.GGMLQuantizationType.Q8_0
    dequantised = [
        torch.from_numpy(
            gguf.quants.dequantize(gguf.quants.quantize(s["blk.0.ffn_up.weight"].numpy(), kind), kind)
        )
        for s in stored
    ]
    mean = ((dequantised[1].double() + dequantised[2].double()) / 2).float()
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], mean)
    merge(config, tmp_path / "again")  # from what was made
    assert sorted((tmp_path / "cache").glob("gguf-*")) == made


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_gguf_is_refused_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("GALENIC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 30)
    with pytest.raises(UserError, match=r"x\.gguf: cannot be read as GGUF") as error:
        merge(recipe([tmp_path / "x.gguf", tmp_path / "x.gguf"], merge_method="linear"), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("gguf-*"))
