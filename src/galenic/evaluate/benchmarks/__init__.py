"""Benchmarks: the 22 rows of Baichuan-M1's report, and any task of lm-evaluation-harness.

In: data files of the benchmarks (each in its own published schema), or Hub data sets where the user names one; a model.
Out: for each row its score with a 95% interval, how many items it left unanswered, and one line an item.

    file --files--> rows of data --items--> prompts and what is right --sample--> answers --scoring--> right, or why not
                                                                                     |                      |
    lm-eval's tasks --lm--> our scorer and sampler as an lm-eval model               +--judge (optional)----+

`rows` is the table: what each row is, the report's published numbers. `items` knows the schemas, `prompts/` holds the
wording, `scoring` reads answers (pure functions). `benchmarks` runs them, without lm-eval; `tasks/` says the same to
lm-eval in its own format, for every model that it can open. `lm` makes a model of ours one of lm-eval's.

Source: arXiv 2502.12671, section 6 and appendix D: at most 1,000 samples, free text, normalised scores.
"""
