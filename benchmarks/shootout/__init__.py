"""`python -m benchmarks shootout`: systems that keep KV, each after the same faults and on the same work.

Each system has an environment of its own (`environments.py`) and answers in processes of its own (`side.py`, one file per
system in `sides/`). `trials.py` has the faults, `judge.py` the outcomes, `speed.py` the measurements, `page.py` the tables.
What has to run in a foreign environment imports nothing but the standard library at the top: `side.py`, `sides/`,
`questions.py`, `slow_disk.py` and `variants.py`.
"""
