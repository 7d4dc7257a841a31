"""From documents to a tokenizer and memory-mapped token shards.

* `tokenizer.py` (verb), `tokenizer_merge.py`: one byte-fallback BPE, or two merged; `tokenizer_units.py`: encoding.
* `shards.py`: the files that training reads; `integrity.py`: whether they are what was written.
* `lookup.py`: the text behind a document's name; `compression.py`: characters per token.
* `chat_format.py`, `chat_template.py`: conversations as tokens.

Paper: Baichuan-M1 (arXiv 2502.12671), section 4.1.
"""
