"""From the rewards of tokens to what a policy learns from: pure functions.

    A_t = sum_k (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}),  V_{T+1} = 0

for the tokens 1 ... T of an answer, V_t being the value of what stands before token t. Source: Schulman et al., arXiv
1506.02438, eq. 16.
"""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, answers: torch.Tensor, *, discount: float, lam: float
) -> torch.Tensor:
    """Computes generalised advantage estimates; see the equation of A_t.

    Args:
        rewards: (rows, length) of each token.
        values: (rows, length) of what stands before it.
        answers: (rows, length) bool, tokens of the answer, which stand together in their row.
        discount: gamma.
        lam: lambda.

    Returns:
        (rows, length) advantages, 0 outside answers.
    """
    advantages = torch.zeros_like(values)
    later = following = values.new_zeros(len(values))
    for place in reversed(range(values.shape[1])):
        error = rewards[:, place] + discount * following - values[:, place]
        later = torch.where(answers[:, place], error + discount * lam * later, 0.0)
        following = torch.where(answers[:, place], values[:, place], 0.0)
        advantages[:, place] = later
    return advantages


def whiten(values: torch.Tensor, *, shift: bool = True) -> torch.Tensor:
    """Divides numbers, which must differ, by their standard deviation; `shift`: and moves their mean to 0."""
    centred = values - values.mean()
    return (centred if shift else values) / centred.square().mean().sqrt()


def adapted_kl(weight: float, kl: float, target: float) -> float:
    """Returns the penalty's next weight: larger after a divergence above the target, by 2% at most.

    b <- b (1 + 0.1 clip(kl / target - 1, -0.2, 0.2)). Source: Ziegler et al., arXiv 1909.08593, section 2.2.

    Args:
        weight: b, of this batch of answers.
        kl: their mean divergence from the reference, nats an answer.
        target: what it should be.
    """
    return weight * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))
