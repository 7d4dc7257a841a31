"""What a checkpoint's folder is made of: names and state of tensors, files and what is wrong with them."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from galenic.pretrain.parallelism.tensor_parallel import regrouped_rows
from galenic.runtime import NO_SPACE, UserError, is_disk_full, read_json, sha256_file

FILE_BYTES = 2**28
"""A rank's part is written in files of about so many bytes; each is put together in memory first."""


# ---------------------------------------------------------------------------- names and state


def reshard(model: torch.nn.Module) -> None:
    """Lets go of whole weights: after a pass without backward, FSDP2 leaves those of the root in the shards' place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that training changes: all, or an adapter's."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def optimizer_state(model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Returns the optimizer's state as `entry.parameter` -> tensor."""
    return {
        f"{key}.{name}": value
        for name, parameter in trained(model)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def empty_state(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns tensors for what a folder holds of the optimizer's state: scalars, or sharded as their parameters are."""
    parameters = dict(trained(model))
    state = {}
    for entry, found in tensors_there(folder).items():
        name = entry.split(".", 1)[1]
        if name not in parameters or not isinstance(found, TensorStorageMetadata):
            raise UserError(f"{folder}: holds {entry}, but this run trains no such parameter")
        like, dtype = parameters[name].detach(), found.properties.dtype
        if len(found.size):
            state[entry] = torch.zeros_like(like, dtype=dtype)
        else:  # a fused optimizer counts its steps where the parameter is
            state[entry] = torch.zeros((), dtype=dtype, device=like.device)
    return state


def tensor_degree(model: torch.nn.Module) -> int:
    """Returns how many devices share each matrix."""
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and "tensor" in (mesh.mesh_dim_names or ()):
            return mesh["tensor"].size()
    return 1


def moves(name: str, value: torch.Tensor, model: Any, saved: int, now: int) -> bool:
    """Whether a tensor's rows stand in another order when `now` devices share it than when `saved` do."""
    if saved == now or value.ndim != 2:
        return False
    official = torch.arange(len(value)).unsqueeze(1)
    orders = [regrouped_rows(name, official, model.config, degree) for degree in (saved, now)]
    return not torch.equal(*orders)


def fill(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies a whole tensor, the same on all ranks, into this rank's part of a sharded one."""
    if isinstance(target, DTensor):
        whole = whole.to(target.to_local().device)
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


# ---------------------------------------------------------------------------- files


def write_tensors(folder: Path, values: dict[str, torch.Tensor], group: Any) -> None:
    """Writes tensors, or this rank's parts of them, into a folder; all ranks together.

    Args:
        folder: where; receives safetensors files.
        values: by name.
        group: of the ranks; None for a process on its own, which torch would warn at each save.
    """
    files = spread(values)
    if group is not None:
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        dcp.save(values, storage_writer=writer, process_group=group)
        return
    folder.mkdir()
    count = max(files.values(), default=0)
    for file in range(1, count + 1):
        own = {name: values[name].contiguous() for name in values if files[name] == file}
        save_file(own, folder / f"shard-00001-model-{file:05d}-of-{count:05d}.safetensors")


def read_tensors(folder: Path, values: dict[str, torch.Tensor], group: Any) -> None:
    """Fills tensors, or this rank's parts of them, in place; all ranks of the group together."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a process on its own
        dcp.load(values, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group)


def tensors_there(folder: Path) -> dict[str, Any]:
    """Returns size and type of each tensor in a folder."""
    return dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def spread(values: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Spreads tensors over files, counted from 1, of about `FILE_BYTES` of this rank's part."""
    files, file, filled = {}, 1, 0
    for name, value in values.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        if filled and filled + local.nbytes > FILE_BYTES:
            file, filled = file + 1, 0
        files[name] = file
        filled += local.nbytes
    return files


def damage(folder: Path, files: Mapping[str, Any], first: int, every: int) -> str | None:
    """Checks each `every`-th file from `first` against its size and SHA-256; says what is wrong."""
    for name, (size, digest) in list(files.items())[first::every]:
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != size:
            return f"{path}: damaged ({path.stat().st_size} bytes, {size} were written)"
        if sha256_file(path) != digest:
            return f"{path}: damaged (its bytes are not those that were written)"
    return None


def differences(found: Any, given: Any, at: str = "") -> list[str]:
    """Says where two JSON values differ: `optim.lr: 0.001 given, 0.002 found`."""
    if isinstance(found, dict) and isinstance(given, dict):
        keys = [*given, *(key for key in found if key not in given)]
        return [
            difference
            for key in keys
            for difference in differences(found.get(key), given.get(key), f"{at}.{key}" if at else key)
        ]
    if isinstance(found, list) and isinstance(given, list) and len(found) == len(given):
        pairs = enumerate(zip(found, given, strict=True))
        return [one for i, (a, b) in pairs for one in differences(a, b, f"{at}[{i}]")]
    return [] if found == given else [f"{at}: {_short(given)} given, {_short(found)} found"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: BaseException) -> str:
    """Tells an error in one line: of a failure on some rank, that rank's own."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    if isinstance(error, UserError):
        return str(error)
    if is_disk_full(error):
        return NO_SPACE
    told = " ".join(str(error).split())[:300]
    return told if isinstance(error, OSError) else f"{type(error).__name__}: {told}"


def read_about(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's run.json; what is wrong with it stands under `problem`."""
    file = folder / "run.json"
    about: Any = None
    try:
        about = read_json(file)
        whole = {"run", "phase_end", "matches"} < about.keys() and about["step"] == step_of(folder)
        whole = whole and about["tensor"] >= 1 and all(len(entry) == 2 for entry in about["files"].values())
    except UserError as error:
        return {"problem": str(error)}
    except (AttributeError, KeyError, TypeError):
        whole = False
    return about if whole else {"problem": f"{file}: damaged"}


def step_of(folder: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(folder.name.split("-")[1])


def replaced(folder: Path) -> Path:
    """Names where a checkpoint waits while one of the same step takes its place."""
    return folder.with_name(f"{folder.name}.replaced")


def ends_phase(folder: Path) -> bool:
    """Whether a phase ends at a checkpoint."""
    return bool(read_about(folder).get("phase_end"))


def as_text(value: Any) -> str:
    """Writes a JSON value."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
