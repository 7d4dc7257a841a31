"""How often the 95% intervals of `evaluate/statistics.py` hold the true value: simulation with a fixed seed.

python benchmarks/interval_coverage.py [--sets 400]
"""

import argparse
from collections.abc import Callable

import numpy as np

from galenic.evaluate.statistics import calibration_error, mean_interval, paired_bootstrap


def share(sets: int, held: Callable[[int], bool], n: int) -> float:
    return float(np.mean([held(n) for _ in range(sets)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=400, help="sets of answers simulated for each row")
    sets = parser.parse_args().sets
    random = np.random.Generator(np.random.Philox(key=0))

    def mean(draw: Callable[[int], np.ndarray], true: float, n: int) -> bool:
        low, high = mean_interval(draw(n))
        return low <= true <= high

    def difference(n: int) -> bool:
        know = random.random(n)
        found = paired_bootstrap(know < 0.5, (know < 0.45) | (random.random(n) < 0.2), resamples=1000)
        return found.low <= 0.45 + 0.55 * 0.2 - 0.5 <= found.high

    def error(n: int, over: float, by: str) -> bool:
        p = random.uniform(0.25, 1, n)
        found = calibration_error(p, random.random(n) < p - over, by=by, resamples=500).error
        return found.low <= over <= found.high

    print(f"{sets} sets of answers each\n\n{'interval of':<52}{'n=40':>8}{'n=100':>8}{'n=400':>8}")
    scores: dict[str, tuple[Callable[[int], np.ndarray], float]] = {
        "accuracy, 30% right": (lambda n: (random.random(n) < 0.3).astype(float), 0.3),
        "accuracy, 98% right": (lambda n: (random.random(n) < 0.98).astype(float), 0.98),
        "mean of graded scores, Beta(1/2, 2)": (lambda n: random.beta(0.5, 2, n), 0.2),
        "mean of graded scores, mostly 0": (
            lambda n: (random.random(n) < 0.1) * random.choice([0.5, 1.0], n),
            0.075,
        ),
    }
    rows: list[tuple[str, Callable[[int], bool]]] = [
        (name, lambda n, draw=draw, true=true: mean(draw, true, n)) for name, (draw, true) in scores.items()
    ]
    rows.append(("difference of two models (bootstrap)", difference))
    for by in ("width", "mass"):
        for over in (0.0, 0.05, 0.15):
            name = f"calibration error, equal {by}, overconfident by {over:.0%}"
            rows.append((name, lambda n, over=over, by=by: error(n, over, by)))
    for name, held in rows:
        found = [share(sets, held, n) for n in (40, 100, 400)]
        print(f"{name:<52}" + "".join(f"{value:>8.1%}" for value in found), flush=True)


if __name__ == "__main__":
    main()
