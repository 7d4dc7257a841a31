"""Does optimum shifting help language models, and does anchored shifting help the merge of experts?

    make starter smollm2
    python benchmarks/flattening_language.py starter --run runs/starter --folder flattening/starter --seeds 3
    python benchmarks/flattening_language.py smollm2 --run runs/smollm2 --folder flattening/smollm2

Takes the families of benchmarks/merging_quality.py, whose starter experts are trained here if `--folder` has none.
Statistics are of each expert's own training conversations, all tokens of them; every linear layer inside the network
is shifted, the output head is not (the starter's is a NormHead, SmolLM2's is tied).

First, each expert on its own task, and the base on all of them: the loss of answers in a quarter of these
conversations and in held-out ones, before and after each kind of shift. `chosen` takes the output budget by the loss on
every other batch of held-out conversations, or changes nothing, and is scored on the other batches, as is everything
else.

Then the merge: experts are shifted towards their base (anchored) or towards zero, merged by MetaGPT, and scored on
all tasks. ALD is the mean over tasks of the merge's held-out loss less the expert's own (lower is better); the norms
are those of the task vectors.

What is scored already is not done again.
"""

import argparse
import copy
import statistics as mean_of
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from merging_quality import TASKS, batches, loss, shown, train_starter_experts
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from galenic.align.sft import encode_samples
from galenic.evaluate.models import open_model
from galenic.flatten import collect, select_shift, shift
from galenic.flatten.apply import Kind
from galenic.flatten.statistics import Statistics
from galenic.merge import merge
from galenic.merge.adapters import is_adapter
from galenic.model import load_tokenizer
from galenic.model.foreign import save_any
from galenic.runtime import read_json, write_json

LAYERS = ["model.layers.*"]
KINDS: dict[str, Kind] = {
    "exact": {"output_budget": 0.0},
    "ridge 0.01": {"output_budget": 0.01},
    "ridge 0.05": {"output_budget": 0.05},
    "energy 0.99": {"energy": 0.99},
}
CANDIDATES: list[Kind] = [{"output_budget": budget} for budget in (0.01, 0.03, 0.1, 0.2)]
MERGES: dict[str, Kind] = {
    "anchored exact": {"output_budget": 0.0},
    "anchored 0.03": {"output_budget": 0.03},
    "anchored 0.1": {"output_budget": 0.1},
    "anchored 0.3": {"output_budget": 0.3},
    "towards zero 0.03": {"output_budget": 0.03},
}


