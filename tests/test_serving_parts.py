"""The ledger of a restore beside others, and what its engine believes about costs."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.frontier import Outcome
from cake_hf.serving.beliefs import Beliefs
from cake_hf.serving.ledger import Chunk, Ledger, Load, WindowLoads
from waiting import PATIENCE

MOVES = st.lists(
    st.sampled_from(["claim", "land", "settle", "lose", "begin", "computed", "advance", "late"]), max_size=60
)


@st.composite
def window_loads(draw: st.DrawFn, stored: list[bool]) -> WindowLoads:
    """No windows, or some of any reach, which loads bring at least at the end of each run of stored chunks."""
    reach = draw(st.integers(0, 3))
    ends = [i for i, has in enumerate(stored) if has and (i + 1 == len(stored) or not stored[i + 1])]
    wanted = {i for end in ends for i in range(max(0, end + 1 - reach), end + 1) if stored[i]}
    return WindowLoads(frozenset(wanted), reach, draw(st.floats(1.0, 10.0)))


@given(stored=st.lists(st.booleans(), min_size=1, max_size=8), moves=MOVES, data=st.data())
def test_each_chunk_is_there_once_and_the_front_never_goes_back(
    stored: list[bool], moves: list[str], data: st.DataObject
) -> None:
    now, windows = 0.0, data.draw(window_loads(stored))
    ledger, under_way, landing, computing = Ledger(stored, lambda: now, windows), [], [], False
    brought: list[int] = []
    held: set[int] = set()  # windows that are at hand
    for move in moves:
        now += 1.0
        front = ledger.front
        if move == "claim" and (load := ledger.claim()) is not None:
            assert stored[load.chunk]
            under_way.append(load)
        elif move == "land" and under_way:
            load = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            if ledger.land(load):
                landing.append(load)
            else:
                assert not ledger.settle(load, Outcome.LOADED)
        elif move == "settle" and landing:
            load = landing.pop()
            assert ledger.settle(load, Outcome.LOADED)
            brought.append(load.chunk)
            held |= {load.chunk} & windows.chunks
        elif move == "lose" and under_way:
            ledger.settle(under_way.pop(), Outcome.ERROR)
        elif move == "begin" and not computing and ledger.advance() is not None:
            computing = ledger.begin()
        elif move == "computed" and computing:
            index, computing = ledger.computed(), False
            held |= set(range(index + 1))
            if not ledger.again:
                brought.append(index)
        elif move == "advance" and not computing:
            ledger.advance()
        elif move == "late":
            ledger.give_up_late(now - 10.0)
        assert ledger.front >= front
        assert set(range(max(0, ledger.front - windows.reach), ledger.front)) <= held
    assert len(brought) == len(set(brought))
    there = {index for index in range(len(stored)) if ledger.state(index) in (Chunk.LOADED, Chunk.COMPUTED)}
    assert there == set(brought)
    assert set(range(ledger.front)) <= there
    for load in landing:
        ledger.settle(load, Outcome.LOADED)
    for load in under_way:
        ledger.settle(load, Outcome.ERROR)
    if computing:
        ledger.computed()
    ledger.close_loading()
    while ledger.advance() is not None:
        assert ledger.begin()
        ledger.computed()
    assert ledger.front == len(stored)


def test_the_end_waits_for_a_copy_that_is_under_way_and_lets_nothing_land_behind_it() -> None:
    ledger = Ledger([True, True], lambda: 0.0)
    first, second = ledger.claim(), ledger.claim()
    assert isinstance(first, Load)
    assert isinstance(second, Load)
    assert ledger.land(first)
    ended = threading.Event()
    threading.Thread(target=lambda: (ledger.end(), ended.set()), daemon=True).start()
    assert not ended.wait(0.01)
    ledger.settle(first, Outcome.LOADED)
    assert ended.wait(PATIENCE)
    assert not ledger.land(second)
    assert ledger.claim() is None


def test_beliefs_follow_what_is_measured() -> None:
    beliefs = Beliefs()
    assert beliefs.compute_seconds(3) is beliefs.load_seconds() is None
    beliefs.start_from(Costs(ComputeCost(1.0, 0.5), LoadCost(0.0, 10.0, 20.0)))
    assert (beliefs.compute_seconds(2), beliefs.load_seconds()) == (2.0, 2.0)
    beliefs.saw_chunk(2, 4.0)  # twice as slow as was learnt
    assert beliefs.compute_seconds(4) == pytest.approx(6.0)
    for index in range(40):
        beliefs.saw_chunk(index % 8, 0.1 + 0.02 * (index % 8))
    assert beliefs.compute_seconds(10) == pytest.approx(0.3)
    for seconds in (1.0, 1.0, 1.0, 50.0, 1.0):
        beliefs.saw_arrival(seconds)
    assert beliefs.load_seconds() == 1.0


def test_beliefs_without_anything_learnt_start_with_the_first_chunk() -> None:
    beliefs = Beliefs()
    beliefs.saw_chunk(0, 2.0)
    assert beliefs.compute_seconds(5) == 2.0
    for index, seconds in ((0, 3.0), (1, 2.0), (2, 1.0)):
        beliefs.saw_chunk(index, seconds)  # later chunks are not cheaper: this is noise
    assert beliefs.compute_seconds(5) == pytest.approx(2.0)
