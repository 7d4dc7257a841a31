"""What surrounds the weights of a Hugging Face folder: config, tokenizer, code, card."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from galenic import __version__
from galenic.merge.config import TAKES, MergeConfig, folder_label
from galenic.merge.io import is_there
from galenic.merge.vocabulary import difference, read_tokens
from galenic.report.model_card import Card, listed, render, split
from galenic.runtime import UserError, folder_name, read_json

COMPANIONS = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
"""Endings of the files that belong to a model and are copied from the base."""
NOT_COMPANIONS = ("galenic.json", "trainer_state.json", "adapter_config.json")
NOT_SETTINGS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Keys of config.json that do not say what the network computes."""


def companions(folder: Path) -> list[Path]:
    """Returns the files of a model folder that a merge copies, sorted: no weights, no card, no training state.

    Raises:
        UserError: one of them is a link that leads nowhere.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if (path.suffix in COMPANIONS or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")))
        and path.name not in NOT_COMPANIONS
        and not path.name.endswith(".index.json")
        and not path.is_dir()
        and is_there(path)
    ]


def missing_bytes(out: str | Path, needed: int) -> int:
    """Returns how many bytes a disk lacks for what is to be written in a folder; 0 if there are enough.

    What an earlier run has written of it already, which goes on or makes room, is not needed again.
    """
    out = Path(out)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    disk = shutil.disk_usage(there)
    begun = sum(file.stat().st_blocks * 512 for file in (out / ".model.partial").glob("*"))
    return max(0, needed - begun - disk.free) if disk.total else 0  # some file systems do not tell


def check_folders(base: Path, experts: Mapping[str, Path], matched: bool = False) -> list[str]:
    """Compares configs and vocabularies of the experts with the base's.

    Args:
        base: folder of the base.
        experts: name -> folder.
        matched: whether rows are matched by token, so that vocabularies may differ.

    Returns:
        Warnings about settings that differ; the output has the base's.

    Raises:
        UserError: another architecture, quantised weights, or a token that means another row of the embedding.
    """
    warnings = []
    config = json_if_there(base / "config.json")
    for folder in (base, *experts.values()):
        _refuse_quantised(folder)
    vocabulary = {} if matched else read_tokens(base)
    for name, folder in experts.items():
        other = json_if_there(folder / "config.json")
        for key in ("model_type", "architectures"):
            if key in config and key in other and config[key] != other[key]:
                raise UserError(
                    f"{folder / 'config.json'}: {key} is {other[key]}, the base's is {config[key]}"
                )
        settings = sorted(
            (set(config) | set(other)) - set(NOT_SETTINGS) - ({"vocab_size"} if matched else set())
        )
        if other and (different := [key for key in settings if config.get(key) != other.get(key)]):
            warnings.append(
                f"config.json of '{name}' differs from the base's in {', '.join(different)}; the base's is used"
            )
        tokens = {} if matched else read_tokens(folder)
        if vocabulary and not tokens:
            warnings.append(
                f"'{name}' has no tokenizer.json: its vocabulary could not be compared with the base's"
            )
        elif vocabulary and tokens != vocabulary:
            raise UserError(f"{folder / 'tokenizer.json'}: {difference(vocabulary, tokens)}")
    return warnings


def _refuse_quantised(folder: Path) -> None:
    """Refuses weights that mean nothing without scales or codebooks, as fp8 with scales, GPTQ or AWQ."""
    path = folder / "config.json"
    settings = json_if_there(path)
    inner = settings.get("text_config")
    found = settings.get("quantization_config") or (
        inner.get("quantization_config") if isinstance(inner, dict) else None
    )
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise UserError(
            f"{path}: the weights are quantised ({kind}); merge the model they were made from, or save it dequantised"
        )


def json_if_there(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if there is no file."""
    value = read_json(path) if is_there(path) else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


# ---------------------------------------------------------------------------- writing


