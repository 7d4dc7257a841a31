"""The model being aligned and its reference, as hidden states and a head: logits are made where they are needed.

The states are taken in the model's own forward pass, whose head stands aside, so that adapters, shards and hooks work
as ever. A few architectures do more to logits than multiply (scale, cap, bias): that is tried on the model itself, and
theirs are taken whole.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from galenic.align.config import ReferenceConfig
from galenic.align.token_statistics import States, TokenStatistics, token_statistics
from galenic.model.foreign import load_any
from galenic.runtime import UserError


def plain(model: Any) -> Any:
    """Returns the causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _aside(head: torch.nn.Module) -> Iterator[None]:
    """Lets a head pass on what it is given."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def head_is_product(model: Any) -> bool:
    """Whether the model's logits are its last hidden states times its head's weight, tried on a few tokens."""
    inner = plain(model)
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None] % inner.config.vocab_size
    head = inner.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return False
    logits = model(input_ids=ids, use_cache=False).logits.float()
    with _aside(head):
        hidden = model(input_ids=ids, use_cache=False).logits
    weight = _weight(inner)
    return weight.shape[1] == hidden.shape[-1] and torch.allclose(
        hidden.float() @ weight.float().T, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())
    )


def _weight(inner: Any) -> torch.Tensor:
    """The head's weight as it multiplies, (vocabulary, width)."""
    head = inner.get_output_embeddings()
    # Ours has rows of unit length.
    return head.normalized_weight() if hasattr(head, "normalized_weight") else head.weight


def states(model: Any, inputs: Mapping[str, torch.Tensor], *, product: bool) -> States:
    """Returns a model's last hidden states (rows, length, width) and its head.

    Args:
        model: a causal language model, with an adapter or without.
        inputs: `input_ids`, and `position_ids` or `attention_mask` where they are needed.
        product: what `head_is_product` says of it.
    """
    if not product:
        return model(**inputs, use_cache=False).logits, None
    inner = plain(model)
    with _aside(inner.get_output_embeddings()):
        hidden = model(**inputs, use_cache=False).logits
    return hidden, _weight(inner)


class Reference:
    """The model that a policy is held against; it never learns.

    Args:
        policy: as it is before training.
        config: which model, and where it waits.
        base: folder that the policy was loaded from.
        parallel: spreads a copy as it spreads the policy (`galenic.pretrain.parallelism.Parallel`).

    Raises:
        UserError: another model's vocabulary differs from the policy's.
    """

    def __init__(self, policy: Any, config: ReferenceConfig, *, base: str, parallel: Any = None) -> None:
        self.policy, self.offload = policy, config.offload
        self.model: Any = None  # none of its own: the base under the policy's adapter
        if config.model is not None and config.model != base:
            self.model = load_any(config.model)
            sizes = [plain(model).config.vocab_size for model in (policy, self.model)]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"reference.model: {config.model} has {sizes[1]} tokens, {base} has {sizes[0]}: only a model with "
                    "the same tokenizer can be a reference"
                )
        elif not hasattr(policy, "disable_adapter"):
            self.model = copy.deepcopy(policy)
        if self.model is not None:
            self.model.requires_grad_(False).eval()
            if parallel is not None:
                parallel.apply(self.model)
        self.product = head_is_product(policy if self.model is None else self.model)

    @torch.no_grad()
    def states(self, inputs: Mapping[str, torch.Tensor]) -> States:
        """Returns its hidden states and head; see `states`."""
        if self.model is None:
            with self.policy.disable_adapter():
                return states(self.policy, inputs, product=self.product)
        with self._here(next(iter(inputs.values())).device):
            return states(self.model, inputs, product=self.product)

    @contextmanager
    def _here(self, device: torch.device) -> Iterator[None]:
        if not self.offload:
            yield
            return
        self.model.to(device)
        yield
        self.model.to("cpu")


def statistics(
    policy: Any,
    inputs: Mapping[str, torch.Tensor],
    wanted: torch.Tensor,
    *,
    product: bool,
    reference: Reference | None = None,
    temperature: float = 1.0,
) -> TokenStatistics:
    """Computes the statistics of the tokens that are wanted, each given those before it.

    Args:
        policy: with gradient, if it has one here.
        inputs: `input_ids` (rows, length) and what else the model takes. Padding stands on the right, where a causal
            model cannot see it.
        wanted: (rows, length) bool, tokens whose statistics are wanted; never a row's first.
        product: what `head_is_product` says of the policy.
        reference: what it is held against.
        temperature: of both distributions.

    Returns:
        (wanted.sum(),) each, in the order of `wanted.nonzero()`.
    """
    targets = inputs["input_ids"][wanted]
    before = wanted.roll(-1, 1)  # the state that a token is predicted from is the one before it
    other = None
    if reference is not None:
        hidden, head = reference.states(inputs)
        other = hidden[before], head
    hidden, head = states(policy, inputs, product=product)
    return token_statistics((hidden[before], head), targets, reference=other, temperature=temperature)


def per_row(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Sums the values of wanted tokens by row: (wanted.sum(),) -> (rows,), of the values' type and with gradient."""
    rows = wanted.nonzero()[:, 0]
    return values.new_zeros(len(wanted)).index_add(0, rows, values)


def padded(sequences: list[list[int]], pad: int) -> torch.Tensor:
    """Lays sequences into (rows, longest) int64, filled up on the right."""
    ids = torch.full((len(sequences), max(map(len, sequences))), pad, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids
