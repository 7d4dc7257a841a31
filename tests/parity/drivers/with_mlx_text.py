"""Text through mlx-lm's public API, tokenizer and chat template included."""

import json
import sys
from pathlib import Path

import numpy as np
from mlx_lm import generate, load, stream_generate

job = json.loads(Path(sys.argv[1]).read_text())
model, tokenizer = load(job["folder"])
prompts = [
    tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    for question in job["questions"]
]
limit = job["new_tokens"]
answers = [generate(model, tokenizer, prompt, max_tokens=limit) for prompt in prompts]
saved = {"answers": np.array(answers)}
for index, prompt in enumerate(prompts):
    steps = list(stream_generate(model, tokenizer, prompt, max_tokens=limit))
    saved[f"prompt_{index}"] = np.array(prompt)
    saved[f"tokens_{index}"] = np.array([step.token for step in steps])
    saved[f"end_{index}"] = np.array(steps[-1].finish_reason)
np.savez(job["out"], **saved)
