"""What a restore believes about costs, and the frontier that it makes of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import dropwhile

from cake_hf.arithmetic.costs import Costs
from cake_hf.arithmetic.frontier import Frontier
from cake_hf.arithmetic.limits import ASIDE_PER_THREAD
from cake_hf.arithmetic.planner import Rule, nearness, overtakes_in_place, ranges_of
from cake_hf.arithmetic.planner import overdue as late
from cake_hf.arithmetic.report import Span
from cake_hf.cache.prompt import Prompt
from cake_hf.cache.session import Session
from cake_hf.movers.cost_memory import CostMemory
from cake_hf.tensors.tree import has, modules_of


def new_frontier(
    session: Session,
    prompt: Prompt,
    stored: Sequence[bool],
    costs: Costs,
    ranges: int,
    *,
    can_run: Callable[[int], bool],
    turn_aside: Callable[[int], None] | None,
) -> Frontier:
    """The ledger of one restore.

    Args:
        session: of the cache.
        prompt: from `look_up`.
        stored: for each chunk, whether it can be loaded.
        costs: as believed.
        ranges: in how many ranges of layers the last chunks are read.
        can_run: whether a chunk could be computed right now; if not, nothing is gained by not waiting for its load.
        turn_aside: see `Frontier`.
    """
    threads, first = session.limits.loader_threads, prompt.first
    following = _following_seconds(prompt, stored, costs)
    rule = Rule.choose(costs, stored, first, following_seconds=following, ranges=ranges)

    def worth(chunk: int, loads_left: int, loads_done: int, idle_seconds: float) -> bool:
        if prompt.blocks[chunk].singly:  # it takes a forward for each token
            return can_run(chunk) and late(costs, first + chunk, loads_left, loads_done, idle_seconds)
        return can_run(chunk) and rule.worth(chunk, loads_left, loads_done, idle_seconds)

    def overdue(chunk: int, loads_left: int, loads_done: int, idle_seconds: float) -> bool:
        return can_run(chunk) and rule.overdue(chunk, loads_left, loads_done, idle_seconds)

    return Frontier(
        stored,
        strategy=session.strategy,
        read_timeout=session.limits.read_timeout,
        near=nearness(costs, first, prompt.chunks, threads),
        most_aside=ASIDE_PER_THREAD * threads,
        nearest=threads,
        turn_aside=turn_aside,
        last=threads,
        worth=worth,
        overdue=overdue if turn_aside is None and overtakes_in_place(_chunks_in_memory(prompt)) else None,
    )


def ranges_for(session: Session, prompt: Prompt, costs: Costs) -> int:
    """In how many ranges of layers the last chunks are read."""
    if not session.store.reads_ranges:
        return 1
    ranges = ranges_of(costs, prompt.layout.layers, session.store.range_seconds)
    # Where a load fails, chunks are computed in the middle of a forward; hooks that move weights are not made for that.
    moves_weights = ranges > 1 and any(has(module, "_hf_hook") for _, module in modules_of(session.model))
    return 1 if moves_weights else ranges


def learn_costs(memory: CostMemory, prompt: Prompt) -> None:
    """Remember what the restore measured, for the next prompt's decisions."""
    if prompt.keys:
        size = prompt.layout.chunk_size
        is_part = prompt.call.tokens <= prompt.rest + size
        last_piece = (prompt.call.past + prompt.rest) // size if is_part else None
        memory.learn(_of_chunks(prompt), prompt.first, prompt.layout.nbytes, last_piece)


def _of_chunks(prompt: Prompt) -> list[Span]:
    """What is on the timeline of full chunks, which are numbered by where they lie, and of the last piece."""
    size, timeline = prompt.layout.chunk_size, prompt.report.timeline[prompt.first_span :]
    spans = [span for span in timeline if span.chunk < 0 or prompt.is_chunk(span.chunk)]
    if all(block.start == number * size for number, block in enumerate(prompt.blocks)):
        return spans
    return [replace(span, chunk=prompt.blocks[span.chunk].start // size) if span.chunk >= 0 else span for span in spans]


def _chunks_in_memory(prompt: Prompt) -> int:
    """How many chunks' room the cache takes with the prompt in it, of all rows."""
    tokens = prompt.call.past + prompt.call.tokens
    return -(-tokens // prompt.layout.chunk_size) * prompt.report.batch


def _following_seconds(prompt: Prompt, stored: Sequence[bool], costs: Costs) -> float:
    """What comes after the loads: a hole behind a stored chunk, or else the prompt's last piece."""
    if costs.compute is None:
        return 0.0
    behind_loads = dropwhile(lambda index: not stored[index], range(len(stored)))
    hole = next((index for index in behind_loads if not stored[index]), None)
    if hole is not None:
        return costs.compute.seconds(prompt.first + hole)
    size = prompt.layout.chunk_size
    suffix_tokens = prompt.call.tokens - prompt.rest
    return costs.compute.seconds((prompt.call.past + prompt.rest) // size) * suffix_tokens / size
