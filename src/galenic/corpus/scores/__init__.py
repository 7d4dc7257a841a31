"""Scores and classes of documents: one small network that this project trains, read by the corpus and the mixture.

    labels (teacher's file, starter's own) --features--> training --> scorer folder --scoring--> scores and classes
    a language model of any folder ----------difficulty-------------------------------------> bits per byte

* `taxonomy.py`: which scores and classes there are, and what sampling prefers.
* `features.py`: texts to hashed n-grams and to a dozen shares (of letters, digits, repeated words ...), compiled.
* `labels.py`: what is learned from; `starter.py`, `priors.py`, `corruptions.py` and `templates/` make it of the
  starter's sources, `teacher.py` asks a language model for more, `labelling.py` on behalf of the verb.
* `training.py`, `calibration.py`, `agreement.py`: the network, its numbers made believable, its agreement with labels
  it has not seen.
* `scorer.py`: the verb. `scoring.py`: the trained folder at work. `difficulty.py`: perplexity for the curriculum.

Source of the dimensions: Baichuan-M1 report (arXiv 2502.12671), sections 2.1.2 (scores), 2.1.5 (27 classes, whose list
is not published) and 2.2 (medical classes, medical quality and value).
"""
