"""What a model and its reference say of given tokens, without ever holding the logits of a whole batch.

For a position with logits z, policy p = softmax(z / T) and reference q, and the token y that follows:

                                        derivative by z / T
    log p(y)                            1[v = y] - p(v)
    H  = -sum_v p(v) log p(v)           -p(v) (log p(v) + H)            entropy
    KL = sum_v q(v) log(q(v) / p(v))    p(v) - q(v)                     forward divergence, KL(q || p)

Logits are made of hidden states in chunks, and made again for the gradients: memory is two or three chunks of each
model and the gradients themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 2**24
"""Logits made at a time, of each model."""

States = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states (..., width) and the head's weight (vocabulary, width); no weight: they are logits already."""


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Each (tokens,), in float32 or more; what belongs to a reference is None without one."""

    log_probs: torch.Tensor
    """log p(y), nats."""
    entropy: torch.Tensor
    """Of p, nats."""
    reference_log_probs: torch.Tensor | None
    """log q(y), nats; without gradient."""
    kl: torch.Tensor | None
    """KL(q || p) over the whole vocabulary, nats."""


def token_statistics(
    policy: States,
    targets: torch.Tensor,
    *,
    reference: States | None = None,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenStatistics:
    """Computes them for every token; gradients flow to the policy's states and head, once.

    Args:
        policy: hidden states (tokens, width) and head.
        targets: (tokens,) int64, the token that follows each state.
        reference: the same of the reference, whose vocabulary is the same; its width may be another.
        temperature: T, of both distributions.
        chunk_elements: logits made at a time.

    Raises:
        ValueError: the vocabularies differ.
    """
    sizes = [_vocabulary(states) for states in (policy, reference) if states is not None]
    if len(set(sizes)) > 1:
        raise ValueError(f"the policy has {sizes[0]} tokens, the reference {sizes[1]}")
    rows = max(1, chunk_elements // sizes[0])
    found = _Statistics.apply(*policy, targets, *(reference or (None, None)), temperature, rows)
    log_probs, entropy, *others = found
    reference_log_probs, kl = others or (None, None)
    return TokenStatistics(
        log_probs=log_probs, entropy=entropy, reference_log_probs=reference_log_probs, kl=kl
    )


def _vocabulary(states: States) -> int:
    hidden, head = states
    return hidden.shape[-1] if head is None else head.shape[0]


class _Statistics(torch.autograd.Function):
    """The statistics of all tokens, chunk after chunk, forward and back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor | None,
        targets: torch.Tensor,
        other: torch.Tensor | None,
        other_head: torch.Tensor | None,
        temperature: float,
        rows: int,
    ) -> tuple[torch.Tensor, ...]:
        columns = [_exact(hidden, len(targets)) for _ in range(2 if other is None else 4)]
        for part in _parts(len(targets), rows):
            log_p, target = _log_softmax(hidden, head, part, temperature), targets[part, None]
            columns[0][part] = log_p.gather(-1, target)[:, 0]
            columns[1][part] = -torch.linalg.vecdot(log_p.exp(), log_p)
            if other is not None:
                log_q = _log_softmax(other, other_head, part, temperature)
                columns[2][part] = log_q.gather(-1, target)[:, 0]
                columns[3][part] = torch.linalg.vecdot(log_q.exp(), log_q - log_p)
        ctx.save_for_backward(hidden, head, targets, other, other_head, columns[1])
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        if other is not None:
            ctx.mark_non_differentiable(columns[2])
        return tuple(columns)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, of_log_p: Any, of_entropy: Any, _: Any = None, of_kl: Any = None
    ) -> Any:
        hidden, head, targets, other, other_head, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = (
            _exact(head, *head.shape).zero_() if head is not None and ctx.needs_input_grad[1] else None
        )
        weight = None if head is None else head.to(hidden.dtype)
        for part in _parts(len(targets), ctx.rows):
            log_p = _log_softmax(hidden, head, part, ctx.temperature)
            slope = torch.zeros_like(log_p)  # by z / T
            p = log_p.exp()
            if of_entropy is not None:
                slope.addcmul_(p, (log_p + entropy[part, None]).mul_(of_entropy[part, None]), value=-1)
            del log_p
            if of_log_p is not None:
                each = of_log_p[part, None]
                slope.addcmul_(p, each, value=-1).scatter_add_(-1, targets[part, None], each)
            if of_kl is not None:
                q = _log_softmax(other, other_head, part, ctx.temperature).exp_()
                slope.addcmul_(p.sub_(q), of_kl[part, None])
            slope = (slope / ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope if weight is None else slope @ weight
            if grad_head is not None and grad_head.dtype == slope.dtype:
                grad_head.addmm_(slope.T, hidden[part])  # a second one as large is not made
            elif grad_head is not None:
                grad_head += slope.T @ hidden[part]
        grad_head = None if grad_head is None else grad_head.to(head.dtype)
        return grad_hidden, grad_head, *(None,) * 5


def _parts(count: int, rows: int) -> Iterator[slice]:
    """Cuts so many tokens into chunks."""
    return (slice(start, start + rows) for start in range(0, count, rows))


def _exact(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Room for numbers in float32 or more."""
    return torch.empty(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _log_softmax(
    hidden: torch.Tensor, head: torch.Tensor | None, part: slice, temperature: float
) -> torch.Tensor:
    """Log-probabilities of a chunk, (tokens, vocabulary), in float32 or more."""
    logits = hidden[part] if head is None else F.linear(hidden[part], head.to(hidden.dtype))
    exact = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(exact) / temperature).log_softmax(-1)
