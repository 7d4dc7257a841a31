"""How training is spread over devices, applied to the network from outside: the network's own file knows nothing of it.

parallel.py            who shares what; FSDP2, hybrid sharding, precision; sums and norms over all processes
tensor_parallel.py     each matrix on several devices        context_parallel.py   each row on several devices
recompute.py           activations computed again            initial.py            the seeded start, layer by layer
"""
