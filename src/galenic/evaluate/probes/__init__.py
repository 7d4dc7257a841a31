"""Probes: sets of our own, made of templates and seeds at run time, so that no training corpus holds them.

    needle         a value said once in a long text, asked for at its end; by length and depth
    hops           facts scattered over a long text that must be joined, one to four of them
    safety         requests to be refused, and look-alikes to be answered
    calibration    whether the questions' probabilities mean what they say
    positions      whether a letter is chosen for its place
    contamination  which of the questions stand in the training corpus

In: one model at a time, the evaluation's questions and their rows. Out: `probes` of that model in results.json, rows in
items/<model>.jsonl. `probes.py` runs them, `asked.py` puts prompts to the model, `haystack.py` makes long texts;
each other file is one probe.
"""
