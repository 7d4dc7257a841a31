"""The verb: `galenic merge --config merge.yaml --out DIR`.

Headers are checked, one pass measures the task vectors, one pass writes the merged model, which is visible only when
it is whole. A killed merge goes on writing where it was; what was measured is remembered. Several processes started by
`torchrun` share the tensors, and give the same bytes.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from galenic import __version__
from galenic.merge.config import MergeConfig, MergeModel, MergeParameters, Method, MethodParameters
from galenic.ranks import barrier, process_group, rank, ranks, zero_first
from galenic.runtime import (
    Plan,
    UserError,
    duration,
    folder_name,
    human,
    human_bytes,
    load_yaml,
    progress,
    resumable_folder,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from galenic.merge.engine import Statistics
    from galenic.merge.io import OnDisk, TensorInfo, Weights


DISK = 1e9
"""Bytes a second of the disk that a plan's time is told for."""


def plan(config: MergeConfig) -> Plan:
    """Tells from headers alone what a merge would read, write and need.

    Raises:
        UserError: a folder is missing or malformed, or the models do not fit together.
    """
    from galenic.merge.engine import arithmetic_seconds, memory_for_blocks, output_tensors
    from galenic.merge.folder import missing_bytes

    with _open(config, download=False) as opened:
        base, experts = opened.base, opened.experts
        output = output_tensors(config, base, opened.stored[0])
        statistics_passes = (
            1
            + 2 * (config.thins in ("ties", "breadcrumbs", "sce"))
            + (
                config.parameters.norms == "after_trim"
                or config.thins == "sce"
                or config.merge_method == "slerp"
            )
        )
        base_passes, expert_passes = statistics_passes + (not config.base_cancels), statistics_passes + 1
        first, *others = opened.stored
        written = sum(info.nbytes for info in output.values())
        missing = missing_bytes(config.out, written)
        read = base_passes * first.nbytes + expert_passes * sum(model.nbytes for model in others)
        facts = {
            "method": config.merge_method,
            "experts": ", ".join(config.names()),
            "tensors": str(len(output)),
            "parameters": human(sum(info.numel for info in output.values())),
            "data types": _data_types(output),
            "to read": human_bytes(read),
            "to write": human_bytes(written)
            + (f", but {human_bytes(missing)} of disk space are missing for it" if missing else ""),
            "memory for blocks": human_bytes(memory_for_blocks(config, output, len(experts)))
            + (", as the largest matrix needs" if config.spectral else ", whatever the model's size"),
            "time": f"about {duration(arithmetic_seconds(config, output, len(experts), expert_passes))} of arithmetic"
            f", or {duration((read + written) / DISK)} where a disk gives and takes {human_bytes(DISK)}/s",
        }
        facts |= {f"note {i}": text for i, text in enumerate(opened.notes, start=1)}
        facts |= {f"warning {i}": text for i, text in enumerate(opened.warnings, start=1)}
        files = [str(file) for model in opened.stored for file in model.files]
    return Plan(
        reads=files,
        writes=[f"{config.out}/{name}" for name in ("model/", "merge-report.html", "merge.json")],
        facts=facts,
    )


