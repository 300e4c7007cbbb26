"""Restoring beside other requests, in transformers' continuous batching, on a clock that other processes cannot disturb."""
