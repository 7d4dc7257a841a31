"""`galenic merge` on bad input, as a user meets it: one line, exit code 2, no traceback, nothing written."""

import json
import os
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from galenic.cli import main
from galenic.merge import merge, merge_state_dicts
from galenic.merge.io import INDEX
from galenic.runtime import UserError

SINGLE, SHARDED = 1, 2  # places in the family of an expert in one file and of one in two shards


@pytest.fixture
def run(family, tmp_path, capsys, monkeypatch):
    """Returns a function that runs the command line on the family and returns (exit code, stderr)."""
    monkeypatch.setenv("GALENIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def merge_in_a_shell(text=None, out="out", words=(), **changes):
        values = {"merge_method": "metagpt", "base_model": "base"}
        values["models"] = [{"model": folder.name} for folder in family[1:]]
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(values | changes) if text is None else text)
        code = main(["merge", "--config", "merge.yaml", "--out", str(out), *words])
        return code, capsys.readouterr().err

    return merge_in_a_shell


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def refused(run, tmp_path):
    """Returns a function that asserts that a merge is refused with a message and writes nothing."""

    def there():
        return [file for file in files(tmp_path) if not file.startswith(("cache", "merge.yaml"))]

    def check(message, **changes):
        before = there()
        code, error = run(**changes)
        assert code == 2 and error.count("\n") == 1 and error.startswith("galenic: error: ")
        assert message in error
        assert there() == before

    return check


# ---------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "dare-ties"}, "'dare-ties' is not supported (did you mean 'dare_ties'?)"),
        ({"merge_method": "della_linear"}, "(the nearest is 'della')"),
        ({"merge_method": "karcher"}, "(the nearest is 'slerp')"),
        ({"merge_method": "passthrough"}, "'passthrough' is not supported; known are metagpt, linear"),
        ({"merge_method": []}, "merge_method: [] is not supported"),
        ({"slices": [{"sources": []}]}, "slices: not supported"),
        ({"modules": {}}, "modules: not supported"),
        ({"chat_template": "auto"}, "chat_template: not supported"),
        ({"parameters": {"int8_mask": True}}, "parameters.int8_mask: not supported"),
        ({"parameters": {"rescale": True}}, "parameters.rescale: not supported"),
        ({"parameters": []}, "parameters: [] is not a mapping; it takes weight"),
        ({"parameters": {"normalize": 1}}, "parameters.normalize: 1 is not true or false"),
        (
            {"parameters": {"scope": "layr"}},
            "parameters.scope: 'layr' is not supported (did you mean 'layer'?)",
        ),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "tokenizer.tokens: not supported"),
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "tokenizer.pad_to_multiple_of: not supported"),
        ({"tokenizer": {}}, "tokenizer.source: None is not supported"),
        ({"tokenizer": "base"}, "tokenizer: 'base' is not a mapping; it takes source"),
        (
            {"tokenizer_source": "model:x"},
            "tokenizer_source: 'model:x' is not supported; known are base, union",
        ),
        ({"dtype": "fp16"}, "dtype: 'fp16' is not supported; known are float32"),
        ({"models": {"model": "expert0"}}, "models: is not a list; write `- model: FOLDER`"),
        ({"models": ["expert0"]}, "models[0]: is not a mapping; write `- model: expert0`"),
        ({"models": [{}]}, "models[0].model: None is not the name of a folder"),
        ({"models": [{"model": {"path": "x"}}]}, "is not the name of a folder"),
        ({"models": [{"model": "expert0", "weight": 1}]}, "models[0].weight: not supported"),
        (
            {"merge_method": "ties", "models": [{"model": "expert0", "parameters": {"weight": "half"}}]},
            "models[0].parameters.weight: 'half' is not a number",
        ),
        (
            {"merge_method": "ties", "parameters": {"density": [0, 0.5, 1]}},
            "parameters.density: gradients (lists) and filters are not supported",
        ),
        (
            {"merge_method": "slerp", "parameters": {"t": [{"filter": "mlp", "value": 1}, {"value": 0}]}},
            "parameters.t: gradients (lists) and filters are not supported",
        ),
        ({"base_model": ""}, "'' names no model"),
        ({"models": [{"model": "base+"}]}, "a model+adapter needs both parts"),
        ({"models": [{"model": "expert0", "name": "a\x1b[31m"}]}, "cannot be printed as a name"),
        ({1: 2}, "1: not supported"),
    ],
)
def test_recipes(refused, changes, message):
    refused(
        message,
        **({"text": yaml.safe_dump({"base_model": "base", "models": [], 1: 2})} if 1 in changes else changes),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file holds no options"),
        ("- a", "the file holds no options"),
        ("base_model: base\nmodels: [{model: expert0}]\nmodels: []\n", "the key 'models' stands twice"),
        ("base_model: base\nmodels: [{model: expert0, model: expert1}]\n", "the key 'model' stands twice"),
        ("a: [", "Problems parsing config"),
        ("base_model: !!python/object/apply:os.abort []\n", "could not determine a constructor"),
    ],
)
def test_yaml(refused, text, message):
    refused(message, text=text)


