"""A run written down: five named states, from any number of processes for any other, whole or not at all.

checkpoints.py   when and how        checkpoint_folder.py   what is on disk        export.py   a Hugging Face folder
"""
