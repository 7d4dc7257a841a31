"""Tells what a fit of mixtures found: a verdict in one line, and tables that are Markdown and fit a terminal."""

from collections.abc import Sequence
from typing import Any

from galenic.corpus.mixtures.mixture_space import Space


def verdict(result: dict[str, Any]) -> str:
    """Says in one line what the check found."""
    check = result["check"]
    if check is None:
        return "The fitted mixture was not checked against the prior (verify_seeds is 0)."
    gain = check["gain"]
    interval = f"95% {gain['low']:+.4f} to {gain['high']:+.4f}, {check['seeds']} pairs"
    figures = f"{gain['mean']:+.4f} bits per byte ({interval})"
    if gain["low"] > 0:
        return f"The fitted mixture beats the prior by {figures}."
    if gain["high"] < 0:
        return f"The fitted mixture is worse than the prior: gain {figures}. mixture.json holds the prior."
    return f"The gain over the prior cannot be told from noise: {figures}. mixture.json holds the prior."


def table_lines(space: Space, result: dict[str, Any]) -> list[str]:
    """Returns the result as Markdown that reads well in a terminal too."""
    shares = [("part", "prior", "fitted", "95% interval", "cap")]
    for name in space.names:
        low, high = result["intervals"][name]
        cap = result["cap"][name]
        shares.append(
            (
                name,
                f"{result['prior'][name]:.1%}",
                f"{result['shares'][name]:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{cap:.1%}" if cap < 1 else "",
            )
        )
    domains = [("held-out domain", "weight", "error", "R2", "Spearman", "predicted gain", "measured gain")]
    for name, found in [*result["domains"].items(), ("all, weighted", result["target"])]:
        total = name == "all, weighted"
        expected = result["predicted_gain"]["mean"] if total else found["prior"] - found["fitted"]
        check = result["check"] and (result["check"]["gain"] if total else result["check"]["domains"][name])
        domains.append(
            (
                name,
                "" if total else f"{result['targets'][name]:.1%}",
                f"{found['rmse']:.4f}",
                f"{found['r2']:.2f}",
                f"{found['spearman']:.2f}",
                f"{expected:+.4f}",
                f"{check['mean']:+.4f} ({check['low']:+.4f} to {check['high']:+.4f})" if check else "",
            )
        )
    gain = result["predicted_gain"]
    return [
        result["verdict"],
        "",
        f"Predicted by the {result['law']} law from {result['runs']} runs: {gain['mean']:+.4f} "
        f"(95% {gain['low']:+.4f} to {gain['high']:+.4f}).",
        "",
        *_markdown(shares),
        "",
        "Bits per byte. Error, R2 and Spearman: predictions of each run by laws fitted and chosen without it.",
        "",
        *_markdown(domains),
    ]


def _markdown(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        "| "
        + " | ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return [aligned[0], rule, *aligned[1:]]