def test_recipes_that_are_no_text(refused, tmp_path, run):
    refused("base_model", text="models: [{model: expert0}]")
    (tmp_path / "other.yaml").write_bytes(b"\xff\xfe\0a")
    code, error = run(words=["--config", "other.yaml"])
    assert code == 2 and "not UTF-8 text" in error
    with pytest.raises(UserError, match="the key 'out' stands twice"):
        (tmp_path / "twice.yaml").write_text("out: a\nout: b\n")
        merge(tmp_path / "twice.yaml")


def test_what_is_null_is_not_given(run, tmp_path):
    code, _ = run(merge_method=None, parameters=None, models=[{"model": "expert0", "parameters": None}])
    assert code == 0
    assert json.loads((tmp_path / "out/merge.json").read_text())["method"] == "metagpt"


def test_yamls_own_ways_are_left(run):
    text = (
        "merge_method: ties\nbase_model: base\nparameters: {density: 1e-1}\n"
        "models:\n  - &one {model: expert0}\n  - {<<: *one, model: expert1}\n"
    )
    assert run(text)[0] == 0


# ---------------------------------------------------------------------------- places


def test_a_mended_recipe_may_use_the_folder_of_one_that_failed(run, tmp_path, family):
    state = load_file(family[SINGLE] / "model.safetensors")
    state["scale"] = torch.tensor(torch.inf)
    save_file(state, family[SINGLE] / "model.safetensors")
    code, error = run()
    assert code == 2 and "'scale' holds NaN or infinity" in error and not files(tmp_path / "out")
    assert run(allow_non_finite=True)[0] == 0


def test_another_finished_merge_is_told_and_stays(run, tmp_path):
    assert run()[0] == 0
    before = (tmp_path / "out/model/model.safetensors").read_bytes()
    code, error = run(merge_method="linear")
    assert code == 2 and "holds the result of another configuration; choose another --out" in error
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == before


def test_outputs_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "inside").symlink_to("expert0")
    for out in ("file", "loop", "nowhere", "file/deeper"):
        refused("is not a folder; choose another out", out=out)
        refused("is not a folder; choose another out", out=out, words=["--plan"])
    for out in ("expert0", "expert0/x", "inside/x", "base/../expert0/x"):
        refused("lies inside the input", out=out)
    shutil.move(tmp_path / "expert2", tmp_path / "run/model/e")
    refused("would replace the input", out="run", models=[{"model": "run/model/e"}])


def test_a_folder_that_is_no_merge_is_not_replaced(family, tmp_path):
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model/galenic.json").write_text('{"made_by": "galenic 0 sft"}')
    recipe = {"base_model": str(family[0]), "models": [{"model": str(family[1])}]}
    with pytest.raises(UserError, match="no merge of ours"):
        merge(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == ["model/galenic.json"]


def test_the_same_model_twice(refused, run, tmp_path):
    (tmp_path / "link").symlink_to("expert0")
    for other in ("expert0", "expert0/", "./expert0", "base/../expert0", "link", str(tmp_path / "expert0")):
        refused("is models[0] already", models=[{"model": "expert0"}, {"model": other, "name": "o"}])
    (tmp_path / "link2").symlink_to("base")
    refused("at least one expert is needed besides the base", models=[{"model": "link2"}])
    shutil.copytree(tmp_path / "expert0", tmp_path / "copy")
    assert run(models=[{"model": "expert0"}, {"model": "expert1"}, {"model": "copy"}])[0] == 0
    (warning,) = json.loads((tmp_path / "out/merge.json").read_text())["warnings"]
    assert warning.startswith("'copy' and 'expert0' hold the same weights")


def test_models_that_are_no_folders(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "x.gguf").mkdir()
    refused("is a file; name the folder", models=[{"model": "expert0/model.safetensors"}])
    refused("no such file or folder", models=[{"model": "loop"}])
    refused("no such file or folder", base_model="loop")
    refused("x.gguf: not a file", base_model="x.gguf")
    refused("org/nothing: no such folder, and as a Hub id", base_model="org/nothing")
    refused("org/nothing@v1: no such folder, and as a Hub id", models=[{"model": "org/nothing@v1"}])


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "NOTICE.txt"]
)
@pytest.mark.parametrize("kind", ["loop", "dangling", "pipe"])
def test_names_that_are_no_files(refused, family, name, kind):
    path = family[0] / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(name if kind == "loop" else "gone")
    refused(f"base/{name}: {'not a file' if kind == 'pipe' else 'a link that leads to no file'}")


