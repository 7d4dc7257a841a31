"""A run folder as the other rooms would leave it, with made-up numbers."""

import json
import math
import random
from pathlib import Path

from galenic.report.config import ReportConfig

SOURCES = {
    "wikipedia": ("general", "en", 5200, 3_400_000),
    "hsk": ("general", "zh", 5000, 420_000),
    "cedict": ("general", "en-zh", 21000, 1_900_000),
    "python-docs": ("general", "en", 900, 800_000),
    "python-code": ("general", "code", 700, 1_500_000),
    "arithmetic": ("general", "en", 8000, 600_000),
    "wikipedia-health": ("medical-basic", "en", 1100, 900_000),
    "icd10cm": ("medical-basic", "en", 9300, 2_100_000),
    "mesh": ("medical-basic", "en", 4700, 1_300_000),
    "drugs": ("medical-basic", "en", 2100, 500_000),
    "abbreviations": ("medical-basic", "en", 1800, 90_000),
    "disease-tables": ("medical-basic", "en", 640, 160_000),
    "hpo": ("medical-advanced", "en", 12100, 2_700_000),
    "radiology": ("medical-advanced", "en", 3300, 1_000_000),
    "guidelines": ("medical-advanced", "en", 84, 1_400_000),
}
PHASES = ("phase-1-general", "phase-2-medical-basic", "phase-3-medical-advanced")
EXPERTS = {"medical": "41-sft-medical", "dialogue": "42-sft-dialogue", "reasoning": "43-sft-reasoning"}
MERGES = {
    "metagpt": "50-merge-metagpt",
    "average": "51-merge-average",
    "task-arithmetic": "52-merge-task-arithmetic",
    "ties": "53-merge-ties",
    "dare": "54-merge-dare",
}
STAGES = {"sft": "55-sft", "elo": "56-elo", "tdpo": "57-tdpo", "reward": "58-reward", "ppo": "59-ppo"}
MODELS = {
    **dict.fromkeys(PHASES, "base"),
    **{f"sft-{name}": "expert" for name in EXPERTS},
    **dict.fromkeys(MERGES, "merge"),
    "flattened": "flattened",
    **{f"after-{name}": "aligned" for name in STAGES if name != "reward"},
}
KINDS = {"recall": 600, "transfer": 600, "translation": 200, "arithmetic": 200, "code": 200}
HOSTILE = "<script>alert('x')</script> & \"<img src=http://evil.example/x.png>\""
CHINESE = "“心肌梗死”的英文是什么？"


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")


def done(folder: Path, seconds: float) -> None:
    versions = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "galenic": "0.1.0"}
    mark = {"fingerprint": f"{hash_text(folder.name):040x}", "seconds": seconds}
    write(folder / "done.json", {**mark, "peak_rss_bytes": 1_300_000_000, "versions": versions})


def hash_text(text: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(text)) % 16**40


def build(root: Path) -> ReportConfig:
    """Writes the run folder and returns the report's config for it."""
    rng = random.Random(0)
    _corpus(root / "10-corpus", rng)
    _tokenizer(root / "20-tokenizer")
    _pretrain(root / "30-pretrain", rng)
    for name, folder in EXPERTS.items():
        _expert(root / folder, name, rng)
    for index, (name, folder) in enumerate(MERGES.items()):
        _merge(root / folder, name, index)
    _flatten(root / "60-flatten", rng)
    _evaluate(root / "70-evaluate", rng)
    for name, folder in STAGES.items():
        _stage(root / folder, name, random.Random(name))
    write(root / "recipe/10-corpus.yaml", "# the corpus\nseed: 0\n")
    write(root / "recipe/30-pretrain.yaml", f"# three phases\ntitle: {HOSTILE}\nlr: 3e-3\n")
    return ReportConfig(
        out=str(root / "80-report"),
        title="Galenic starter",
        corpus=str(root / "10-corpus"),
        tokenizer=str(root / "20-tokenizer"),
        pretrain=str(root / "30-pretrain"),
        experts={name: str(root / folder) for name, folder in EXPERTS.items()},
        merges={name: str(root / folder) for name, folder in MERGES.items()},
        alignment={name: str(root / folder) for name, folder in STAGES.items()},
        flatten=str(root / "60-flatten"),
        evaluate=str(root / "70-evaluate"),
        recipe=str(root / "recipe"),
    )


