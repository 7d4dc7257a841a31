import json

import numpy as np
import torch

TEXTS = [
    "Question: What is asthma?\nAnswer: a disease of the airways",
    "Fever is a raised body temperature; it has many causes.",
    "Question: Which drug lowers the blood pressure?\nAnswer: ramipril",
    "The heart pumps blood through the body. 心脏把血液输送到全身。",
]


def naive_log_probs(model, ids):
    """log p of tokens 1, 2, ... of one sequence: no batching, no padding, no cache."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double()
    table = torch.log_softmax(logits, dim=-1)
    return np.array([float(table[i - 1, ids[i]]) for i in range(1, len(ids))])


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def question(number, kind="recall"):
    return {
        "id": f"{kind}-{number}",
        "question": f"What is sign {number} of {kind}?",
        "options": [
            f"fever {number}",
            "心脏 disease",
            "a raised body temperature",
            f"drug {number} for the heart",
        ],
        "answer": number % 4,
        "source": "hpo",
        "department": "",
        "entity": str(number),
    }