@pytest.mark.parametrize("name", [INDEX, "model-00002-of-00002.safetensors"])
def test_links_of_shards(refused, run, family, tmp_path, name):
    path = family[SHARDED] / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(name)
    refused(f"expert1/{name}: a link that leads to no file")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")  # as in the Hub's cache
    assert run()[0] == 0


def test_a_shard_that_the_index_forgets(refused, run, family, tmp_path):
    path = family[SHARDED] / INDEX
    whole = json.loads(path.read_text())["weight_map"]
    part = {name: file for name, file in whole.items() if "00001" in file}
    path.write_text(json.dumps({"weight_map": part}))
    refused("model-00002-of-00002.safetensors: model.safetensors.index.json places nothing in this shard")
    (family[SHARDED] / "model-00002-of-00002.safetensors").unlink()
    refused("expert1: not the tensors of base: lacks 'model.embed_tokens.weight'")


def test_other_files_beside_shards_are_left_alone(run, family, tmp_path):
    for name in ("model.safetensors", "consolidated.safetensors", "model.fp16-00001-of-00002.safetensors"):
        (family[SHARDED] / name).write_bytes(b"not looked at")
    assert run()[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"weight_map": {', '"weight_map": {"scale": "x.safetensors", '), "twice"),
        (lambda text: text.replace("model-00001", "a" * 5000, 1), "File name too long"),
        (lambda text: text.replace("model-00001", "a\\u0000", 1), "missing, but"),
        (lambda text: text.replace("model-00001", "\\ud800", 1), "missing, but"),
        (lambda text: text.replace("model-00001", "..\\\\base\\\\model", 1), "missing, but"),
        (lambda text: "[]", "has no weight_map"),
    ],
)
def test_indexes(refused, family, change, message):
    path = family[SHARDED] / INDEX
    path.write_text(change(path.read_text()))
    refused(message)


def test_the_index_of_another_folder(refused, family):
    shutil.copy(family[SHARDED] / INDEX, family[SINGLE])
    refused("expert0/model-00001-of-00002.safetensors: missing")


def header_of(path):
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: b"", "malformed safetensors header"),
        (lambda text: b"\xef\xbb\xbf" + text, "Unexpected UTF-8 BOM"),
        (lambda text: text.decode().encode("utf-16"), "malformed safetensors header"),
        (lambda text: text[:-1] + b', "scale": {}}', "the key 'scale' stands twice"),
        (
            lambda text: text.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtype": "I32"', 1),
            "'dtype' stands twice",
        ),
        (lambda text: text[:-1] + b', "__metadata__": 3}', "stands twice"),
        (lambda text: text.replace(b'{"format": "pt"}', b"3"), "__metadata__ is not a mapping"),
        (lambda text: text.replace(b'"scale"', b'"\\ud800"'), "surrogates not allowed"),
        (lambda text: text.replace(b'"scale"', b'"lm_head.weight "'), "lacks 'scale'"),
    ],
)
def test_headers(refused, family, change, message):
    path = family[SINGLE] / "model.safetensors"
    header, data = header_of(path)
    text = change(json.dumps(header).encode())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused(message)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8])
def test_header_lengths(refused, family, length):
    path = family[SINGLE] / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(f"header of {length} bytes")


