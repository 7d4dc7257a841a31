"""The same requests to lm-evaluation-harness' `hf` model and to ours, and the report's rows as its tasks."""

import json
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, job["src"])  # what is compared is not installed here

import numpy as np  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from galenic.evaluate.benchmarks import benchmarks  # noqa: E402
from galenic.evaluate.benchmarks.config import BenchmarksConfig  # noqa: E402
from galenic.evaluate.benchmarks.lm import GalenicLM  # noqa: E402
from galenic.model import load_tokenizer  # noqa: E402
from galenic.model.foreign import load_any  # noqa: E402


def requests(kind: str, arguments: list) -> list:
    return [
        Instance(request_type=kind, doc={}, arguments=tuple(each), idx=n) for n, each in enumerate(arguments)
    ]


theirs = HFLM(
    pretrained=job["folder"], trust_remote_code=True, dtype="float32", device="cpu", batch_size=job["batch"]
)
tokenizer = load_tokenizer(job["folder"])
model = load_any(job["folder"])
ours = GalenicLM(model, tokenizer, add_bos=False, batch_tokens=256)
out = {}
for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
    for name, lm in (("theirs", theirs), ("ours", ours)):
        found = getattr(lm, kind)(requests(kind, job[kind]))
        out[f"{kind}.{name}"] = np.array(found)

manager = TaskManager(
    include_path=job["rows"],
    include_defaults=False,
    metadata=job["places"],
)
names = [f"galenic_{name}" for name in job["row_tasks"]]
results = simple_evaluate(
    model=ours,
    tasks=names,
    task_manager=manager,
    apply_chat_template=True,
    gen_kwargs={"max_gen_toks": job["new_tokens"]},
    bootstrap_iters=0,
    log_samples=True,
)
out["rows"] = np.array(
    json.dumps(
        {
            name: [[s["resps"][0][0].strip(), s["right"], s["unanswered"]] for s in results["samples"][name]]
            for name in names
        }
    )
)


class Told(GalenicLM):
    """Says what it was told to say."""

    def generate_until(self, requests, disable_tqdm=False):
        return [job["right"][request.args[0]] for request in requests]


for name in names:  # no chat template: the prompt is the key
    task = manager.load([name])["tasks"][name]
    job.setdefault("right", {}).update(
        {doc["prompt"]: job["answers"][name][n] for n, doc in enumerate(task.eval_docs)}
    )
told = simple_evaluate(
    model=Told(model, tokenizer), tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False
)
out["told"] = np.array([told["results"][name]["right,none"] for name in names])

config = BenchmarksConfig(tasks=["choices", "answers"], task_folder=job["tasks"], samples=2, prompt="plain")
numbers, lines = benchmarks.measure(config, {}, model, tokenizer, "m", Path(job["out"]).parent)
out["measured"] = np.array(json.dumps([numbers, lines], ensure_ascii=False))

refusals = []
for change in ({"tasks": ["choises"]}, {"tasks": ["perplexity"]}, {"tasks": ["missing"]}):
    try:
        benchmarks.measure(
            BenchmarksConfig(**({"task_folder": job["tasks"]} | change)),
            {},
            model,
            tokenizer,
            "m",
            Path(job["out"]).parent,
        )
        refusals.append("")
    except ValueError as error:
        refusals.append(f"{type(error).__name__}: {error}")
out["refusals"] = np.array(refusals)
np.savez(job["out"], **out)
