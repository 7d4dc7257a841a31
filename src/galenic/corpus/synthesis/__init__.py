"""Synthesis: questions, reasoning and texts that no source holds, made of documents that are trusted.

    documents.parquet --seeds--> five pipelines --checks--> judge <--feedback--> revision --> documents, conversations
                                      |                                  |
                                 client.py: cache, budget, pace       ledger.jsonl: what was dropped and why

* `encyclopaedia.py`, `cases.py`, `knowledge_graph.py`, `papers.py`, `online_qa.py`: one pipeline each, its prompts in
  `prompts/` in English and Chinese. `templates.py` is what knowledge graphs become without an endpoint.
* `long_context.py`, `safety.py`: conversations for fine-tuning, by templates only (section 5.1).
* `steps.py`: seeds, drafts and how a step is asked. `checks.py`: what an answer is refused for.
* `client.py`, `cache.py`: any OpenAI-compatible endpoint, nothing paid twice.
* `synthesise.py`: the verb.

Paper: Baichuan-M1 (arXiv 2502.12671), section 2.2.2 and figure 6.
"""
