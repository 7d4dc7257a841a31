"""Products of a loss's Hessian or generalised Gauss-Newton matrix with vectors, over batches, without the matrix.

Every matrix here is of the mean loss over all samples (or tokens) of all batches,

    H = sum_b H_b / sum_b n_b,    H_b of batch b's summed loss,

exactly that of one large batch: batches of unequal size count by their size. One batch's graph is alive at a time,
and sums over batches are float64.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from galenic.runtime import Bar, UserError, nearest

Linearised = tuple[int, Callable[[Sequence[Tensor]], Sequence[Tensor]]]
"""A batch's count and the product of its matrix with one vector, in parts shaped like the parameters."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A symmetric matrix known by its products."""

    size: int
    """Rows, and columns: the number of entries of all parameters together, in their order, each flattened."""

    device: torch.device
    """Where vectors live."""

    epsilon: float
    """Spacing of the numbers that products are computed in: the precision of the parameters' type."""

    product: Callable[[Tensor], Tensor]
    """(size, k) float64 -> (size, k) float64: k products in one pass over the data."""


def hessian(
    loss_fn: Callable[[Any], tuple[Tensor, int]],
    parameters: Iterable[Tensor],
    batches: Sequence[Any],
    *,
    bar: Bar | None = None,
) -> Operator:
    """Returns the Hessian of the mean loss as an operator.

        H v = d/dtheta (dL/dtheta . v)

    Args:
        loss_fn: batch -> (summed loss, number of samples or tokens); must allow a second derivative (attention:
            eager), and must not draw at random (dropout off), or every product is of another matrix.
        parameters: what to differentiate by, all of one device; those that need no gradient are left out, and a
            tied one counts once. A part of the model's parameters gives that block of the matrix.
        batches: the data, gone through once for each call of `product`.
        bar: advanced by one for each vector and batch.

    Raises:
        UserError: no parameters or batches; a loss or a product that is NaN or infinite.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    tensors = distinct(parameters)
    return _operator(lambda batch: linearise_loss(loss_fn, tensors, batch), tensors, batches, bar)


def gauss_newton(
    outputs_fn: Callable[[Any], Tensor],
    loss_of_outputs: Callable[[Tensor, Any], tuple[Tensor, int]],
    parameters: Iterable[Tensor],
    batches: Sequence[Any],
    *,
    bar: Bar | None = None,
) -> Operator:
    """Returns the generalised Gauss-Newton matrix of the mean loss as an operator.

        G = J^T H_z J,    J = dz/dtheta,    H_z = the loss's Hessian by the outputs z

    It is the Hessian without the network's own curvature, and positive semi-definite when the loss is convex in z.

    Args:
        outputs_fn: batch -> outputs z, one tensor of any shape.
        loss_of_outputs: (outputs, batch) -> (summed loss, number of samples or tokens).
        parameters: as in `hessian`.
        batches: as in `hessian`.
        bar: as in `hessian`.

    Raises:
        UserError: as in `hessian`.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products". J v by two backward passes: u -> J^T u is
    linear, and its own backward pass is J.
    """
    tensors = distinct(parameters)

    def linearise(batch: Any) -> Linearised:
        outputs = outputs_fn(batch)
        point = outputs.detach().requires_grad_()
        loss, count = loss_of_outputs(point, batch)
        check_finite(loss)
        (slope,) = torch.autograd.grad(loss, point, create_graph=True, materialize_grads=True)
        weights = torch.zeros_like(outputs, requires_grad=True)
        pulled = gradients_of(outputs, tensors, weights, create_graph=True)

        def multiply(vector: Sequence[Tensor]) -> Sequence[Tensor]:
            (pushed,) = _products(pulled, [weights], vector)
            (curved,) = _products([slope], [point], [pushed])
            return gradients_of(outputs, tensors, curved, retain_graph=True)

        return count, multiply

    return _operator(linearise, tensors, batches, bar)


def scaled(operator: Operator, scale: Tensor) -> Operator:
    """Returns D A D for an operator A and D = diag(scale), a (size,) float64 tensor."""
    column = scale[:, None]
    return Operator(
        size=operator.size,
        device=operator.device,
        epsilon=operator.epsilon,
        product=lambda vectors: column * operator.product(column * vectors),
    )


def parameter_groups(model: nn.Module, patterns: Iterable[str]) -> dict[str, list[Tensor]]:
    """Sorts a model's parameters into groups, so that each group's block of a matrix can be measured by itself.

    A pattern is a parameter's name or part of the model's tree with `*` for any text: `layers.0.*`, `*.attn.*`. A
    parameter goes to the first pattern that takes it; a tied one counts once, under its first name; those that need
    no gradient are left out. The traces of the groups' blocks add up to that of all groups together.

    Raises:
        UserError: a pattern that takes no parameter (nearest names given).
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: dict[str, list[Tensor]] = {pattern: [] for pattern in patterns}
    for name, parameter in named.items():
        for pattern, members in groups.items():
            if fnmatchcase(name, pattern):
                members.append(parameter)
                break
    for pattern, members in groups.items():
        if not members:
            taken = any(fnmatchcase(name, pattern) for name in named)
            why = "only parameters that earlier patterns took" if taken else "no parameter with a gradient"
            raise UserError(f"parameters: '{pattern}' takes {why}{nearest(pattern, named)}")
    return groups


