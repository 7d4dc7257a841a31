"""The model being aligned and its reference, as hidden states and a head: logits are made where they are needed."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from galenic.align.config import ReferenceConfig
from galenic.align.token_statistics import States, TokenStatistics, token_statistics
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any, plain
from galenic.model.head import head_aside, head_is_product
from galenic.runtime import UserError

# ---------------------------------------------------------------------------- hidden states and head


def states(model: Any, inputs: Mapping[str, torch.Tensor], *, product: bool) -> States:
    """Returns a model's last hidden states (rows, length, width) and its head's weight, or its logits and None.

    Args:
        model: a causal language model, with an adapter or without.
        inputs: `input_ids`, and `position_ids` or `attention_mask` where they are needed.
        product: what `head_is_product` says of it.
    """
    if not product:
        return model(**inputs, use_cache=False).logits, None
    with head_aside(model) as head:
        hidden = model(**inputs, use_cache=False).logits
    # Sharded weights are whole from the forward pass to the end of the backward pass. Ours has rows of unit length.
    return hidden, head.normalized_weight() if hasattr(head, "normalized_weight") else head.weight


def hidden_and_states(
    model: Any, inputs: Mapping[str, torch.Tensor], *, product: bool
) -> tuple[torch.Tensor, States]:
    """Returns the last hidden states (rows, length, width) of any model, and with them what `states` does."""
    kept: list[torch.Tensor] = []
    head = plain(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        found = states(model, inputs, product=product)
    finally:
        hook.remove()
    return kept[0], found


# ---------------------------------------------------------------------------- the reference


class Reference:
    """The model that a policy is held against; it never learns.

    Args:
        policy: as it is before training, on no device yet.
        config: which model, and where it waits.
        base: folder that the policy was loaded from.
        parallel: spreads a copy as it spreads the policy (`galenic.pretrain.parallelism.Parallel`).

    Raises:
        UserError: another model has other tokens than the policy.
    """

    def __init__(self, policy: Any, config: ReferenceConfig, *, base: str, parallel: Any = None) -> None:
        self.policy, self.offload = policy, config.offload
        self.model: Any = None  # none of its own: the base under the policy's adapter
        if config.model is not None and config.model != base:
            self.model = load_any(config.model)
            _refuse_other_tokens(policy, base, self.model, config.model)
        elif not _has_adapter(policy):
            self.model = copy.deepcopy(policy)
        self.product = head_is_product(policy if self.model is None else self.model)
        if self.model is not None:
            self.model.requires_grad_(False).eval()
            if parallel is not None:
                if parallel.precision == "bfloat16":  # it computes in that, and never learns
                    for parameter in self.model.parameters():
                        parameter.data = parameter.data.bfloat16()
                parallel.apply(self.model)
            if self.offload:
                self.model.to("cpu")

    @torch.no_grad()
    def states(self, inputs: Mapping[str, torch.Tensor]) -> States:
        """Returns its hidden states and head; see `states`."""
        if self.model is None:
            with _without_adapter(self.policy):
                return states(self.policy, inputs, product=self.product)
        if not self.offload:
            return states(self.model, inputs, product=self.product)
        self.model.to(next(iter(inputs.values())).device)
        hidden, head = states(self.model, inputs, product=self.product)
        head = None if head is None else head.clone()  # the model takes its own along
        self.model.to("cpu")
        return hidden, head


def _refuse_other_tokens(policy: Any, base: str, other: Any, folder: str) -> None:
    sizes = [plain(model).config.vocab_size for model in (policy, other)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"reference.model: {folder} has {sizes[1]} tokens, {base} has {sizes[0]}: only a model with the same "
            "tokenizer can be a reference"
        )
    if load_tokenizer(folder).get_vocab() != load_tokenizer(base).get_vocab():
        raise UserError(
            f"reference.model: {folder} has other tokens than {base}: only a model with the same tokenizer can be a "
            "reference"
        )


def _has_adapter(model: Any) -> bool:
    return plain(model) is not model


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """Lets a PEFT model compute as its base does.

    PEFT's own way also says of the adapter that it is not trained, and shards that are whole at that moment (FSDP2)
    would go on to say so.
    """
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


# ---------------------------------------------------------------------------- tokens


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
    other = None if reference is None else before(reference.states(inputs), wanted)
    own = before(states(policy, inputs, product=product), wanted)
    return token_statistics(own, inputs["input_ids"][wanted], reference=other, temperature=temperature)


def before(found: States, wanted: torch.Tensor) -> States:
    """Returns the states that tokens are predicted from: those of the places before them.

    Args:
        found: states (rows, length, width), and the head.
        wanted: (rows, length) bool, the tokens; never a row's first.

    Returns:
        States (wanted.sum(), width) in the order of `wanted.nonzero()`, and the head.
    """
    hidden, head = found
    return hidden[wanted.roll(-1, 1)], head


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


def laid(sequences: list[list[int]], prompts: list[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lays prompts with their answers into (rows, longest) int64; and tells which tokens are the answers', bool.

    Args:
        sequences: each a prompt and its answer.
        prompts: tokens of each prompt.
        pad: fills up on the right.
    """
    ids = padded(sequences, pad)
    places, ends = torch.arange(ids.shape[1]), [len(sequence) for sequence in sequences]
    first, last = (torch.tensor(numbers)[:, None] for numbers in (prompts, ends))
    return ids, (places >= first) & (places < last)
