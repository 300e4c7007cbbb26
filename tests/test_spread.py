"""Over how many requests a value is read, learnt on a made-up server: no clock is involved."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cake_hf.stores.object_client import Spread

MIB = 2**20
Server = Callable[[int], float]


def reads(spread: Spread, server: Server, count: int, most: int = 8) -> list[int]:
    """How many requests each of so many reads of a value takes, where n requests at once take server(n) seconds."""
    taken = []
    for _ in range(count):
        halvings = spread.halvings(most)
        taken.append(-(-most >> halvings) or 1)
        spread.learn(halvings, most * 8 * MIB, server(taken[-1]))
    return taken


def far(requests: int) -> float:
    """Each connection brings 60 MB/s."""
    return 64 * MIB / requests / 60e6


def near(requests: int) -> float:
    """One connection brings all that the server can give, and each request costs it something."""
    return 0.02 + 0.01 * requests


def test_far_away_a_value_comes_over_as_many_connections_as_it_may() -> None:
    taken = reads(Spread(), far, 1000)
    assert taken[:3] == [8, 4, 8]
    assert set(taken) == {8, 4}, "no trial takes more than twice as long"
    assert taken.count(4) < 20


def test_a_server_nearby_is_soon_asked_once() -> None:
    taken = reads(Spread(), near, 1000)
    assert taken[:4] == [8, 4, 2, 1]
    assert taken[4:].count(1) > 950


def test_the_best_may_be_between() -> None:
    taken = reads(Spread(), lambda requests: {8: 0.5, 4: 0.3, 2: 0.2, 1: 0.4}[requests], 1000)
    assert taken.count(2) > 950


@pytest.mark.parametrize(("before", "later", "expected"), [(near, far, 8), (far, near, 1)])
def test_a_change_of_the_server_is_noticed(before: Server, later: Server, expected: int) -> None:
    spread = Spread()
    reads(spread, before, 200)
    assert reads(spread, later, 500)[-100:].count(expected) > 90


def test_values_of_fewer_requests_are_read_by_no_less_than_one() -> None:
    spread = Spread()
    assert reads(spread, near, 10)[-1] == 1
    assert [spread.halvings(most) for most in (1, 2, 3, 4)][:3] == [0, 1, 2]