def write_companions(
    config: MergeConfig,
    base: Path,
    folder: Path,
    summary: dict[str, Any],
    inputs: Sequence[dict[str, Any]],
    rows: int | None = None,
) -> None:
    """Writes everything but the weights into a merged model's folder.

    Args:
        config: of the merge.
        base: folder of the base.
        folder: receives the files.
        summary: what the statistics pass found.
        inputs: model, file, bytes and identity of every file that was read.
        rows: of the output's vocabulary, where they may be others than the base's.
    """
    for path in companions(base):
        shutil.copyfile(path, folder / path.name)
    settings = json_if_there(base / "config.json")
    if settings and config.output_dtype:
        key = "torch_dtype" if "torch_dtype" in settings else "dtype"
        settings[key] = config.output_dtype
    if settings and rows is not None:
        inner = settings.get("text_config")
        place = settings if "vocab_size" in settings or not isinstance(inner, dict) else inner
        place["vocab_size"] = rows
    if settings and (config.output_dtype or rows is not None):
        _dump(folder / "config.json", settings)
    recipe = recipe_yaml(config)
    (folder / "README.md").write_text(_card(config, base, recipe, summary), encoding="utf-8")
    _dump(
        folder / "galenic.json",
        {
            "made_by": f"galenic {__version__} merge",
            "parents": parents(config),
            "inputs": inputs,
            "recipe": recipe,
            "merge": summary,
        },
    )


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def recipe_yaml(config: MergeConfig) -> str:
    """Writes the recipe back as YAML, with the defaults that took effect and without the output folder."""
    each = {
        "weight": config.weights(),
        "density": config.densities(),
        "gamma": config.gammas(),
        "epsilon": config.epsilons(),
    }
    rows = []
    for index, model in enumerate(config.models):
        numbers = {key: values[index] for key, values in each.items() if _takes(config, key)}
        rows.append(
            {"model": "+".join(map(folder_name, model.paths())), "name": model.label()}
            | ({"parameters": numbers} if numbers else {})
        )
    recipe: dict[str, Any] = {
        "merge_method": config.merge_method,
        "base_model": folder_name(config.base_model),
        "models": rows,
    }
    own = {key: getattr(config.parameters, key) for key in TAKES if key not in each}
    if own := {key: value for key, value in own.items() if value is not None}:
        recipe["parameters"] = own
    if config.output_dtype:
        recipe["dtype"] = config.output_dtype
    if config.vocabulary:
        recipe["tokenizer"] = {"source": config.vocabulary}
    if config.allow_non_finite:
        recipe["allow_non_finite"] = True
    if config.draws:
        recipe["seed"] = config.seed
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _takes(config: MergeConfig, key: str) -> bool:
    return config.merge_method in TAKES[key] or (key == "density" and config.parameters.trim is not None)


def parents(config: MergeConfig) -> list[str]:
    """Returns the models a merge comes from, base first."""
    return list(dict.fromkeys(folder_name(path) for path in config.names_read()))


def _card(config: MergeConfig, base: Path, recipe: str, summary: dict[str, Any]) -> str:
    """Writes the model card: parents, coefficients, recipe, warnings."""
    # The Hub links parents by their ids, which have no revision.
    ids = [name if Path(name).exists() else name.split("@")[0] for name in parents(config)]
    rows = [
        f"| {name} | {summary['norms'][name]:.4g} | {summary['coefficients'][name]:.4f} |"
        for name in config.names()
    ]
    return render(
        Card(
            title=f"Merge of {', '.join(config.names())}",
            description=f"Made by galenic {__version__} with `{config.merge_method}` from the base "
            f"`{folder_label(config.base_model)}`. Its config and tokenizer are the base's.",
            licence=_licence(base),
            pipeline="text-generation",
            parents=ids,
            relation="merge",
            tags=["merge", "galenic"],
            sections=[
                (
                    "Experts",
                    "\n".join(["| expert | norm of task vector | coefficient |", "|---|--:|--:|", *rows]),
                ),
                ("Warnings", listed(summary["warnings"])),
                ("Recipe", f"```yaml\n{recipe}```"),
            ],
        )
    )


def _licence(folder: Path) -> str | None:
    """Returns the licence a base's model card names, if it names one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    licence = split(card.read_text(encoding="utf-8", errors="replace"))[0].get("license")
    return licence if isinstance(licence, str) else None
