"""The top of the page: a few numbers and a few sentences, each only if its step was run."""

from typing import Any

from galenic.runtime import human

from .inputs import Run
from .scores import headline
from .sections import spell

Content = dict[str, Any]


def tiles(run: Run, content: Content) -> list[tuple[str, str, str]]:
    """(label, number, note) of the key numbers."""
    found = []
    if trained := content["training"]:
        found.append(("training tokens", human(trained["tokens"]), f"{len(trained['phases'])} phases"))
    if results := run.evaluate.get("results.json"):
        product, _ = headline(results)
        model = results["models"][product]
        found.insert(0, ("model", f"{human(model['parameters'])}", "parameters"))
        for kind in ("recall", "transfer"):
            if score := model["accuracy"].get(kind):
                note = f"{100 * score['low']:.1f}\u2013{100 * score['high']:.1f}"
                if score["chance"] is not None:
                    note += f"; chance {100 * score['chance']:g}%"
                found.append((f"{kind} questions", f"{100 * score['value']:.1f}%", note))
        if model["normalised_average"] is not None:
            found.append(
                ("normalised average", f"{model['normalised_average']:.3f}", "1: as good as the experts")
            )
    if (flat := content["flattening"]) and flat["trace"]:
        before, after = flat["trace"]["before"]["mean"], flat["trace"]["after"]["mean"]
        found.append(
            (
                f"{flat['trace'].get('kind', 'Hessian')} trace",
                f"{after:.4g}",
                f"before flattening {before:.4g}",
            )
        )
    if times := content["timings"]:
        found.append(
            ("time", times["rounded"], f"{times['finished']} of {len(times['rows'])} steps finished")
        )
    return found


def sentences(run: Run, content: Content) -> list[str]:
    """The run in one paragraph."""
    lines = []
    results = run.evaluate.get("results.json")
    product, base = headline(results) if results else ("", "")
    if trained := content["training"]:
        size = f" of {human(results['models'][base]['parameters'])} parameters" if results else ""
        lines.append(
            f"A language model{size} {'was' if run.pretrain.state == 'done' else 'is being'} trained from scratch"
            f"{'' if run.pretrain.state == 'done' else ', so far'} on {human(trained['tokens'])} tokens in "
            f"{spell(trained['seconds'])}."
        )
        for gain in (trained["heldout"] or {"gains": []})["gains"]:
            lines.append(
                f"Phase {gain['phase']} introduces the {gain['group']} sources; it took their held-out bits per byte "
                f"from {gain['before']:.3f} to {gain['after']:.3f} (mean over sources)."
            )
    if results:
        lines += _accuracies(results, product, base)
    if flat := content["flattening"]:
        lines.append(flat["verdict"])
    return lines


def _accuracies(results: Content, product: str, base: str) -> list[str]:
    lines = []
    models = results["models"]
    words = {
        "recall": "questions on facts that are in the training text",
        "transfer": "questions on entities that appear nowhere in training",
    }
    for kind, what in words.items():
        score = models[product]["accuracy"].get(kind)
        if score is None:
            continue
        sense = ", not distinguishable from chance"
        if score["chance"] is None:
            sense = ""
        elif score["low"] > score["chance"]:
            sense = ", above chance"
        elif score["high"] < score["chance"]:
            sense = ", below chance"
        reference = models[base]["accuracy"].get(kind)
        compared = (
            f"; {base} answers {100 * reference['value']:.1f}%" if reference and base != product else ""
        )
        lines.append(
            f"Of {score['n']} {what}, the model '{product}' answers {100 * score['value']:.1f}% right "
            f"(95% interval {100 * score['low']:.1f} to {100 * score['high']:.1f}%{sense}){compared}."
        )
    average = models[product]["normalised_average"]
    if average is not None:
        lines.append(
            f"Its normalised average is {average:.3f}, where 1 is as good as each expert on its own kind."
        )
    return lines
