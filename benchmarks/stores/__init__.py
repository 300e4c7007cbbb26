"""`python -m benchmarks stores`: how much of what its client can do raw a store gives.

`contenders` and `remote` say, for each store, what raw means; `race` times it; `own_cluster` does so for Mooncake, in a network
of its own. What is timed is the store alone, without the loader's check: a chunk from where it is kept into a cache's buffers.
"""
