"""Loss, gradients and metrics of one batch of preference pairs in TRL's DPOTrainer or RewardTrainer, on the CPU.

TRL 1.16 multiplies by `lm_head.weight` itself, so the head is made a plain one first.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
opener = AutoModelForCausalLM if job["way"] == "dpo" else AutoModelForSequenceClassification
model = opener.from_pretrained(job["folder"], trust_remote_code=True, dtype=torch.float32)
common = {
    "output_dir": job["checkpoints"],
    "per_device_train_batch_size": len(job["pairs"]),
    "max_length": 128,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
data = Dataset.from_list(job["pairs"])
if job["way"] == "dpo":
    reference = opener.from_pretrained(job["reference"], trust_remote_code=True, dtype=torch.float32)
    model.materialize_norm_head()
    reference.materialize_norm_head()
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(beta=job["beta"], **common),
        train_dataset=data,
        processing_class=tokenizer,
    )
else:
    trainer = RewardTrainer(
        model,
        args=RewardConfig(center_rewards_coefficient=job["centre"], **common),
        train_dataset=data,
        processing_class=tokenizer,
    )
batch = next(iter(trainer.get_train_dataloader()))
arrays = {name: value.numpy() for name, value in batch.items() if torch.is_tensor(value)}
trainer.model.train()
loss = trainer.compute_loss(trainer.model, batch)
loss.backward()
for name, parameter in trainer.model.named_parameters():
    if parameter.grad is not None:
        arrays[f"gradient {name}"] = parameter.grad.numpy()
for name, values in trainer._metrics["train"].items():
    arrays[f"metric {name}"] = np.array(values[-1])
np.savez(job["out"], loss=loss.detach().numpy(), **arrays)
