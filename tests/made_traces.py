"""Traces by hand, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.traces.requests import BLOCK, Request, Trace


def trace_of(names: Sequence[Sequence[int]], tokens: int = 1) -> Trace:
    """A trace whose blocks are named by the way to them."""
    known: dict[tuple[int, ...], int] = {}
    requests = []
    for time, path in enumerate(names):
        blocks = tuple(known.setdefault(tuple(path[: end + 1]), len(known)) for end in range(len(path)))
        requests.append(Request(float(time), blocks, len(path) * BLOCK + tokens, 1))
    return Trace("made", tuple(requests))
