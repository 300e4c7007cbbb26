"""The evaluation harness: does a restored prompt give exactly the plain result, and what does LongBench say?

    python -m eval.score FILE.jsonl      # LongBench's scores of predictions
    python -m eval.parity --model M ...  # plain, chunked, cold, warm, meeting in the middle, with faults: all the same?

It lives beside the package, not in it: users of `cake_hf` do not need data sets.
"""
