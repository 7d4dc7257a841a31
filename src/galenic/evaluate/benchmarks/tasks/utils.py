"""The report's rows for lm-eval: where their items lie, and how an answer is scored. See `_row.yaml`.

The file of a row is told by lm-eval's option `--metadata`, as JSON: row of the report -> file, folder or Hub data set.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from datasets import Dataset  # pyrefly: ignore[missing-import]

from galenic.evaluate.benchmarks import items


def _items(row: str) -> Callable[..., dict[str, Dataset]]:
    """Makes what loads a row: lm-eval hands it the metadata, in which `row` names the data."""

    def load(**metadata: Any) -> dict[str, Dataset]:
        if row not in metadata:
            raise ValueError(f'say where the data of {row} lies: --metadata \'{{"{row}": "FILE"}}\'')
        rows = [
            {"prompt": item.prompt, "target": ", ".join(item.answer), "item": json.dumps(asdict(item))}
            for item in items.load(row, str(metadata[row]), f"--metadata {row}")
        ]
        return {"test": Dataset.from_list(rows)}

    return load


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores an answer."""
    item = json.loads(doc["item"])
    item |= {name: tuple(item[name]) for name in ("answer", "labels")}
    verdict = items.score(items.Item(**item), results[0])
    return {"right": verdict.right, "unanswered": float(bool(verdict.problem))}


clinicalbench_diagnosis = _items("ClinicalBench-Diagnosis")
clinicalbench_department = _items("ClinicalBench-Department")
rarearena_rdc = _items("RareArena-rdc")
rarearena_rds = _items("RareArena-rds")
rarebench = _items("RareBench")
nejmqa = _items("NEJMQA")
cmexam = _items("CMExam")
erke = _items("Erke")
neike = _items("Neike")
quanke = _items("Quanke")
usmle = _items("USMLE")
medbullets = _items("MedBullets")
mediq = _items("MediQ")
pubmedqa = _items("PubMedQA")
redis_qa = _items("ReDis-QA")
mednli_dis = _items("MedNLI-Dis")
medcalc = _items("MedCalc")
mmlu_anatomy = _items("MMLU-anatomy")
mmlu_virology = _items("MMLU-virology")
mmlu_genetics = _items("MMLU-genetics")
