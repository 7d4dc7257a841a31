"""How often intervals of Cohen's kappa hold the true one: ours, and the delta method's.

    python benchmarks/kappa.py [--samples 3000]

Prints the table of docs/evaluation-judge.md. Two judges' labels are drawn from a table of probabilities.
"""

import argparse

import numpy as np

from galenic.evaluate.judging import kappa
from galenic.evaluate.statistics import Z95

TABLES = {
    "99% agree, two labels": [[0.495, 0.005], [0.005, 0.495]],
    "95% agree, four labels": (np.eye(4) * 0.95 / 4 + (1 - np.eye(4)) * 0.05 / 12).tolist(),
    "90% agree, two labels": [[0.45, 0.05], [0.05, 0.45]],
    "93% agree, one label in nine of ten": [[0.85, 0.03], [0.04, 0.08]],
    "60% agree, two labels": [[0.3, 0.2], [0.2, 0.3]],
}


def true_kappa(table: np.ndarray) -> float:
    """Returns kappa of probabilities or counts."""
    shares = table / table.sum()
    chance = (shares.sum(0) * shares.sum(1)).sum()
    return (np.trace(shares) - chance) / (1 - chance)


def delta_method(table: np.ndarray) -> tuple[float, float]:
    """Returns kappa +- 1.96 standard errors of J. L. Fleiss, J. Cohen and B. S. Everitt, Psychol. Bull. 72 (1969)."""
    shares = table / table.sum()
    rows, columns = shares.sum(1), shares.sum(0)
    chance, found = rows @ columns, true_kappa(table)
    left = 1 - found
    same = (np.diag(shares) * (1 - (rows + columns) * left) ** 2).sum()
    other = left**2 * ((shares - np.diag(np.diag(shares))) * (columns[:, None] + rows[None, :]) ** 2).sum()
    variance = max(0.0, same + other - (found - chance * left) ** 2) / table.sum() / (1 - chance) ** 2
    return found - Z95 * variance**0.5, found + Z95 * variance**0.5


def ours(table: np.ndarray) -> tuple[float, float]:
    """Returns the interval of `galenic.evaluate.judging.kappa`."""
    places = [place for place, count in np.ndenumerate(table) for _ in range(count)]
    found = kappa(places)
    assert found is not None
    return found["low"], found["high"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=3000)
    samples, dice = parser.parse_args().samples, np.random.default_rng(0)
    print("| two judges | true kappa | n | ours | delta method |\n|---|---|---|---|---|")
    for name, shares in TABLES.items():
        table = np.array(shares)
        true, held = true_kappa(table), {ours: [], delta_method: []}
        for n in (30, 100, 300):
            drawn = dice.multinomial(n, table.ravel(), size=samples).reshape(-1, *table.shape)
            drawn = [one for one in drawn if one.sum(0).max() < n or one.sum(1).max() < n]  # kappa is there
            for method, shares_held in held.items():
                ends = [method(one) for one in drawn]
                shares_held.append(np.mean([low - 1e-9 <= true <= high + 1e-9 for low, high in ends]))
        columns = (" / ".join(f"{share:.0%}" for share in shares_held) for shares_held in held.values())
        print(f"| {name} | {true:.2f} | 30 / 100 / 300 | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
