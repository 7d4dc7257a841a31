"""PEFT's adapters of every kind a merge reads, and the models PEFT makes of them."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
for name, settings in job["adapters"].items():
    torch.manual_seed(len(name))
    base = LlamaForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    folder = Path(job["folder"]) / name
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "whole")
np.savez(job["out"], done=True)
