"""Made-up traces with the statistics of published ones, for machines that have none: the same for the same seed.

The published statistics are those of Mooncake's three workloads (Qin et al., "Mooncake: Trading More Storage for Less
Computation", FAST 2025, Table 2). What one row of the table stands for:

    chat        its conversations: user texts of very different lengths behind one system prompt, and few turns
    agents      its tools and agents: long system prompts that many sessions share, and many turns that each add little
    documents   its synthetic mix of L-Eval, LooGLE and ShareGPT: several questions about each long document, and short prompts
                with nothing in common

The distributions are our own choice: lognormal lengths, geometric numbers of turns, Poisson arrivals, popularity by rank. Their
parameters are set so that the means come out as published.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import exp, log

from benchmarks.traces.requests import BLOCK, Numbering, Request, Trace, by_time, full_blocks

LONGEST = 126_000
"""Tokens that no prompt exceeds: the traces are of a model with a context of 128K."""


@dataclass(frozen=True)
class Published:
    """One row of the table.

    Attributes:
        row: its name there.
        tokens, output: means per request.
        shared: the share of the prompts that was cached.
        per_second: requests that come per second (of the trace's own times, which the table does not have).
    """

    row: str
    tokens: int
    output: int
    shared: float
    per_second: float


PUBLISHED = {
    "chat": Published("Conversation", 12_035, 343, 0.40, 3.4),
    "agents": Published("Tool&Agent", 8_596, 182, 0.59, 6.6),
    "documents": Published("Synthetic", 15_325, 149, 0.66, 3.9),
}


@dataclass(frozen=True)
class Turn:
    """One prompt of a session.

    Attributes:
        names: a name for each of its blocks.
        tokens, output: of prompt and answer.
    """

    names: tuple[tuple[str, int, int], ...]
    tokens: int
    output: int


def generate(kind: str, requests: int, seed: int = 0) -> Trace:
    """Returns a trace.

    Args:
        kind: "chat", "agents" or "documents".
        requests: their number.
        seed: of everything that is drawn.

    Raises:
        ValueError: there is no such kind, or no request is asked for.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of trace {kind!r}; choose one of {', '.join(KINDS)}.")
    if requests < 1:
        raise ValueError(f"A trace has at least one request, got {requests}.")
    draw = Draw(seed)
    numbering = Numbering()
    made = []
    for time, turn in _interleaved(KINDS[kind](draw), draw, PUBLISHED[kind].per_second, requests):
        blocks = numbering.number(turn.names[: full_blocks(turn.tokens)])
        made.append(Request(time, blocks, turn.tokens, turn.output))
    return by_time(kind, made)


class Draw(random.Random):
    """Random numbers of the distributions that are used here."""

    def length(self, mean: float, sigma: float) -> int:
        """Returns a lognormal number of tokens, from 1 to `LONGEST`."""
        return max(1, min(LONGEST, round(self.lognormvariate(log(mean) - sigma**2 / 2, sigma))))

    def turns(self, mean: float) -> int:
        """Returns a geometric number, at least 1."""
        return 1 + int(self.expovariate(1.0) / -log(1 - 1 / mean)) if mean > 1 else 1

    def rank(self, ranks: int, power: float) -> int:
        """Returns one of so many ranks; each is as likely as `1 / (rank + 1) ** power`."""
        return self.choices(range(ranks), [1 / (rank + 1) ** power for rank in range(ranks)])[0]


Session = Iterator[Turn]


@dataclass(frozen=True)
class _Talk:
    """The parameters of sessions whose prompts grow from turn to turn: means of lengths in tokens, and their sigmas.

    Attributes:
        systems, system: number of system prompts, and the mean length of one.
        first, first_sigma: what the first turn adds.
        turns: mean number of turns.
        added, added_sigma: what each later turn adds.
        output, output_sigma: an answer, which belongs to the next prompt.
    """

    systems: int
    system: int
    first: int
    first_sigma: float
    turns: float
    added: int
    added_sigma: float
    output: int
    output_sigma: float


CHAT = _Talk(1, 600, 10_000, 1.3, 1.7, 2_400, 1.2, 343, 0.9)
AGENTS = _Talk(24, 2_400, 4_400, 1.0, 2.0, 1_700, 1.0, 182, 1.0)


def _talks(talk: _Talk, draw: Draw) -> Iterator[Session]:
    sizes = [draw.length(talk.system, 0.4) for _ in range(talk.systems)]
    for number in count():
        yield _talk(talk, draw, number, draw.rank(talk.systems, 1.0), sizes)


def _talk(talk: _Talk, draw: Draw, number: int, system: int, sizes: list[int]) -> Session:
    common = sizes[system] // BLOCK
    tokens = min(LONGEST, sizes[system] + draw.length(talk.first, talk.first_sigma))
    for _ in range(draw.turns(talk.turns)):
        if tokens > LONGEST:
            return
        names = [("system", system, i) if i < common else ("talk", number, i) for i in range(full_blocks(tokens))]
        output = draw.length(talk.output, talk.output_sigma)
        yield Turn(tuple(names), tokens, output)
        tokens += output + draw.length(talk.added, talk.added_sigma)


def _documents(draw: Draw) -> Iterator[Session]:
    """Sessions of one turn each: three of five ask about a document, of which a few are asked about most often."""
    asked = 0
    sizes: list[int] = []
    for number in count():
        if draw.random() < SHORT:
            tokens = draw.length(600, 1.0)
            yield iter([Turn(_own(number, tokens), tokens, draw.length(240, 0.8))])
            continue
        if asked % QUESTIONS == 0:
            sizes.append(draw.length(26_000, 0.6))
        asked += 1
        document = len(sizes) - 1 - min(len(sizes) - 1, draw.rank(RECENT, 0.7))
        yield iter([_question(draw, number, document, sizes[document])])


SHORT = 0.4
QUESTIONS = 3
RECENT = 40
"""Share of short prompts; questions per document, on average; and how many of the newest documents are asked about."""


def _question(draw: Draw, number: int, document: int, size: int) -> Turn:
    tokens = size + draw.length(80, 0.7)
    names = [
        ("document", document, i) if (i + 1) * BLOCK <= size else ("own", number, i) for i in range(full_blocks(tokens))
    ]
    return Turn(tuple(names), tokens, draw.length(90, 1.0))


def _own(number: int, tokens: int) -> tuple[tuple[str, int, int], ...]:
    return tuple(("own", number, i) for i in range(full_blocks(tokens)))


def _interleaved(
    sessions: Iterator[Session], draw: Draw, per_second: float, requests: int
) -> Iterator[tuple[float, Turn]]:
    """Starts a session whenever the requests would otherwise come too seldom; later turns follow after a pause."""
    waiting: list[tuple[float, int, Session]] = []
    order, now = count(), 0.0
    for _ in range(requests):
        now += draw.expovariate(per_second)
        if not waiting or waiting[0][0] > now:
            heappush(waiting, (now, next(order), next(sessions)))
        _, _, session = heappop(waiting)
        turn = next(session)
        yield now, turn
        following = next(session, None)
        if following is not None:
            heappush(waiting, (now + PAUSE * exp(draw.gauss(0, 0.8)), next(order), _put_back(following, session)))


PAUSE = 30.0
"""Seconds between two turns of a session, in the middle."""


def _put_back(turn: Turn, session: Session) -> Session:
    yield turn
    yield from session


KINDS: dict[str, Callable[[Draw], Iterator[Session]]] = {
    "chat": lambda draw: _talks(CHAT, draw),
    "agents": lambda draw: _talks(AGENTS, draw),
    "documents": _documents,
}
