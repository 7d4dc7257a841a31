"""Small float64 networks with unequal batches, and their dense matrices."""

import torch
from torch import nn
from torch.func import functional_call

from galenic.flatten.products import Operator


class Problem:
    """A network of 57 parameters on 17 samples in batches of 12 and 5, softmax cross-entropy."""

    def __init__(self, seed, activation=nn.Tanh, hidden=6, dtype=torch.float64):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, hidden), activation(), nn.Linear(hidden, 3)).to(dtype)
        self.x, self.y = torch.randn(17, 5, dtype=dtype), torch.randint(0, 3, (17,))
        self.batches = [(self.x[:12], self.y[:12]), (self.x[12:], self.y[12:])]
        self.parameters = list(self.model.parameters())

    def loss_fn(self, batch):
        return self.loss_of_outputs(self.outputs_fn(batch), batch)

    def outputs_fn(self, batch):
        return self.model(batch[0])

    def loss_of_outputs(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])

    def logits_of(self, flat):
        """The logits of all samples as a function of all parameters in one vector."""
        parts = flat.split([p.numel() for p in self.parameters])
        names = [name for name, _ in self.model.named_parameters()]
        state = {n: v.view_as(p) for n, v, p in zip(names, parts, self.parameters, strict=True)}
        return functional_call(self.model, state, (self.x,))

    @property
    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def dense_hessian(self):
        return torch.autograd.functional.hessian(
            lambda flat: nn.functional.cross_entropy(self.logits_of(flat), self.y), self.flat
        )

    def dense_gauss_newton(self):
        jacobian = torch.autograd.functional.jacobian(self.logits_of, self.flat)  # (N, K, size)
        logits = self.logits_of(self.flat)
        by_logits = torch.autograd.functional.hessian(
            lambda z: nn.functional.cross_entropy(z, self.y), logits
        )  # (N, K, N, K)
        return torch.einsum("nkp,nkml,mlq->pq", jacobian, by_logits, jacobian)


def operator_of(matrix):
    """A dense symmetric matrix as an operator."""
    return Operator(
        size=len(matrix),
        device=matrix.device,
        epsilon=torch.finfo(matrix.dtype).eps,
        product=lambda vectors: matrix @ vectors,
    )


def matrix_of(operator):
    """All columns of an operator."""
    return operator.product(torch.eye(operator.size, dtype=torch.float64))


def source(seed=0):
    return torch.Generator().manual_seed(seed)
