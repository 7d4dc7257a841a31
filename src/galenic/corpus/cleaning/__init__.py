"""What a document must be to stay: light repair, boilerplate lines out, rules with sources, the language.

* `clean.py`: `clean_table`, the whole of it over a table; `rules.py`: every threshold with its source.
* `tidy.py`, `phrases.py`: repair and boilerplate; `measure.py`, `counting.py`: what the rules look at, in one pass.
* `language.py`: which language a text is in.
"""
