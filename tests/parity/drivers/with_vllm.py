"""Greedy continuations by vLLM in several set-ups, one after another. Galenic is found as a plugin, not imported."""

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
# Without "nobind" every rank wants a NUMA node of its own.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import numpy as np
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def run(rounds: list[list[list[int]]], new_tokens: int, options: dict) -> dict:
    llm = LLM(**{"dtype": "float32", "seed": 0, "disable_log_stats": False} | options)
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    tokens, cached = [], []
    for prompts in rounds:
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        for output in llm.generate(texts, sampling, use_tqdm=False):
            tokens.append(output.outputs[0].token_ids)
            cached.append(output.num_cached_tokens or 0)
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    found = {"tokens": tokens, "cached": cached, "preempted": counters["vllm:num_preemptions"]}
    return {name: np.array(value) for name, value in found.items()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, setup in job["setups"].items():
        for key, value in run(setup["rounds"], job["new_tokens"], setup["options"]).items():
            found[f"{name}/{key}"] = value
        gc.collect()
        cleanup_dist_env_and_memory()
    np.savez(job["out"], **found)


if __name__ == "__main__":  # worker processes import this file again
    main()
