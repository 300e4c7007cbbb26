"""What a restore believes about costs, the frontier made from that, and what is learned from the restore."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import dropwhile
from typing import Any

from cake_hf.blocks import Block
from cake_hf.chunks.codec import stored_bytes
from cake_hf.limits import STAGED_PER_THREAD
from cake_hf.restore.plan import RestorePlan
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.scheduling.costs import Brought, Costs
from cake_hf.scheduling.frontier import Frontier
from cake_hf.scheduling.pace import Pace
from cake_hf.transfer.cost_notes import CostMemory


class RestorePace(Pace):
    """The pace of one restore of a cache.

    Attributes:
        blocks: of the prompt.
        can_run: whether a block could be computed right now; if not, skipping the wait for its load gains nothing.
        can_leave: whether a forward on it can be ended although its load has not arrived.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        blocks: Sequence[Block],
        can_run: Callable[[int], bool],
        can_leave: Callable[[int], bool],
        **beliefs: Any,
    ) -> None:
        super().__init__(costs, **beliefs)
        self.blocks, self.can_run, self.can_leave = blocks, can_run, can_leave

    def end(self, now: float) -> None:
        """Ends the restore, and drops the references to it, since it holds KV."""
        super().end(now)
        self.can_run = self.can_leave = _never

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        slack = super().slack(front, chunk, loads, now)
        return max(1.0, slack) if any(block.singly for block in self.blocks[front : chunk + 1]) else slack

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        if not self.can_run(chunk):
            return False
        if self.blocks[chunk].singly:  # takes one forward per token, so only if the loads are very late
            wait = self._wait(loads_left, now)
            return wait is None or self._compute is None or self.blocks[chunk].tokens * self._seconds(chunk) < wait
        return super().worth(chunk, loads_left, now, whole=whole)

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        return self.can_leave(chunk) and super().tries(chunk, loads_left, now)


def _never(chunk: int) -> bool:
    return False


def new_pace(
    session: Session,
    prompt: Prompt,
    plan: RestorePlan,
    memory: CostMemory,
    costs: Costs,
    *,
    layers: int,
    can_run: Callable[[int], bool],
    can_leave: Callable[[int], bool],
) -> RestorePace:
    """Returns the beliefs at the start of a restore.

    Args:
        session: of the cache.
        prompt: from `open_prompt`.
        plan: of the restore.
        memory: the costs of earlier prompts.
        costs: of chunks, from that memory.
        layers: of the model.
        can_run, can_leave: see `RestorePace`.
    """
    return RestorePace(
        costs,
        blocks=prompt.blocks,
        can_run=can_run,
        can_leave=can_leave,
        first=prompt.first,
        chunks=prompt.chunks,
        layers=layers,
        threads=session.limits.loader_threads,
        following_seconds=_following_seconds(prompt, plan.usable, costs),
        ranges=plan.ranges,
        credit=memory.credit,
        quiet=memory.quiet,
    )


def new_frontier(session: Session, plan: RestorePlan, pace: RestorePace, read_timeout: float) -> Frontier:
    """Returns the ledger of one restore.

    Args:
        session: of the cache.
        plan: of the restore.
        pace: of the restore.
        read_timeout: seconds that a read is waited for.
    """
    return Frontier(
        plan.usable,
        strategy=session.strategy,
        read_timeout=read_timeout,
        most_staged=STAGED_PER_THREAD * session.limits.loader_threads,
        judge=pace,
    )


def learn_costs(memory: CostMemory, prompt: Prompt, pace: Pace, took: Mapping[int, Brought]) -> None:
    """Stores what the restore measured, for decisions about the next prompt.

    Args:
        memory: of costs.
        prompt: that was restored.
        pace: of the restore.
        took: what was brought for each chunk that was read.
    """
    if not prompt.keys:
        return
    timeline = prompt.report.timeline[prompt.first_span :]
    part = None
    size = prompt.layout.chunk_size
    if prompt.call.tokens <= prompt.rest + size:  # the suffix is at most one chunk
        spans = [span for span in timeline if span.chunk < 0 and span.outcome == "computed"]
        part = ((prompt.call.past + prompt.rest) // size, spans[0].end - spans[0].start) if spans else None
    chunks = [span for span in timeline if span.chunk in prompt.full]
    memory.learn(pace, chunks, stored_bytes(prompt.layout), part, took)


def note_savings(memory: CostMemory, prompt: Prompt, seconds: float) -> None:
    """Adds the time saved to a prompt's report, if the cost of computing is known.

    Args:
        memory: of costs, including those of this prompt.
        prompt: of which at least one chunk was not computed.
        seconds: that the restore took, including the prompt's suffix if that is over.
    """
    compute = memory.costs().compute
    if compute is None:
        return
    report, size = prompt.report, prompt.layout.chunk_size
    past = prompt.call.past
    computed = sum(
        compute.seconds((past + start) // size) * (end - start) / size
        for start, end, _ in prompt.blocks[: prompt.chunks]
    )
    if any(span.chunk < 0 for span in report.timeline[prompt.first_span :]):
        computed += compute.seconds((past + prompt.rest) // size) * (prompt.call.tokens - prompt.rest) / size
    report.seconds_saved = (report.seconds_saved or 0.0) + computed - seconds


def _following_seconds(prompt: Prompt, stored: Sequence[bool], costs: Costs) -> float:
    """Returns the cost of what follows the loads: a hole after a stored chunk, or else the prompt's suffix."""
    if costs.compute is None:
        return 0.0
    behind_loads = dropwhile(lambda index: not stored[index], range(len(stored)))
    hole = next((index for index in behind_loads if not stored[index]), None)
    if hole is not None:
        return costs.compute.seconds(prompt.first + hole)
    size = prompt.layout.chunk_size
    suffix_tokens = prompt.call.tokens - prompt.rest
    return costs.compute.seconds((prompt.call.past + prompt.rest) // size) * suffix_tokens / size