def run(config: MergeConfig) -> None:
    """Merges: writes `model/`, then `merge-report.html`, then `merge.json`.

    Raises:
        UserError: a folder is missing or malformed, the models do not fit together, hold NaN or infinity, or change
            while they are read; or the disk has no room for the result.
    """
    from galenic.merge.blocks import own_names
    from galenic.merge.cache import identity, statistics_file
    from galenic.merge.engine import measure, merge_blocks, output_tensors
    from galenic.merge.folder import missing_bytes, recipe_yaml, write_companions
    from galenic.merge.vocabulary import write_union_tokenizer
    from galenic.merge.writer import safetensors_writer
    from galenic.report.merge_page import write_merge_page

    result = Path(config.out) / "model"
    with process_group(), ExitStack() as stack:
        _check_replaced(result)
        with zero_first():  # what is downloaded or converted is so once
            opened = stack.enter_context(_open(config))
        base, experts = opened.base, opened.experts
        output = output_tensors(config, base, opened.stored[0])
        if missing := missing_bytes(config.out, sum(info.nbytes for info in output.values())):
            raise UserError(
                f"{config.out}: no space left on device: {human_bytes(missing)} more are needed for the merged model"
            )
        stamps = _stamps(opened)
        own = sum(base.tensors[name].numel for name in own_names(base))
        paths = [[config.base_model], *(model.paths() for model in config.models)]
        inputs = [
            {
                "model": "+".join(map(folder_name, names)),
                "file": file.name,
                "bytes": file.stat().st_size,
                "identity": identity(file),
            }
            for names, model in zip(paths, opened.stored, strict=True)
            for file in model.files
        ]
        cache = statistics_file(opened.stored, opened.how)
        statistics = measure(config, base, experts, cache, show=rank() == 0)
        statistics.summary["warnings"] += [*opened.warnings, *_same_weights(config.names(), opened, inputs)]
        if opened.notes:
            statistics.summary["vocabulary"] = opened.notes
        with _shared_folder(result, _key(config, opened, stamps, statistics)) as folder:
            with ExitStack() as files:
                with zero_first():
                    if rank() == 0:
                        origin, *others = opened.folders
                        write_companions(config, origin, folder, statistics.summary, inputs, opened.rows)
                        if opened.new_tokens:
                            write_union_tokenizer(origin, others, opened.new_tokens, folder)
                    writer = files.enter_context(safetensors_writer(folder, output))
                label = f"merging ({config.merge_method})"
                bar = files.enter_context(progress(own, label, "weights")) if rank() == 0 else None
                merge_blocks(
                    config,
                    base,
                    experts,
                    statistics,
                    output,
                    writer.write,
                    bar,
                    first=writer.done,
                    finished=writer.finished,
                    lead=writer.lead,
                )
            for before, now in zip(stamps, _stamps(opened), strict=True):
                if before != now:
                    raise UserError(
                        f"{before[0]}: changed while it was merged; merge again when it is at rest"
                    )
    if rank() == 0:
        page = Path(config.out) / "merge-report.html"
        write_merge_page(page, statistics.summary, recipe_yaml(config), inputs)
        write_json(Path(config.out) / "merge.json", statistics.summary)


@contextmanager
def _shared_folder(path: Path, key: str) -> Iterator[Path]:
    """As `resumable_folder`, for all processes: it appears when all are through."""
    from galenic.merge.writer import JOURNAL

    if rank() == 0:
        with resumable_folder(path, key, JOURNAL) as folder:
            yield folder
            barrier()
    else:
        yield path.with_name(f".{path.name}.partial")
        barrier()


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """Models that fit together."""

    stored: list["OnDisk"]
    """The base and the experts as they are on disk."""
    folders: Sequence[Path]
    """Where their configs and tokenizers are: an adapter's may be its base's."""
    base: "Weights"
    """The base as it is merged: as stored, or with rows rearranged."""
    experts: list["Weights"]
    """The experts likewise."""
    warnings: list[str]
    """What a reader of the result should know."""
    how: str = ""
    """Identifies how rows are rearranged, if they are."""
    rows: int | None = None
    """Rows of the vocabulary, if they are rearranged."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens that the output has beyond the base's."""
    notes: list[str] = field(default_factory=list)
    """How tokens were matched."""


