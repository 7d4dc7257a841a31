"""Two runs as `galenic build` leaves them, with questions and what each model answered."""

import json
import random
from pathlib import Path

import fake_run

KINDS = {"recall": 240, "transfer": 120, "arithmetic": 120}
RIGHT = {"phase-3-medical-advanced": 0.35, "sft-medical": 0.6, "metagpt": 0.5, "flattened": 0.5}
SCORING = "pmi"


def build(root: Path, seed: int = 0, questions: int = 0) -> Path:
    """Writes a run folder; `questions` seeds what is asked."""
    fake_run.build(root)
    fake_run.write(root / "recipe.json", {"recipe": "starter"})
    (root / "recipe").rename(root / "kept-recipe")
    for step, inputs in {
        "50-merge-metagpt": [f"RUN/{step}/model" for step in fake_run.EXPERTS.values()],
        "55-sft": ["RUN/30-pretrain/phase-3-medical-advanced"],
    }.items():
        fake_run.write(
            root / step / "provenance.json", {"verb": "merge", "inputs": dict.fromkeys(inputs, "")}
        )
    for folder in sorted(root.glob("[0-9][0-9]-*")):
        fake_run.write(folder / "config.yaml", f"out: {folder}\n")
    evaluate = root / "70-evaluate"
    fake_run.write(evaluate / "config.yaml", f"out: {evaluate}\nquestions: {root}/10-corpus/questions\n")
    _answers(root, random.Random(seed), random.Random(questions))
    return root


def _answers(root: Path, rng: random.Random, asked: random.Random) -> None:
    rows = {
        kind: [
            {
                "id": f"{kind}/{number}",
                "question": f"What is {asked.randrange(10**6)} in {kind}?",
                "options": [f"{kind} {letter}" for letter in "abcd"],
                "answer": asked.randrange(4),
                "source": "hpo",
            }
            for number in range(count)
        ]
        for kind, count in KINDS.items()
    }
    for kind, questions in rows.items():
        fake_run.write(root / f"10-corpus/questions/{kind}.jsonl", questions)
    file = root / "70-evaluate/results.json"
    results = json.loads(file.read_text())
    results["protocol"]["scoring"] = SCORING
    for name, model in results["models"].items():
        items = [_item(kind, row, RIGHT.get(name, 0.3), rng) for kind, each in rows.items() for row in each]
        fake_run.write(root / f"70-evaluate/items/{name}.jsonl", items)
        model["accuracy"] = {kind: _score([i for i in items if i["kind"] == kind]) for kind in KINDS}
    fake_run.write(file, results)


def _item(kind: str, row: dict, share: float, rng: random.Random) -> dict:
    hit = rng.random() < share
    pick = row["answer"] if hit else (row["answer"] + rng.randrange(1, 4)) % 4
    scores = [-rng.random() for _ in range(4)]
    scores[pick] = rng.random() * 3
    return {
        "kind": kind,
        "id": row["id"],
        "answer": row["answer"],
        "picks": {SCORING: pick},
        SCORING: scores,
        "right": float(hit),
    }


def _score(items: list[dict]) -> dict:
    value = sum(item["right"] for item in items) / len(items)
    return {"value": value, "low": value - 0.06, "high": value + 0.06, "n": len(items), "chance": 0.25}
