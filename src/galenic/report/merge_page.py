"""The page that lies beside every merged model: what was merged, how much of each, and where they differ."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from galenic.runtime import human_bytes

from . import svg
from .page import render, write

SHORT = 14
"""Characters of a name that fit beside a chart."""


def write_merge_page(
    file: Path, summary: dict[str, Any], recipe: str, inputs: Sequence[dict[str, Any]]
) -> None:
    """Writes the page; the same values give the same bytes.

    Args:
        file: to write, atomically.
        summary: the contents of `merge.json`.
        recipe: YAML.
        inputs: of each file its `model`, `file`, `bytes` and `identity`.
    """
    names = summary["experts"]
    numbered = len(names) > 4 or any(len(name) > SHORT for name in names)
    short = [str(i) for i in range(1, len(names) + 1)] if numbered else names
    labels = [f"{i}. {name}" for i, name in enumerate(names, start=1)] if numbered else names
    kept = summary.get("kept") or summary.get("densities")
    largest = max((abs(c) for c in summary["coefficients"].values()), default=0.0) or 1.0
    experts = [
        {
            "label": label,
            "norm": f"{summary['norms'][name]:.4g}",
            "coefficient": f"{summary['coefficients'][name]:.4f}",
            "width": f"{100 * abs(summary['coefficients'][name]) / largest:.2f}",
            "kept": f"{100 * kept[name]:.1f}%" if kept else "",
        }
        for name, label in zip(names, labels, strict=True)
    ]
    layers, outside = _layers(summary["units"])
    page = render(
        "merge.html",
        {"size": human_bytes},
        title=f"Merge of {len(names)} experts" if len(names) > 4 else f"Merge of {', '.join(names)}",
        tiles=_tiles(summary),
        sentences=_sentences(summary),
        warnings=summary["warnings"],
        notes=summary.get("vocabulary", []),
        experts=experts,
        kept=bool(kept),
        scope=summary["scope"],
        numbered=numbered,
        heat=_heat(summary, short) if len(names) > 1 else None,
        profiles=_profiles(summary, layers, short),
        outside=[
            (unit, [f"{summary['units'][unit]['norms'][name]:.4g}" for name in names]) for unit in outside
        ],
        recipe=recipe,
        inputs=inputs,
    )
    write(file, page)


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    count = len(summary["experts"])
    tiles = [
        ("Method", summary["method"], ""),
        ("Experts", str(count), ""),
        ("Effective number of models", f"{summary['effective_models']:.2f}", f"of {count}"),
    ]
    if summary["scope"] != "global":
        tiles.append(("Coefficients", f"per {summary['scope']}", ""))
    if count > 1:
        between = [summary["cosines"][i][j] for i in range(count) for j in range(i)]
        tiles.append(("Mean cosine", f"{sum(between) / len(between):.3f}", "between task vectors"))
    return tiles


def _sentences(summary: dict[str, Any]) -> list[str]:
    names, coefficients, norms = summary["experts"], summary["coefficients"], summary["norms"]
    most = max(names, key=lambda name: abs(coefficients[name]))
    said = [f"{summary['method']} merged {len(names)} expert{'s' * (len(names) > 1)} of {summary['base']}."]
    if len({round(value, 6) for value in coefficients.values()}) == 1:
        said.append(f"Each counts {coefficients[most]:.3g}.")
    else:
        said.append(f"{most} counts most, {coefficients[most]:.3g}.")
    positive = [norm for norm in norms.values() if norm > 0]
    if len(positive) > 1:
        longest, shortest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
        said.append(
            f"The longest task vector, {longest}'s, is {max(positive) / min(positive):.2g} times as long as the "
            f"shortest{f', {shortest}' + chr(39) + 's' if len(positive) == len(norms) else ' that is not zero'}."
        )
    return said


def _layers(units: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Splits units into those of numbered layers, in the order of their numbers, and the others."""
    numbered = [(unit, re.search(r"\.(\d+)(?=\.|$)", f".{unit}")) for unit in units]
    layers = sorted((int(found[1]), place) for place, (_, found) in enumerate(numbered) if found)
    return [numbered[place][0] for _, place in layers], [unit for unit, found in numbered if not found]


def _heat(summary: dict[str, Any], short: Sequence[str]) -> Markup:
    pairs = [
        f"{a} and {b} {summary['cosines'][i][j]:.3f}"
        for i, a in enumerate(summary["experts"])
        for j, b in enumerate(summary["experts"])
        if i < j
    ]
    label = f"Cosines between task vectors: {'; '.join(pairs)}."
    return svg.heat(label, list(short), summary["cosines"])


def _profiles(
    summary: dict[str, Any], layers: Sequence[str], short: Sequence[str]
) -> list[tuple[str, str, Markup]]:
    """Draws norms, and coefficients if they differ, over the layers."""
    if len(layers) < 2:
        return []
    names, tensors = summary["experts"], summary["scope"] == "tensor"
    x_title = "tensor, by layer" if tensors else "layer"
    wanted = [("Norms of task vectors", "norms")]
    if summary["scope"] != "global":
        wanted.append(("Coefficients", "coefficients"))
    found = []
    for title, key in wanted:
        series = [
            (label, [summary["units"][unit][key][name] for unit in layers])
            for name, label in zip(names, short, strict=True)
        ]
        spans = [
            f"{name} {min(values):.3g} to {max(values):.3g}"
            for name, (_, values) in zip(names, series, strict=True)
        ]
        label = f"{title} over {len(layers)} {'tensors' if tensors else 'layers'}: {'; '.join(spans)}."
        note = f"one line an expert, the first {'tensor' if tensors else 'layer'} on the left"
        found.append((title, note, svg.profile(label, series, x_title)))
    return found
