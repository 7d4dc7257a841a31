"""What evaluation sets ask is taken out of training texts, and every removed span is told.

* `evaluation_items.py`: reads evaluation files; `overlap_index.py`, `overlap.py`: indexes and finds them.
* `decontaminate.py`: spans, cuts, dropped documents; `report.py`: what was found, by file and source.
"""