# ---------------------------------------------------------------------------- one batch


def linearise_loss(
    loss_fn: Callable[[Any], tuple[Tensor, int]], tensors: Sequence[Tensor], batch: Any, blocks: int = 1
) -> Linearised:
    """Returns a batch's count and its Hessian's product; the graph lives as long as the latter.

    With more blocks than one, the product is with the Hessian's diagonal blocks, of so many runs of tensors.
    """
    loss, count = loss_fn(batch)
    check_finite(loss)
    gradients = gradients_of(loss, tensors, create_graph=True)
    edges = [len(tensors) * index // blocks for index in range(blocks + 1)]
    runs = [slice(begin, end) for begin, end in itertools.pairwise(edges) if begin < end]

    def multiply(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        return [part for run in runs for part in _products(gradients[run], tensors[run], vector[run])]

    return count, multiply


def gradients_of(
    outputs: Tensor, tensors: Sequence[Tensor], weights: Tensor | None = None, **how: bool
) -> Any:
    """Returns the gradients of outputs (weighted), zeros where they do not depend on a tensor."""
    if not outputs.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return torch.autograd.grad(outputs, tensors, weights, allow_unused=True, materialize_grads=True, **how)


def _products(
    gradients: Sequence[Tensor], tensors: Sequence[Tensor], vector: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Returns the derivative of gradients . vector by the tensors; the gradients' graph is kept."""
    curved = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
    if not curved:  # gradients that depend on nothing: a loss that is linear in every tensor
        return [torch.zeros_like(tensor) for tensor in tensors]
    outputs, directions = zip(*curved, strict=True)
    try:
        return torch.autograd.grad(
            outputs, tensors, directions, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        step = str(error).removeprefix("derivative for ").split()[0]
        raise UserError(
            f"{step} has no second derivative in PyTorch; for attention load the model with "
            "attn_implementation='eager', or run inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        ) from error


# ---------------------------------------------------------------------------- all batches


def _operator(
    linearise: Callable[[Any], Linearised], tensors: list[Tensor], batches: Sequence[Any], bar: Bar | None
) -> Operator:
    size, device = sum(tensor.numel() for tensor in tensors), tensors[0].device
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in tensors)

    def product(vectors: Tensor) -> Tensor:
        rows = vectors.T.contiguous()  # entries of a vector side by side
        total = torch.zeros_like(rows, dtype=torch.float64)
        count = 0
        for batch in batches:
            number, multiply = linearise(batch)
            count += number
            for row, vector in zip(total, rows, strict=True):
                row += flatten(multiply(shaped_like(tensors, vector)))
                if bar:
                    bar.update()
            del multiply  # this batch's graph, before the next one grows
        check_data(count, total)
        return total.div_(count).T

    return Operator(size=size, device=device, epsilon=epsilon, product=product)


def distinct(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns each parameter that needs a gradient once.

    Raises:
        UserError: there is none.
    """
    tensors = list({id(p): p for p in parameters if p.requires_grad}.values())
    if not tensors:
        raise UserError("no parameter needs a gradient: curvature is taken by those with requires_grad=True")
    return tensors


def flatten(parts: Iterable[Tensor]) -> Tensor:
    """Returns all entries in one (size,) float64 vector."""
    return torch.cat([part.detach().reshape(-1).double() for part in parts])


def shaped_like(tensors: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
    """Cuts a (size,) vector into parts of the tensors' shapes, types and device."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [
        part.reshape(tensor.shape).to(device=tensor.device, dtype=tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


@contextmanager
def restored(tensors: Mapping[Any, Tensor]) -> Iterator[dict[Any, Tensor]]:
    """Yields copies of tensors by name, and puts them back at the end of the block, whatever happens."""
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield kept
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])


def check_finite(loss: Tensor) -> None:
    """Raises a UserError if a loss is NaN or infinite."""
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss is {loss.item()}: its curvature cannot be estimated; "
            "look for a broken model, a bad batch or numbers too large for the model's type"
        )


def check_data(count: int, products: Tensor) -> None:
    """Raises a UserError if there was no data, or if a product is NaN or infinite though the loss was not."""
    if not count:
        raise UserError(
            "there are no batches: a Hessian needs data, in a list, since it is gone through several times"
        )
    if not torch.isfinite(products).all():
        raise UserError(
            "the loss is finite but its second derivative is not: a root or norm at zero, or numbers too large; "
            "try the model in float32 or float64, or leave the layer out of the parameters"
        )


# ---------------------------------------------------------------------------- probes


def probe_seeds(probes: int, generator: torch.Generator) -> list[int]:
    """Draws one seed for each probe: the same state of the generator gives the same probes."""
    return torch.randint(2**62, (probes,), generator=generator).tolist()


def signs(seed: int, size: int) -> Tensor:
    """Returns the probe that a seed stands for: (size,) int8 of independent entries +1 and -1."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=source, dtype=torch.int8).mul_(2).sub_(1)


def probe_matrix(seeds: Sequence[int], operator: Operator) -> Tensor:
    """Returns the probes of seeds as columns, (size, k) float64 on the operator's device."""
    return torch.stack([signs(seed, operator.size) for seed in seeds]).to(operator.device, torch.float64).T
