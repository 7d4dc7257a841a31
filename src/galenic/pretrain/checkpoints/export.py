"""A model under training as a Hugging Face folder, from whatever ranks hold it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from galenic.model import save
from galenic.pretrain.checkpoints.checkpoint_folder import one_line, reshard
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.ranks import gathered, rank
from galenic.runtime import UserError

Tensors = Iterable[tuple[str, torch.Tensor]]
"""Names and whole tensors."""


def export_model(
    model: Any, parallel: Parallel, folder: Path, tokenizer: str | None, provenance: dict[str, Any]
) -> None:
    """Writes a model folder: official names, shapes and order of rows; called by all ranks together.

    Args:
        model: applied to `parallel`, or plain.
        parallel: how it is spread.
        folder: where; it appears at once.
        tokenizer: folder whose tokenizer files are copied; None for none.
        provenance: how the model was made; see `galenic.model.save`.

    Raises:
        UserError: rank 0 could not write; on every rank.
    """

    def write(tensors: Tensors) -> None:
        save(model, folder, tokenizer=tokenizer, provenance=provenance, weights=tensors)

    export(model, parallel, folder, write)


def export(
    model: Any,
    parallel: Parallel,
    folder: Path,
    write: Callable[[Tensors], None],
    *,
    wanted: Callable[[torch.Tensor], bool] = lambda parameter: True,
) -> None:
    """Puts a model's tensors together and lets rank 0 write them; called by all ranks together.

    Each tensor is put together in turn, and rank 0 takes it before it asks for the next one: where it writes one after
    the other, no rank holds more than one whole tensor. Equal weights give the same bytes from any number of ranks.

    Args:
        model: applied to `parallel`, or plain.
        parallel: how it is spread.
        folder: that is written.
        write: called on rank 0.
        wanted: which of the model's parameters and buffers.

    Raises:
        UserError: rank 0 could not write; on every rank.
    """
    reshard(model)
    tensors = _whole(model, parallel, wanted)
    problem = None
    if rank() == 0:
        try:
            write(tensors)
        except (OSError, UserError) as error:
            problem = f"{folder}: not written: {one_line(error)}"
    for _ in tensors:  # every rank takes part in every tensor, whatever became of the folder
        pass
    problem = gathered(problem)[0]
    if problem is not None:
        raise UserError(problem)


def _whole(
    model: Any, parallel: Parallel, wanted: Callable[[torch.Tensor], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Puts the tensors together, one after the other; one with two names is one tensor under both."""
    state = model.state_dict(keep_vars=True)
    names = Counter(map(id, state.values()))
    tied: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        if not wanted(tensor):
            continue
        whole = tied.get(id(tensor))
        if whole is None:
            whole = tensor.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if rank() == 0:
                whole = parallel.official_rows(name, whole).cpu()
            if names[id(tensor)] > 1:
                tied[id(tensor)] = whole
        yield name, whole
