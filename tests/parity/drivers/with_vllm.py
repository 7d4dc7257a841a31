"""Greedy continuations by vLLM: prompts in, tokens and what the scheduler did out. Galenic is found as a plugin only."""

import json
import os
import sys

os.environ["VLLM_NO_USAGE_STATS"] = os.environ["DO_NOT_TRACK"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
from vllm import LLM, SamplingParams


def main() -> None:
    job = json.load(open(sys.argv[1]))
    llm = LLM(
        model=str(job["folder"]), dtype="float32", seed=0, disable_log_stats=False, **job["options"]
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True)
    tokens, cached = [], []
    for prompts in job["rounds"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        for output in llm.generate(prompts, sampling, use_tqdm=False):
            tokens.append(output.outputs[0].token_ids)
            cached.append(output.num_cached_tokens or 0)
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    np.savez(
        job["out"],
        tokens=np.array(tokens),
        cached=np.array(cached),
        preemptions=counters.get("vllm:num_preemptions", -1),
        chunks=job["options"].get("max_num_batched_tokens", 0),
    )


if __name__ == "__main__":
    main()
