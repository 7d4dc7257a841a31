"""The verb `export`: a model folder that any Hugging Face tool loads, as it is wanted there.

FOLDER/model/        config.json, safetensors, tokenizer, README.md (card), galenic.json, our modelling file
FOLDER/export.json   what was done, sizes, and what quantising cost
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from galenic import __version__
from galenic.model.export.config import ExportConfig
from galenic.runtime import (
    Plan,
    atomic_path,
    folder_name,
    human,
    human_bytes,
    progress,
    read_json,
    write_json,
)

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def plan(config: ExportConfig) -> Plan:
    """What the verb would write, and upload.

    Raises:
        UserError: no model, or an adapter without its base.
    """
    from galenic.evaluate.config import model_parts
    from galenic.evaluate.models import weight_files

    size = sum(file.stat().st_size for file in weight_files("model", config.model))
    base = Path(model_parts(config.model)[0])
    dtype = config.dtype or stored_dtype(base)
    facts = {"weights read": human_bytes(size), "weights written": f"{config.quantize or ''} {dtype}".strip()}
    facts["weights written"] += ", a plain head" if config.plain_head or config.quantize else ""
    names = companion_names(base)
    facts["files"] = ", ".join(["model.safetensors (or shards and an index)", *names])
    if config.quantize:
        facts["cost measured on"] = config.heldout or "a small text of ours"
    if config.push_to_hub:
        seen = "private" if config.private else "public, or as it is"
        facts["upload"] = (
            f"model/ to https://huggingface.co/{config.push_to_hub} ({seen}), with your own login"
        )
    return Plan(
        reads=config.reads(), writes=[f"{config.out}/model", f"{config.out}/export.json"], facts=facts
    )


def run(config: ExportConfig) -> None:
    """Writes `model/` and `export.json`.

    Raises:
        UserError: no model, an adapter that does not fit, layers that cannot be quantised, a missing package.
    """
    import torch

    from galenic.evaluate.config import model_parts
    from galenic.evaluate.models import open_model, weight_files
    from galenic.model.folder import load_tokenizer
    from galenic.model.modeling_baichuan_m1 import BaichuanM1ForCausalLM

    files = weight_files("model", config.model)
    base = Path(model_parts(config.model)[0])
    stored = stored_dtype(base)
    dtype = config.dtype or stored
    model = open_model(config.model, getattr(torch, max(stored, dtype, key=SIZES.__getitem__)))
    ours = isinstance(model, BaichuanM1ForCausalLM)
    if config.plain_head and not ours:
        print("  plain_head: this architecture has a plain head already", file=sys.stderr)
    if isinstance(model, BaichuanM1ForCausalLM) and (config.plain_head or config.quantize):
        model.materialize_norm_head()
    model.to(getattr(torch, dtype))
    tokenizer = load_tokenizer(base) if (base / "tokenizer.json").is_file() else None
    record: dict[str, Any] = {
        "made_by": f"galenic {__version__} export",
        "model": "+".join(folder_name(part) for part in model_parts(config.model)),
        "dtype": dtype,
        "plain_head": bool(ours and not model.config.norm_head),
        "quantize": config.quantize,
    }
    tensors = settings = None
    if config.quantize:
        tensors, settings, record["cost"] = _quantize(model, config, tokenizer)
    with atomic_path(Path(config.out) / "model") as folder:
        folder.mkdir(parents=True)
        _write(model, folder, base, config.model, record, tensors, settings)
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    record["bytes"] = {"before": sum(file.stat().st_size for file in files), "after": written}
    write_json(Path(config.out) / "export.json", record)
    print("\n".join(describe(record)))


def afterwards(config: ExportConfig) -> None:
    """Uploads what `run` has written, if asked to.

    Raises:
        UserError: not logged in, not allowed, not reached, or a public repository where a private one was asked for.
    """
    if config.push_to_hub:
        from galenic.model.export.push import push

        print(f"uploaded: {push(Path(config.out) / 'model', config.push_to_hub, config.private)}")


def describe(record: dict[str, Any]) -> list[str]:
    """Returns the lines that tell sizes and the cost."""
    before, after = record["bytes"]["before"], record["bytes"]["after"]
    lines = [f"weights: {human_bytes(before)} -> {human_bytes(after)} ({before / after:.2f} times smaller)"]
    if cost := record.get("cost"):
        bits, same = cost["bits_per_byte"], cost["top_1_agreement"]
        difference = bits["difference"]
        lines += [
            f"on {cost['text']}: {cost['documents']} documents, {human(cost['bytes'])} bytes",
            f"bits per byte: {bits['before']:.4f} -> {bits['after']:.4f}, difference {difference['value']:+.4f} "
            f"(95%: {difference['low']:+.4f} to {difference['high']:+.4f})",
            f"likeliest next token the same: {100 * same['value']:.1f}% of {human(cost['tokens'])} "
            f"(95%: {100 * same['low']:.1f} to {100 * same['high']:.1f})",
        ]
    elif record["quantize"]:
        lines.append("the cost was not measured: the model has no tokenizer")
    return lines


def stored_dtype(folder: Path) -> str:
    """Returns the dtype that a model's weights have, of its config; float32 where it says none."""
    file = folder / "config.json"
    settings = read_json(file) if file.is_file() else {}
    named = settings.get("dtype") or settings.get("torch_dtype") if isinstance(settings, dict) else None
    return named if named in SIZES else "float32"