def _corpus(folder: Path, rng: random.Random) -> None:
    reasons = ("near duplicate", "exact duplicate", "too short", "holds a transfer entity", "mostly symbols")
    sources = {
        name: {
            "group": group,
            "title": f"{name.title()} collection",
            "licence": "CC BY-SA 4.0" if name != "drugs" else HOSTILE,
            "language": language,
            "url_or_package": f"https://example.org/{name}",
            "documents": documents,
            "characters": characters,
            "dropped": {reason: rng.randrange(0, documents // 20 + 2) for reason in reasons},
            "heldout": documents // 50,
            "duplicates": documents // 30,
        }
        for name, (group, language, documents, characters) in SOURCES.items()
    }
    write(folder / "sources.json", sources)
    departments = (
        "cardiology neurology paediatrics oncology psychiatry dermatology urology surgery radiology".split()
    )
    stats = {
        "by_language": {"en": 50_000, "zh": 5000, "en-zh": 21_000, "code": 700},
        "by_department": {
            name: rng.randrange(200, 5000) for name in [*departments, "ophthalmology", "", "emergency"]
        },
        "questions": {kind: 1500 + n for kind, n in KINDS.items()},
        "conversations": {"medical.train": 4100, "medical.heldout": 210},
    }
    write(folder / "stats.json", stats)
    done(folder, 61.2)


def _tokenizer(folder: Path) -> None:
    sources = {
        name: {
            "group": group,
            "train": {"documents": documents, "tokens": characters // 4, "bytes": characters},
            "heldout": {"documents": documents // 50, "tokens": characters // 200, "bytes": characters // 50},
        }
        for name, (group, _, documents, characters) in SOURCES.items()
    }
    write(folder / "tokens/meta.json", {"dtype": "uint16", "vocab_size": 6144, "sources": sources})
    done(folder, 14.0)


def _bits(index: int, *, end: bool = False) -> dict[str, float]:
    return {
        name: round(3.2 - 0.4 * index - 0.7 * (list(SOURCES).index(name) % 5) / 5
                    - (0.5 if end and PHASES[index].endswith(group) else 0.0), 6)
        for name, (group, *_) in SOURCES.items()
    }  # fmt: skip


def _pretrain(folder: Path, rng: random.Random) -> None:
    rows, step = [], 0
    for index, (phase, steps) in enumerate(zip(PHASES, (420, 200, 110), strict=True)):
        for position in range(steps):
            step += 1
            loss = (
                2.9
                + 5.8 * math.exp(-step / 60)
                + 0.25 * index * math.exp(-position / 30)
                + rng.gauss(0, 0.08)
            )
            skipped = step in (230, 477)
            rows.append(
                {
                    "kind": "train",
                    "phase": phase,
                    "step": step,
                    "tokens": step * 4096,
                    "loss": loss,
                    "lr": min(step / 40, 1.0)
                    * 3e-3
                    * (1.0 if index < 2 else 0.5 * (1 + math.cos(position / steps * math.pi))),
                    "grad_norm": 6.0 if skipped else abs(rng.gauss(0.6, 0.1)) + 2 * math.exp(-step / 30),
                    "skipped": skipped,
                    "tokens_per_second": 4400 + rng.random() * 200,
                    "seconds": 0.93,
                    "domains": {
                        name: loss + 0.1 * place
                        for place, (name, (group, *_)) in enumerate(SOURCES.items())
                        if phase.endswith(group) and (step + place) % 3
                    },
                    "repeats": {
                        name: round(0.005 * step, 4)
                        for name, (group, *_) in SOURCES.items()
                        if any(before.endswith(group) for before in PHASES[: index + 1])
                    },
                    "mfu": 0.30 + 0.05 * index + 0.001 * (step % 7),
                    "memory_gb": 1.5 + 0.25 * index,
                    "eta_seconds": 0.93 * (730 - step),
                    **({"documents": [f"hpo:{step}", f"{HOSTILE}:7"]} if skipped else {}),
                }
            )
            if step % 100 == 0:
                rows.append({"kind": "heldout", "phase": phase, "step": step, "bits_per_byte": _bits(index)})
        rows.append(
            {"kind": "heldout", "phase": phase, "step": step, "bits_per_byte": _bits(index, end=True)}
        )
    write(folder / "metrics.jsonl", rows)
    done(folder, 688.4)


def _expert(folder: Path, name: str, rng: random.Random) -> None:
    rows = [{"kind": "heldout", "step": 0, "answers": {f"{name}.heldout": 4.125}}]
    rows += [
        {
            "kind": "train",
            "step": step,
            "tokens": step * 4096,
            "loss": 1.4 + len(name) / 20 + 2.5 * math.exp(-step / 12) + rng.gauss(0, 0.1),
            "lr": 1e-3,
            "grad_norm": 0.5,
            "skipped": False,
            "tokens_per_second": 4300.0,
            "seconds": 0.95,
        }
        for step in range(1, 81)
    ]
    rows.append({"kind": "heldout", "step": 80, "answers": {f"{name}.heldout": 1.876}})
    write(folder / "metrics.jsonl", rows)
    done(folder, 80.5)


def _stage(folder: Path, name: str, rng: random.Random) -> None:
    """A stage of alignment; only those that sample have rewards and lengths."""
    rows = [{"kind": "heldout", "step": 0, "accuracy": 0.125, "log_likelihood": -1.5}]
    if name == "sft":
        rows = [{"kind": "heldout", "step": 0, "answers": {"tasks.heldout": 2.75}}]
    for step in range(1, 121):
        rise = 1 - math.exp(-step / 40)
        row = {"kind": "train", "step": step, "tokens": step * 512, "loss": 2.5 - rise + rng.gauss(0, 0.05)}
        row |= {"lr": 1e-4, "grad_norm": 0.5, "skipped": False, "tokens_per_second": 900.0, "seconds": 0.5}
        if name not in ("sft", "reward"):
            row |= {"kl": 0.02 * rise + 0.002 * rng.random(), "entropy": 1.5 - 0.5 * rise}
        if name in ("elo", "ppo"):
            row |= {"reward": rise + rng.gauss(0, 0.1), "length": 30 + 9 * rise, "ended": 0.9 + 0.1 * rise}
        if name != "sft":
            row |= {"accuracy": min(1.0, 0.4 + 0.4 * rise)}
        if name == "ppo":
            row |= {"clipped": 0.1 * rng.random()}
        rows.append(row)
    last = (
        {"answers": {"tasks.heldout": 1.25}}
        if name == "sft"
        else {"accuracy": 0.625, "log_likelihood": -0.875}
    )
    write(folder / "metrics.jsonl", [*rows, {"kind": "heldout", "step": 120, **last}])
    write(folder / "model/galenic.json", {"verb": name})
    done(folder, 61.0)


def _merge(folder: Path, name: str, index: int) -> None:
    weights = ([0.4321, 0.3456, 0.2223], [1 / 3] * 3, [0.3] * 3, [1.0] * 3, [0.5] * 3)[index]
    write(
        folder / "merge.json",
        {
            "method": name if name != "average" else "linear",
            "base": "/somewhere/30-pretrain/phase-3-medical-advanced",
            "experts": list(EXPERTS),
            "norms": {"medical": 21.2345, "dialogue": 18.9876, "reasoning": 15.4321},
            "cosines": [[1.0, 0.1234, 0.0567], [0.1234, 1.0, -0.0432], [0.0567, -0.0432, 1.0]],
            "coefficients": dict(zip(EXPERTS, weights, strict=True)),
            "effective_models": 1 / sum(w * w for w in weights) * sum(weights) ** 2,
            "warnings": ["norms differ by 1.4x: the largest decides"] if name == "metagpt" else [],
        },
    )
    done(folder, 0.8)


def _flatten(folder: Path, rng: random.Random) -> None:
    layers = [
        {
            "name": f"model.layers.{layer}.{part}",
            "rank": 256 if "down" not in part else 631,
            "dimension": 256 if "down" not in part else 640,
            "noop": "W_pack" in part,
            "relative_output_change_predicted": 1e-4 * rng.random(),
            "relative_output_change_measured": 1e-4 * rng.random(),
            "norm_before": 20 + rng.random(),
            "norm_after": 18 + rng.random(),
        }
        for layer in range(6)
        for part in ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    write(
        folder / "flatten.json",
        {
            "mode": "ridge",
            "output_budget": 0.001,
            "rows": 200_000,
            "layers": layers,
            "loss": {"train": [3.0123, 3.0131], "heldout": [3.2345, 3.2312]},
            "trace": {
                "before": {"mean": 1523.4, "standard_error": 21.5, "probes": 32},
                "after": {"mean": 1377.8, "standard_error": 19.5, "probes": 32},
            },
            "notes": ["the head is left alone: NormHead rescales its rows"],
        },
    )
    done(folder, 44.0)


def _evaluate(folder: Path, rng: random.Random) -> None:
    models = {}
    for index, (name, group) in enumerate(MODELS.items()):
        accuracy = {}
        for kind, n in KINDS.items():
            value = round((0.25 + 0.012 * index * (kind != "transfer") + rng.random() * 0.04) * n) / n
            half = 1.96 * math.sqrt(value * (1 - value) / n)
            accuracy[kind] = {
                "value": value,
                "low": value - half,
                "high": value + half,
                "n": n,
                "chance": 0.25,
            }
        models[name] = {
            "path": f"{STAGES[name[6:]]}/model" if name.startswith("after-") else f"/somewhere/{name}",
            "group": group,
            "parameters": 4_012_345,
            "bits_per_byte": {
                s: {"value": 2.5 - 0.05 * index + rng.random() / 5, "bytes": 30_000} for s in SOURCES
            },
            "answers": {s: {"bits_per_byte": 2 - 0.05 * index, "bytes": 20_000} for s in EXPERTS},
            "accuracy": accuracy,
            "normalised_average": 0.8 + index / 50,
        }
    shown = []
    for index in range(10):
        kind = list(KINDS)[index % 5]
        options = ["myocardial infarction", "心绞痛 (angina)", "heart failure", "pericarditis"]
        if index == 3:
            options[1] = HOSTILE
        text = {2: CHINESE, 4: "What does this print?\nfor i in range(3):\n    print(i * i)", 8: HOSTILE}.get(
            index, "Which finding belongs to “seizure”, a transient sign of abnormal activity in the brain?"
        )
        picks = {name: rng.choice([0, 0, 1, 2, 3]) for name in MODELS}
        shown.append(
            {"kind": kind, "question": text, "options": options, "answer": 0, "source": "hpo", "picks": picks}
        )
        shown[-1]["said"] = {name: f"{name} says that it is fever {index}" for name in MODELS}
    shown[0]["said"] |= {"after-sft": "", "after-ppo": "Let me think.\nAnswer: Myocardial Infarction"}
    shown[3]["said"]["after-elo"] = HOSTILE
    write(
        folder / "results.json",
        {
            "models": models,
            "experts": {
                "recall": "sft-medical",
                "translation": "sft-dialogue",
                "arithmetic": "sft-reasoning",
            },
            "shown": shown,
            "protocol": {
                "prompt": "<s>Question: {question}\nAnswer: {option}",
                "accuracy": "highest per byte",
            },
        },
    )
    done(folder, 187.0)
