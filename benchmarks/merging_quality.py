"""Do merges keep what their experts know? The MetaGPT paper's questions, asked of models that anyone can have.

    make starter smollm2
    python benchmarks/merging_quality.py starter --run runs/starter --folder quality/starter --seeds 3
    python benchmarks/merging_quality.py smollm2 --run runs/smollm2 --folder quality/smollm2

`starter` fine-tunes the starter model's base into three experts, for every seed anew. `smollm2` takes the experts that
recipes/smollm2 made of SmolLM2-135M-Instruct: a medical and a Chinese-English one trained in full, and one for
arithmetic and code trained as a LoRA adapter, whose task vector is much shorter. All are scored on conversations held
out of their training. SLERP is of two models: it goes from the medical to the dialogue expert.

For every method: the held-out loss of each task (nats per token of the answers), the Average Loss Difference to the
experts (ALD, the paper's equation 4), and two averages, higher is better: a task's score is the geometric mean
likelihood of an answer's token, `exp(-loss)`; `absolute` is its mean over the tasks, `normalised` that of its ratio
to the score of the task's own expert (section 4 of the paper, which takes accuracies). Also the cosines of the task
vectors, and how straight a model's outputs run between the base and an expert (Figure 3): the share of their variation
that a straight line explains.

What is trained and scored already is not done again.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from galenic.align.config import SftConfig
from galenic.align.sft import encode_samples
from galenic.align.sft import run as sft
from galenic.evaluate.models import open_model
from galenic.merge import merge
from galenic.merge.adapters import is_adapter
from galenic.model import load_tokenizer
from galenic.pretrain.config import OptimConfig
from galenic.runtime import read_json, write_json

TASKS = {"medical": 600_000, "dialogue": 200_000, "reasoning": 200_000}
"""Task -> training tokens of the starter's expert, as in its recipe."""
METHODS: dict[str, dict[str, Any]] = {
    "average": {"merge_method": "linear"},
    "task arithmetic 0.3": {"merge_method": "task_arithmetic"},
    "TIES": {"merge_method": "ties"},
    "DARE": {"merge_method": "dare_linear"},
    "DARE + TIES": {"merge_method": "dare_ties"},
    "breadcrumbs": {"merge_method": "breadcrumbs"},
    "DELLA": {"merge_method": "della"},
    "SCE": {"merge_method": "sce"},
    "SLERP medical-dialogue": {"merge_method": "slerp", "parameters": {"t": 0.5}},
    "Model Stock": {"merge_method": "model_stock"},
    "TSV": {"merge_method": "tsv"},
    "Iso-C": {"merge_method": "iso_c"},
    "Iso-CTS": {"merge_method": "iso_cts"},
    "MetaGPT": {"merge_method": "metagpt"},
    "MetaGPT per layer": {"merge_method": "metagpt", "parameters": {"scope": "layer"}},
    "MetaGPT + TIES": {"merge_method": "metagpt", "parameters": {"trim": "ties"}},
    "MetaGPT + DARE": {"merge_method": "metagpt", "parameters": {"trim": "dare"}},
    "norm power 1": {"merge_method": "metagpt", "parameters": {"norm_power": 1.0}},
    "norm power -1": {"merge_method": "metagpt", "parameters": {"norm_power": -1.0}},
}
BATCH_TOKENS = 1024
LINE = [step / 10 for step in range(11)]
"""The paper's Figure 3: alpha from 0 to 1 by 0.1."""

Sample = tuple[Tensor, Tensor]
"""Token ids and labels, both (length,); labels are -100 outside the answers."""


# ---------------------------------------------------------------------------- scores


def batches(samples: Sequence[Sample], pad: int) -> list[dict[str, Tensor]]:
    """Pads samples of like length to batches of at most BATCH_TOKENS tokens."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda pair: len(pair[0]), reverse=True):
        if groups[-1] and (len(groups[-1]) + 1) * len(groups[-1][0][0]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(sample)
    found = []
    for group in groups:
        ids, labels = zip(*group, strict=True)
        found.append(
            {
                "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
                "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
                "attention_mask": nn.utils.rnn.pad_sequence(
                    [torch.ones_like(row) for row in ids], batch_first=True
                ),
            }
        )
    return found


def answer_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the (n, vocabulary) logits that predict the batch's n labelled tokens, and those (n,)."""
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    targets = batch["labels"][:, 1:]
    wanted = targets != -100
    return output[:, :-1][wanted], targets[wanted]