def companion_names(base: Path) -> list[str]:
    """Returns the names of what is written beside the weights of a model like the one in `base`."""
    from galenic.model.folder import TOKENIZER_FILES
    from galenic.model.foreign import COMPANIONS

    settings = read_json(base / "config.json")
    ours = isinstance(settings, dict) and settings.get("model_type") == "baichuan_m1"
    names = {"config.json", "galenic.json", "README.md"}
    patterns = (*TOKENIZER_FILES, "LICEN*", "NOTICE*") if ours else COMPANIONS
    names |= {file.name for pattern in patterns for file in base.glob(pattern) if file.is_file()}
    return sorted(names | ({"generation_config.json", "modeling_baichuan_m1.py"} if ours else set()))


def _quantize(
    model: Any, config: ExportConfig, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Quantises a model; returns its tensors and settings, and the cost if there is a tokenizer to measure it with."""
    from galenic.model.export import losses
    from galenic.model.export.quantize import quantize

    if tokenizer is None:
        return *quantize(model, str(config.quantize)), None
    texts = losses.load(config.heldout, tokenizer, config.heldout_tokens)
    with progress(2 * sum(len(text.ids) for text in texts), "measure", "tokens") as bar:
        before = losses.score(model, texts, bar)
        tensors, settings = quantize(model, str(config.quantize))
        after = losses.score(model, texts, bar)
    text = folder_name(config.heldout) if config.heldout else "a small text of ours"
    return tensors, settings, {"text": text, **losses.compare(before, after, texts)}


def _write(
    model: Any,
    folder: Path,
    base: Path,
    name: str,
    record: dict[str, Any],
    tensors: dict[str, Any] | None,
    settings: dict[str, Any] | None,
) -> None:
    """Writes the model folder."""
    from galenic.merge.io import TensorInfo
    from galenic.merge.writer import safetensors_writer
    from galenic.model.folder import Network, _quiet, write_companions
    from galenic.model.foreign import copy_companions, write_card

    parent = read_json(base / "galenic.json") if (base / "galenic.json").is_file() else {}
    parent = parent if isinstance(parent, dict) else {}
    kept = {key: parent[key] for key in ("title", "license", "description", "licences") if key in parent}
    provenance = {**kept, "export": record, "parent": {k: v for k, v in parent.items() if k not in kept}}
    parents = record["model"].split("+")
    if isinstance(model, Network):
        tokenizer = base if (base / "tokenizer.json").is_file() else None
        write_companions(model, folder, tokenizer=tokenizer, provenance=provenance, parents=parents)
        for pattern in ("LICEN*", "NOTICE*"):
            for file in base.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    else:
        model.config.dtype = record["dtype"]
        with _quiet():
            model.config.save_pretrained(folder)
        copy_companions(base, folder)
        write_json(folder / "galenic.json", provenance)
        write_card(folder, provenance, parents, "a model folder of Hugging Face's")
    if settings is not None:
        values = read_json(folder / "config.json")
        write_json(folder / "config.json", values | {"quantization_config": settings})
    if name == str(base) and (base / "README.md").is_file():  # its own card says more than a new one
        shutil.copyfile(base / "README.md", folder / "README.md")
    with open(folder / "README.md", "a", encoding="utf-8") as card:
        card.write("\n".join(["", "## This copy", "", *_copy(record), ""]))
    state = _without_ties(model, model.state_dict() if tensors is None else tensors)
    infos = {key: TensorInfo(dtype=value.dtype, shape=tuple(value.shape)) for key, value in state.items()}
    with safetensors_writer(folder, infos) as writer:
        for key, value in state.items():
            writer.write(key, 0, value.detach().cpu().contiguous().flatten())


def _without_ties(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what transformers ties to another tensor itself when it loads."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _copy(record: dict[str, Any]) -> list[str]:
    """Returns the lines that a card says about an exported copy."""
    lines = [f"Exported from `{record['model']}` with Galenic: weights in {record['dtype']}."]
    if record["plain_head"]:
        lines.append(
            "The rows of the output head have been scaled to unit length, so it is a plain linear head."
        )
    if record["quantize"]:
        lines.append(
            f"Linear layers are stored in {record['quantize']} (compressed-tensors; `pip install compressed-tensors`)."
        )
    if cost := record.get("cost"):
        bits, same = cost["bits_per_byte"], cost["top_1_agreement"]
        lines += [
            "",
            f"| on {cost['text']} ({cost['documents']} documents, {cost['bytes']} bytes) | before | after | 95% |",
            "|---|---:|---:|---:|",
            f"| bits per byte | {bits['before']:.4f} | {bits['after']:.4f} | difference "
            f"{bits['difference']['low']:+.4f} to {bits['difference']['high']:+.4f} |",
            f"| likeliest next token the same, % of {cost['tokens']} | | {100 * same['value']:.1f} | "
            f"{100 * same['low']:.1f} to {100 * same['high']:.1f} |",
        ]
    return lines
