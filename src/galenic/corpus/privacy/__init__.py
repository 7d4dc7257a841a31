"""What identifies a patient is replaced before anything else sees a note.

* `deidentify.py`: finds and replaces; `identifiers*.py`: the rules, in English and Chinese.
"""
