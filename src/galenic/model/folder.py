"""Model folders: what `save` writes and `load` reads.

config.json  generation_config.json  model.safetensors (or shards and an index)
tokenizer.json  tokenizer_config.json  special_tokens_map.json  chat_template.jinja
modeling_baichuan_m1.py  galenic.json (how it was made)  README.md (model card)
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from galenic.model import modeling_baichuan_m1
from galenic.model.modeling_baichuan_m1 import (
    BaichuanM1Config,
    BaichuanM1ForCausalLM,
    BaichuanM1ForSequenceClassification,
)
from galenic.report.model_card import Card, fenced, licences, listed, render
from galenic.runtime import UserError, atomic_path, nearest, read_json, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
MODELING_FILE = Path(modeling_baichuan_m1.__file__)
AUTO_MAP = {
    "AutoConfig": f"{MODELING_FILE.stem}.BaichuanM1Config",
    "AutoModelForCausalLM": f"{MODELING_FILE.stem}.BaichuanM1ForCausalLM",
    "AutoModelForSequenceClassification": f"{MODELING_FILE.stem}.BaichuanM1ForSequenceClassification",
}
Network = BaichuanM1ForCausalLM | BaichuanM1ForSequenceClassification

# With Galenic imported, the Auto classes open our folders without running code from them.
AutoConfig.register("baichuan_m1", BaichuanM1Config, exist_ok=True)
AutoModelForCausalLM.register(BaichuanM1Config, BaichuanM1ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    BaichuanM1Config, BaichuanM1ForSequenceClassification, exist_ok=True
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library's progress bars and advice for calls whose outcome we check ourselves."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------------------- load


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> BaichuanM1ForCausalLM:
    """Loads a model folder, offline and without running code from it.

    Args:
        folder: holds config.json and safetensors weights.
        dtype: what the weights are converted to.
        attn_implementation: "sdpa", or "eager" where derivatives of higher order are needed.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        UserError: the folder, its config or a tensor is missing, damaged or of another model; or the tokenizer in it
            has tokens that the model lacks.
    """
    return _load(BaichuanM1ForCausalLM, folder, dtype, attn_implementation)


def load_classifier(
    folder: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> BaichuanM1ForSequenceClassification:
    """As `load`, of a classifier's or a reward model's folder."""
    return _load(BaichuanM1ForSequenceClassification, folder, dtype, attn_implementation)


def as_scorer(model: BaichuanM1ForCausalLM) -> BaichuanM1ForSequenceClassification:
    """Makes a network that gives a text one number, 0 at first, of a language model, whose weights it shares."""
    config = deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        scorer = BaichuanM1ForSequenceClassification._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    shared = scorer.state_dict().keys()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in shared}
    tensors["score.weight"] = torch.zeros(1, config.hidden_size, dtype=model.dtype)
    scorer.load_state_dict(tensors, assign=True)
    return scorer.eval()


def _load(kind: Any, folder: str | Path, dtype: torch.dtype, attn_implementation: str) -> Any:
    """Loads a model folder into one of our networks."""
    folder = Path(folder)
    config = _read_config(folder)
    named = (config.architectures or [kind.__name__])[0]
    if named != kind.__name__ and named in {network.__name__ for network in get_args(Network)}:
        raise UserError(f"{folder / 'config.json'}: a {named} lies here, not a {kind.__name__}")
    _refuse_other_tokenizer(folder, config)
    with torch.device("meta"):
        model = kind._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    found: dict[str, Path] = {}
    for file in _weight_files(folder):
        for name, tensor in _read_tensors(file, expected):
            if name in found:
                raise UserError(f"{folder}: tensor {name} is in {found[name].name} and again in {file.name}")
            tensors[name], found[name] = tensor.to(dtype), file
    if missing := sorted(set(expected) - set(tensors)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: the weights lack tensor {missing[0]}{more}; the folder is incomplete")
    model.load_state_dict(tensors, assign=True)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # refuses a damaged file in our words
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _read_config(folder: Path) -> BaichuanM1Config:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so this is not a model folder")
    values = read_json(folder / "config.json")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "baichuan_m1":
        raise UserError(
            f"{folder / 'config.json'}: model_type is {kind!r}, this room reads 'baichuan_m1' only"
        )
    try:
        return BaichuanM1Config.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None


def _refuse_other_tokenizer(folder: Path, config: BaichuanM1Config) -> None:
    """Refuses a tokenizer whose tokens the model has no rows for; a model without tokenizer is fine."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    values = read_json(file)
    try:
        vocabulary = values["model"]["vocab"]
        listed = not isinstance(vocabulary, dict)  # Unigram: [[token, score], ...]; the others: {token: id}
        ids = {token: i for i, (token, *_) in enumerate(vocabulary)} if listed else dict(vocabulary)
        ids |= {token["content"]: token["id"] for token in values.get("added_tokens") or []}
        token = max(ids, key=lambda name: ids[name], default=None)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: not a usable tokenizer (no vocabulary in it)") from None
    if token is not None and ids[token] >= config.vocab_size:
        raise UserError(
            f"{file}: token {token!r} has id {ids[token]}, but config.json says vocab_size={config.vocab_size}: "
            "the tokenizer belongs to another model"
        )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: no weights ({WEIGHTS} or {INDEX})")
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{folder / INDEX}: no 'weight_map' in it")
    files = [folder / name for name in sorted({str(name) for name in names.values()})]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{file}: {INDEX} names this file, but it is not in the folder")
    return files


