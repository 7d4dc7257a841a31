"""Room 4: alignment on the loop of pre-training: one method a file.

    model folder + conversations ──> sft ──> expert (model folder or LoRA adapter, metrics.jsonl)

Supervised fine-tuning (Baichuan-M1 report, section 5.1): packed samples that cannot see each other, loss on the
answers only, cosine learning rate from where the annealing ended. Models of other architectures are trained the same
way, with their own chat template; `lora.py` trains an adapter instead of the whole model.
"""
