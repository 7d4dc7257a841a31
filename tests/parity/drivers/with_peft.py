"""LoRA with PEFT: trains, generates, merges back, saves adapter and merged model."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
torch.manual_seed(0)
rows = torch.tensor(job["rows"])


def fresh():
    return AutoModelForCausalLM.from_pretrained(job["folder"], trust_remote_code=True)


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(rows).logits.numpy()


def greedy(model) -> np.ndarray:
    mask = torch.ones_like(rows)
    out = model.eval().generate(
        input_ids=rows, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    return out.numpy()


lora = LoraConfig(r=4, lora_alpha=16, target_modules=job["targets"], task_type="CAUSAL_LM")
model = get_peft_model(fresh(), lora).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
losses = []
for _ in range(8):
    loss = model(input_ids=rows, labels=rows).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
# An adapter that the network passes by keeps its second factor at the zeros it began with.
moved, still = set(), set()
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        (moved if parameter.any() else still).add(name.split(".lora_B")[0].rsplit(".", 1)[1])
saved = {"losses": np.array(losses), "trained": np.array(sorted(moved - still))}
saved |= {"adapter": logits(model), "adapter_greedy": greedy(model)}
model.save_pretrained(job["adapter"])
saved["reloaded"] = logits(PeftModel.from_pretrained(fresh(), job["adapter"]))
merged = model.merge_and_unload()
saved |= {"merged": logits(merged), "merged_greedy": greedy(merged)}
merged.save_pretrained(job["merged"])
np.savez(job["out"], **saved)
