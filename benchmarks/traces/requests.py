"""A trace: requests in the order of their arrival, each a number of tokens of which the first blocks may be shared."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

BLOCK = 512
"""Tokens of a block in the public traces, and of a chunk in the paper's cost curves."""


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        time: seconds after the first request.
        blocks: a number for each full block that may be stored. Equal numbers mean equal tokens up to the block's end.
        tokens: of the whole prompt; at least one of them lies behind the blocks.
        output: tokens of the answer.
    """

    time: float
    blocks: tuple[int, ...]
    tokens: int
    output: int


@dataclass(frozen=True)
class Trace:
    """Requests by time.

    Attributes:
        name: of the file, or of the generated kind.
        requests: at least one.
        block: tokens of a block.
    """

    name: str
    requests: tuple[Request, ...]
    block: int = BLOCK

    def first(self, count: int) -> Trace:
        """Returns the trace's first requests."""
        return Trace(self.name, self.requests[:count], self.block)


@dataclass(frozen=True)
class Statistics:
    """What describes a trace.

    Attributes:
        requests: their number.
        tokens, output: means per request, of the prompt and of the answer.
        shared: the share of all prompt tokens that lie in leading blocks of an earlier prompt, as an unbounded store would hit.
        seconds: from the first arrival to the last.
    """

    requests: int
    tokens: float
    output: float
    shared: float
    seconds: float


def statistics_of(trace: Trace) -> Statistics:
    """Returns a trace's statistics."""
    seen: set[int] = set()
    hits = 0
    for request in trace.requests:
        hits += sum(block in seen for block in request.blocks)
        seen.update(request.blocks)
    count, tokens = len(trace.requests), sum(request.tokens for request in trace.requests)
    return Statistics(
        requests=count,
        tokens=tokens / count,
        output=sum(request.output for request in trace.requests) / count,
        shared=hits * trace.block / tokens,
        seconds=trace.requests[-1].time - trace.requests[0].time,
    )


@dataclass
class Numbering:
    """Gives each block a number by its name and all names before it, so that shared blocks always are leading ones."""

    _known: dict[tuple[int, Hashable], int] = field(default_factory=dict)

    def number(self, names: Iterable[Hashable]) -> tuple[int, ...]:
        """Returns the numbers of a prompt's blocks."""
        numbers: list[int] = []
        for name in names:
            parent = numbers[-1] if numbers else -1
            numbers.append(self._known.setdefault((parent, name), len(self._known)))
        return tuple(numbers)


def full_blocks(tokens: int, block: int = BLOCK) -> int:
    """Returns how many full blocks of a prompt may be stored: at least one token is always left to run."""
    return (tokens - 1) // block


def by_time(name: str, requests: Sequence[Request], block: int = BLOCK) -> Trace:
    """Returns the trace of these requests in the order of arrival, the first one at time 0."""
    ordered = sorted(requests, key=lambda request: request.time)
    start = ordered[0].time
    moved = (Request(one.time - start, one.blocks, one.tokens, one.output) for one in ordered)
    return Trace(name, tuple(moved), block)
