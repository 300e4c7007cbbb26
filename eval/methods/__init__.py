"""Other papers' methods on a restored prompt: score, bytes and seconds of each, beside the full KV.

The KV of a document is computed and stored once, and restored once. Each method then presses a copy of that restore and answers
the question. Results are written row by row, so a run that was stopped goes on where it was: the same command again.
"""
