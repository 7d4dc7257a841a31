"""Fits held-out losses to mixtures and finds the mixture with the least loss. Pure functions on float64 arrays.

Two laws of a domain's loss, r the shares of the mixture's parts (on the simplex):

    exponential   L(r) = c + exp(b + sum_j t_j r_j)         data mixing laws, Ye et al., arXiv 2403.16952, equation 6
    quadratic     L(r) = b + sum_j t_j r_j + sum_j q_j r_j^2

Both are fitted by ridge regression (the first on log(L - c), for each c of a grid); c of each domain, and one ridge and
one law for all, are chosen by leave-one-out error. Small runs as the regression's data, their mixtures drawn around a
prior: RegMix, Liu et al., arXiv 2407.01492. That a domain's own part is penalised less is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RIDGES = tuple(10.0**k for k in range(-6, 4))
"""Over the mean square of the (standardised) features; the largest leave the mean alone."""
FLOORS = tuple(2.0 ** (k / 2) for k in range(-6, 13))
"""How far below the least loss c may lie, in standard deviations of the losses; far below, the law is linear."""

OWN_PART = 10.0
"""A domain's loss depends on the share of its own part most: that part's slopes are this much freer."""


@dataclass(frozen=True, kw_only=True)
class Laws:
    """Fitted laws of several domains; shapes with d parts and m domains."""

    exponential: np.ndarray
    """(m,) bool: which law."""
    floor: np.ndarray
    """(m,) c, 0 for the quadratic law."""
    constant: np.ndarray
    """(m,) b."""
    linear: np.ndarray
    """(m, d) t."""
    square: np.ndarray
    """(m, d) q, 0 for the exponential law."""

    def predict(self, shares: np.ndarray) -> np.ndarray:
        """Returns the losses (n, m) of mixtures (n, d)."""
        inner = self.constant + shares @ self.linear.T + (shares * shares) @ self.square.T
        return np.where(self.exponential, self.floor + np.exp(np.minimum(inner, 50.0)), inner)

    def gradient(self, share: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Returns the gradient (d,) at a mixture (d,) of the losses' sum weighted by targets (m,)."""
        inner = self.constant + self.linear @ share + self.square @ (share * share)
        outer = targets * np.where(self.exponential, np.exp(np.minimum(inner, 50.0)), 1.0)
        return outer @ (self.linear + 2 * self.square * share)


# ---------------------------------------------------------------------------- regression


def ridge_fits(
    features: np.ndarray, target: np.ndarray, weights: np.ndarray, ridges: tuple[float, ...] = RIDGES
) -> tuple[np.ndarray, np.ndarray]:
    """Solves weighted ridge regressions and their leave-one-out predictions in closed form.

        minimise  sum_i w_i (y_i - b - x_i beta)^2 + ridge sum_i w_i |beta|^2       (b is not penalised)
        y_i - (prediction without i) = (y_i - prediction) / (1 - h_i)      for this fixed penalty

    Args:
        features: (n, p), standardised.
        target: (n,).
        weights: (n,) above 0.
        ridges: penalties.

    Returns:
        Coefficients (ridges, 1 + p), the constant first, and leave-one-out predictions (ridges, n).
    """
    root = np.sqrt(weights / weights.sum())
    design = np.column_stack([np.ones(len(features)), features]) * root[:, None]
    penalty = np.ones(design.shape[1])
    penalty[0] = 1e-12
    gram = design.T @ design
    matrices = gram[None] + np.array(ridges)[:, None, None] * np.diag(penalty)[None]
    inverse = np.linalg.inv(matrices)
    coefficients = inverse @ (design.T @ (target * root))
    leverage = np.einsum("ip,kpq,iq->ki", design, inverse, design)
    fitted = coefficients @ (design / root[:, None]).T
    return coefficients, target - (target - fitted) / np.maximum(1 - leverage, 1e-6)


