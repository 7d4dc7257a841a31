"""What a phase reads: documents drawn by the mixture, easy to hard or shuffled, packed into rows, laid into batches.

    shards --stages.py--> easy ... hard --drawing.py--> documents --packing.py, bins.py--> rows
    rows --curriculum.py--> batches

A batch is a function of the configuration and its step; a reader's state is a few numbers.
"""
