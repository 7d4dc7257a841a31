import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from galenic.merge import gram, merge
from galenic.merge.adapters import Adapter, adapter_gram, factor_inner_product, is_adapter
from galenic.merge.io import StateDict
from galenic.runtime import UserError

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.q.weight": (6, 6),
    "model.layers.0.up.weight": (700, 1100),
    "model.layers.1.q.weight": (6, 6),
    "model.layers.0.q.bias": (6,),
    "model.norm.weight": (6,),
    "lm_head.weight": (11, 6),
}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "init_lora_weights": True}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_state(dtype=torch.bfloat16):
    return {name: (0.1 * random(*shape, seed=i)).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def lora(module, rank=2, seed=0, transposed=False):
    rows, columns = SHAPES[f"{module}.weight"]
    rows, columns = (columns, rows) if transposed else (rows, columns)
    return {
        f"base_model.model.{module}.lora_A.weight": 0.1 * random(rank, columns, seed=seed),
        f"base_model.model.{module}.lora_B.weight": 0.1 * random(rows, rank, seed=seed + 1),
    }


def lora_embedding(seed=0):
    rows, width = SHAPES["model.embed_tokens.weight"]
    return {
        "base_model.model.model.embed_tokens.lora_embedding_A": random(2, rows, seed=seed),
        "base_model.model.model.embed_tokens.lora_embedding_B": random(width, 2, seed=seed + 1),
    }


def write_adapter(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def dense(view):
    return {
        name: view.read(name, 0, info.numel).view(info.shape).double() for name, info in view.tensors.items()
    }


def product(tensors, module):
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return b @ a


@pytest.fixture
def opened(tmp_path):
    def build(tensors, base=None, **settings):
        folder = write_adapter(tmp_path / "adapter", tensors, **settings)
        return Adapter(folder, StateDict(base or base_state(), "base"), "adapter")

    return build


# ---------------------------------------------------------------------------- what PEFT means


def test_an_update_is_alpha_over_r_times_b_a(opened):
    tensors = lora("model.layers.0.q") | lora("model.layers.0.up", seed=5)
    values, base = dense(opened(tensors)), base_state()
    for name in SHAPES:
        module = name.removesuffix(".weight")
        adapted = module in ("model.layers.0.q", "model.layers.0.up") and name.endswith("weight")
        update = 3.0 * product(tensors, module) if adapted else 0
        torch.testing.assert_close(values[name], base[name].double() + update, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"q": 10}}, 5.0),
        ({"alpha_pattern": {"layers.1.q": 10}}, 3.0),
        ({"alpha_pattern": {r"layers\.\d+\.q": 8, "q": 10}}, 4.0),
        ({"rank_pattern": {"0.q": 2}, "r": 16}, 3.0),
        ({"alpha_pattern": {"ers.0.q": 10}}, 3.0),  # patterns match from a dot on
    ],
)
def test_scales_of_modules(opened, settings, scale):
    tensors = lora("model.layers.0.q")
    update = dense(opened(tensors, **settings))["model.layers.0.q.weight"]
    update = update - base_state()["model.layers.0.q.weight"].double()
    torch.testing.assert_close(update, scale * product(tensors, "model.layers.0.q"), rtol=1e-9, atol=1e-12)


def test_transposed_layers_and_embeddings_add_the_transpose(opened):
    tensors = lora("model.layers.0.up", transposed=True)
    update = dense(opened(tensors, fan_in_fan_out=True))["model.layers.0.up.weight"]
    expected = base_state()["model.layers.0.up.weight"].double() + 3 * product(tensors, "model.layers.0.up").T
    torch.testing.assert_close(update, expected)
    tensors = lora_embedding()
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{x}"].double() for x in "AB")
    update = dense(opened(tensors))["model.embed_tokens.weight"]
    torch.testing.assert_close(update, base_state()["model.embed_tokens.weight"].double() + 3 * (b @ a).T)


def test_whole_tensors_stand_instead_of_the_bases(opened):
    head, bias = random(11, 6, seed=50), random(6, seed=51)
    tensors = lora("model.layers.0.q") | {
        "base_model.model.lm_head.weight": head,
        "base_model.model.model.layers.0.q.bias": bias,
    }
    adapter = opened(tensors, modules_to_save=["lm_head"], bias="all")
    values = dense(adapter)
    assert torch.equal(values["lm_head.weight"], head.double())
    assert torch.equal(values["model.layers.0.q.bias"], bias.double())
    assert adapter.replaced == ["lm_head.weight", "model.layers.0.q.bias"]


