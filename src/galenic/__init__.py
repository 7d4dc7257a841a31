"""Galenic compounds medical language models: train, align, merge, flatten.

The folders are the pipeline, in order: corpus -> model -> pretrain -> align -> merge -> flatten -> evaluate
-> report. Each folder's docstring says what comes in and what goes out; the file named after the verb reads
top to bottom.
"""

__version__ = "0.1.0"
