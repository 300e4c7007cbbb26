"""Makes a restore's beliefs about costs, its frontier and its steps, and counts for the report what came of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import dropwhile

from cake_hf.chunks.codec import stored_bytes
from cake_hf.limits import STAGED_PER_THREAD
from cake_hf.model.ranks import Ranks, ranks_of
from cake_hf.restore.plan import RestorePlan
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.scheduling.adapting import Adapting
from cake_hf.scheduling.costs import Brought, Costs, levels_of
from cake_hf.scheduling.frontier import Frontier, Outcome
from cake_hf.scheduling.pace import Pace, RestorePace
from cake_hf.transfer.cost_notes import CostMemory
from cake_hf.transfer.loader import LoadJob


class HurriedPace(RestorePace, Adapting):
    """The pace of a restore that has a time to keep. A chunk has two forms: whole, and its bases alone."""


def deadline_of(session: Session, prompt: Prompt, max_ttft: float | None) -> float | None:
    """Returns when the prompt's first token should be there; None if its chunks are all loaded whole.

    They are, too, if bases cannot be read alone; and on several ranks, as each would choose forms of its own.
    """
    if max_ttft is None or not session.bound_store.store.reads_ranges or ranks_of(session.model) is not None:
        return None
    return prompt.started + max_ttft


def new_pace(
    session: Session,
    prompt: Prompt,
    plan: RestorePlan,
    memory: CostMemory,
    costs: Costs,
    *,
    deadline: float | None,
    layers: int,
    can_run: Callable[[int], bool],
    can_leave: Callable[[int], bool],
) -> RestorePace:
    """Returns the beliefs at the start of a restore.

    Args:
        prompt: from `open_prompt`.
        memory: the costs of earlier prompts.
        costs: the costs of chunks, from that memory; of raw ones if there is a deadline.
        deadline: see `deadline_of`.
        can_run, can_leave: see `RestorePace`.
    """
    kind: Callable[..., RestorePace] = session.rules.pace
    if deadline is not None:
        raw_bytes = stored_bytes(prompt.layout)
        kind = partial(HurriedPace, forms=levels_of(costs.codec), chunk_bytes=raw_bytes, deadline=deadline)
    return kind(
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
        **memory.effort(),
    )


def new_frontier(session: Session, plan: RestorePlan, pace: RestorePace, read_timeout: float) -> Frontier:
    """Returns the ledger of one restore."""
    return Frontier(
        plan.usable,
        strategy=session.strategy,
        read_timeout=read_timeout,
        most_staged=STAGED_PER_THREAD * session.limits.loader_threads,
        judge=pace,
    )


def learn_costs(memory: CostMemory, prompt: Prompt, pace: Pace, took: Mapping[int, Brought]) -> None:
    """Stores what the restore measured, for decisions about the next prompt."""
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
        prompt: a prompt of which at least one chunk was not computed.
        seconds: that the restore took, including the prompt's suffix if that is over.
    """
    compute = memory.costs().compute
    if compute is None:
        return
    report, size, past = prompt.report, prompt.layout.chunk_size, prompt.call.past
    parts = [(start, end) for start, end, _ in prompt.blocks[: prompt.chunks]]
    if any(span.chunk < 0 for span in report.timeline[prompt.first_span :]):
        parts.append((prompt.rest, prompt.call.tokens))
    seconds_of = compute.each({(past + start) // size for start, _ in parts})
    computed = sum(seconds_of[(past + start) // size] * (end - start) / size for start, end in parts)
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


def count_restore(
    prompt: Prompt,
    outcomes: Mapping[int, Outcome],
    overruled: set[int],
    job: LoadJob,
    flown: set[int],
    states: int,
    patience: float,
) -> int:
    """Adds to the report which side made each chunk, what came from the store, and how loads ended; logs late loads.

    The numbers are added, not set, since the rows of a batch share a report.

    Args:
        outcomes: the outcomes of its loads, by chunk.
        overruled: chunks that were loaded, and then made again.
        job: the job of the loader threads.
        flown: chunks that the main thread got from another restore.
        states: the number of snapshots loaded.
        patience: seconds that a load was waited for.

    Returns:
        How many chunks were not computed.
    """
    report, ends = prompt.report, Counter(outcomes.values())
    loaded = {index for index, outcome in outcomes.items() if outcome is Outcome.LOADED} - overruled
    own, shared = loaded - job.shared, (loaded & job.shared) | flown
    chunks = prompt.counted.intersection(range(prompt.chunks))
    tails = set(range(prompt.chunks)) - chunks
    report.chunks_loaded += len(own & chunks)
    report.chunks_shared += len(shared & chunks)
    report.chunks_computed += len(chunks - own - shared)
    report.tails_loaded += len(tails & (own | shared))
    report.tail_tokens_loaded += sum(prompt.blocks[index].tokens for index in tails & (own | shared))
    report.tails_computed += len(tails - own - shared)
    report.chunks_missed += ends[Outcome.MISSED]
    report.chunks_failed += ends[Outcome.CORRUPT] + ends[Outcome.ERROR] + ends[Outcome.LATE]
    if late := ends[Outcome.LATE]:
        job.faults.tell(
            "late",
            "Chunks that the store did not bring in time are computed instead: %s.",
            f"{late} of {len(outcomes)}, given up after {patience:g} s (Limits.read_timeout)",
        )
    report.states_loaded += states
    rounded = sum(prompt.blocks[index].tokens for index in job.frontier.rounded())
    report.tokens_lossy += rounded
    report.tokens_hurried += rounded
    report.bytes_stored += sum(
        took.nbytes - took.raw_bytes
        for index, took in list(job.took.items())
        if index in own and took.nbytes < took.raw_bytes and not took.is_rounded
    )
    report.bytes_loaded += job.place.wanted_bytes(own) + states * prompt.state_layout.nbytes
    return len(own | shared)


class Steps:
    """The steps of a process that computes alone. The methods are those of the frontier.

    Attributes:
        overruled: chunks that were loaded, and made again since another rank had to make them.
    """

    def __init__(self, frontier: Frontier) -> None:
        self._frontier = frontier
        self.overruled: set[int] = set()

    def advance(self, *, until: int, past_loads: bool) -> int | None:
        """Same as `Frontier.advance`."""
        return self._frontier.advance(until=until, past_loads=past_loads)

    def preempted(self, index: int) -> bool:
        """Same as `Frontier.preempted`."""
        return self._frontier.preempted(index)

    def computed(self, index: int) -> None:
        """Same as `Frontier.computed`."""
        self._frontier.computed(index)

    def stand(self, come_near: Callable[[int], int], index: int) -> int:
        """Moves as near to a chunk as possible; returns where. See `Carried.come_near`."""
        return come_near(index)


class AgreedSteps(Steps):
    """The steps of one rank among several, of a tensor-parallel model. All ranks take the same steps.

    Each rank has a frontier and loaders of its own. But all ranks run a forward together. So before each forward every rank
    names the chunk that it would make next, and all make the first of these. A rank that has loaded it makes it again: it is
    the same KV, bit for bit, in the same place. The first of the chunks named only grows, since a rank that has named it has it
    afterwards. So there are at most as many steps as chunks.
    """

    def __init__(self, frontier: Frontier, ranks: Ranks) -> None:
        super().__init__(frontier)
        self._ranks = ranks
        self._own: int | None = None  # what this rank would make next; None for nothing
        self._asks = True  # whether to ask the frontier for the next chunk

    def advance(self, *, until: int, past_loads: bool) -> int | None:
        """Same as `Frontier.advance`, for all ranks. No rank goes past loads: others may have to make these chunks."""
        if self._asks or (self._own is not None and self._frontier.preempted(self._own)):
            self._own, self._asks = self._frontier.advance(until=until), False
        (agreed,) = self._ranks.all_reduce_min([until if self._own is None else self._own])
        if agreed == until:
            return None
        if agreed != self._own:
            self.overruled.add(agreed)
        return agreed

    def preempted(self, index: int) -> bool:
        """False: the other ranks are in the same forward."""
        return False

    def computed(self, index: int) -> None:
        """Same as `Frontier.computed`, if the chunk was the one that this rank named."""
        if index == self._own:
            self._frontier.computed(index)
            self._asks = True

    def stand(self, come_near: Callable[[int], int], index: int) -> int:
        """Moves as near to a chunk as all ranks can."""
        at = come_near(index)
        while True:
            least, greatest = self._ranks.span(at)
            if least == greatest:
                return at
            at = come_near(least)


def steps_for(frontier: Frontier, ranks: Ranks | None) -> Steps:
    """Returns the steps of a process alone, or of one rank among several."""
    return Steps(frontier) if ranks is None else AgreedSteps(frontier, ranks)
