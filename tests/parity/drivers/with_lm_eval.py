"""Two local tasks through lm-evaluation-harness' `hf` model."""

import json
import sys
from pathlib import Path

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

job = json.loads(Path(sys.argv[1]).read_text())
results = simple_evaluate(
    model="hf",
    model_args={"pretrained": job["folder"], "trust_remote_code": True, "dtype": "float32"},
    tasks=["choices", "answers"],
    task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
    batch_size=job["batch"],
    device="cpu",
    log_samples=True,
    bootstrap_iters=0,
)
asked, scores, written = [], [], []
for sample in results["samples"]["choices"]:
    for arguments, response in zip(sample["arguments"], sample["resps"], strict=True):
        asked.append(list(arguments))
        scores.append(response[0][0] if isinstance(response[0], tuple | list) else response[0])
for sample in results["samples"]["answers"]:
    written.append([sample["arguments"][0][0], sample["resps"][0][0]])
np.savez(
    job["out"],
    asked=np.array(asked),
    scores=np.array(scores, dtype=float),
    written=np.array(written),
    accuracy=np.array(results["results"]["choices"]["acc,none"]),
)
