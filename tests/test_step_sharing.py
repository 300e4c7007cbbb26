"""The laws of sharing an engine's steps and the path to the store."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.planner import plan
from cake_hf.scheduling.step_sharing import (
    AGEING,
    StallBudget,
    first_front,
    holds_back,
    is_worth_computing,
    loads_wait,
    next_load,
    remaining_seconds,
    yields,
)

seconds = st.floats(0.001, 10.0)
counts = st.integers(0, 20)


@given(base=seconds, slope=st.floats(0.0, 1.0), load=seconds, stored=st.lists(st.booleans(), min_size=1, max_size=12))
def test_what_remains_is_the_planner_s_optimum(base: float, slope: float, load: float, stored: list[bool]) -> None:
    compute = ComputeCost(base, slope)
    costs = Costs(compute, LoadCost(0.0, 1000.0 / load, 1000.0))
    predicted = plan(costs, stored).predicted_seconds
    found = remaining_seconds([compute.seconds(i) for i in range(len(stored))], stored, load)
    assert found == pytest.approx(predicted, rel=1e-6)


@given(compute=st.lists(seconds, min_size=1, max_size=12), load=seconds)
def test_what_remains_is_at_most_either_side_alone_and_grows_with_each_cost(compute: list[float], load: float) -> None:
    stored = [True] * len(compute)
    both = remaining_seconds(compute, stored, load)
    assert both <= min(sum(compute), len(compute) * load) + 1e-9
    assert both >= max(min(compute[0], load), 0.0) - 1e-9
    assert both <= remaining_seconds([2 * f for f in compute], stored, load) + 1e-9
    assert both <= remaining_seconds(compute, stored, 2 * load) + 1e-9
    assert remaining_seconds([], [], load) == 0.0


@given(f=seconds, left=st.integers(1, 20), load=seconds, threads=st.integers(1, 4))
def test_a_step_that_the_loads_would_overtake_is_not_begun(f: float, left: int, load: float, threads: int) -> None:
    assert is_worth_computing(f, left, load, 0.0, threads) == (left * load > f)
    assert not is_worth_computing(f, 0, load, 0.0, threads)


@given(f=seconds, left=st.integers(1, 20), load=seconds, threads=st.integers(1, 4))
def test_a_load_that_never_comes_is_overtaken(f: float, left: int, load: float, threads: int) -> None:
    patience = min(left, threads) * load + f
    assert is_worth_computing(f, left, load, patience, threads)
    assert is_worth_computing(f, left, load, 2 * patience, threads)
    assert loads_wait(left, load, 1000 * patience, threads) > loads_wait(left, load, patience, threads)


@given(f=seconds, load=st.none() | seconds, remaining=seconds, queued=seconds, waited=st.floats(0.0, 100.0))
def test_nobody_yields_to_nobody(f: float, load: float | None, remaining: float, queued: float, waited: float) -> None:
    assert not yields(f, load, remaining, queued, 0, waited)


@given(f=seconds, load=seconds, remaining=seconds, queued=seconds, requests=st.integers(1, 30))
def test_yielding_makes_the_sum_of_all_waits_least(
    f: float, load: float, remaining: float, queued: float, requests: int
) -> None:
    """Exchange argument: either order is better by exactly what the rule compares."""
    loses = queued - queued / load * (f * load / (f + load))  # loads on meanwhile, and so need not compute that part
    others_first, restore_first = loses, requests * remaining
    assert yields(f, load, remaining, queued, requests, 0.0) == (others_first <= restore_first) or (
        others_first == pytest.approx(restore_first)
    )


@given(f=seconds, load=st.none() | seconds, remaining=seconds, queued=seconds, requests=st.integers(1, 30))
def test_nobody_yields_for_ever(f: float, load: float | None, remaining: float, queued: float, requests: int) -> None:
    assert not yields(f, load, remaining, queued, requests, remaining / AGEING + 1e-6)


@given(f=seconds, load=seconds, remaining=seconds, queued=seconds, requests=st.integers(1, 30))
def test_a_restore_that_loads_on_yields_sooner(
    f: float, load: float, remaining: float, queued: float, requests: int
) -> None:
    if yields(f, None, remaining, queued, requests, 0.0):
        assert yields(f, load, remaining, queued, requests, 0.0)


@given(queued=seconds, requests=st.integers(0, 30), delay=st.floats(0.0, 10.0), waited=st.floats(0.0, 100.0))
def test_nobody_is_held_back_for_nothing_or_for_ever(queued: float, requests: int, delay: float, waited: float) -> None:
    held = holds_back(queued, requests, delay, waited)
    assert not held or (requests > 0 and queued <= requests * delay / 2)
    assert not holds_back(queued, requests, delay, delay / AGEING)
    assert not holds_back(queued, requests, 0.0, waited)
    if held:
        assert holds_back(queued, requests, delay, 0.0)
        assert holds_back(queued, requests + 1, delay, waited)


@given(st.lists(st.tuples(seconds, st.floats(0.0, 100.0)), min_size=1, max_size=8))
def test_the_front_that_is_done_soonest_goes_first_and_none_is_left_behind(fronts: list[tuple[float, float]]) -> None:
    chosen = first_front(fronts)
    least = min(remaining - AGEING * waited for remaining, waited in fronts)
    assert fronts[chosen][0] - AGEING * fronts[chosen][1] == least
    fresh = [(remaining, 0.0) for remaining, _ in fronts]
    assert fresh[first_front(fresh)][0] == min(remaining for remaining, _ in fronts)
    longest = max(remaining for remaining, _ in fronts)
    old = [(longest, longest / AGEING + 1.0), *fresh]
    assert first_front(old) == 0


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 2.0]), counts), min_size=1, max_size=8))
def test_loads_go_where_they_save_most_and_in_turn_where_they_save_alike(candidates: list[tuple[float, int]]) -> None:
    chosen = next_load(candidates)
    saves, under_way = candidates[chosen]
    assert saves == max(saved for saved, _ in candidates)
    assert under_way == min(begun for saved, begun in candidates if saved == saves)


@given(share=st.floats(0.05, 1.0), wants=st.lists(st.booleans(), max_size=200))
def test_steps_alone_keep_to_their_share_in_every_stretch(share: float, wants: list[bool]) -> None:
    budget, alone = StallBudget(share), []
    for want in wants:
        if want and budget.allows():
            budget.spend()
            alone.append(1)
        else:
            budget.earn()
            alone.append(0)
    sums = [0, *accumulate(alone)]
    for first in range(len(sums)):
        for last in range(first, len(sums)):
            assert sums[last] - sums[first] <= share * (last - first) + 1 + 1e-6


@given(share=st.floats(0.05, 1.0))
def test_a_front_that_always_wants_gets_its_share(share: float) -> None:
    budget, alone, steps = StallBudget(share), 0, 400
    for _ in range(steps):
        if budget.allows():
            budget.spend()
            alone += 1
        else:
            budget.earn()
    assert alone >= share * steps / (1 + share) - 1