def test_configs_that_say_nothing_sensible(refused, run, family):
    for text, message in [
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ]:
        (family[0] / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(message)
    for folder in family:
        (folder / "config.json").write_text('{"vocab_size": [1], "text_config": [2], "architectures": 3}')
    assert run()[0] == 0


# ---------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    "method", ["metagpt", "ties", "della", "breadcrumbs", "tsv", "model_stock", "sce", "linear"]
)
def test_odd_names_and_shapes_are_merged(states, write, tmp_path, method):
    base, experts = states(experts=2)
    names = [
        "",
        " ",
        "new\nline",
        "模型.权重",
        "😀",
        "a/../../b",
        "x" * 5000,
        "<script>alert(1)</script>",
        "0",
    ]
    for shift, state in enumerate([base, *experts]):
        state |= {name: torch.full((3,), 1.0 + shift) for name in names}
        state |= {"no elements": torch.zeros(0, 4), "no dimensions": torch.tensor(1.0 + shift)}
    folders = [write(tmp_path / f"m{i}", state) for i, state in enumerate([base, *experts])]
    recipe = {"merge_method": method, "base_model": str(folders[0])}
    out = merge(recipe | {"models": [{"model": str(f)} for f in folders[1:]]}, tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in base.items()}
    assert all(torch.isfinite(value).all() for value in found.values())
    assert "<script>alert" not in (tmp_path / "out/merge-report.html").read_text()


@pytest.mark.parametrize("method", ["metagpt", "ties", "linear"])
@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.arange(3)])
def test_nothing_to_merge(refused, family, method, tensor):
    for folder in family[:2]:
        save_file({"w": tensor}, folder / "model.safetensors")
    refused("there is nothing to merge", merge_method=method, models=[{"model": "expert0"}])
    with pytest.raises(UserError, match="there is nothing to merge"):
        merge_state_dicts({"w": tensor}, [{"w": tensor}], method)


@pytest.mark.parametrize(
    ("base", "expert", "dtype", "expected"),
    [
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.float32, None, torch.bfloat16),
        (torch.bfloat16, torch.float16, "float32", torch.float32),
    ],
)
def test_mixed_precision_and_what_the_plan_says_of_it(
    run, states, write, tmp_path, capsys, base, expert, dtype, expected
):
    origin, [own] = states(experts=1)
    write(tmp_path / "a", {name: value.to(base) for name, value in origin.items()})
    write(tmp_path / "b", {name: value.to(expert) for name, value in own.items()})
    changes = {"base_model": "a", "models": [{"model": "b"}]} | ({"dtype": dtype} if dtype else {})
    capsys.readouterr()
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(changes | {"out": "out"}))
    assert main(["merge", "--config", "plan.yaml", "--plan"]) == 0
    told = capsys.readouterr().out
    assert f"data types         {str(expected).removeprefix('torch.')}\n" in told
    assert run(**changes)[0] == 0
    found = load_file(tmp_path / "out/model/model.safetensors")
    assert {value.dtype for value in found.values()} == {expected}
    # With one expert metagpt gives that expert, rounded once.
    assert all(torch.equal(value, own[name].to(expert).to(expected)) for name, value in found.items())


def test_buffers_that_differ_are_named(refused, family):
    for place in (0, 1, 3):
        state = load_file(family[place] / "model.safetensors")
        state["mask"] = torch.tensor([True, place != 3])
        save_file(state, family[place] / "model.safetensors")
    refused("expert2: buffer 'mask' differs", models=[{"model": "expert0"}, {"model": "expert2"}])


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_ties", "breadcrumbs", "della", "sce", "model_stock", "tsv"]
)
def test_experts_that_equal_the_base_give_the_base(run, tmp_path, family, method):
    for folder in family[1:]:
        shutil.rmtree(folder)
        shutil.copytree(family[0], folder)
    assert run(merge_method=method)[0] == 0
    base, found = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out/model"))
    assert all(torch.equal(base[name], found[name]) for name in base)
    first, *_ = json.loads((tmp_path / "out/merge.json").read_text())["warnings"]
    assert first == "every expert equals the base: all task vectors are zero"


# ---------------------------------------------------------------------------- tied heads


def tie(folders, tied=True):
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))


