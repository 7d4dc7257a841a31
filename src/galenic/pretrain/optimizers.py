"""The optimizers of training: AdamW, or Muon for the layers' matrices and AdamW for the rest.

Both know sharded parameters (DTensors): AdamW works entry by entry, Muon puts each matrix together before it
orthogonalises, so that any number of processes takes the step that one takes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from galenic.pretrain.config import OptimConfig


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> Any:
    """Makes the optimizer of a model's trained parameters; the rate of each step is the caller's to set.

    Returns:
        What has `param_groups`, `state` (parameter -> tensors by name), `step()` and `zero_grad()`.
    """
    matrices, others = trained_parameters(model)
    groups = _groups(others, 0.0)
    if config.name == "adamw":
        groups = _groups(matrices, config.weight_decay) + groups
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    muon = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay)
    if not groups:  # an adapter has matrices only
        return muon
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    return Both(muon, adamw)


def trained_parameters(model: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns (the layers' matrices, all other parameters that are trained).

    Norms, convolution taps, embedding and head are spared from weight decay. Only the direction of a NormHead row
    counts: decay would shrink the rows of rare words and so raise their gradients without end.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim != 2 or "embed_tokens" in name or "lm_head" in name
            (others if spared else matrices).append(parameter)
    return matrices, others


def _groups(parameters: Iterable[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters of one decay; the fused kernel takes those together that lie on one mesh of devices."""
    by_mesh: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        by_mesh[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return [{"params": found, "weight_decay": weight_decay} for found in by_mesh.values()]


class Both:
    """Two optimizers of different parameters as one: one list of groups, one state."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = first, second
        self.state = second.state = first.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Both take a step."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


# ---------------------------------------------------------------------------- Muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5, as steep at zero as keeps [0, 1] bounded (Keller Jordan, Muon)."""


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Brings all singular values of a matrix near 1 by Newton-Schulz steps, without computing them.

    X <- a X + b (X X^T) X + c (X X^T)^2 X from X = matrix / its Frobenius norm. Singular values end in about
    [0.7, 1.2], those far below the largest one may stay smaller.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).

    Args:
        matrix: [m, n], computed in its own precision.
        steps: of the iteration.

    Returns:
        [m, n].
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices; `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` for sharded ones too.

        B <- m B + (1 - m) G                    momentum, kept as the parameter is sharded
        U = (1 - m) G + m B                     Nesterov
        W <- W (1 - lr decay) - 0.2 lr sqrt(max(rows, columns)) orthogonalised(U)

    The factor gives the update the size of AdamW's, so that both share one rate. Every process gathers each matrix and
    orthogonalises it whole, in bfloat16 on CUDA: torch's own takes sharded products of DTensors instead, whose
    bfloat16 roundings depend on the number of processes.

    Sources: Keller Jordan, "Muon" (2024); Liu et al., arXiv 2502.16982, section 2.2 (the factor).
    """

    def __init__(
        self, parameters: list[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes a step; the loss is not computed again, as a closure would have it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._update(parameter, parameter.grad, group["momentum"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(parameter.shape)))

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
        """Returns the orthogonalised momentum, sharded as the parameter is."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum)
        if update.is_cuda:
            update = update.bfloat16()
        whole = orthogonalised(update.full_tensor() if isinstance(update, DTensor) else update)
        whole = whole.to(parameter.dtype)
        if not isinstance(parameter, DTensor):
            return whole
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