def _read_tensors(file: Path, expected: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of one safetensors file after checking names and shapes against `expected`."""
    try:
        with safe_open(file, framework="pt") as reader:
            names = sorted(reader.keys())
            for name in names:
                if name not in expected:
                    hint = nearest(name, expected)
                    raise UserError(f"{file}: tensor {name} does not belong to this model{hint}")
                shape, kind = tuple(reader.get_slice(name).get_shape()), reader.get_slice(name).get_dtype()
                if shape != expected[name]:
                    raise UserError(
                        f"{file}: tensor {name} has shape {shape}, config.json asks for {expected[name]}"
                    )
                if kind not in WEIGHT_TYPES:
                    allowed = ", ".join(WEIGHT_TYPES)
                    raise UserError(
                        f"{file}: tensor {name} is of type {kind}; weights are {allowed}, quantised ones cannot be read"
                    )
            for name in names:
                yield name, reader.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut off ({' '.join(str(error).split())})") from None


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a model or tokenizer folder, offline.

    Raises:
        UserError: there is no readable tokenizer.json.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: no tokenizer.json, so there is no tokenizer here")
    read_json(file)
    try:
        with _quiet():
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise UserError(f"{file}: not a usable tokenizer ({' '.join(str(error).split())})") from None


# ---------------------------------------------------------------------------- save


def save(
    model: Network,
    folder: str | Path,
    *,
    tokenizer: str | Path | None,
    provenance: dict[str, Any],
    parents: Iterable[str] = (),
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Writes a model folder: all of it, or nothing. The same inputs give the same bytes.

    Weights are written one after the other, into files of at most 5 GB; what they need of the disk is taken at once.

    Args:
        model: what to save, in the dtype it has.
        folder: where; an older folder there is replaced.
        tokenizer: folder whose tokenizer files are copied; None for a model without one.
        provenance: how the model was made (JSON values); goes to galenic.json and into the model card. Its keys
            "title", "license" and "description" fill the card's places of that name; "licences", of sources of text,
            are listed.
        parents: models this one was made from, as they should be named on the card.
        weights: names and whole tensors of a model that holds parts of them only; not given: the model's own.

    Raises:
        UserError: `tokenizer` is not a tokenizer folder.
    """
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer}: no tokenizer.json, so there is no tokenizer to save with the model")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        _write_weights(model, temporary, weights)
        write_companions(model, temporary, tokenizer=tokenizer, provenance=provenance, parents=list(parents))


def write_companions(
    model: Network,
    folder: Path,
    *,
    tokenizer: str | Path | None,
    provenance: dict[str, Any],
    parents: list[str],
) -> None:
    """Writes what a model folder holds besides weights; see `save`."""
    config = deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    with _quiet():
        config.save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()  # only the modelling file below, whichever class the model came from
    config = read_json(folder / "config.json")
    name = next(kind.__name__ for kind in get_args(Network) if isinstance(model, kind))
    config |= {"architectures": [name], "auto_map": AUTO_MAP}
    write_json(folder / "config.json", dict(sorted(config.items())))
    if isinstance(model, BaichuanM1ForCausalLM):
        write_json(folder / "generation_config.json", _generation_config(model.config))
    shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
    if tokenizer is not None:
        for file in (Path(tokenizer) / name for name in TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    write_json(folder / "galenic.json", provenance)
    (folder / "README.md").write_text(_card(model, provenance, parents), encoding="utf-8")


def _write_weights(model: Network, folder: Path, weights: Iterable[tuple[str, torch.Tensor]] | None) -> None:
    from galenic.merge.io import TensorInfo
    from galenic.merge.writer import safetensors_writer

    state = model.state_dict()
    infos = {n: TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape)) for n, tensor in state.items()}
    with safetensors_writer(folder, infos) as writer:
        for name, tensor in state.items() if weights is None else weights:
            writer.write(name, 0, tensor.detach().cpu().flatten())


def _generation_config(config: BaichuanM1Config) -> dict[str, Any]:
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}


_ABOUT = """\
{description}

{parameters} parameters, {layers} layers, hidden size {hidden}, vocabulary {vocabulary}. The architecture is that of
Baichuan-M1 (arXiv 2502.12671): global and sliding-window attention layers in turn, a two-tap convolution on keys and
values, {head}.
"""
_USE = """\
```python
from transformers import {opener}, AutoTokenizer

model = {opener}.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
```

`trust_remote_code` runs `modeling_baichuan_m1.py`, which lies in this folder. Nothing else is needed.
"""


def _card(model: Network, provenance: dict[str, Any], parents: list[str]) -> str:
    """Renders the model card. Nothing in it depends on when or where it is written."""
    config, writes = model.config, isinstance(model, BaichuanM1ForCausalLM)
    made = (
        "A causal language model for medical text, made with Galenic."
        if writes
        else "A reward model: it gives a conversation one number, made with Galenic."
    )
    head = "an output head with unit-length rows" if config.norm_head else "a plain output head"
    about = _ABOUT.format(
        description=provenance.get("description", made),
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=f"{config.vocab_size:,}",
        head=f"and {head if writes else 'a linear score of the last token'}",
    )
    return render(
        Card(
            title=provenance.get("title", "A Galenic medical language model"),
            description=about,
            licence=provenance.get("license", "other"),
            languages=["en", "zh"],
            pipeline=f"text-{'generation' if writes else 'classification'}",
            parents=parents,
            tags=["medical", "baichuan_m1", "galenic"] + (["merge"] if len(parents) > 1 else []),
            sections=[
                (
                    "Use",
                    _USE.format(opener=f"AutoModelFor{'CausalLM' if writes else 'SequenceClassification'}"),
                ),
                ("Made from", listed(parents)),
                ("Texts it learned from", licences(provenance.get("licences", {}))),
                ("How it was made", f"{fenced(provenance)}\n\n`galenic.json` holds the whole record."),
            ],
        )
    )
