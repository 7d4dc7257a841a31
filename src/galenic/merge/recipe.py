"""mergekit's recipes in our words: what is the same passes, what a merge does not do is refused by name.

Types and ranges are checked again when the config is made; here they are checked because a recipe written for mergekit
is where most of them come from, and the message should say what the recipe says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, get_args

from galenic.merge.config import MergeConfig, MergeModel, MergeParameters, Method, MethodParameters
from galenic.runtime import UserError, nearest

CLOSEST = {
    "della_linear": "della",
    "breadcrumbs_ties": "breadcrumbs",
    "nuslerp": "slerp",
    "multislerp": "slerp",
    "karcher": "slerp",
    "magnitude": "ties",
}
"""mergekit's methods that are not here -> the nearest in meaning; the names of others are compared by letters."""
WORDS = {
    "scope": ("global", "layer", "tensor"),
    "trim": ("ties", "dare"),
    "norms": ("before_trim", "after_trim"),
    "dtype": ("float32", "bfloat16", "float16"),
    "out_dtype": ("float32", "bfloat16", "float16"),
    "tokenizer_source": ("base", "union"),
    "tokenizer.source": ("base", "union"),
    "merge_method": get_args(Method),
}
"""Keys that take one of some words."""


def from_mergekit(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe in our words: `lambda` is `scale`, and a key that is null is left out.

    Raises:
        UserError: a key that no merge knows, a value of another kind than it takes, or both `lambda` and `scale`.
    """
    _check_keys("", recipe, [*(key.name for key in fields(MergeConfig)), "config", "plan"])
    found = {key: value for key, value in recipe.items() if value is not None}
    for key in ("merge_method", "dtype", "out_dtype", "tokenizer_source"):
        if key in found:
            _check_word(key, found[key])
    if "tokenizer" in found:
        found["tokenizer"] = _mapping("tokenizer", found["tokenizer"], ["source"])
        _check_word("tokenizer.source", found["tokenizer"].get("source"))
    if "parameters" in found:
        found["parameters"] = _numbers("parameters", found["parameters"], MethodParameters)
    if "models" in found:
        if not isinstance(found["models"], list):
            raise UserError("models: is not a list; write `- model: FOLDER` for every expert")
        found["models"] = [_model(f"models[{i}]", model) for i, model in enumerate(found["models"])]
    return found


def _model(place: str, model: Any) -> dict[str, Any]:
    if isinstance(model, str):
        raise UserError(f"{place}: is not a mapping; write `- model: {model}`")
    found = _mapping(place, model, [key.name for key in fields(MergeModel)])
    if not isinstance(found.get("model"), str):
        raise UserError(f"{place}.model: {found.get('model')!r} is not the name of a folder or Hub id")
    if "parameters" in found:
        found["parameters"] = _numbers(f"{place}.parameters", found["parameters"], MergeParameters)
    return found


def _numbers(place: str, values: Any, kind: type) -> dict[str, Any]:
    known = [key.name for key in fields(kind)]
    named = [*known, "lambda"] if "scale" in known else known
    found = _mapping(place, values, named)
    for key, value in found.items():
        if isinstance(value, list | dict):
            raise UserError(
                f"{place}.{key}: gradients (lists) and filters are not supported; give one value for the whole model"
            )
        if key in WORDS:
            _check_word(f"{place}.{key}", value)
        elif isinstance(value, bool) != (key == "normalize") or not _is_number(value):
            wanted = "true or false" if key == "normalize" else "a number"
            raise UserError(f"{place}.{key}: {value!r} is not {wanted}")
    if "lambda" in found:
        if "scale" in found:
            raise UserError(f"{place}.lambda: is the same as scale; give one of them")
        found["scale"] = found.pop("lambda")
    return found


def _is_number(value: Any) -> bool:
    # YAML 1.1 takes 1e-3 for a string.
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _mapping(place: str, value: Any, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: {value!r} is not a mapping; it takes {', '.join(known)}")
    _check_keys(f"{place}.", value, known)
    return {key: item for key, item in value.items() if item is not None}


def _check_keys(place: str, values: Mapping[Any, Any], known: Iterable[str]) -> None:
    for key in values:
        if str(key).split(".")[0] not in known:
            named = ", ".join(name for name in known if name not in ("config", "plan"))
            raise UserError(f"{place}{key}: not supported{nearest(str(key), known)}; known are {named}")


def _check_word(place: str, value: Any) -> None:
    key = place if place in WORDS else place.rsplit(".", 1)[-1]
    if value in WORDS[key]:
        return
    hint = nearest(str(value).lower().replace("-", "_"), WORDS[key])
    if key == "merge_method" and str(value) in CLOSEST:
        hint = f" (the nearest is '{CLOSEST[str(value)]}')"
    raise UserError(f"{place}: {value!r} is not supported{hint}; known are {', '.join(WORDS[key])}")