def fit_law(
    shares: np.ndarray, losses: np.ndarray, law: str, own: int = -1
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Fits one law to one domain with every ridge; for each, the c with the least leave-one-out error.

    Args:
        shares: (n, d) mixtures.
        losses: (n,).
        law: `exponential` or `quadratic`.
        own: the part that holds the domain's own text, whose slopes are hardly penalised; -1 if none does.

    Returns:
        For each ridge: fields of `Laws` for this domain, and leave-one-out predictions (n,).
    """
    spread, parts = float(losses.std()), shares.shape[1]
    raw = shares if law == "exponential" else np.column_stack([shares, shares**2])
    centre, scale = raw.mean(axis=0), np.maximum(raw.std(axis=0), 1e-9)
    if own >= 0:
        scale[own::parts] /= OWN_PART
    features = (raw - centre) / scale

    def attempt(below: float) -> list[tuple[float, dict[str, Any], np.ndarray]]:
        """Returns for each ridge (error, fields, predictions) with c that far below the least loss."""
        floor = float(losses.min() - max(spread, 1e-9) * below) if law == "exponential" else 0.0
        above = losses - floor
        target = np.log(above) if law == "exponential" else losses
        # An error e in log(L - c) is one of about (L - c) e in L: weighted so, errors count in L.
        weights = above**2 if law == "exponential" else np.ones(len(losses))
        coefficients, left_out = ridge_fits(features, target, weights)
        predictions = floor + np.exp(np.minimum(left_out, 50.0)) if law == "exponential" else left_out
        slopes = coefficients[:, 1:] / scale
        return [
            (
                float(((predictions[k] - losses) ** 2).mean()),
                {
                    "exponential": law == "exponential",
                    "floor": floor,
                    "constant": float(coefficients[k, 0] - slopes[k] @ centre),
                    "linear": slopes[k, :parts],
                    "square": slopes[k, parts:] if law == "quadratic" else np.zeros(parts),
                },
                predictions[k],
            )
            for k in range(len(RIDGES))
        ]

    tried = [attempt(below) for below in (FLOORS if law == "exponential" else (0.0,))]
    return [min((at[k] for at in tried), key=lambda found: found[0])[1:] for k in range(len(RIDGES))]


def fit(
    shares: np.ndarray,
    losses: np.ndarray,
    own: Sequence[int] = (),
    laws: Sequence[str] = ("exponential", "quadratic"),
) -> tuple[Laws, np.ndarray]:
    """Fits all domains; one law and one ridge for all, those with the least leave-one-out error.

    The error is the mean over domains of squared error / variance. One choice for all rests on more data than one for
    each: few runs tempt a domain's own choice into what fits by chance.

    Args:
        shares: (n, d) mixtures.
        losses: (n, m).
        own: (m,) see `fit_law`; none by default.
        laws: to choose from.

    Returns:
        The laws, and leave-one-out predictions (n, m) of the chosen ones.
    """
    variance = np.maximum(losses.var(axis=0), 1e-12)
    own = own or [-1] * losses.shape[1]
    best: tuple[float, list[tuple[dict[str, Any], np.ndarray]]] | None = None
    for law in laws:
        domains = [fit_law(shares, losses[:, i], law, own[i]) for i in range(losses.shape[1])]
        for k in range(len(RIDGES)):
            chosen = [domain[k] for domain in domains]
            left_out = np.array([predictions for _, predictions in chosen]).T
            error = float((((left_out - losses) ** 2).mean(axis=0) / variance).mean())
            if best is None or error < best[0]:
                best = (error, chosen)
    assert best is not None
    stacked = {name: np.array([fields[name] for fields, _ in best[1]]) for name in best[1][0][0]}
    return Laws(**stacked), np.array([predictions for _, predictions in best[1]]).T


def cross_predict(shares: np.ndarray, losses: np.ndarray, own: Sequence[int] = ()) -> np.ndarray:
    """Returns predictions (n, m) of each run by laws fitted and chosen without it."""
    keep = ~np.eye(len(shares), dtype=bool)
    return np.array(
        [fit(shares[k], losses[k], own)[0].predict(shares[i : i + 1])[0] for i, k in enumerate(keep)]
    )


def agreement(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Returns root mean square error, R^2 (1 - error / variance) and Spearman's rank correlation; both arrays (n,)."""
    error, variance = float(((predicted - measured) ** 2).mean()), float(measured.var())
    ranks = [_ranks(values) for values in (predicted, measured)]
    spread = math.prod(float(rank.std()) for rank in ranks)
    both = float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean())
    return {
        "rmse": math.sqrt(error),
        "r2": 1 - error / variance if variance else float("nan"),
        "spearman": both / spread if spread else float("nan"),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values share their mean."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values], dtype=np.float64)


# ---------------------------------------------------------------------------- the best mixture


def project(point: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Returns the nearest mixture to a point, (d,): {r : sum r = 1, low <= r <= high}, which must not be empty.

    It is clip(point - shift, low, high) for the shift that makes the sum 1: the sum is linear between the shifts at
    which a share meets a bound.
    """
    shifts = np.sort(np.concatenate([point - low, point - high]))
    sums = np.clip(point - shifts[:, None], low, high).sum(axis=1)
    return np.clip(point - np.interp(1.0, sums[::-1], shifts[::-1]), low, high)


def minimise(
    laws: Laws, targets: np.ndarray, low: np.ndarray, high: np.ndarray, starts: np.ndarray, steps: int = 200
) -> np.ndarray:
    """Returns the mixture (d,) of least weighted loss found by projected gradient descent from the best starts.

    Args:
        laws: of m domains.
        targets: (m,) weights.
        low: (d,) least shares.
        high: (d,) greatest shares.
        starts: (k, d) candidates; the three of least loss are refined.
        steps: at most, for each start.
    """
    starts = np.array([project(start, low, high) for start in starts])
    values = laws.predict(starts) @ targets
    found = []
    for index in np.argsort(values, kind="stable")[:3]:
        point, value, length = starts[index], float(values[index]), 1.0
        for _ in range(steps):
            slope = laws.gradient(point, targets)
            while length > 1e-9:
                moved = project(point - length * slope, low, high)
                reached = float(laws.predict(moved[None])[0] @ targets)
                if reached <= value - 0.1 * float(((moved - point) ** 2).sum()) / length:
                    break
                length /= 2
            else:
                break
            gain, point, value, length = value - reached, moved, reached, length * 2
            if gain < 1e-10:
                break
        found.append((value, tuple(point)))
    return np.array(min(found)[1])


# ---------------------------------------------------------------------------- how sure


def wild_losses(fitted: np.ndarray, errors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws losses as other runs might have given them, (n, m): the wild bootstrap over runs.

    Each run keeps its mixture; its leave-one-out errors, of all domains together, keep or change their sign. Drawing
    runs with replacement would leave too few different mixtures for as many parts. Wu, Annals of Statistics 14 (1986).

    Args:
        fitted: (n, m) the laws' losses of the runs.
        errors: (n, m) measured losses less leave-one-out predictions.
        generator: of the signs.
    """
    return fitted + errors * generator.choice([-1.0, 1.0], size=(len(fitted), 1))


def student_t(df: int, level: float = 0.975) -> float:
    """Returns a quantile of Student's t distribution, `level` above one half, by integrating its density."""
    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    # With x = sqrt(df) tan(u) the density becomes norm sqrt(df) cos(u)^(df - 1), on a bounded interval.
    nodes, masses = np.polynomial.legendre.leggauss(60)
    left, right = 0.0, math.pi / 2
    for _ in range(80):
        middle = (left + right) / 2
        inner = (nodes + 1) / 2 * middle
        area = norm * math.sqrt(df) * middle / 2 * float(masses @ np.cos(inner) ** (df - 1))
        left, right = (middle, right) if 0.5 + area < level else (left, middle)
    return math.sqrt(df) * math.tan((left + right) / 2)


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Returns (mean, low, high): the mean of paired differences with its 95% t interval; (n,) with n at least 2."""
    mean, n = float(differences.mean()), len(differences)
    half = student_t(n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half
