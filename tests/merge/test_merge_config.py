import copy
from pathlib import Path

import pytest
import yaml

from galenic.cli import parse_config
from galenic.merge.config import MergeConfig, MergeModel, MergeParameters, MethodParameters
from galenic.runtime import UserError

RECIPES = Path(__file__).parents[2] / "recipes" / "merging"


def config(method="task_arithmetic", models=("a", "b"), **changes):
    models = [m if isinstance(m, MergeModel) else MergeModel(model=m) for m in models]
    return MergeConfig(out="out", merge_method=method, base_model="base", models=models, **changes)


def test_defaults_are_the_papers():
    assert config().weights() == [0.3, 0.3]
    assert config("linear").weights() == config("ties").weights() == [1.0, 1.0]
    assert config("ties").densities() == config("dare_linear").densities() == [0.55, 0.55]


def test_a_models_own_numbers_win():
    own = MergeModel(model="a", parameters=MergeParameters(weight=0.7, density=0.2))
    both = config("ties", [own, "b"], parameters=MethodParameters(weight=0.1, density=0.9))
    assert both.weights() == [0.7, 0.1] and both.densities() == [0.2, 0.9]


@pytest.mark.parametrize(
    ("method", "models", "parameters", "message"),
    [
        (
            "metagpt",
            ["a", "b"],
            {"density": 0.5},
            "density: is for ties, .*not metagpt: it keeps every entry",
        ),
        (
            "metagpt",
            ["a", "b"],
            {"weight": 0.5},
            "parameters.weight: is for linear, .*it takes its coefficients",
        ),
        ("task_arithmetic", ["a"], {"density": 0.5}, "density: is for ties.*not task_arithmetic"),
        ("ties", ["a"], {"density": 0.0}, r"0.0 is not in \(0, 1\]"),
        ("ties", ["a"], {"density": 1.5}, r"1.5 is not in \(0, 1\]"),
        ("dare_linear", ["a"], {"density": float("nan")}, "nan is not a finite number"),
        ("linear", ["a", "b"], {"weight": 0.0}, "divides by their sum, which is 0"),
        ("ties", ["a", "b"], {"weight": -1.0}, "must be >= 0"),
        ("task_arithmetic", ["a"], {"weight": float("inf")}, "not a finite number"),
        ("ties", ["a"], {"scope": "layer"}, "parameters.scope: is for metagpt, not ties"),
        ("metagpt", ["a", "b"], {"max_coefficient": 0.4}, r"0.4 is not in \[1/2, 1\]"),
        ("metagpt", ["a", "b"], {"norm_power": float("nan")}, "not a finite number"),
        ("metagpt", ["a", "b"], {"norms": "after_trim"}, "parameters.trim is not set"),
        ("dare_ties", ["a", "b"], {"weight": -1.0}, "dare_ties takes a weighted mean"),
        ("metagpt", [], {}, "at least one expert"),
        ("metagpt", ["a", "./a/"], {}, r"models\[1\].model: ./a/ is models\[0\] already"),
        ("metagpt", ["x/a", "y/a"], {}, "'a' is the name of"),
        ("metagpt", ["base"], {}, "at least one expert is needed besides the base"),
        ("slerp", ["a", "b"], {}, "slerp goes from the base to one model; 2"),
        ("slerp", ["a"], {"t": 1.5}, r"t: 1.5 is not in \[0, 1\]"),
        ("model_stock", ["a"], {}, "give two or more"),
        ("breadcrumbs", ["a"], {"gamma": 1.0}, r"gamma: 1.0 is not in \[0, 1\)"),
        ("ties", ["a"], {"gamma": 0.1}, "gamma: is for breadcrumbs, not ties"),
        ("della", ["a"], {"density": 0.9, "epsilon": 0.2}, "epsilon are probabilities"),
        ("della", ["a"], {"density": 0.1, "epsilon": 0.1}, "epsilon are probabilities"),
        ("sce", ["a"], {"select_topk": 0.0}, r"select_topk: 0.0 is not in \(0, 1\]"),
        ("sce", ["a"], {"weight": 1.0}, "weight: is for linear"),
        ("model_stock", ["a", "b"], {"normalize": True}, "normalize: is for linear"),
    ],
)
def test_contradictions_are_refused(method, models, parameters, message):
    with pytest.raises(UserError, match=message):
        config(method, models, parameters=MethodParameters(**parameters))


def test_names_come_from_folders():
    models = ["run/41-sft-medical/model", "x/code", MergeModel(model="y/code", name="mine")]
    assert config(models=models).names() == ["41-sft-medical", "code", "mine"]


def test_linear_may_average_the_base_in():
    assert config("linear", ["a", "base"]).weights() == [1.0, 1.0]


def test_mergekits_yaml_is_understood_and_the_rest_refused():
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.5, "density": 0.4}}, {"model": "b"}],
        "parameters": {"density": 0.6},
        "dtype": "bfloat16",
        "out": "out",
    }
    parsed, _ = parse_config("merge", recipe)
    assert parsed.weights() == [0.5, 1.0] and parsed.densities() == [0.4, 0.6] and parsed.dtype == "bfloat16"


REFUSED = {
    "slices": [{"sources": []}],
    "modules": {},
    "chat_template": "auto",
    "merge_method": "karcher",
    "dtype": "float8_e4m3fn",
    "out_dtype": "int8",
    "tokenizer_source": "union:b",
    "tokenizer": {"source": "base", "pad_to_multiple_of": 8},
    "models": [{"model": "a", "wieght": 1}],
    "parameters": {"int8_mask": True},
}


@pytest.mark.parametrize("key", REFUSED)
def test_the_rest_of_mergekits_schema_is_refused_by_name(key):
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}], "out": "out"}
    with pytest.raises(UserError) as refused:
        parse_config("merge", recipe | {key: REFUSED[key]})
    word = {"tokenizer": "pad_to_multiple_of", "models": "wieght", "parameters": "int8_mask"}.get(key, key)
    assert word in str(refused.value)


@pytest.mark.parametrize("value", [[0, 1], [{"filter": "mlp", "value": 0.5}, {"value": 1}]])
def test_gradients_and_filters_are_refused(value):
    recipe = {"merge_method": "ties", "base_model": "base", "out": "out"}
    with pytest.raises(UserError, match="weight"):
        parse_config("merge", recipe | {"models": [{"model": "a", "parameters": {"weight": value}}]})


def test_mergekits_other_words(tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a"}],
        "parameters": {"lambda": 0.5, "normalize": True},
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "tokenizer_source": "base",
        "tokenizer": {"source": "base"},
        "out": "out",
    }
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump(recipe))
    parsed, _ = parse_config("merge", copy.deepcopy(recipe))
    from_file, _ = parse_config("merge", ["--config", str(file)])
    assert parsed == from_file
    assert parsed.scale == 0.5 and parsed.normalizes and parsed.output_dtype == "bfloat16"
    assert parsed.names() == ["a"]
    with pytest.raises(UserError, match="the same as scale"):
        parse_config("merge", recipe | {"parameters": {"lambda": 0.5, "scale": 1.0}})


def test_the_bases_own_parameters_are_refused():
    own = MergeModel(model="base", parameters=MergeParameters(weight=0.5))
    with pytest.raises(UserError, match=r"models\[0\].parameters: base is the base_model"):
        config("ties", [own, "a"])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_ready_recipes_are_understood(file):
    config, _ = parse_config("merge", ["--config", str(file), "--out", "merged"])
    assert config.out == "merged" and config.models


def test_there_are_ready_recipes():
    assert len(list(RECIPES.glob("*.yaml"))) >= 6
