"""`python -m benchmarks`: how fast the library is on this machine, beside the limit that physics sets, in one interleaved run.

One module per question: `strategies` (both ends against each single method), `saving` (what writing behind costs),
`decoding` (time per token), `memory` (what a restore needs beside the KV), `cached` (how near a full hit comes to the
bare disk). Goals are judged, never asserted: timing does not decide the exit code, but a wrong logit does.
"""
