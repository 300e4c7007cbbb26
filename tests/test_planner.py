"""The split is the best one, and the rule for one more compute step keeps what its docstring proves.

The oracles play the two ends chunk by chunk: `play_split` for a fixed split, `play_rule` for the rule asked online.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.cells import optimum
from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.pace import LATE, TRIAL_SHARE, Pace
from cake_hf.scheduling.planner import Plan, plan

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
            under_way = arrival[i] - interval <= now
            pace = pace_of(believed, [time for time in arrival.values() if time <= now])
            if pace.worth(i, len(left), now) and (contest or not under_way):
                now += seconds
                break
            now = min(left)
    return now


def pace_of(costs: Costs, arrivals: Sequence[float], **options: int) -> Pace:
    """That of a restore whose loads began at 0 and arrived then."""
    pace = Pace(costs, **options)
    pace.loading(0.0)
    for when in sorted(arrivals):
        pace.loaded(when)
    return pace


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


@given(computes, loads, st.integers(0, 50), st.integers(1, 50))
def test_a_stuck_store_is_waited_for_no_longer_than_a_part_of_a_step(
    compute: ComputeCost, load: LoadCost, index: int, left: int
) -> None:
    """Nothing arrives. What was not worth it at first becomes so soon after the first loads are due."""
    costs, step = Costs(compute, load), compute.seconds(index)
    pace = pace_of(costs, [], threads=load.threads)
    due = load.finish(min(left, load.threads))
    assert pace.worth(index, left, due + step / LATE * (1 + 1e-9) + 1e-9)


def test_unknown_costs_and_holes_are_worth_it() -> None:
    known = Costs(ComputeCost(5.0), load_cost(1.0))
    assert not pace_of(known, []).worth(0, 5, 0.0)
    assert pace_of(known, []).worth(0, 6, 0.0)
    assert pace_of(known, []).worth(0, 0, 0.0)
    assert pace_of(Costs(None, known.load), []).worth(0, 1, 0.0)
    assert pace_of(Costs(known.compute, None), []).worth(0, 1, 0.0)


# What a restore sees corrects what was believed.


@given(computes, loads, st.floats(1 / 32, 32), st.integers(2, 40))
def test_a_chunk_that_was_computed_tells_what_the_next_ones_take(
    compute: ComputeCost, load: LoadCost, factor: float, left: int
) -> None:
    believed, true = pace_of(Costs(compute, load), []), factor * compute.seconds(1)
    believed.saw_forward(0, factor * compute.seconds(0))
    assume(abs(true - load.finish(left)) > 1e-6 * true)
    assert believed.worth(1, left, 0.0) == (true < load.finish(left))


@given(loads, st.floats(1 / 32, 32), st.integers(1, 20), st.integers(1, 20))
def test_loads_that_have_arrived_tell_what_the_next_ones_take(
    load: LoadCost, factor: float, rounds: int, left: int
) -> None:
    """They come as believed, all slower or faster by one factor. A step of exactly that time decides the rule."""
    done = rounds * load.threads
    arrivals = [factor * load.finish(number) for number in range(1, done + 1)]
    wait = factor * (load.finish(done + left) - load.finish(done))
    for step, is_worth in ((wait * (1 - 1e-6), True), (wait * (1 + 1e-6), False)):
        pace = pace_of(Costs(ComputeCost(step), load), arrivals, threads=load.threads)
        assert pace.worth(0, left, arrivals[-1]) == is_worth


@given(st.integers(1, 4), st.integers(1, 6))
def test_loads_that_share_the_path_fairly_are_not_late(threads: int, rounds: int) -> None:
    """All of a round come at its end, although one after the other was believed. Nothing is worth computing meanwhile."""
    load, chunks = LoadCost(0.0, 2**20, 2**20, threads), threads * (rounds + 1)
    arrivals = [float(threads * (1 + number // threads)) for number in range(threads * rounds)]
    pace = pace_of(Costs(ComputeCost(chunks * 1.01), load), [], threads=threads)
    assert not pace.worth(0, chunks, threads * 0.99)
    for when in arrivals:
        assert not pace.worth(0, chunks, when)
        pace.loaded(when)
        chunks -= 1


# Trials.


@given(computes, intervals, st.integers(2, 80), st.integers(1, 60), st.integers(1, 30))
def test_trials_cost_no_more_than_their_share_where_the_belief_is_right(
    compute: ComputeCost, interval: float, layers: int, left: int, restores: int
) -> None:
    """Each restore loads all that is left; its waiting main thread is asked at each arrival. A trial costs a layer's time."""
    costs, credit, spent, total = Costs(compute, load_cost(interval)), 0.0, 0.0, 0.0
    assume(compute.seconds(0) > left * interval)
    for _ in range(restores):
        pace = Pace(costs, layers=layers, credit=credit)
        pace.loading(0.0)
        for done in range(left):
            now = done * interval
            if done:
                pace.loaded(now)
            if not pace.worth(0, left - done, now) and pace.tries(0, left - done, now):
                layer = compute.seconds(0) / layers
                spent += 0.2 * min(layer, left * interval - now) + max(0.0, layer - (left * interval - now))
        pace.end(left * interval)
        credit, total = pace.credit, total + left * interval
        assert spent <= TRIAL_SHARE * total * (1 + 1e-9)


def test_a_trial_comes_once_its_price_is_earned() -> None:
    """A layer takes 0.4 s, of which a fifth is taken from the loads; they take 2 s: 2 % of four seconds are enough."""
    costs = Costs(ComputeCost(12.8), load_cost(0.1))
    assert not Pace(costs, layers=32, credit=1.9).tries(0, 20, 0.0)  # nothing is loaded yet
    assert not pace_of(costs, [], layers=32).tries(0, 20, 0.0)
    early = Pace(costs, layers=32, credit=1.9)
    early.loading(0.0)
    assert not early.tries(0, 20, 0.0)
    pace = Pace(costs, layers=32, credit=2.1)
    pace.loading(0.0)
    assert pace.tries(0, 20, 0.0)
    assert not pace.tries(0, 20, 0.0)
    pace.end(2.0)
    assert pace.credit == pytest.approx(0.0)


def test_what_others_took_of_the_time_is_not_in_a_trials_price() -> None:
    """Computing was measured while others had three quarters of the processor: they may be gone."""
    costs = Costs(ComputeCost(12.8), load_cost(0.1))
    for quiet, tried in ((1.0, False), (0.25, True)):
        pace = Pace(costs, layers=32, quiet=quiet)
        pace.loading(0.0)
        assert pace.tries(0, 20, 0.0) == tried


@pytest.mark.parametrize("options", [{"layers": 1}, {"layers": 32, "threads": 20}])
def test_nothing_is_tried_that_cannot_be_left_or_that_would_keep_the_last_loads_from_coming_in_parts(
    options: dict[str, int],
) -> None:
    pace = Pace(Costs(ComputeCost(12.8), load_cost(0.1)), credit=1e6, **options)
    pace.loading(0.0)
    assert not pace.tries(0, 20, 0.0)


def test_a_clock_that_jumps_changes_no_belief() -> None:
    """Neither back nor far ahead."""
    for seconds in (-1.0, math.nan, math.inf, 1e9):
        pace = pace_of(Costs(ComputeCost(5.0), load_cost(1.0)), [])
        pace.saw_forward(0, seconds)
        assert pace.steps == []
        assert not pace.worth(1, 5, 0.0)
        assert pace.worth(1, 6, 0.0)