def conversations(file: Path, tokenizer: Any, count: int) -> list[dict[str, Tensor]]:
    """Encodes and batches the first so many conversations of a file."""
    rows, _ = encode_samples(str(file), tokenizer, context=256)
    return batches([(torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in rows[:count]], pad=0)


def measure_inputs(model: nn.Module, rows: Sequence[dict[str, Tensor]]) -> Statistics:
    """Collects the statistics of all layers inside the network."""
    inputs = [
        {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"], "use_cache": False} for b in rows
    ]
    return collect(model, tqdm(inputs, desc="layer inputs", leave=False), LAYERS)


@torch.inference_mode()
def row_losses(model: nn.Module, rows: Sequence[dict[str, Tensor]]) -> Tensor:
    """Returns the mean loss of each conversation's answers, (n,)."""
    found = []
    for batch in rows:
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        each = cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        found.append(each.sum(1) / (targets != -100).sum(1).clamp_min(1))
    return torch.cat(found)


def alone(
    expert: nn.Module, statistics: Statistics, train: Any, chosen_by: Any, heldout: Any
) -> dict[str, dict[str, Any]]:
    """Scores every kind of shift of one expert on its own task."""
    found = {"original": {"train": loss(expert, train), "heldout": loss(expert, heldout)}}
    for name, kind in KINDS.items():
        model = copy.deepcopy(expert)
        done = shift(model, statistics, **kind)
        found[name] = {
            "train": loss(model, train),
            "heldout": loss(model, heldout),
            "moved": sum(not one.noop for one in done.values()),
            "layers": len(done),
            "norm": sum(one.norm_after**2 for one in done.values())
            / sum(one.norm_before**2 for one in done.values()),
        }
    model = copy.deepcopy(expert)
    choice = select_shift(model, statistics, CANDIDATES, lambda: row_losses(model, chosen_by), caution=1.0)
    budget = None if choice.chosen is None else CANDIDATES[choice.chosen]["output_budget"]
    found["chosen"] = {"train": loss(model, train), "heldout": loss(model, heldout), "budget": budget}
    return found


def merged(
    folder: Path, base: Path, experts: dict[str, Path], heldout: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Merges experts by MetaGPT; returns the losses by task and the norms of the task vectors."""
    recipe = {
        "merge_method": "metagpt",
        "base_model": str(base),
        "dtype": "float32",
        "models": [{"model": str(path), "name": task} for task, path in experts.items()],
    }
    model = open_model(str(merge(recipe, folder / "merged")))
    norms = read_json(folder / "merged" / "merge.json")["norms"]
    return {task: loss(model, rows) for task, rows in heldout.items()}, norms


def compare(
    folder: Path, run: Path, base: Path, experts: dict[str, Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Scores one set of experts; what `folder/results.json` has is not done again."""
    place = folder / "results.json"
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = read_json(place) if place.exists() else {"alone": {}, "merges": {}}
    tokenizer = load_tokenizer(base)
    corpus = run / "10-corpus" / "sft"
    train = {t: conversations(corpus / f"{t}.train.jsonl", tokenizer, options.training) for t in experts}
    heldout = {
        t: conversations(corpus / f"{t}.heldout.jsonl", tokenizer, options.conversations) for t in experts
    }
    weights = dict(open_model(str(base)).named_parameters())
    anchor = {name.removesuffix(".weight"): weight.detach() for name, weight in weights.items()}
    models: dict[str, tuple[nn.Module, Statistics]] = {}

    def opened(task: str) -> tuple[nn.Module, Statistics]:
        if task not in models:
            path = experts[task]
            model = open_model(f"{base}+{path}" if is_adapter(path) else str(path))
            models[task] = model, measure_inputs(model, train[task])
        return models[task]

    for task in experts:
        if task not in results["alone"]:
            model, statistics = opened(task)
            rows = heldout[task]
            results["alone"][task] = alone(model, statistics, train[task][::4], rows[0::2], rows[1::2])
            write_json(place, results)
    if "base" not in results:
        model = open_model(str(base))
        every = [[batch for task in experts for batch in rows[task]] for rows in (train, heldout)]
        found = alone(model, measure_inputs(model, every[0]), every[0][::4], every[1][0::2], every[1][1::2])
        results["base"] = found
        write_json(place, results)
    results.setdefault("experts", {})
    for task in experts:
        if task not in results["experts"]:
            results["experts"][task] = loss(opened(task)[0], heldout[task])
            write_json(place, results)
    for name in ["as trained", *MERGES]:
        if name in results["merges"]:
            continue
        shifted = dict(experts)
        if name != "as trained":
            for task in experts:
                expert, statistics = opened(task)
                model = copy.deepcopy(expert)
                kind = dict(MERGES[name]) | ({"base": anchor} if name.startswith("anchored") else {})
                shift(model, statistics, **kind)
                shifted[task] = folder / "shifted" / task
                save_any(model, shifted[task], base=base, provenance={}, parents=[])
        losses, norms = merged(folder, base, shifted, heldout)
        results["merges"][name] = {"losses": losses, "norms": norms}
        write_json(place, results)
    return results


# ---------------------------------------------------------------------------- the tables


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Writes both tables as Markdown."""
    lines = ["| shift | " + " | ".join(f"{t}, train | {t}, held out" for t in TASKS) + " | squared norm |"]
    lines.append("|---|" + "--:|" * (2 * len(TASKS) + 1))
    for name in ["original", *KINDS, "chosen"]:
        cells = []
        for task in TASKS:
            each = [run["alone"][task] for run in runs]
            for split in ("train", "heldout"):
                own = shown([one["original"][split] for one in each])
                moved = shown([one[name][split] - one["original"][split] for one in each])
                cells.append(own if name == "original" else signed(moved))
        norms = [run["alone"][t][name].get("norm") for run in runs for t in TASKS]
        norm = f"{mean_of.fmean(n for n in norms if n is not None):.3f}" if None not in norms else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {norm} |")
    lines += ["", "| shift of the base | train | held out | squared norm |", "|---|--:|--:|--:|"]
    base = runs[0]["base"]
    for name, own in base.items():
        less = 0 if name == "original" else 1
        cells = [shown([own[split] - less * base["original"][split]]) for split in ("train", "heldout")]
        cells = [signed(cell) for cell in cells] if less else cells
        lines.append(f"| {name} | {' | '.join(cells)} | {own.get('norm', 1.0):.3f} |")
    lines += ["", f"budget chosen: {base['chosen']['budget']}"]
    budgets = [str(run["alone"][t]["chosen"]["budget"]) for run in runs for t in TASKS]
    lines += ["", f"budgets chosen: {', '.join(budgets)}", ""]
    lines.append("| experts | " + " | ".join(TASKS) + " | ALD | ALD less as trained | norms |")
    lines.append("|---|" + "--:|" * (len(TASKS) + 2) + "---|")
    plain = [ald(run, "as trained") for run in runs]
    for name in ["as trained", *MERGES]:
        each = [run["merges"][name] for run in runs]
        cells = [shown([one["losses"][task] for one in each]) for task in TASKS]
        own = [ald(run, name) for run in runs]
        gain = signed(shown([a - b for a, b in zip(own, plain, strict=True)])) if name != "as trained" else ""
        norms = ", ".join(f"{mean_of.fmean(one['norms'][t] for one in each):.2f}" for t in TASKS)
        lines.append(f"| {name} | " + " | ".join([*cells, shown(own), gain, norms]) + " |")
    return "\n".join(lines)


def ald(run: dict[str, Any], name: str) -> float:
    """Returns the average loss difference of a merge to the experts as they were trained."""
    return mean_of.fmean(run["merges"][name]["losses"][t] - run["experts"][t] for t in TASKS)


def signed(text: str) -> str:
    """Puts a plus before a difference that has no minus."""
    return text if text.startswith("-") else "+" + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=["starter", "smollm2"])
    parser.add_argument("--run", type=Path, help="the family's recipe run; default: runs/<family>")
    parser.add_argument("--folder", type=Path, required=True, help="keeps experts and results")
    parser.add_argument("--seeds", type=int, default=3, help="of the starter's experts, 2 to 5")
    parser.add_argument("--training", type=int, default=300, help="training conversations of each task")
    parser.add_argument("--conversations", type=int, default=100, help="held-out ones of each task")
    options = parser.parse_args()
    run = options.run or Path("runs") / options.family
    torch.set_flush_denormal(True)
    found = []
    for seed in range(options.seeds if options.family == "starter" else 1):
        if options.family == "starter":
            folder = options.folder / f"seed-{seed}"
            base, experts = train_starter_experts(run, folder, seed)
        else:
            folder, base = options.folder, run / "20-convert" / "model"
            names = {"medical": 41, "dialogue": 42, "reasoning": 43}
            experts = {task: run / f"{number}-sft-{task}" / "model" for task, number in names.items()}
        found.append(compare(folder, run, base, experts, options))
    print(table(found))


if __name__ == "__main__":
    main()
