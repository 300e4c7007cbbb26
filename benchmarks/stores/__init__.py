"""`python -m benchmarks stores`: how much of its client's raw speed each store reaches.

`contenders` and `remote` define, for each store, what raw means; `race` times it; `own_cluster` does so for Mooncake, in a
network of its own. Only the store is timed, without the loader's check: a chunk from the store into a cache's buffers.
"""
