"""The plan of a restore: which stored chunks of a prompt are loaded, and how, decided before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cake_hf.blocks import Block
from cake_hf.model.look import any_has
from cake_hf.report import Refusal
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.frontier import Strategy
from cake_hf.transfer.deadline import wait_budget

NO_SNAPSHOT = Refusal(
    "no-snapshot", "stored chunks are computed where no snapshot of the model's state is stored behind them"
)


@dataclass(frozen=True)
class RestorePlan:
    """Says what the loaders bring.

    Attributes:
        usable: for each chunk, whether loading it helps.
        windows: the chunks whose sliding-window pieces are wanted, and the offset of these in their buffers, in tokens.
        state: the chunk at whose end the snapshot of the recurrent state is wanted; None for none.
        loads: whether anything is loaded.
        ranges: in how many ranges of layers the last chunks are read. With more than one, the main thread may go past loads.
    """

    usable: tuple[bool, ...]
    windows: dict[int, int]
    state: int | None
    loads: bool
    ranges: int


def plan_restore(session: Session, prompt: Prompt, costs: Costs, reach: int, *, by_layers: bool) -> RestorePlan:
    """Plans the restore of one prompt.

    Args:
        prompt: from `open_prompt`.
        costs: as currently believed.
        reach: how many tokens the model's longest window reaches back.
        by_layers: whether a forward that follows loads can wait for them layer by layer.
    """
    usable, state = _usable(prompt)
    return RestorePlan(
        usable,
        windows_to_load(usable, prompt.blocks, reach),
        state,
        loads=session.strategy is not Strategy.COMPUTE and any(usable) and wait_budget().grant(1.0) > 0,
        ranges=_ranges(session, prompt, costs) if by_layers else 1,
    )


def snapshot_refusal(prompt: Prompt) -> Refusal | None:
    """Returns why some chunks are computed although they are stored; None if all stored ones help."""
    usable, _ = _usable(prompt)
    return None if usable == prompt.match.stored[: prompt.chunks] else NO_SNAPSHOT


def _usable(prompt: Prompt) -> tuple[tuple[bool, ...], int | None]:
    """Returns for each chunk whether loading it helps, and the chunk at whose end the snapshot of the state is wanted."""
    stored = prompt.match.stored[: prompt.chunks]
    if not prompt.state_layout.pieces:
        return stored, None
    begin, state = _between_states(stored, prompt.match.states)
    return tuple(state is not None and begin <= index <= state for index in range(prompt.chunks)), state


def window_begin(named: Sequence[Block], stop: int, reach: int) -> int:
    """Returns the first block that a window of `reach` tokens, ending at the start of block `stop`, reaches back to."""
    begin = stop
    while begin and named[begin - 1].end > named[stop - 1].end - reach:
        begin -= 1
    return begin


def windows_to_load(usable: Sequence[bool], named: Sequence[Block], reach: int) -> dict[int, int]:
    """Chooses the windows to load: those that the model needs at the end, and wherever it continues after loaded chunks.

    Args:
        usable: which chunks are loaded.
        named: all of them.
        reach: how many tokens the longest window reaches back.

    Returns:
        The chunks, and the offset of each one's windows in a buffer for all of them, in tokens.
    """
    wanted: set[int] = set()
    for stop in range(1, len(usable) + 1):
        if usable[stop - 1] and (stop == len(usable) or not usable[stop]):
            wanted.update(index for index in range(window_begin(named, stop, reach), stop) if usable[index])
    ends = accumulate(named[index].tokens for index in sorted(wanted))
    return {index: end - named[index].tokens for index, end in zip(sorted(wanted), ends, strict=True)}


def _ranges(session: Session, prompt: Prompt, costs: Costs) -> int:
    store = session.bound_store.store
    if not store.reads_ranges:
        return 1
    ranges = session.rules.ranges(costs, prompt.layout.layers, store.range_seconds)
    # After a failed load, chunks are computed in the middle of a forward; hooks that move weights do not support that.
    return 1 if ranges > 1 and any_has(session.model, "_hf_hook") else ranges


def _between_states(stored: Sequence[bool], states: Sequence[bool]) -> tuple[int, int | None]:
    """Finds the run of stored chunks, up to one with a snapshot at its end, that leaves the fewest chunks to compute.

    Chunks before the run are computed from the front, chunks after it from the snapshot.
    """
    best: tuple[int, int | None] = (0, None)
    fewest, begin = len(stored), 0
    for index, has in enumerate(stored):
        if not has:
            begin = index + 1
        elif states[index] and begin + len(stored) - index - 1 < fewest:
            best, fewest = (begin, index), begin + len(stored) - index - 1
    return best