def _stamps(opened: _Opened) -> list[tuple[str, int, int]]:
    """Returns path, size and time of change of every file of weights."""
    files = [file for model in opened.stored for file in model.files]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _same_weights(
    names: Sequence[str], opened: _Opened, inputs: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Warns of experts that are copies of each other."""
    first: dict[Any, str] = {}
    left = iter(inputs)
    for name, model in zip(["the base", *names], opened.stored, strict=True):
        weights = tuple(next(left)["identity"] for _ in model.files)
        if name != "the base" and (other := first.setdefault(weights, name)) != name:
            yield f"'{name}' and '{other}' hold the same weights, as far as samples tell: they count twice"


def _data_types(output: Mapping[str, "TensorInfo"]) -> str:
    """Names the data types of the merged tensors, those of most weights first."""
    sizes: dict[str, int] = {}
    for info in output.values():
        kind = str(info.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + info.numel
    return ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))


def _check_replaced(model: Path) -> None:
    """Refuses to put a merge where something else lies."""
    from galenic.merge.folder import json_if_there

    if os.path.lexists(model) and "merge" not in json_if_there(model / "galenic.json"):
        raise UserError(f"{model}: is there already and no merge of ours; choose another out or remove it")


def _key(
    config: MergeConfig, opened: _Opened, files: Sequence[tuple[str, int, int]], statistics: "Statistics"
) -> str:
    """Identifies a merge: what is merged, how, and into which blocks. Files are known by size and time of change."""
    from galenic.merge.blocks import CHUNK

    found = [statistics.thresholds, statistics.origin, statistics.summary["units"]]
    parts = [repr(replace(config, out="")), list(files), opened.how, found, CHUNK, ranks()]
    return hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()


@contextmanager
def _open(config: MergeConfig, download: bool = True) -> Iterator[_Opened]:
    """Opens all models and checks by their headers that they fit together."""
    import torch

    from galenic.merge.adapters import Adapter, is_adapter
    from galenic.merge.folder import check_folders, json_if_there
    from galenic.merge.gguf import dequantised, gguf_file
    from galenic.merge.hub import local_folder
    from galenic.merge.io import Checkpoint, Mended, check_same_tensors
    from galenic.merge.vocabulary import check_tied, tied_heads

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but there is no CUDA device that PyTorch can use; leave it out")
    notes = []
    left_out: list[str] = []

    def folder_of(model: str) -> Path:
        found = local_folder(model, download)
        file = gguf_file(found)
        return dequantised(file, convert=download) if file else found

    def whole(folder: Path, label: str) -> Checkpoint:
        if is_adapter(folder):
            raise UserError(f"{label}: is a LoRA adapter; here a whole model is needed")
        model = stack.enter_context(Checkpoint(folder, label))
        copies = tied_heads(model.tensors, json_if_there(folder / "config.json"))
        if download:  # not for a plan, which reads no weights
            check_tied(model, copies)
        model.leave_out(copies)
        left_out.extend(f"{label}: {copy}" for copy in copies)
        notes.extend(f"{label}: '{copy}' is its input embedding, so it counts once" for copy in copies)
        return model

    with ExitStack() as stack:
        base = whole(folder_of(config.base_model), config.base_model)
        experts: list[OnDisk] = []
        folders: dict[str, Path] = {}  # where config and tokenizer are
        for model in config.models:
            own, on_it = [folder_of(path) for path in model.paths()][-1], base
            if is_adapter(own) or len(model.paths()) == 2:
                first = model.paths()[0]
                if len(model.paths()) == 2 and os.path.realpath(first) != os.path.realpath(config.base_model):
                    on_it = whole(folder_of(first), first)
                its_own = [] if on_it is base else on_it.files
                experts.append(stack.enter_context(Adapter(own, on_it, model.model, its_own)))
                own = own if (own / "tokenizer.json").exists() else on_it.folder
            else:
                experts.append(whole(own, model.model))
            folders[model.label()] = own
        warnings = check_folders(base.folder, folders, matched=config.vocabulary is not None)
        opened = (
            _matched(config.vocabulary, base, experts, [base.folder, *folders.values()], warnings)
            if config.vocabulary
            else _Opened(
                stored=[base, *experts],
                folders=[base.folder, *folders.values()],
                base=base,
                experts=list(experts),
                warnings=warnings,
            )
        )
        check_same_tensors(opened.base, opened.experts)
        if left_out:  # what is remembered of the same files with these tensors is not theirs
            opened = replace(opened, how=f"{opened.how} without {sorted(left_out)}")
        if config.allow_non_finite:
            mended: list[Weights] = [
                expert if isinstance(expert, Adapter) else Mended(expert, opened.base)
                for expert in opened.experts
            ]
            opened = replace(opened, experts=mended, how=f"{opened.how} mended")
        yield replace(opened, notes=notes + opened.notes)


def _matched(
    source: Literal["base", "union"],
    base: "OnDisk",
    experts: Sequence["OnDisk"],
    folders: Sequence[Path],
    warnings: list[str],
) -> _Opened:
    """Rearranges the rows of embeddings and heads, by token, unless all vocabularies are the same."""
    from galenic.merge.folder import json_if_there
    from galenic.merge.vocabulary import align, read_tokens

    opened = _Opened(
        stored=[base, *experts], folders=folders, base=base, experts=list(experts), warnings=warnings
    )
    tokens = [read_tokens(folder) for folder in folders]
    alike = all(
        {name: info.shape for name, info in expert.tensors.items()}
        == {name: info.shape for name, info in base.tensors.items()}
        for expert in experts
    )
    if alike and all(own == tokens[0] for own in tokens):
        return opened
    settings = [json_if_there(folder / "config.json") for folder in folders]
    aligned = align(source, base, tokens[0], experts, tokens[1:], settings[0], settings[1:])
    return replace(
        opened,
        base=aligned.base,
        experts=aligned.experts,
        how=hashlib.sha256(json.dumps([source, tokens]).encode()).hexdigest(),
        rows=aligned.rows,
        new_tokens=aligned.new_tokens,
        notes=aligned.notes,
    )


# ---------------------------------------------------------------------------- in Python


def merge(recipe: MergeConfig | Mapping[str, Any] | str | Path, out: str | Path | None = None) -> Path:
    """Merges model folders and returns the merged model's folder.

    Args:
        recipe: a config, the same as a mapping (mergekit's keys), or the path of a YAML file.
        out: output folder; needed unless the recipe names one.

    Raises:
        UserError: unknown keys, contradictions, folders that are missing or do not fit together.

    Example:
        >>> merge({"base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}, "merged")  # doctest: +SKIP
    """
    config = recipe if isinstance(recipe, MergeConfig) else _read_recipe(recipe, out)
    if out is not None and isinstance(recipe, MergeConfig) and str(out) != recipe.out:
        raise UserError(f"out: {out} was given, but the config says {recipe.out}")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    run(config)
    return Path(config.out) / "model"


def _read_recipe(recipe: Mapping[str, Any] | str | Path, out: str | Path | None) -> MergeConfig:
    import yaml

    from galenic.cli import parse_config

    values: Any = recipe
    if isinstance(recipe, str | Path):
        try:
            values = load_yaml(Path(recipe).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{recipe}: no such file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{recipe}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{recipe}: a merge recipe is a mapping with base_model and models")
    config, _ = parse_config(
        "merge", dict(copy.deepcopy(values)) | ({} if out is None else {"out": str(out)})
    )
    return config


def merge_state_dicts(
    base: Mapping[str, "Tensor"],
    experts: Mapping[str, Mapping[str, "Tensor"]] | Sequence[Mapping[str, "Tensor"]],
    method: Method = "metagpt",
    *,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    seed: int = 0,
    parameters: MethodParameters | None = None,
    allow_non_finite: bool = False,
) -> dict[str, "Tensor"]:
    """Merges state dicts in memory, to the same bits as folders.

    Args:
        base: the state dict the experts were fine-tuned from.
        experts: name -> state dict, or a sequence of them (named "0", "1" ...). A tied tensor should be listed once,
            or its norm counts twice.
        method: as in a recipe.
        weights: one per expert, where the method takes weights.
        density: share of kept entries for `ties`, `dare_linear` and `dare_ties`.
        dtype: of the result's floating-point tensors. Default: the base's.
        seed: of DARE.
        parameters: the method's numbers, as in a recipe; then `density` is among them.
        allow_non_finite: whether experts may hold NaN or infinity; the base's weights stand in for them.

    Returns:
        The merged state dict, with new tensors.

    Raises:
        UserError: contradictions, tensors that differ in name or shape, NaN or infinity.
    """
    import torch

    from galenic.merge.engine import measure, merge_blocks, output_tensors
    from galenic.merge.io import Mended, StateDict, check_same_tensors

    named = experts if isinstance(experts, Mapping) else {str(i): state for i, state in enumerate(experts)}
    if weights is not None and len(weights) != len(named):
        raise UserError(f"weights: {len(weights)} given for {len(named)} experts")
    if parameters is not None and density is not None:
        raise UserError("density: give it among the parameters, or leave those out")
    own = weights or [None] * len(named)
    config = MergeConfig(
        out="",
        merge_method=method,
        base_model="base",
        models=[
            MergeModel(model=f"experts/{name}", name=name, parameters=MergeParameters(weight=weight))
            for name, weight in zip(named, own, strict=True)
        ],
        parameters=parameters or MethodParameters(density=density),
        dtype=dtype,
        seed=seed,
        allow_non_finite=allow_non_finite,
    )
    origin = StateDict(base, "base")
    models: list[Weights] = [StateDict(state, name) for name, state in named.items()]
    check_same_tensors(origin, models)
    if allow_non_finite:
        models = [Mended(model, origin) for model in models]
    statistics = measure(config, origin, models)
    output = output_tensors(config, origin)
    merged = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in output.items()}

    def write(name: str, start: int, block: "Tensor") -> None:
        merged[name].view(-1)[start : start + block.numel()] = block

    merge_blocks(config, origin, models, statistics, output, write)
    return merged
