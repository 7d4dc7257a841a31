import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import galenic.merge
from galenic.merge import merge, merge_state_dicts
from galenic.merge.config import MergeConfig, MergeModel
from galenic.merge.io import Checkpoint, TensorInfo, read_header
from galenic.merge.writer import safetensors_writer
from galenic.runtime import UserError

METHODS = ["metagpt", "linear", "task_arithmetic", "ties", "dare_linear"]


def recipe(folders, method="metagpt", **changes):
    models = [{"model": str(folder)} for folder in folders[1:]]
    return {"merge_method": method, "base_model": str(folders[0]), "models": models} | changes


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}


# ---------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_folders_and_state_dicts_give_the_same_bits(family, states, tmp_path, method, dtype):
    base, experts = states()
    changes = {"dtype": dtype} if dtype else {}
    out = merge(recipe(family, method, **changes), tmp_path / "out")
    named = {f"expert{t}": state for t, state in enumerate(experts)}
    expected = merge_state_dicts(base, named, method, dtype=dtype)
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
        for name in found
    )


def test_the_output_is_a_whole_model_folder(family, tmp_path, monkeypatch):
    out = merge(recipe(family, dtype="bfloat16"), tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "galenic.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_x.py",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card  # nobody's folders are told
    front = yaml.safe_load(card.split("---\n")[1])
    assert (
        front["base_model"] == [f"{f.parent.name}/{f.name}" for f in family]
        and front["license"] == "apache-2.0"
    )
    fenced = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert fenced["merge_method"] == "metagpt" and "parameters" not in fenced["models"][0]
    assert json.loads((out / "galenic.json").read_text())["parents"] == front["base_model"]
    monkeypatch.chdir(tmp_path.parent)
    again = merge(fenced, tmp_path / "again")  # the recipe in the card makes the same model
    assert digest(again) == digest(out)


def test_merge_json_tells_norms_cosines_and_coefficients(family, states, tmp_path):
    merge(recipe(family), tmp_path / "out")
    summary = json.loads((tmp_path / "out/merge.json").read_text())
    base, experts = states()
    taus = [torch.cat([(e[n].double() - base[n].double()).flatten() for n in base]) for e in experts]
    norms = [float(t.norm()) for t in taus]
    assert summary["experts"] == ["expert0", "expert1", "expert2"]
    assert list(summary["norms"].values()) == pytest.approx(norms, rel=1e-6)
    assert list(summary["coefficients"].values()) == pytest.approx(
        [n**2 / sum(m**2 for m in norms) for n in norms]
    )
    assert summary["cosines"][0][1] == pytest.approx(float(taus[0] @ taus[1]) / norms[0] / norms[1], rel=1e-5)
    assert summary["effective_models"] == pytest.approx(
        1 / sum(c**2 for c in summary["coefficients"].values())
    )
    assert (
        summary["method"] == "metagpt"
        and summary["base"] == f"{tmp_path.name}/base"
        and summary["warnings"] == []
    )


def test_a_dominant_expert_is_warned_of(states, write, tmp_path):
    base, experts = states(experts=2, norms=[1, 30])
    folders = [write(tmp_path / n, s) for n, s in zip("bxy", [base, *experts], strict=True)]
    merge(recipe(folders), tmp_path / "out")
    (warning,) = json.loads((tmp_path / "out/merge.json").read_text())["warnings"]
    assert warning.startswith("'y' gets 0.99")
    assert warning in (tmp_path / "out/model/README.md").read_text()


def test_a_merge_again_gives_the_same_bytes_and_replaces_leftovers(family, tmp_path):
    first = digest(merge(recipe(family, "dare_linear"), tmp_path / "out"))
    leftover = tmp_path / "out/.model.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert digest(merge(recipe(family, "dare_linear"), tmp_path / "out")) == first
    torch.set_num_threads(threads)
    assert not leftover.exists()


def test_sharded_output_has_an_index_and_reads_back(tmp_path):
    tensors = {name: TensorInfo(dtype=torch.float32, shape=(6,)) for name in "abc"}
    tensors["d"] = TensorInfo(dtype=torch.bool, shape=(3,))
    tensors["e"] = TensorInfo(dtype=torch.bfloat16, shape=())
    tensors["f"] = TensorInfo(dtype=torch.bfloat16, shape=(0, 4))
    with safetensors_writer(tmp_path, tensors, max_shard_bytes=50) as writer:
        for name in "abc":
            writer.write(name, 3, torch.full((3,), 2.0))  # out of order
            writer.write(name, 0, torch.ones(3))
        writer.write("d", 0, torch.tensor([True, False, True]))
        writer.write("e", 0, torch.tensor([7.0], dtype=torch.bfloat16))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors) and index["metadata"]["total_size"] == 3 * 24 + 3 + 2
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        found |= load_file(tmp_path / file)  # the library accepts our headers
    assert found["c"].tolist() == [1, 1, 1, 2, 2, 2] and found["d"].tolist() == [True, False, True]
    assert found["e"].item() == 7 and found["f"].shape == (0, 4)
    with Checkpoint(tmp_path, "x") as checkpoint:
        assert checkpoint.read("c", 2, 4).tolist() == [1, 2] and len(checkpoint.files) > 1


