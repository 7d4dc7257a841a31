"""A value head on a model's last hidden states: part of the model while PPO trains, no part of what is written."""

from typing import Any

import torch

from galenic.align.policy import Reference, before, hidden_and_states
from galenic.align.token_statistics import TokenStatistics, token_statistics
from galenic.model.foreign import plain


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


def value_head_for(model: Any) -> ValueHead:
    """Makes one for the states that a model's own head is given; `with_values` looks for it at `model.value_head`."""
    return ValueHead(plain(model).get_output_embeddings().weight.shape[-1])


def with_values(
    model: Any,
    ids: torch.Tensor,
    answers: torch.Tensor,
    *,
    product: bool,
    temperature: float,
    reference: Reference | None = None,
) -> tuple[TokenStatistics, torch.Tensor]:
    """Computes the statistics of the answers' tokens, and the value of what stands before each, in one pass.

    Args:
        model: with a value head.
        ids: (rows, length) token ids; padding stands on the right, where a causal model cannot see it.
        answers: (rows, length) bool, never a row's first.
        product: what `head_is_product` says of the model.
        temperature: that tokens were sampled at.
        reference: what the model is held against.

    Returns:
        The statistics and (tokens,) values, in the order of `answers.nonzero()`.
    """
    inputs = {"input_ids": ids}
    other = None if reference is None else before(reference.states(inputs), answers)
    hidden, states = hidden_and_states(model, inputs, product=product)
    own = before(states, answers)
    found = token_statistics(own, ids[answers], reference=other, temperature=temperature)
    return found, model.value_head(before((hidden, None), answers)[0])
