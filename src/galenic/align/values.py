"""A value head on a model's last hidden states: a part of the model while PPO trains, and no part of what is exported.

The states are those that the model's own head is given, in its own forward pass: adapters, shards and heads that do
more than multiply stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from galenic.align.policy import Reference, plain, statistics
from galenic.align.token_statistics import TokenStatistics


class ValueHead(torch.nn.Module):
    """A value of each of a model's last hidden states: (..., width) -> (...), 0 to begin with.

    A vector and a number: optimizers that treat matrices in their own way leave it alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes values, at least in float32."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(exact) @ self.weight.to(exact) + self.bias.to(exact)


def add_value_head(model: Any) -> None:
    """Makes a value head a part of the model, which is trained, sharded and kept in checkpoints with it."""
    model.value_head = ValueHead(plain(model).get_output_embeddings().weight.shape[-1])


@contextmanager
def _heard(model: Any) -> Iterator[list[torch.Tensor]]:
    """Keeps what is given to the model's head in passes meanwhile: last hidden states (rows, length, width)."""
    kept: list[torch.Tensor] = []
    head = plain(model).get_output_embeddings()
    listener = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        yield kept
    finally:
        listener.remove()


def with_values(
    model: Any,
    ids: torch.Tensor,
    answers: torch.Tensor,
    *,
    product: bool,
    temperature: float,
    reference: Reference | None = None,
) -> tuple[TokenStatistics, torch.Tensor]:
    """Computes the statistics of the answers' tokens, and the value of what stands before each.

    Args:
        model: with a value head.
        ids: (rows, length) token ids.
        answers: (rows, length) bool, never a row's first.
        product: what `head_is_product` says of the model.
        temperature: that tokens were sampled at.
        reference: what the model is held against.

    Returns:
        The statistics and (tokens,) values, in the order of `answers.nonzero()`, all from one pass.
    """
    with _heard(model) as hidden:
        found = statistics(
            model,
            {"input_ids": ids},
            answers,
            product=product,
            reference=reference,
            temperature=temperature,
        )
    # The last pass is the policy's: a reference that is the base under its adapter comes before.
    return found, model.value_head(hidden[-1][answers.roll(-1, 1)])
