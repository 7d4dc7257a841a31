"""From logits to probabilities that can be believed: one or two numbers a head, fitted on texts not trained on."""

import numpy as np


def platt(z: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Fits sigmoid(a z + b) to targets in [0, 1] by Newton's method on the cross-entropy; a is never negative.

    Source: J. Platt 1999, with soft targets and a ridge of 1e-3 towards (1, 0), which decides where the data do not.

    Args:
        z: (n,) logits.
        targets: (n,) in [0, 1].
    """
    if not len(z):
        return 1.0, 0.0
    x = np.stack([z.astype(np.float64), np.ones(len(z))], axis=1)
    prior = np.array([1.0, 0.0])
    found = prior.copy()

    def loss(w: np.ndarray) -> float:
        u = x @ w
        return float(np.sum(np.logaddexp(0, u) - targets * u) + 5e-4 * np.sum((w - prior) ** 2))

    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ found, -500, 500)))
        gradient = x.T @ (p - targets) + 1e-3 * (found - prior)
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + 1e-3 * np.eye(2), gradient)
        size, here = 1.0, loss(found)
        while size > 1e-8 and loss(found - size * step) > here:
            size /= 2
        found = found - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    return max(0.0, float(found[0])), float(found[1])


def temperature(z: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature T in [0.05, 20] for which softmax(z / T) has the least cross-entropy, by golden section.

    Source: Guo et al. 2017, arXiv 1706.04599.

    Args:
        z: (n, labels) logits.
        labels: (n,) int.
    """
    if not len(z):
        return 1.0
    z = z.astype(np.float64)

    def loss(log_t: float) -> float:
        scaled = z / np.exp(log_t)
        top = scaled.max(axis=1)
        total = np.log(np.exp(scaled - top[:, None]).sum(axis=1)) + top
        return float(np.mean(total - scaled[np.arange(len(labels)), labels]))

    low, high = np.log(0.05), np.log(20.0)
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-6:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))
