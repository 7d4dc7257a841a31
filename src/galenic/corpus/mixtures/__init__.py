"""How often a document is read, and how much of each source a phase reads.

* `sampling.py`: repeats of a document from its scores, classes and count.
* `mixture_tree.py`: a curriculum's mixture as a tree of tokens, documents and repeats.
* `mixture.py` (verb), `mixture_space.py`, `fit.py`, `mixture_table.py`: ratios fitted from many small runs.

Paper: Baichuan-M1 (arXiv 2502.12671), sections 2.1 and 4.2.
"""