def test_written_file_is_byte_for_byte_the_librarys(tmp_path):
    state = {"b": torch.arange(5.0), "a": torch.arange(3).to(torch.bfloat16), "c": torch.arange(4)}
    save_file(state, tmp_path / "library.safetensors", metadata={"format": "pt"})
    (tmp_path / "ours").mkdir()
    infos = {name: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for name, t in state.items()}
    with safetensors_writer(tmp_path / "ours", infos) as writer:
        for name, tensor in state.items():
            writer.write(name, 0, tensor)
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (
        tmp_path / "library.safetensors"
    ).read_bytes()


def test_integer_buffers_are_copied(states, write, tmp_path):
    base, experts = states(experts=1)
    for state in (base, experts[0]):
        state["position_ids"] = torch.arange(7)
    folders = [write(tmp_path / "b", base), write(tmp_path / "x", experts[0])]
    out = merge(recipe(folders, dtype="float16"), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["position_ids"], torch.arange(7))


def test_plan_reads_headers_only_and_writes_nothing(family, tmp_path):
    module = sys.modules["galenic.merge.merge"]
    models = [MergeModel(model=str(f)) for f in family[1:]]
    told = module.plan(MergeConfig(out=str(tmp_path / "out"), base_model=str(family[0]), models=models))
    assert not (tmp_path / "out").exists()
    assert told.facts["experts"] == "expert0, expert1, expert2" and len(told.reads) == 5
    assert galenic.merge.merge is merge and module.merge is merge


def test_importing_the_room_is_cheap():
    code = "import sys, galenic.merge.config, galenic.merge.merge; print({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "set()\n"
    )