@pytest.mark.parametrize("place", [(0, 0), (39, 23)])
def test_a_head_that_is_no_copy_of_its_embedding_is_not_left_out(refused, run, family, place):
    for folder in family:
        for file in folder.glob("*.safetensors"):
            state = load_file(file)
            state.pop("lm_head.weight", None)
            save_file(state, file, metadata={"format": "pt"})
    (family[SHARDED] / INDEX).unlink()
    shutil.rmtree(family[SHARDED])
    tie(family[:2])
    models = [{"model": "expert0"}]
    state = load_file(family[SINGLE] / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][place] += 1
    save_file(state, family[SINGLE] / "model.safetensors")
    refused("expert0: 'lm_head.weight' is no copy of the input embedding", models=models)
    assert run(models=models, words=["--plan"])[0] == 0  # a plan reads headers alone
    state["lm_head.weight"][place] = state["model.embed_tokens.weight"][place]
    save_file(state, family[SINGLE] / "model.safetensors")
    assert run(models=models)[0] == 0


def test_what_is_remembered_knows_which_heads_were_left_out(run, tmp_path, family):
    for folder in (family[0], family[1]):
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors")
    for out, tied in [("a", True), ("b", False), ("c", True)]:
        tie(family[:2], tied)
        assert run(out=out, models=[{"model": "expert0"}])[0] == 0
    norms = [json.loads((tmp_path / out / "merge.json").read_text())["norms"]["expert0"] for out in "abc"]
    assert norms[0] == norms[2] < norms[1]


# ---------------------------------------------------------------------------- the disk


def test_too_little_space_is_found_before_a_weight_is_read(refused, run, capsys, monkeypatch, tmp_path):
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=16_000))
    monkeypatch.setattr("galenic.merge.engine.measure", None)  # would be the first pass
    refused("out: no space left on device: 996B more are needed")
    (tmp_path / "plan.yaml").write_text("base_model: base\nmodels: [{model: expert0}]\nout: out\n")
    assert main(["merge", "--config", "plan.yaml", "--plan"]) == 0
    assert "17kB, but 996B of disk space are missing for it" in capsys.readouterr().out
    monkeypatch.undo()


def test_a_file_that_changes_while_it_is_merged(family, tmp_path, monkeypatch):
    real = sys.modules["galenic.merge.writer"].Writer.close
    file = family[SINGLE] / "model.safetensors"

    def close(writer):
        os.utime(file, ns=(0, 0))
        real(writer)

    monkeypatch.setattr("galenic.merge.writer.Writer.close", close)
    recipe = {"base_model": str(family[0]), "models": [{"model": str(f)} for f in family[1:]]}
    with pytest.raises(UserError, match=r"expert0/model.safetensors: changed while it was merged"):
        merge(recipe, tmp_path / "out")
    assert not files(tmp_path / "out")


# ---------------------------------------------------------------------------- the result


def test_the_result_names_its_parents_and_counts_its_bytes(run, family, tmp_path, monkeypatch):
    real = sys.modules["galenic.merge.writer"].safetensors_writer
    monkeypatch.setattr(
        "galenic.merge.writer.safetensors_writer", lambda folder, tensors: real(folder, tensors, 8000)
    )
    assert run()[0] == 0
    model = tmp_path / "out/model"
    index = json.loads((model / INDEX).read_text())
    headers = [header_of(file) for file in sorted(model.glob("*.safetensors"))]
    assert len(headers) > 1 and sorted(index["weight_map"]) == sorted(
        name for header, _ in headers for name in header if name != "__metadata__"
    )
    assert (
        index["metadata"]["total_size"]
        == sum(len(data) for _, data in headers)
        == 4 * (2 * 960 + 72 * 24 + 576 + 25)
    )
    record = json.loads((model / "galenic.json").read_text())
    names = [f"{tmp_path.name}/{folder.name}" for folder in family]
    assert yaml.safe_load((model / "README.md").read_text().split("---\n")[1])["base_model"] == names
    assert record["parents"] == names
    assert [(row["model"], row["file"]) for row in record["inputs"]] == [
        (name, file.name)
        for name, folder in zip(names, family, strict=True)
        for file in sorted(folder.glob("*.safetensors"))
    ]
    assert all(len(row["identity"]) == 64 for row in record["inputs"])
    assert {row["file"]: row["bytes"] for row in record["inputs"]}["model-00001-of-00002.safetensors"] == (
        family[SHARDED] / "model-00001-of-00002.safetensors"
    ).stat().st_size
    assert record["merge"] == json.loads((tmp_path / "out/merge.json").read_text())


def test_folders_that_may_not_be_listed(refused, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, *how, **more: not str(path).endswith("expert0") and real(path, *how, **more),
    )
    refused("expert0: permission denied", models=[{"model": "expert0"}])
