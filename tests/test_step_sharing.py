"""The laws of sharing an engine's steps and the path to the store."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.planner import plan
from cake_hf.scheduling.step_sharing import (
    AGEING,
    RECENT,
    StallBudget,
    Traffic,
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
    assert is_worth_computing(f, left, load, 0.0, threads, 0.0) == (left * load > f)
    assert not is_worth_computing(f, 0, load, 0.0, threads, 0.0)


@given(f=seconds, left=st.integers(1, 20), load=seconds, threads=st.integers(1, 4))
def test_a_load_that_never_comes_is_overtaken(f: float, left: int, load: float, threads: int) -> None:
    patience = min(left, threads) * load + f
    assert is_worth_computing(f, left, load, patience, threads, 0.0)
    assert is_worth_computing(f, left, load, 2 * patience, threads, 0.0)
    assert loads_wait(left, load, 1000 * patience, threads) > loads_wait(left, load, patience, threads)


def steady(interval: float, share: float) -> tuple[Traffic, float]:
    """Requests that came at that interval and take that share of the time, and when the last one came."""
    traffic = Traffic()
    for number in range(2 * RECENT):
        traffic.worked(share * interval)
        traffic.came(1, number * interval)
    return traffic, (2 * RECENT - 1) * interval


@given(step=seconds, interval=st.floats(0.01, 1.0), share=st.floats(0.0, 0.9), offset=st.floats(0.0, 1.0))
def test_a_step_delays_the_requests_that_come_until_its_backlog_is_worked_off(
    step: float, interval: float, share: float, offset: float
) -> None:
    traffic, now = steady(interval, share)
    waits, number = 0.0, 0
    while (left := step - (offset + number) * interval * (1 - share)) > 0:
        waits, number = waits + left, number + 1
    expected = traffic.delay(step, now)
    assert waits == pytest.approx(expected, abs=step)  # they come one by one, not evenly
    assert traffic.delay(2 * step, now) == pytest.approx(4 * expected)


@given(step=seconds, interval=st.floats(0.01, 1.0), share=st.floats(0.0, 0.9))
def test_the_more_requests_the_more_delay_and_silence_is_believed(step: float, interval: float, share: float) -> None:
    traffic, now = steady(interval, share)
    busier, then = steady(interval, share / 2 + 0.5)
    assert busier.delay(step, then) >= traffic.delay(step, now)
    rarer, then = steady(2 * interval, share)
    assert rarer.delay(step, then) <= traffic.delay(step, now)
    assert traffic.delay(step, now + 3 * interval) < traffic.delay(step, now)
    assert traffic.delay(step, now + 1e9) < 1e-6


@given(step=seconds, interval=st.floats(0.01, 1.0), more=st.floats(1.1, 3.0))
def test_an_engine_that_cannot_keep_up_has_no_time_to_spare(step: float, interval: float, more: float) -> None:
    traffic, now = steady(interval, more)
    assert math.isinf(traffic.delay(step, now))


@given(step=seconds, requests=counts, now=st.floats(0.0, 100.0))
def test_one_burst_says_nothing_of_what_will_come(step: float, requests: int, now: float) -> None:
    traffic = Traffic()
    traffic.came(requests, now)
    traffic.worked(step)
    assert traffic.delay(step, now) == 0.0


@given(
    f=seconds,
    left=st.integers(1, 20),
    load=seconds,
    threads=st.integers(1, 4),
    delay=st.floats(0.0, 10.0, exclude_min=True),
)
def test_a_chunk_is_computed_if_the_restore_gains_what_the_others_lose(
    f: float, left: int, load: float, threads: int, delay: float
) -> None:
    """The restore ends when its loads and the chunk are there, whichever is later."""
    gain = left * load - max(f, (left - 1) * load)
    assume(gain != pytest.approx(delay))
    assert is_worth_computing(f, left, load, 0.0, threads, delay) == (gain >= delay)
    assert not is_worth_computing(f, left, load, 0.0, threads, math.inf)
    patience = min(left, threads) * load + f + left * delay + 1e-6
    assert is_worth_computing(f, left, load, patience, threads, delay)  # a load that never comes is overtaken


@given(f=seconds, share=st.floats(0.05, 1.0))
def test_the_last_load_is_not_overtaken_for_little_while_others_decode(f: float, share: float) -> None:
    delay = StallBudget(share).delay(f)
    assert not is_worth_computing(f, 1, f * (2 - share) - 1e-3 * f, 0.0, 1, delay)
    assert is_worth_computing(f, 1, f * (2 - share) + 1e-3 * f, 0.0, 1, delay)


@given(f=seconds, load=st.none() | seconds, remaining=seconds, queued=seconds, waited=st.floats(0.0, 100.0))
def test_without_others_no_request_yields(
    f: float, load: float | None, remaining: float, queued: float, waited: float
) -> None:
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
def test_no_request_yields_for_ever(
    f: float, load: float | None, remaining: float, queued: float, requests: int
) -> None:
    assert not yields(f, load, remaining, queued, requests, remaining / AGEING + 1e-6)


@given(f=seconds, load=seconds, remaining=seconds, queued=seconds, requests=st.integers(1, 30))
def test_a_restore_that_loads_on_yields_sooner(
    f: float, load: float, remaining: float, queued: float, requests: int
) -> None:
    if yields(f, None, remaining, queued, requests, 0.0):
        assert yields(f, load, remaining, queued, requests, 0.0)


@given(queued=seconds, requests=st.integers(0, 30), delay=st.floats(0.0, 10.0), waited=st.floats(0.0, 100.0))
def test_no_request_is_held_back_for_nothing_or_for_ever(
    queued: float, requests: int, delay: float, waited: float
) -> None:
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
