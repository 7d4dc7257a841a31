"""What a flattening starts from: the model made ready, its data, the layers to shift, what to shift them towards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galenic.align.sft import keeps_apart
from galenic.flatten.config import FlattenConfig
from galenic.flatten.data import Batch, read_batches
from galenic.flatten.layers import unsuitable, weight_of
from galenic.flatten.shifts import centre_gauge
from galenic.flatten.statistics import select_layers
from galenic.model import BaichuanM1ForCausalLM, load_tokenizer
from galenic.model.foreign import KINDS, kind_of, load_any
from galenic.runtime import UserError, torch_setup


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and everything that is needed to shift it."""

    model: Any
    train: list[Batch]
    validation: list[Batch]
    """What `select: validation` chooses by; empty without it."""
    heldout: list[Batch]
    """What the result is proved on."""
    names: list[str]
    """Layers to shift."""
    head: str | None
    """The layer whose outputs are the logits; None if there is none, or if it cannot be shifted."""
    base: Mapping[str, Tensor] | None
    """Layer name -> weight of the base to stay close to."""
    notes: list[str]

    @property
    def task(self) -> str:
        """`next token`, `masked token` or `class`."""
        return self.train[0].task


def prepare(config: FlattenConfig) -> Job:
    """Loads a model and its data.

    Raises:
        UserError: the model or the data is missing or unfit, an unknown layer pattern, a base that is another network,
            a mode or gauge that needs a last layer whose outputs are the logits.
    """
    torch_setup(config.seed)
    # The other kernels of attention have no second derivative.
    model = load_any(config.model, attn_implementation="eager", kinds=KINDS)
    notes = _prepare_head(model, config)
    alone = _must_be_alone(model, config)
    train = read_batches(config, "train", model, alone)
    heldout = read_batches(config, "heldout", model, alone)
    validation: list[Batch] = []
    if config.select:
        validation, heldout = halves(heldout)
    head = softmax_head(model, train[0])
    if (config.gauge or config.mode == "curvature") and head is None:
        asked = "gauge" if config.gauge else "mode: curvature"
        raise UserError(
            f"{asked}: needs a last layer of its own whose outputs are the logits; this model has none"
        )
    if config.gauge:
        notes.append(_centre(model, str(head)))
    names = [str(head)] if config.mode == "curvature" else select_layers(model, config.layers)
    return Job(
        model=model,
        train=train,
        validation=validation,
        heldout=heldout,
        names=names,
        head=head,
        base=_base_weights(config, names) if config.base else None,
        notes=notes,
    )


def _must_be_alone(model: nn.Module, config: FlattenConfig) -> bool:
    """Whether a model of another architecture mixes packed samples, so that each needs a row of its own.

    Raises:
        UserError: the token shards are of another tokenizer than the model's.
    """
    if isinstance(model, BaichuanM1ForCausalLM):
        return False
    if kind_of(type(model).__name__) != "causal language model":
        return True
    if (
        config.tokens
        and load_tokenizer(config.tokens).get_vocab() != load_tokenizer(config.model).get_vocab()
    ):
        raise UserError(
            f"tokens: {config.tokens} has another tokenizer than {config.model}; give conversations instead"
        )
    ids = np.arange(4, 20)
    mixes = not keeps_apart(model, (ids, ids))
    if mixes and config.tokens:
        raise UserError(f"{config.model}: mixes packed documents; give conversations instead of tokens")
    return mixes


def _prepare_head(model: nn.Module, config: FlattenConfig) -> list[str]:
    """Turns a NormHead into a plain head of the same outputs if asked to; returns what to note."""
    if not isinstance(model, BaichuanM1ForCausalLM) or not model.config.norm_head:
        return []
    if config.head == "skip":
        return [
            "The NormHead was left alone: its rows are scaled to unit length, so their norm means nothing."
        ]
    model.materialize_norm_head()
    return [
        "The NormHead was turned into a plain linear head of the same outputs first; the trace before and after is "
        "that of the plain head's parameters."
    ]


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Splits data into its even and its odd rows.

    Raises:
        UserError: there is one row only.
    """
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    offset = 0
    for batch in batches:
        size = len(batch.labels)
        for parity, part in enumerate(parts):
            chosen = torch.arange((parity - offset) % 2, size, 2)
            if len(chosen):
                part.append(batch.take(chosen))
        offset += size
    if offset < 2:
        raise UserError("select: validation needs at least two rows or samples of held-out data; give more")
    return parts


@torch.no_grad()
def softmax_head(model: nn.Module, batch: Batch) -> str | None:
    """Finds the layer whose outputs, as they are, the model returns as logits, by running it on one row."""
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
        for name, module in model.named_modules()
        if not unsuitable(model, name, module)
    ]
    try:
        logits = model(**batch.take(torch.arange(1)).inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, out in outputs.items() if out is logits or _alike(out, logits)]
    return found[-1] if found else None


def _alike(output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are a view or copy of a layer's output, number for number."""
    return output.shape == logits.shape and torch.equal(output.to(logits.dtype), logits)


def _centre(model: nn.Module, head: str) -> str:
    """Centres the last layer's gauge in place; returns what to note."""
    module = model.get_submodule(head)
    assert isinstance(module, nn.Linear)
    before = float(module.weight.detach().norm())
    weight, bias = centre_gauge(module.weight, module.bias)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    after = float(weight.norm())
    return (
        f"The mean over classes was taken off '{head}' first: norm {before:.4g} to {after:.4g}, probabilities as they "
        "were on any input."
    )


def _base_weights(config: FlattenConfig, names: Sequence[str]) -> dict[str, Tensor]:
    """Loads a base model and returns its weights of some layers.

    Raises:
        UserError: the base is another network.
    """
    base = load_any(str(config.base), attn_implementation="eager", kinds=KINDS)
    _prepare_head(base, config)
    modules = dict(base.named_modules())
    for name in names:
        if name not in modules:
            raise UserError(
                f"base: {config.base} lacks layer '{name}' of {config.model}; it is another network"
            )
    return {name: weight_of(base, name).detach() for name in names}
