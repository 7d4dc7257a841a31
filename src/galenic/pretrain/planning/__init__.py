"""What a run will cost, before it runs: the text of `--plan` and the formulas behind it.

plan.py  <--  estimate.py  <--  budget.py (parameters, FLOPs, seconds), memory.py (bytes of a device)
"""
