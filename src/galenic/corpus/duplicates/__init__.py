"""One copy of each text stays and knows how many it stands for: exact and near duplicates over a whole corpus.

* `minhash.py`: signatures of texts; `dedup.py`: pairs, sets and who stays, in memory; `files.py`: the same over the
  signature files of a corpus, a few bytes a document.

Paper: Baichuan-M1 (arXiv 2502.12671), section 2.1.1.
"""