def test_any_range_from_any_thread_is_that_of_the_whole(opened):
    adapter = opened(lora("model.layers.0.up"))
    name = "model.layers.0.up.weight"
    whole = dense(adapter)[name].flatten()
    ranges = [(i * 977 % 700_000, i * 977 % 700_000 + 13 * i) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for (start, stop), part in zip(
            ranges, pool.map(lambda r: adapter.read(name, *r), ranges), strict=True
        ):
            torch.testing.assert_close(part, whole[start:stop], rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------- norms


class Counting(StateDict):
    def __init__(self, state, label):
        super().__init__(state, label)
        self.names = set()

    def read(self, name, start, stop):
        self.names.add(name)
        return super().read(name, start, stop)


def test_inner_products_of_factors_are_those_of_the_matrices():
    left, right = random(30, 3, seed=1).double(), random(3, 20, seed=2).double()
    other_left, other_right = random(30, 5, seed=3).double(), random(5, 20, seed=4).double()
    expected = float(((left @ right) * (other_left @ other_right)).sum())
    assert factor_inner_product(left, right, other_left, other_right) == pytest.approx(expected, rel=1e-12)


def test_gram_of_adapters_equals_that_of_the_models_and_reads_only_what_is_replaced(tmp_path):
    base = Counting(base_state(torch.float32), "base")
    parts = [
        lora("model.layers.0.q") | lora("model.layers.0.up", seed=9),
        lora("model.layers.0.q", seed=20) | lora_embedding(seed=3),
        lora("model.layers.1.q", seed=30) | {"base_model.model.lm_head.weight": random(11, 6, seed=8)},
    ]
    adapters = [Adapter(write_adapter(tmp_path / str(i), p), base, str(i)) for i, p in enumerate(parts)]
    found = adapter_gram(base, adapters)
    assert base.names == {"lm_head.weight"}
    expected = gram(base_state(torch.float64), [dense(adapter) for adapter in adapters])
    assert list(found) == list(expected)
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, rtol=1e-6, atol=1e-10)


# ---------------------------------------------------------------------------- whole merges


@pytest.fixture
def folders(tmp_path, write):
    base = write(tmp_path / "base", base_state(), config={"model_type": "llama", "dtype": "bfloat16"})
    first = write_adapter(tmp_path / "first", lora("model.layers.0.q") | lora("model.layers.0.up", seed=3))
    second = write_adapter(tmp_path / "second", lora("model.layers.1.q", seed=7), use_rslora=True)
    whole = {name: (tensor.double() + 0.01).to(torch.bfloat16) for name, tensor in base_state().items()}
    full = write(tmp_path / "full", whole, config={"model_type": "llama", "dtype": "bfloat16"})
    return base, first, second, full


@pytest.mark.parametrize("method", ["metagpt", "task_arithmetic", "ties", "dare_ties"])
def test_adapters_merge_like_the_models_they_make(folders, tmp_path, write, method):
    base, *experts = folders
    recipe = {"merge_method": method, "base_model": str(base)}
    out = merge(recipe | {"models": [{"model": str(folder)} for folder in experts]}, tmp_path / "out")
    made = []
    for folder in experts[:2]:
        adapter = Adapter(folder, StateDict(base_state(), "base"), folder.name)
        made.append(write(tmp_path / "made" / folder.name, dense(adapter), config={"model_type": "llama"}))
    models = [{"model": str(folder)} for folder in (*made, experts[2])]
    same = merge(recipe | {"models": models}, tmp_path / "same")
    merged, expected = load_file(out / "model.safetensors"), load_file(same / "model.safetensors")
    assert merged["lm_head.weight"].dtype == torch.bfloat16
    for name in SHAPES:
        # The same numbers up to the last bits of float64 before the one rounding.
        different = merged[name] != expected[name]
        assert different.sum() <= 1e-4 * merged[name].numel()
    norms = json.loads((tmp_path / "out" / "merge.json").read_text())["norms"]
    assert norms == pytest.approx(json.loads((tmp_path / "same" / "merge.json").read_text())["norms"])


def test_an_adapter_on_another_model_than_the_base(folders, tmp_path):
    base, first, second, full = folders
    models = [{"model": f"{full}+{first}"}, {"model": f"{base}+{second}"}]
    recipe = {"merge_method": "linear", "base_model": str(base), "models": models}
    out = merge(recipe, tmp_path / "out")
    bases = {folder: load_file(folder / "model.safetensors") for folder in (base, full)}
    expected = [
        dense(Adapter(first, StateDict(bases[full], "full"), "first")),
        dense(Adapter(second, StateDict(bases[base], "base"), "second")),
    ]
    merged = load_file(out / "model.safetensors")
    for name in SHAPES:
        mean = (expected[0][name] + expected[1][name]) / 2
        torch.testing.assert_close(merged[name].double(), mean, rtol=2**-8, atol=1e-6)
    provenance = json.loads((out / "galenic.json").read_text())
    assert [parent.split("/")[-1] for parent in provenance["parents"]] == ["base", "full", "first", "second"]


def test_the_files_of_an_adapters_own_base_count(folders, tmp_path, monkeypatch):
    """The same adapter on two models is two experts: nothing remembered of one is the other's."""
    monkeypatch.setenv("GALENIC_CACHE", str(tmp_path / "cache"))
    base, first, _, full = folders
    other = tmp_path / "other"
    shutil.copytree(full, other)
    state = load_file(other / "model.safetensors")
    save_file({name: 2 * value for name, value in state.items()}, other / "model.safetensors")
    norms = []
    for model in (full, other):
        models = [{"model": f"{model}+{first}", "name": "x"}]
        out = merge({"base_model": str(base), "models": models}, tmp_path / f"out-{model.name}")
        norms.append(json.loads((out.parent / "merge.json").read_text())["norms"]["x"])
        record = json.loads((out / "galenic.json").read_text())
        assert [row["file"] for row in record["inputs"]] == [
            "model.safetensors",
            "adapter_config.json",
            "adapter_model.safetensors",
            "model.safetensors",
        ]
        assert str(tmp_path) not in json.dumps(record)
    assert norms[1] > 1.5 * norms[0]


def test_a_model_that_is_an_adapter_is_refused(folders, tmp_path):
    base, first, second, _ = folders
    for recipe in (
        {"base_model": str(first), "models": [{"model": str(base)}]},
        {"base_model": str(base), "models": [{"model": f"{first}+{second}"}]},
    ):
        with pytest.raises(UserError, match="is a LoRA adapter; here a whole model is needed"):
            merge(recipe, tmp_path / "out")
    (first / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors in it"):
        merge({"base_model": str(base), "models": [{"model": str(first)}]}, tmp_path / "out")


def test_what_is_an_adapter(folders, tmp_path):
    base, first, *_ = folders
    assert is_adapter(first) and not is_adapter(base)
    (base / "adapter_config.json").write_text("{}")
    assert not is_adapter(base)


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"use_dora": True}, "use_dora is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changed the base's weights"),
        ({"r": 0}, "r is 0; it is a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e\\+300; it is a positive number"),
        ({"lora_alpha": 10**400}, "it is a positive number"),
        ({"alpha_pattern": {"q": float("inf")}}, "maps names to positive numbers"),
        ({"rank_pattern": {"q": True}}, "maps names to positive numbers"),
        ({"r": 4}, r"with rank 4 do not make an update of 'model.layers.0.q.weight'"),
        ({"rank_pattern": {"q": 8}}, "with rank 8"),
        ({"alpha_pattern": {"(": 8}}, "is not a regular expression"),
        ({"alpha_pattern": [3]}, "maps names to positive numbers"),
    ],
)
def test_settings_that_are_not_understood_are_refused(opened, settings, message):
    with pytest.raises(UserError, match=message):
        opened(lora("model.layers.0.q"), **settings)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.model.layers.7.q.lora_A.weight": torch.zeros(2, 6)}, "which base lacks"),
        ({"base_model.model.model.layers.0.q.lora_A.weight": torch.zeros(2, 6)}, "has A alone"),
        ({"base_model.model.model.layers.0.q.lora_magnitude_vector": torch.zeros(6)}, "not understood"),
        ({"base_model.model.model.layers.0.q.lora_B.bias": torch.zeros(6)}, "not understood"),
        ({"base_model.model.lm_head.weight": torch.zeros(12, 6)}, "keep the base's shapes"),
        (
            {"base_model.model.score.weight": torch.zeros(12, 6)},
            "belongs to 'score.weight', which base lacks",
        ),
        (lora("model.layers.0.up", transposed=True), "do not make an update"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(opened, tensors, message):
    with pytest.raises(UserError, match=message):
        opened(tensors)


def test_an_adapter_of_a_tied_head_says_so(opened):
    base = {name: tensor for name, tensor in base_state().items() if name != "lm_head.weight"}
    with pytest.raises(UserError, match="stores it tied to its embedding"):
        opened(lora("lm_head"), base=base)


def test_not_finite_factors_and_pickled_ones_are_refused(opened, tmp_path):
    tensors = lora("model.layers.0.q")
    tensors["base_model.model.model.layers.0.q.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(UserError, match=r"lora_B.weight' holds NaN or infinity"):
        opened(tensors).factors("model.layers.0.q.weight")
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="never loaded"):
        Adapter(folder, StateDict(base_state(), "base"), "pickled")
