"""One step of TRL's SFTTrainer on the CPU; saves the batch and the loss it saw.

TRL 1.16 computes the loss from `lm_head.weight` itself, which leaves out what the head does with its rows (NormHead).
Two ways out: `OwnLossTrainer` takes the model's loss, or the head is made a plain one first.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class RecordingTrainer(SFTTrainer):
    def training_step(self, model, inputs, *arguments):
        batches.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return super().training_step(model, inputs, *arguments)


class OwnLossTrainer(RecordingTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)


job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(job["folder"], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
if job["way"] == "a plain head":
    model.materialize_norm_head()
before = model.model.layers[0].self_attn.W_pack.weight.detach().clone()
settings = SFTConfig(
    output_dir=job["checkpoints"],
    max_steps=1,
    per_device_train_batch_size=job["batch"],
    packing=job["packing"],
    max_length=128,
    logging_steps=1,
    learning_rate=1e-3,
    use_cpu=True,
    bf16=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
batches = []
trainer = (OwnLossTrainer if job["way"] == "the model's loss" else RecordingTrainer)(
    model, args=settings, train_dataset=Dataset.from_list(job["conversations"]), processing_class=tokenizer
)
try:
    trainer.train()
except AttributeError as error:
    np.savez(job["out"], refusal=np.array(str(error)))
    sys.exit()
log = trainer.state.log_history[0]
(batch,) = batches
changed = (model.model.layers[0].self_attn.W_pack.weight - before).abs().max()
np.savez(
    job["out"],
    loss=np.array(log["loss"]),
    norm=np.array(log["grad_norm"]),
    changed=np.array(changed.item()),
    **{name: value.numpy() for name, value in batch.items()},
)
