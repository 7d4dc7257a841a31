"""What is told about a run while it goes on: rows of metrics, held-out scores, TensorBoard and the like.

watch.py   rows, speed, MFU, memory, time left        heldout.py   bits per byte        sinks.py   where else rows go
"""
