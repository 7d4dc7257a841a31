"""A model under training as a Hugging Face folder, from whatever ranks hold it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from galenic.model import save
from galenic.pretrain.checkpoints.checkpoint_folder import one_line, reshard
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.ranks import gathered, rank
from galenic.runtime import UserError


def export_model(
    model: Any, parallel: Parallel, folder: Path, tokenizer: str | None, provenance: dict[str, Any]
) -> None:
    """Writes a model folder: official names, shapes and order of rows; called by all ranks together.

    Each tensor is put together in turn, and rank 0 writes it before it asks for the next one: no rank holds more than
    one whole tensor. Equal weights give the same bytes from any number of ranks.

    Args:
        model: applied to `parallel`, or plain.
        parallel: how it is spread.
        folder: where; it appears at once.
        tokenizer: folder whose tokenizer files are copied; None for none.
        provenance: how the model was made; see `galenic.model.save`.

    Raises:
        UserError: rank 0 could not write; on every rank.
    """
    reshard(model)
    tensors = _whole(model, parallel)
    problem = None
    if rank() == 0:
        try:
            save(model, folder, tokenizer=tokenizer, provenance=provenance, weights=tensors)
        except (OSError, UserError) as error:
            problem = f"{folder}: not written: {one_line(error)}"
    for _ in tensors:  # every rank takes part in every tensor, whatever became of the folder
        pass
    problem = gathered(problem)[0]
    if problem is not None:
        raise UserError(problem)


def _whole(model: Any, parallel: Parallel) -> Iterator[tuple[str, torch.Tensor]]:
    """Puts the tensors together, one after the other."""
    for name, tensor in model.state_dict().items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        yield name, parallel.official_rows(name, whole).cpu() if rank() == 0 else whole