@torch.inference_mode()
def loss(model: nn.Module, samples: Sequence[dict[str, Tensor]]) -> float:
    """Mean negative log-likelihood of the labelled tokens, nats."""
    total, count = 0.0, 0
    for batch in samples:
        logits, targets = answer_logits(model, batch)
        total += float(cross_entropy(logits.float(), targets, reduction="sum"))
        count += len(targets)
    return total / count


@torch.inference_mode()
def straightness(model: nn.Module, origin: Any, expert: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """How straight the outputs run from the base (alpha 0) to the expert (alpha 1).

    Returns:
        `explained`: 1 - sum of squares about the straight line of least squares / sum of squares about the mean, over
        the logits of all answers' tokens (each token's own), alpha by alpha; and the curves of three of them.
    """
    rows = []
    for alpha in LINE:
        model.load_state_dict({key: torch.lerp(origin[key], expert[key], alpha) for key in origin})
        logits, targets = answer_logits(model, batch)
        rows.append(logits.gather(1, targets[:, None])[:, 0].double())
    outputs = torch.stack(rows)  # (alphas, outputs)
    centred = outputs - outputs.mean(0)
    steps = torch.tensor(LINE, dtype=torch.float64)
    steps = steps - steps.mean()
    slope = steps @ centred / (steps @ steps)
    rest = centred - steps[:, None] * slope
    shown = torch.linspace(0, outputs.shape[1] - 1, 3).long()
    return {
        "explained": 1 - float(rest.square().sum() / centred.square().sum()),
        "curves": outputs[:, shown].T.tolist(),
    }


def heldout_answers(run: Path, base: Path, conversations: int) -> dict[str, list[dict[str, Tensor]]]:
    """Encodes held-out conversations of each task as the base's tokenizer has it, and batches them."""
    tokenizer = load_tokenizer(base)
    heldout = {}
    for task in TASKS:
        file = run / "10-corpus" / "sft" / f"{task}.heldout.jsonl"
        rows, _ = encode_samples(str(file), tokenizer, context=256)
        pairs = [(torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in rows[:conversations]]
        heldout[task] = batches(pairs, pad=0)
    return heldout


def recipe(name: str, base: Path, experts: dict[str, Path]) -> dict[str, Any]:
    """Returns the recipe of a method. SLERP is of two models, so it stands between two of the experts."""
    models = experts
    if METHODS[name]["merge_method"] == "slerp":
        base, models = experts["medical"], {"dialogue": experts["dialogue"]}
    # In float32, so that what is compared is the methods and not the rounding.
    return METHODS[name] | {
        "base_model": str(base),
        "dtype": "float32",
        "models": [{"model": str(path), "name": task} for task, path in models.items()],
    }


def compare(
    folder: Path, base: Path, experts: dict[str, Path], heldout: dict[str, list[dict[str, Tensor]]]
) -> dict[str, Any]:
    """Scores the base, the experts and every merge; what `folder/results.json` has is not done again."""
    place = folder / "results.json"
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = read_json(place) if place.exists() else {"losses": {}, "straight": {}}
    names = ["base", *experts, *METHODS]

    def expert(task: str) -> nn.Module:
        path = experts[task]
        return open_model(f"{base}+{path}" if is_adapter(path) else str(path))

    for name in tqdm(names, desc=folder.name, leave=False):
        if name in results["losses"]:
            continue
        if name in METHODS:
            out = folder / "merged"
            model = open_model(str(merge(recipe(name, base, experts), out)))
            found = read_json(out / "merge.json")
            if METHODS[name]["merge_method"] != "slerp":  # whose task vector starts at an expert
                results |= {key: found[key] for key in ("norms", "cosines")}
            results.setdefault("coefficients", {})[name] = found["coefficients"]
        else:
            model = open_model(str(base)) if name == "base" else expert(name)
        results["losses"][name] = {task: loss(model, rows) for task, rows in heldout.items()}
        write_json(place, results)
    model = open_model(str(base))
    origin = {key: value.clone() for key, value in model.state_dict().items()}
    for task in experts:
        if task not in results["straight"]:
            results["straight"][task] = straightness(
                model, origin, expert(task).state_dict(), heldout[task][0]
            )
            write_json(place, results)
    return results


# ---------------------------------------------------------------------------- the starter model


def train_starter_experts(run: Path, folder: Path, seed: int) -> tuple[Path, dict[str, Path]]:
    """Trains three experts from the starter's base with this seed's order of the data; returns the base and them."""
    base = run / "30-pretrain" / "phase-3-medical-advanced"
    experts = {}
    for task, tokens in TASKS.items():
        out = folder / task
        experts[task] = out / "model"
        if experts[task].exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        sft(
            SftConfig(
                out=str(out),
                model=str(base),
                conversations=str(run / "10-corpus" / "sft" / f"{task}.train.jsonl"),
                tokens=tokens,
                context=256,
                rows=8,
                optim=OptimConfig(lr=1e-3, warmup_steps=10),
                final_lr=1e-4,
                seed=seed,
            )
        )
    return base, experts


def starter(run: Path, folder: Path, seed: int, conversations: int) -> dict[str, Any]:
    """Compares the merges of one seed's experts."""
    base, experts = train_starter_experts(run, folder / f"seed-{seed}", seed)
    return compare(folder / f"seed-{seed}", base, experts, heldout_answers(run, base, conversations))


# ---------------------------------------------------------------------------- SmolLM2


def smollm2(run: Path, folder: Path, conversations: int) -> dict[str, Any]:
    """Compares merges of the experts that recipes/smollm2 made of SmolLM2-135M-Instruct."""
    base = run / "20-convert" / "model"
    experts = {
        "medical": run / "41-sft-medical" / "model",
        "dialogue": run / "42-sft-dialogue" / "model",
        "reasoning": run / "43-sft-reasoning" / "model",
    }
    return compare(folder, base, experts, heldout_answers(run, base, conversations))


# ---------------------------------------------------------------------------- the table


def scores(losses: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    """Returns a model's held-out losses, ALD, absolute and normalised average."""
    own = losses[name]
    differences = [own[task] - losses[task][task] for task in TASKS]
    return {
        **own,
        "ALD": statistics.fmean(differences),
        "absolute": statistics.fmean(math.exp(-own[task]) for task in TASKS),
        "normalised": statistics.fmean(math.exp(-difference) for difference in differences),
    }


def shown(values: Sequence[float]) -> str:
    """Writes a mean and, of several, its 95% interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return f"{mean:.3f} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Writes the results of one run or of several seeds as Markdown."""
    columns = [*TASKS, "ALD", "absolute", "normalised"]
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for name in ["base", *TASKS, *METHODS]:
        each = [scores(run["losses"], name) for run in runs]
        lines.append(f"| {name} | " + " | ".join(shown([row[key] for row in each]) for key in columns) + " |")
    lines.append("")
    for run in runs:
        norms = ", ".join(f"{task} {norm:.3f}" for task, norm in run["norms"].items())
        coefficients = ", ".join(f"{value:.3f}" for value in run["coefficients"]["MetaGPT"].values())
        cosines = "; ".join(" ".join(f"{value:.3f}" for value in row) for row in run["cosines"])
        straight = ", ".join(f"{task} {found['explained']:.3f}" for task, found in run["straight"].items())
        lines.append(f"norms: {norms}; MetaGPT's coefficients {coefficients}; cosines [{cosines}]")
        lines.append(f"share of the outputs' variation along alpha that is straight: {straight}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=["starter", "smollm2"])
    parser.add_argument("--run", type=Path, help="the family's recipe run; default: runs/<family>")
    parser.add_argument("--folder", type=Path, required=True, help="keeps experts and results")
    parser.add_argument("--seeds", type=int, default=3, help="of the starter's experts, 2 to 5")
    parser.add_argument("--conversations", type=int, default=100, help="held-out ones of each task")
    options = parser.parse_args()
    run = options.run or Path("runs") / options.family
    if options.family == "starter":
        found = [starter(run, options.folder, seed, options.conversations) for seed in range(options.seeds)]
    else:
        found = [smollm2(run, options.folder, options.conversations)]
    print(table(found))


if __name__ == "__main__":
    main()
