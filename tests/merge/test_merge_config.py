import pytest

from galenic.cli import parse_config
from galenic.merge.config import MergeConfig, MergeModel, MergeParameters, MethodParameters
from galenic.runtime import UserError


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
        ("metagpt", ["a", "b"], {"density": 0.5}, "parameters.density: metagpt keeps every entry"),
        ("metagpt", ["a", "b"], {"weight": 0.5}, "parameters.weight: metagpt takes its coefficients"),
        ("task_arithmetic", ["a"], {"density": 0.5}, "keeps every entry"),
        ("ties", ["a"], {"density": 0.0}, r"0.0 is not in \(0, 1\]"),
        ("ties", ["a"], {"density": 1.5}, r"1.5 is not in \(0, 1\]"),
        ("dare_linear", ["a"], {"density": float("nan")}, r"nan is not in \(0, 1\]"),
        ("linear", ["a", "b"], {"weight": 0.0}, "divides by their sum, which is 0"),
        ("ties", ["a", "b"], {"weight": -1.0}, "must be >= 0"),
        ("task_arithmetic", ["a"], {"weight": float("inf")}, "not a finite number"),
        ("ties", ["a"], {"scope": "layer"}, "parameters.scope: is for merge_method: metagpt"),
        ("metagpt", ["a", "b"], {"max_coefficient": 0.4}, r"0.4 is not in \[1/2, 1\]"),
        ("metagpt", ["a", "b"], {"norm_power": float("nan")}, "not a finite number"),
        ("metagpt", ["a", "b"], {"norms": "after_trim"}, "parameters.trim is not set"),
        ("dare_ties", ["a", "b"], {"weight": -1.0}, "dare_ties takes a weighted mean"),
        ("metagpt", [], {}, "at least one expert"),
        ("metagpt", ["a", "./a/"], {}, r"models\[1\].model: ./a/ is models\[0\] already"),
        ("metagpt", ["x/a", "y/a"], {}, "'a' is the name of"),
        ("metagpt", ["a", "base"], {}, "is the base_model"),
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
    for change in ({"slices": []}, {"merge_method": "slerp"}, {"models": [{"model": "a", "wieght": 1}]}):
        with pytest.raises(UserError):
            parse_config("merge", recipe | change)
