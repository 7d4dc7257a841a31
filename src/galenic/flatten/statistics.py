"""Gram matrices of layer inputs, collected in one forward pass over the data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from galenic.runtime import UserError, nearest


class Statistics:
    """Gram matrices of the inputs of linear layers.

    Layers fed by the very same tensor (a gate and an up projection) share one matrix: `owner` names whose.

    Attributes:
        grams: owner -> (d, d) float64, the sum of x^T x over all rows x of its inputs.
        rows: owner -> number of rows.
        owner: layer -> the layer whose matrix is also its own.
    """

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.mask: Tensor | None = None
        self._latest: tuple[Tensor, str] | None = None

    def gram(self, layer: str) -> Tensor:
        """Returns a layer's (d, d) Gram matrix in float64."""
        return self.grams[self.owner[layer]]

    def add(self, layer: str, inputs: Tensor) -> None:
        """Adds one call's inputs (..., d); rows where `mask` is zero do not count.

        Raises:
            UserError: the inputs hold NaN or infinity.
        """
        shared = self._latest[1] if self._latest and self._latest[0] is inputs else layer
        if self.owner.setdefault(layer, shared) != shared:
            raise UserError(
                f"layer '{layer}' shares its input with '{self.owner[layer]}' in some calls only; name it alone"
            )
        if shared != layer:
            return
        self._latest = (inputs, layer)
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        if self.mask is not None and self.mask.numel() == len(rows):
            rows = rows[self.mask.reshape(-1).bool()]
        rows = rows.double()
        product = rows.T @ rows
        if not torch.isfinite(product.diagonal()).all():
            raise UserError(
                f"the inputs of layer '{layer}' hold NaN or infinity; the model or its data is broken"
            )
        if layer in self.grams:
            self.grams[layer] += product
            self.rows[layer] += len(rows)
        else:
            self.grams[layer], self.rows[layer] = product, len(rows)

    def forget_call(self) -> None:
        """Ends a forward pass: tensors of the next one are others, even at the same address."""
        self._latest = None


@torch.no_grad()
def collect(model: nn.Module, loader: Iterable[Any], layers: Sequence[str] = ("*",)) -> Statistics:
    """Collects the Gram matrices of the inputs of linear layers.

    Args:
        model: put into eval mode for the pass, so that dropout is off; its mode is restored.
        loader: batches: a mapping (passed as keywords; a 2-D `attention_mask` leaves padding out), a tuple or list
            (its first item is the input) or a tensor.
        layers: names or patterns, see `select_layers`.

    Returns:
        The statistics; a layer called several times per pass counts all its calls.

    Raises:
        UserError: an unknown or unsuitable layer, an empty loader, a layer that was never called, NaN or infinity.
    """
    names = select_layers(model, layers)
    count = 0
    with watching(model, names) as statistics:
        for batch in loader:
            run_batch(model, batch, statistics)
            count += 1
    if not count:
        raise UserError("the loader is empty: there is nothing to collect statistics on")
    check_called(statistics, names)
    return statistics


@contextmanager
def watching(model: nn.Module, layers: Sequence[str]) -> Iterator[Statistics]:
    """Yields statistics that grow with every forward pass of the model (in eval mode) inside the block."""
    statistics = Statistics()
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(lambda _, inputs, name=name: statistics.add(name, inputs[0]))
        for name in layers
    ]
    training = {name for name, module in modules.items() if module.training}
    model.eval()
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
        for name in training:
            modules[name].training = True


def run_batch(model: nn.Module, batch: Any, statistics: Statistics, mask: Tensor | None = None) -> Any:
    """Runs a model on a batch of any of the accepted forms and returns its output.

    Args:
        model: what to run.
        batch: see `collect`.
        statistics: told which rows count.
        mask: (B, T), nonzero on rows that count. Default: the batch's 2-D `attention_mask`, if it has one.
    """
    if mask is None and isinstance(batch, Mapping):
        attention_mask = batch.get("attention_mask")
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
    statistics.mask = mask
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(batch[0] if isinstance(batch, tuple | list) else batch)
    statistics.forget_call()
    return output


def check_called(statistics: Statistics, layers: Sequence[str]) -> None:
    """Raises a UserError if a layer has no statistics."""
    silent = [name for name in layers if name not in statistics.owner]
    if silent:
        raise UserError(f"layer '{silent[0]}' was never called by the model's forward pass; leave it out")


# ---------------------------------------------------------------------------- which layers


def select_layers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Returns the names of the linear layers that patterns name, in the model's order.

    A pattern may hold `*` for any text; it takes the layers that can be shifted and passes over the others. A full
    name insists.

    Raises:
        UserError: a pattern that matches nothing (nearest names given), or a full name of a layer that cannot be
            shifted (why is said).
    """
    modules = {name: module for name, module in model.named_modules() if name}
    reasons = {name: unsuitable(model, name, module) for name, module in modules.items()}
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern in modules:
            if reasons[pattern]:
                raise UserError(f"layers: '{pattern}' cannot be shifted: {reasons[pattern]}")
            chosen.add(pattern)
            continue
        matches = {name for name in modules if fnmatchcase(name, pattern) and not reasons[name]}
        if not matches:
            linear = [name for name in modules if not reasons[name]]
            hint = nearest(pattern, linear) or f"; linear layers: {', '.join(linear[:4])} ..."
            raise UserError(f"layers: '{pattern}' matches no linear layer of the model{hint}")
        chosen |= matches
    return [name for name in modules if name in chosen]


def unsuitable(model: nn.Module, name: str, module: nn.Module) -> str:
    """Says why a module cannot be shifted, or returns an empty string."""
    if isinstance(module, nn.Embedding):
        return "an embedding's inputs are single tokens: tokens not in the data would become zero"
    if "NormHead" in type(module).__name__:
        return "a NormHead scales its rows to unit length; make it a plain head first (head: materialise)"
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return f"it is a {type(module).__name__}, not a linear layer"
    if "weight" not in module._parameters:
        return "its weight is parametrised"
    if not module.weight.dtype.is_floating_point:
        return f"its weight is quantised ({module.weight.dtype})"
    for other, holder in model.named_modules():
        if other != name and any(p is module.weight for p in holder._parameters.values()):
            return f"its weight is tied to '{other}'"
    return ""
