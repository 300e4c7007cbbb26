"""The split is the best one, and the rule for one more compute step keeps what its docstring proves.

The oracles play the two ends chunk by chunk: `play_split` for a fixed split, `play_rule` for the rule asked online.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cake_hf.arithmetic.costs import ComputeCost, Costs, LoadCost
from cake_hf.arithmetic.planner import Plan, Rule, optimum, plan, worth_starting
from cake_hf.people.bench import cells

computes = st.builds(ComputeCost, st.floats(0.01, 10), st.floats(0, 3))
intervals = st.floats(0.01, 50)
masks = st.lists(st.booleans(), max_size=14)


def load_cost(interval: float) -> LoadCost:
    """Chunks arrive one by one, one in each interval."""
    return LoadCost(0.0, 2**20, interval * 2**20)


loads = st.builds(LoadCost, st.floats(0, 5), st.floats(1, 100), st.floats(1, 500), st.integers(1, 4))


def play_split(compute: list[float], load: LoadCost, stored: list[bool], split: int) -> float:
    """Seconds until all chunks are there: up to the split all are computed, then holes only, each after what precedes it."""
    now = 0.0
    for i, seconds in enumerate(compute):
        if i < split or not stored[i]:
            now += seconds
        else:
            now = max(now, load.finish(sum(stored[i:])))
    return now


def play_rule(
    compute: list[float], interval: float, stored: list[bool], believed: Costs, *, contest: bool = True
) -> float:
    """Seconds until all chunks are there, if each step is begun only where the rule finds it worth it.

    Args:
        compute: true seconds of each chunk.
        interval: true seconds between arrivals; loads arrive from the last stored chunk to the first.
        stored: which chunks are loaded.
        believed: what the rule knows.
        contest: whether a chunk may be computed although its load is under way.
    """
    now = 0.0
    arrival = {i: sum(stored[i:]) * interval for i in range(len(stored)) if stored[i]}
    for i, seconds in enumerate(compute):
        if i not in arrival:
            now += seconds
        while i in arrival and arrival[i] > now:
            left = [time for j, time in arrival.items() if j >= i and time > now]
            last = min(left) - interval
            under_way = arrival[i] - interval <= now
            if worth_starting(believed, i, len(left), now - last) and (contest or not under_way):
                now += seconds
                break
            now = min(left)
    return now


def seconds_of(cost: ComputeCost, chunks: int) -> list[float]:
    return [cost.seconds(i) for i in range(chunks)]


# The plan.


@given(computes, loads, masks, st.integers(0, 20), st.floats(0, 5))
def test_plan_is_the_best_split(
    compute: ComputeCost, load: LoadCost, stored: list[bool], first: int, suffix: float
) -> None:
    made = plan(Costs(compute, load), stored, first, suffix)
    seconds = [compute.seconds(first + i) for i in range(len(stored))]
    every = [play_split(seconds, load, stored, m) + suffix for m in range(len(stored) + 1)]
    assert made.curve == pytest.approx(every)
    assert made.predicted_seconds == min(made.curve) == pytest.approx(min(every))
    assert made.split is not None
    assert made.curve[made.split] == made.predicted_seconds


@given(computes, loads, masks)
def test_never_worse_than_the_better_single_method(compute: ComputeCost, load: LoadCost, stored: list[bool]) -> None:
    made = plan(Costs(compute, load), stored)
    assert made.predicted_seconds is not None
    assert made.gain is not None
    assert made.curve[-1] == pytest.approx(sum(seconds_of(compute, len(stored))))
    assert made.curve[0] == pytest.approx(play_split(seconds_of(compute, len(stored)), load, stored, 0))
    assert made.predicted_seconds <= min(made.curve[0], made.curve[-1])
    assert made.gain >= 1


@given(computes, loads, masks)
def test_decision_says_what_the_split_does(compute: ComputeCost, load: LoadCost, stored: list[bool]) -> None:
    made = plan(Costs(compute, load), stored)
    assert made.split is not None
    computed, loaded = any(stored[: made.split]), any(stored[made.split :])
    assert (computed or not any(stored), loaded) == (made.decision in ("compute", "both"), made.decision != "compute")


@pytest.mark.parametrize(
    ("compute", "load", "decision", "split"),
    [
        (ComputeCost(1.0), 1.0, "both", 2),
        (ComputeCost(1.0), 100.0, "compute", 4),
        (ComputeCost(100.0), 1.0, "load", 0),
    ],
)
def test_the_three_decisions(compute: ComputeCost, load: float, decision: str, split: int) -> None:
    made = plan(Costs(compute, load_cost(load)), [True] * 4)
    assert (made.decision, made.split) == (decision, split)


def test_a_hole_behind_loads_waits_for_all_of_them() -> None:
    made = plan(Costs(ComputeCost(1.0), load_cost(2.0)), [True, True, False, True])
    assert made.curve == (7.0, 5.0, 3.0, 3.0, 4.0)
    assert plan(Costs(ComputeCost(1.0)), [False] * 3).curve == (3.0,) * 4


def test_unknown_costs_leave_it_to_the_two_ends() -> None:
    for costs in (Costs(), Costs(compute=ComputeCost(1.0)), Costs(load=load_cost(1.0))):
        made = plan(costs, [True, False])
        assert made == Plan("both")
        assert made.gain is None
    assert plan(Costs(), [False, False]) == Plan("compute")
    assert plan(Costs(ComputeCost(2.0)), [False]).predicted_seconds == 2.0


def test_an_empty_prefix_is_its_suffix() -> None:
    assert plan(Costs(ComputeCost(1.0), load_cost(1.0)), [], suffix_seconds=0.5) == Plan("compute", 0, 0.5, (0.5,))
    assert plan(Costs(ComputeCost(1.0), load_cost(1.0)), []).gain == 1.0


@pytest.mark.parametrize(("first", "suffix"), [(-1, 0.0), (0, -0.1), (0, math.nan), (0, math.inf)])
def test_senseless_arguments_are_refused(first: int, suffix: float) -> None:
    with pytest.raises(ValueError, match="must not be negative or absurd"):
        plan(Costs(), [True], first, suffix)


@given(computes, intervals, st.integers(0, 20), st.floats(0, 5))
def test_the_plan_of_a_stored_prefix_is_the_papers_optimum(
    compute: ComputeCost, interval: float, chunks: int, suffix: float
) -> None:
    best = optimum(seconds_of(compute, chunks), interval, suffix)
    every = [
        max(sum(seconds_of(compute, m)), (chunks - m) * interval) + suffix for m in range(chunks + 1)
    ]  # the formula as it is written in the paper
    assert best == pytest.approx(min(every))
    assert plan(Costs(compute, load_cost(interval)), [True] * chunks, 0, suffix).predicted_seconds == pytest.approx(
        best
    )


def test_there_is_one_optimum() -> None:
    assert cells.optimum is optimum


# The rule.


@settings(max_examples=150)
@given(computes, intervals, masks)
def test_the_rule_with_true_costs_is_as_fast_as_the_best_split(
    compute: ComputeCost, interval: float, stored: list[bool]
) -> None:
    costs = Costs(compute, load_cost(interval))
    taken = play_rule(seconds_of(compute, len(stored)), interval, stored, costs)
    made = plan(costs, stored)
    assert made.predicted_seconds is not None
    assert taken == pytest.approx(made.predicted_seconds)
    assert taken <= min(made.curve[0], made.curve[-1]) * (1 + 1e-9)


@settings(max_examples=150)
@given(computes, intervals, masks)
def test_without_contest_the_rule_loses_one_interval_at_most(
    compute: ComputeCost, interval: float, stored: list[bool]
) -> None:
    costs = Costs(compute, load_cost(interval))
    taken = play_rule(seconds_of(compute, len(stored)), interval, stored, costs, contest=False)
    best = plan(costs, stored).predicted_seconds
    assert best is not None
    assert taken <= (best + interval) * (1 + 1e-9)


@settings(max_examples=150)
@given(st.lists(st.floats(0.01, 10), max_size=14), computes, intervals)
def test_whatever_it_believes_about_computing_it_is_one_step_off_at_most(
    compute: list[float], believed: ComputeCost, interval: float
) -> None:
    chunks = len(compute)
    taken = play_rule(compute, interval, [True] * chunks, Costs(believed, load_cost(interval)))
    step = max([*compute, *seconds_of(believed, chunks)], default=0.0)
    assert taken <= (optimum(compute, interval) + step) * (1 + 1e-9)
    assert taken <= (chunks * interval + max(compute, default=0.0)) * (1 + 1e-9)


def test_without_the_rule_the_last_step_ends_too_late() -> None:
    """The negative control: the same play with unknown costs, which is Cake's own, is slower than loading alone."""
    compute, load = ComputeCost(100.0), load_cost(1.0)
    assert play_rule([100.0, 100.0], 1.0, [True, True], Costs()) == 100.0
    assert play_rule([100.0, 100.0], 1.0, [True, True], Costs(compute, load)) == 2.0


