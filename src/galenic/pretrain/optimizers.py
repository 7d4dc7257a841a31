"""The optimizers of training: AdamW, or Muon for the layers' matrices."""

from typing import Any

import torch

from galenic.pretrain.config import OptimConfig


def parameter_groups(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
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


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> Any:
    """Makes the optimizer of a model's trained parameters; the rate of each step is the caller's to set."""
    matrices, others = parameter_groups(model)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
