"""A model's last hidden states instead of its logits, which are large: made only where they are needed.

The states are taken in the model's own forward pass, whose head stands aside, so that adapters, shards, caches and
hooks work as ever. A few architectures do more to logits than multiply (scale, cap, bias): that is tried on the model
itself, and theirs are taken whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from galenic.model.foreign import plain


@contextmanager
def _giving(head: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Lets something else stand in a head's place."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def head_is_product(model: Any) -> bool:
    """Whether the model's logits are its last hidden states times its head's weight, and nothing more.

    What the head gives has to come out of the model as it is: tried with numbers so far apart that any scale, cap or
    bias shows.
    """
    head = plain(model).get_output_embeddings()
    if not (hasattr(head, "normalized_weight") or (type(head) is torch.nn.Linear and head.bias is None)):
        return False
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    size = head.weight.shape[0]
    given = torch.linspace(-100, 100, 2 * size, device=ids.device).view(1, 2, size)
    with _giving(head, lambda hidden: given):
        logits = model(input_ids=ids, use_cache=False).logits
    return logits.shape == given.shape and torch.equal(logits.float(), given)


@contextmanager
def head_aside(model: Any) -> Iterator[Any]:
    """Lets a model give its last hidden states (rows, length, width) as `logits`; yields its head.

    Only for a model of which `head_is_product` says so.
    """
    head = plain(model).get_output_embeddings()
    with _giving(head, lambda hidden: hidden):
        yield head