@given(computes, intervals, st.integers(0, 50), st.integers(1, 50), st.floats(0, 100))
def test_a_stuck_store_is_waited_for_two_steps_at_most(
    compute: ComputeCost, interval: float, index: int, left: int, busy: float
) -> None:
    costs, step = Costs(compute, load_cost(interval)), compute.seconds(index)
    assume(not worth_starting(costs, index, left, busy))
    assert worth_starting(costs, index, left, busy + 2 * step * (1 + 1e-9) + 1e-9)


@given(computes, loads, st.integers(0, 50), st.integers(1, 8), st.integers(0, 8))
def test_loads_in_place_are_overtaken_when_late_by_what_that_costs(
    compute: ComputeCost, load: LoadCost, index: int, left: int, done: int
) -> None:
    rule = Rule(Costs(compute, load), first=3)
    due, price = load.finish(done + left) - load.finish(done), left * compute.seconds(3 + index)
    assert not rule.overdue(index, left, done, 0.0)
    assert not rule.overdue(index, left, done, (due + price) * (1 - 1e-9))
    assert rule.overdue(index, left, done, (due + price) * (1 + 1e-9) + 1e-9)
    assert not Rule(Costs(compute, None)).overdue(index, left, done, 1e6)
    assert not Rule(Costs(None, load)).overdue(index, left, done, 1e6)


def test_unknown_costs_and_holes_are_worth_it() -> None:
    known = Costs(ComputeCost(5.0), load_cost(1.0))
    assert not worth_starting(known, 0, 5, 0.0)
    assert worth_starting(known, 0, 6, 0.0)
    assert worth_starting(known, 0, 0, 0.0)
    assert worth_starting(Costs(None, known.load), 0, 1, 0.0)
    assert worth_starting(Costs(known.compute, None), 0, 1, 0.0)
