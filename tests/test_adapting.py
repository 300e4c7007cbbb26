"""The pace of a restore that has a time to keep, by itself. `test_max_ttft.py` has it in restores."""

from __future__ import annotations

import threading

import pytest

from cake_hf.scheduling.adapting import Adapting
from cake_hf.scheduling.costs import Brought, Costs, LoadCost, levels_of
from cake_hf.scheduling.frontier import Frontier

CHUNK_BYTES = 1000
KNOWN = LoadCost(0.0, CHUNK_BYTES / 10, CHUNK_BYTES, 1)
"""10 seconds for a chunk."""


def new_pace(load: LoadCost | None) -> Adapting:
    return Adapting(Costs(None, load), forms=levels_of(None), chunk_bytes=CHUNK_BYTES, deadline=100.0, chunks=8)


@pytest.mark.parametrize("load", [None, KNOWN], ids=["nothing known", "learnt"])
@pytest.mark.parametrize("came", [0, 1, 3])
def test_what_is_in_time_is_known_after_a_pause(load: LoadCost | None, came: int) -> None:
    """All loads have ended, and no other one was worth starting, before refinements are read."""
    pace = new_pace(load)
    for number in range(came):
        pace.loading(10.0 * number)
        pace.loaded(10.0 * (number + 1), Brought(CHUNK_BYTES, CHUNK_BYTES))
    before = pace.arrives(CHUNK_BYTES, 50.0), pace.arrives(CHUNK_BYTES * 100, 50.0)
    pace.paused()
    assert (pace.arrives(CHUNK_BYTES, 50.0), pace.arrives(CHUNK_BYTES * 100, 50.0)) == before
    assert before == (True, load is None and not came)
    assert not pace.arrives(1, 101.0)


def test_the_judge_is_asked_under_the_lock() -> None:
    """A late load may arrive at any time, and is then told to the judge."""
    changed = threading.Condition(threading.Lock())
    frontier = Frontier([True], changed=changed)
    assert frontier.ask(lambda: changed.acquire(blocking=False)) is False