def test_memory_is_bounded(tmp_path, write):
    # 4 models of 64 MiB in a process that may hold far less than one of them beyond what it starts with.
    for t, name in enumerate(("base", "x", "y", "z")):
        write(tmp_path / name, {"w": torch.full((2**24,), 1.0 + t)})
    code = (
        "import resource, sys, galenic.merge.engine, galenic.merge.folder, galenic.merge.writer\n"
        "from galenic.merge import merge, merge_state_dicts\n"
        "import torch\n"
        "merge_state_dicts({'w': torch.ones(2**18)}, [{'w': torch.zeros(2**18)}] * 3)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "models = [{'model': sys.argv[1] + '/' + n} for n in 'xyz']\n"
        "merge({'base_model': sys.argv[1] + '/base', 'models': models}, sys.argv[1] + '/out')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 40_000  # KiB


# ---------------------------------------------------------------------------- refusals


def refuse(folders, tmp_path, message, **changes):
    with pytest.raises(UserError, match=message) as error:
        merge(recipe(folders, **changes), changes.get("out", tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def change_state(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_other_shapes_are_refused(family, tmp_path):
    change_state(family[1], lambda s: s.update({"lm_head.weight": torch.zeros(41, 24)}))
    refuse(family, tmp_path, r"expert0: 'lm_head.weight' has shape \[41, 24\], in .*base \[40, 24\]")


def test_missing_and_extra_tensors_are_listed(family, tmp_path):
    change_state(family[3], lambda s: s.update({"lm_haed.weight": s.pop("lm_head.weight")}))
    refuse(
        family,
        tmp_path,
        r"lacks 'lm_head.weight' \(did you mean 'lm_haed.weight'\?\); has in addition 'lm_haed",
    )


def test_nan_is_named(family, tmp_path):
    change_state(family[1], lambda s: s["model.norm.weight"].fill_(float("nan")))
    refuse(family, tmp_path, "expert0: 'model.norm.weight' holds NaN")


def test_another_kind_of_tensor_is_refused(family, tmp_path):
    change_state(family[1], lambda s: s.update({"model.norm.weight": torch.zeros(24, dtype=torch.int32)}))
    refuse(family, tmp_path, "'model.norm.weight' is torch.int32, in .* torch.float32")


def test_truncated_and_padded_files_are_refused(family, tmp_path):
    file = family[1] / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    refuse(family, tmp_path, "model.safetensors: truncated")
    file.write_bytes(data + b"\0")
    refuse(family, tmp_path, "longer than its header says")
    file.write_bytes(data[:5])
    refuse(family, tmp_path, "truncated or not safetensors")
    file.write_bytes(b"")
    refuse(family, tmp_path, "truncated or not safetensors")


def test_index_mistakes_are_refused(family, tmp_path):
    path = family[2] / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    name, file = next(iter(good["weight_map"].items()))
    other = next(f for f in good["weight_map"].values() if f != file)
    for change, message in [
        ({name: "../expert0/model.safetensors"}, "not a safetensors file of the folder"),
        ({name: "/etc/passwd"}, "not a safetensors file of the folder"),
        ({name: 3}, "not a safetensors file of the folder"),
        ({name: "gone.safetensors"}, "gone.safetensors: missing"),
        ({name: other}, "which .* does not place there"),
        ({"ghost": file}, "lacks 'ghost'"),
    ]:
        path.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        refuse(family, tmp_path, message)
    path.write_text("{}")
    refuse(family, tmp_path, "has no weight_map")
    path.write_text("{")
    refuse(family, tmp_path, "not valid JSON")


def test_folders_without_safetensors_are_refused(family, tmp_path):
    refuse([tmp_path / "nowhere", *family[1:]], tmp_path, "nowhere: no such model folder")
    os.remove(family[0] / "model.safetensors")
    refuse(family, tmp_path, "no model.safetensors in it")
    (family[0] / "pytorch_model.bin").write_bytes(b"")
    refuse(family, tmp_path, "pickled weights, which are never loaded")


def test_other_vocabularies_are_refused(family, tmp_path):
    tokenizer = {"model": {"vocab": {"a": 0, "b": 2, "c": 1}}, "added_tokens": []}
    (family[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(
        family, tmp_path, r"vocabulary is not the base's: 2 tokens at another row \(rows 1 to 2 of the base"
    )
    tokenizer["model"]["vocab"] = {"a": 0, "b": 1, "c": 2, "new": 3}
    (family[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(family, tmp_path, r"1 token the base lacks \(row 3: 'new'\)")


def test_configs_that_differ_are_told_and_other_architectures_refused(family, tmp_path):
    path = family[1] / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", "rope_theta": 1e6}))
    merge(recipe(family), tmp_path / "fine")
    warnings = json.loads((tmp_path / "fine/merge.json").read_text())["warnings"]
    assert warnings == ["config.json of 'expert0' differs from the base's in rope_theta; the base's is used"]
    path.write_text(json.dumps({"model_type": "mamba"}))
    refuse(family, tmp_path, "model_type is mamba, the base's is llama")


def test_outputs_that_would_harm_an_input_are_refused(family, tmp_path):
    before = [digest(folder) for folder in family]
    for out, message in [
        (family[1], "lies inside the input"),
        (family[1] / "deep/er", "lies inside the input"),
    ]:
        with pytest.raises(UserError, match=message):
            sys.modules["galenic.merge.merge"].run(
                MergeConfig(
                    out=str(out),
                    base_model=str(family[0]),
                    models=[MergeModel(model=str(f)) for f in family[1:]],
                )
            )
    moved = tmp_path / "run/model"
    moved.parent.mkdir()
    family[3].rename(moved)
    with pytest.raises(UserError, match="would replace the input"):
        merge(recipe([*family[:3], moved]), tmp_path / "run")
    assert [digest(folder) for folder in [*family[:3], moved]] == before


def test_recipes_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        merge(tmp_path / "none.yaml", tmp_path / "out")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="is a mapping"):
        merge(tmp_path / "list.yaml", tmp_path / "out")


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        [],
        {"w": {"dtype": "F32", "shape": [2]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"w": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}},
        {
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
    ],
)
def test_lying_headers_are_refused(tmp_path, header):
    with pytest.raises(UserError):
        read_header(header_file(tmp_path / "x.safetensors", header, b"\0" * 8))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 300))
def test_broken_bytes_are_refused_never_crash(tmp_path, noise, position):
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.arange(20.0), "v": torch.ones(3)}, file)
    data = bytearray(file.read_bytes())
    data[position : position + len(noise)] = noise
    file.write_bytes(data)
    try:
        found = read_header(file)
    except UserError:
        return
    assert sum(info.nbytes for _, info, _ in found) < len(data)


def test_a_recipe_given_as_a_mapping_is_left_as_it_was(family, tmp_path):
    recipe = {"base_model": str(family[0]), "models": [{"model": str(family[1])}, {"model": str(family[2])}]}
    text = json.dumps(recipe)
    merge(recipe, tmp_path / "out")
    assert json.dumps(recipe) == text
