"""What a model and its reference say of given tokens, without ever holding the logits of a whole batch.

For a position with policy p and reference q over the vocabulary, and the token y that follows:

    log p(y),  log q(y),  entropy  -sum_v p(v) log p(v),  forward KL  sum_v q(v) (log q(v) - log p(v))

Logits are made of hidden states in chunks and again on the way back, so that memory is a few chunks and the gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits made at a time, of each model."""

States = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states (..., width) and the head's weight (vocabulary, width); no weight: they are logits already."""


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Each (tokens,) float32; what belongs to a reference is None without one."""

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
    """Computes them for every token; gradients flow to the policy's states and head.

    Args:
        policy: hidden states (tokens, width) and head.
        targets: (tokens,) int64, the token that follows each state.
        reference: the same of the reference, whose vocabulary is the same; its width may be another.
        temperature: that both distributions are taken at.
        chunk_elements: logits made at a time.

    Raises:
        ValueError: the vocabularies differ.
    """
    sizes = [_vocabulary(states) for states in (policy, reference) if states is not None]
    if len(set(sizes)) > 1:
        raise ValueError(f"the policy has {sizes[0]} tokens, the reference {sizes[1]}")
    if reference is not None:
        reference = reference[0].detach(), None if reference[1] is None else reference[1].detach()
    rows = max(1, chunk_elements // sizes[0])
    found = []
    for start in range(0, len(targets), rows) or [0]:  # an empty batch too has a gradient: zero
        part = slice(start, start + rows)
        others = (None, None) if reference is None else (reference[0][part], reference[1])
        arguments = (policy[0][part], policy[1], targets[part], *others, temperature)
        found.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
    columns = [None if column[0] is None else torch.cat(column) for column in zip(*found, strict=True)]
    log_probs, entropy, reference_log_probs, kl = columns
    assert log_probs is not None and entropy is not None
    return TokenStatistics(
        log_probs=log_probs, entropy=entropy, reference_log_probs=reference_log_probs, kl=kl
    )


def _vocabulary(states: States) -> int:
    hidden, head = states
    return hidden.shape[-1] if head is None else head.shape[0]


def _chunk(
    hidden: torch.Tensor,
    head: torch.Tensor | None,
    targets: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_head: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor | None, ...]:
    """Returns (log p(y), entropy, log q(y) or None, KL or None) of some tokens."""
    log_p = _log_softmax(hidden, head, temperature)
    log_probs = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    if reference_hidden is None:
        return log_probs, entropy, None, None
    log_q = _log_softmax(reference_hidden, reference_head, temperature)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return log_probs, entropy, log_q.gather(-1, targets[:, None])[:, 0], kl


def _log_softmax(hidden: torch.Tensor, head: torch.Tensor | None, temperature: float) -> torch.Tensor:
    logits: Any = hidden if head is None else F.linear(hidden, head.to(hidden.dtype))
    exact = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(exact) / temperature).log_softmax(-1)
