"""The paper's claims and what benchmarks/flattening.py says of each."""

import math
from collections.abc import Sequence
from functools import partial

from flattening_methods import EQUAL_LOSS
from flattening_table import (
    CAUTIONS,
    TRICKS,
    Interval,
    Row,
    Value,
    accuracies,
    against,
    against_plain,
    by_condition,
    change,
    curved,
    details,
    equal_trace,
    gained,
    over_seeds,
    ratio,
    selections,
    sign_test,
    trainings,
    where,
)

GAIN = 1.5
"""Points that selection must reach under label noise."""
COST = 0.1
"""Points that it may cost on clean data."""
DETAILED = (
    "fashion, mlp, sgd, decay 0.0005, clean",
    "fashion, mlp, sgd, decay 0.0005, 20% noise",
    "fashion, resnet, sgd, decay 0.0005, clean",
    "fashion, resnet, sgd, decay 0.0005, 20% noise",
    "few, wide, sgd, decay 0, clean",
    "few, wide, adamw, decay 0, clean",
)
"""The kinds of runs that get a table of everything measured."""
NAMES = {
    "exact": "exact shift where it moves",
    "curvature-weighted": "curvature-weighted, 48 probes",
    "curvature-weighted, exact": "curvature-weighted, metric in closed form",
}
OTHERS = ("resnet", "vgg", "densenet", "vit")


def verdict(found: Interval) -> str:
    """Says whether a claimed rise is there."""
    if found.low > 0:
        return "holds here"
    return "does not hold here: the opposite does" if found.high < 0 else "cannot be told here"


def claims(runs: list[Row]) -> list[str]:
    """The paper's claims and ours, a line each: holds here, does not, or cannot be told, with the number."""
    lines = []

    def told(claim: str, found: Interval, values: Sequence[float], shown: str) -> None:
        as_claimed, count, p = sign_test(values)
        counted = f"so in {as_claimed} of {count} runs that differ, sign test p = {p:.2g}"
        lines.append(f"* {claim}: **{verdict(found)}**, {shown}; {counted}.")

    def points(claim: str, chosen: list[Row], method: str) -> None:
        if chosen:
            values = [v for run in chosen if (v := gained(method)(run)) is not None]
            found = over_seeds(chosen, gained(method))
            told(claim, found, values, f"{found} points")

    def flatter(claim: str, chosen: list[Row], value: Value) -> None:
        values = [-v for run in chosen if (v := value(run)) is not None]
        if values:
            found = over_seeds(chosen, value)
            told(claim, Interval(-found.mean, found.margin), values, f"ratio {ratio(found)}")

    exact = [run["rows"]["exact"] for run in runs]
    able = [run for run in runs if not run["rows"]["exact"]["noop"]]
    worst = max((abs(gained("exact", "loss", "train")(run) or 0.0) for run in runs), default=0.0)
    lines.append(
        f"* Same training loss, exact shift of the head: **holds here**, it moves by at most {worst:.1g} nats. But in "
        f"{sum(row['noop'] for row in exact)} of {len(runs)} runs there is nothing to shift."
    )
    more = over_seeds(runs, lambda run: _log_loss(run, "SOS"))
    held = "does not hold here" if more.low > math.log(1.05) else "holds here within 5%"
    lines.append(f"* Same training loss, SOS: **{held}**, the loss is {ratio(more)} times the original's.")
    for method in ("exact", "curvature-weighted", "curvature-weighted, exact"):
        for optimiser in ("sgd", "adamw"):
            chosen = where(able, optimiser=optimiser)
            flatter(f"Smaller trace (body), {NAMES[method]}, {optimiser}", chosen, curved(method))
    flatter("Smaller trace (all), SOS, as it is", runs, curved("SOS", "whole", "curvature"))
    flatter("Smaller trace (all), SOS, at equal loss", runs, curved("SOS", "whole"))
    flatter("Smaller top eigenvalue, SOS, at equal loss (MLPs)", runs, curved("SOS", "top"))
    flatter("Smaller trace (all), truncation to K, at equal loss", runs, curved("truncated to K", "whole"))
    points("Better generalisation, exact shift where it moves", able, "exact")
    plain = where(runs, trick="none")
    for noise, word in ((0.0, "clean"), (0.2, "20% noise")):
        for nets, name in ((("mlp", "narrow", "wide"), "MLPs"), (OTHERS, "ResNet, VGG, DenseNet, ViT")):
            points(f"Better generalisation, SOS, {word}, {name}", where(plain, noise=noise, net=nets), "SOS")
        both = against(runs, "shift", noise)
        if both:
            values = [against_plain("accuracy")(run) for run in both]
            found = over_seeds(both, against_plain("accuracy"))
            told(f"Better generalisation, SOS in training, {word}, MLP", found, values, f"{found} points")
            flatter(f"Smaller trace, SOS in training, {word}, MLP, at loss {EQUAL_LOSS}", both, equal_trace)
    for optimiser in ("sgd", "adamw"):
        for decay in (0.0, 5e-4):
            chosen = where(plain, data="fashion", net="mlp", optimiser=optimiser, decay=decay, noise=0.2)
            points(f"Works with weight decay {decay:g} ({optimiser}), SOS, 20% noise, MLP", chosen, "SOS")
    for trick in ("sam", "mixup", "swa"):
        for noise, word in ((0.0, "clean"), (0.2, "20% noise")):
            points(
                f"Works with {TRICKS[trick]}, SOS, {word}, MLP", where(runs, trick=trick, noise=noise), "SOS"
            )
    return lines + targets(plain)


def _log_loss(run: Row, method: str) -> float:
    rows = run["rows"]
    return math.log(rows[method]["train"]["loss"] / rows["original"]["train"]["loss"])


def targets(runs: list[Row]) -> list[str]:
    """What choosing by validation must reach: GAIN points under noise on the MLP, COST at most on clean data."""
    lines = []
    noisy, clean = where(runs, part="noise", noise=0.2), where(runs, noise=0.0)
    for caution in CAUTIONS:
        value = partial(change, caution=caution)
        start = f"* Selected by validation, caution {caution:g}, "
        if noisy:
            found = over_seeds(noisy, value)
            met = "met" if found.mean >= GAIN and found.low > 0 else "**not met**"
            lines.append(f"{start}at least {GAIN:+} points under noise, MLP with SGD: {met}, {found}.")
        if clean:
            means = {name: over_seeds(group, value).mean for name, group in by_condition(clean).items()}
            low, worst = min(means, key=lambda name: means[name]), min(map(value, clean))
            costly = sum(value(run) < -COST for run in clean)
            lines.append(
                f"{start}at most {COST} points lost on clean data: "
                f"{'met' if means[low] >= -COST else '**not met**'} by means over seeds (lowest {means[low]:+.2f}: "
                f"{low}), {'**not met**' if costly else 'met'} by single runs ({costly} of {len(clean)} lose more, "
                f"the worst {worst:+.2f}); all clean runs {over_seeds(clean, value)}."
            )
    return lines


def report(runs: list[Row]) -> str:
    """Returns everything as Markdown."""
    groups = by_condition(runs)
    parts = ["### Test accuracy", accuracies(groups), "### Selection by validation", selections(groups)]
    for name, group in groups.items():
        if name in DETAILED:
            parts += [f"### {name}", details(group)]
    parts += ["### Ways to train", trainings(runs), "### Claims", "\n".join(claims(runs))]
    return "\n\n".join(parts)
