"""An exported folder through transformers' own auto classes, without galenic."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

job = json.loads(Path(sys.argv[1]).read_text())
assert importlib.util.find_spec("galenic") is None
assert transformers.__version__ == job["version"]
torch.set_num_threads(1)
folder, again = job["folder"], job["again"]

try:
    AutoModelForCausalLM.from_pretrained(folder)
    refusal = "nothing was refused"
except (ValueError, EOFError) as error:
    refusal = str(error)

first = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
first.save_pretrained(again)
tokenizer.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
assert (
    AutoTokenizer.from_pretrained(again)("fever and cough").input_ids
    == tokenizer("fever and cough").input_ids
)

rows = torch.tensor(job["rows"])
batch = {"input_ids": rows, "attention_mask": (rows != first.config.pad_token_id).long()}
saved = {"refusal": np.array(refusal)}
for name, model in {"first": first, "second": second}.items():
    with torch.no_grad():
        saved[f"{name}_logits"] = model(**batch).logits.numpy()
    for way, settings in job["ways"].items():
        out = model.generate(
            **batch, max_new_tokens=job["new_tokens"], do_sample=False, eos_token_id=None, **settings
        )
        saved[f"{name}_{way}"] = out.numpy()
np.savez(job["out"], **saved)
