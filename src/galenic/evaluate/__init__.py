"""Room 7: measure what the models know.

In: model folders (or `base+adapter`), the tokenizer step (tokenizer and held-out token shards), questions, held-out
conversations. Without a tokenizer step: the models' own tokenizer and chat template, and no documents.
Out: `results.json` (one entry a model) and `items/<model>.jsonl` (one row a question, every score kept).

    held-out tokens ----> bits per byte, one number a domain --------+
    conversations ------> bits per byte of the assistant's answers --+--> results.json --> report
    questions ----------> accuracy with its 95% interval ------------+
      by the options' likelihood, or by an answer of the model's own
                            |
                            +--> normalised average over the experts' domains (MetaGPT, arXiv 2406.11385, section 4)

`statistics` holds the intervals and averages, `likelihood` the log-probabilities of tokens, `bits_per_byte` and
`multiple_choice` two measures, `written` the answers that models write themselves, `models` opens a model, `inputs`
what is read and refused. `evaluate` is the verb that runs them over all models; `compare` says which of two
models is better on the same items; `chat` talks to one model in the terminal. `probes/` holds measures of our own: long
context, safety, calibration, position bias, contamination.
"""
