"""`python -m benchmarks grid`: bandwidth x prompt length x share of compute left x model, against the limit and against
peers.

`axes` says what is measured, `run` goes through it group by group, `group` measures all cells of one model, length and share
in interleaved rounds. `competition` makes the competing load, `peers` are the alternatives without us, `exactness` first
checks whether restoring is exact on the device at all. `show` and `plots` present the results.
"""
