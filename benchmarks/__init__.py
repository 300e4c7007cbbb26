"""`python -m benchmarks`: how fast the library is on this machine, compared with the physical limit, in one interleaved run.

There is one module per question: `strategies` (both ends against each single method), `saving` (the cost of writing behind),
`decoding` (time per token), `memory` (what a restore needs beside the KV), `cached` (how near a full hit comes to the bare
disk). Results are compared with goals, never asserted: timing does not decide the exit code, but a wrong logit does.
"""
