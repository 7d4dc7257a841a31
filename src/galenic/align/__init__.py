"""Room 4: alignment on the loop of pre-training: one method a file.

    model folder + conversations ──> sft ──> expert (model folder, metrics.jsonl)

Supervised fine-tuning (Baichuan-M1 report, section 5.1): packed samples that cannot see each other, loss on the
answers only, cosine learning rate from where the annealing ended.
"""
