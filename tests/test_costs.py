"""The cost model, and that it is learnt through noise, a cold start and outliers; what is damaged is ignored."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf.scheduling.costs import (
    MAX_BYTES,
    MAX_SECONDS,
    ComputeCost,
    Costs,
    LoadCost,
)
from cake_hf.scheduling.learning import COLD_DEBT, FIT_POINTS, OLD_SECONDS, PROMPTS, STEPS, CostLearner, fit_line
from cake_hf.scheduling.load_batches import busy_seconds, most_at_once
from cake_hf.scheduling.pace import Pace

NOW = 1.7e9

CHUNK = 2**20
seeds = st.integers(0, 2**32)
any_float = st.floats() | st.sampled_from([5e-324, 1e308, MAX_SECONDS, -0.0])
any_int = st.integers(-5, 400) | st.integers(-(10**400), 10**400)
json_values = st.recursive(
    st.none() | st.booleans() | any_float | any_int | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def learn_steps(random: Random, cost: ComputeCost, indices: list[int]) -> CostLearner:
    """A cold first step, 3 % of noise, and every tenth step 2 to 20 times too slow. All of one prompt."""
    learner = CostLearner()
    slow = set(random.sample(range(len(indices)), len(indices) // 10))
    factors = [random.uniform(2, 20) if n in slow else random.uniform(0.97, 1.03) for n in range(len(indices))]
    steps = [(index, factor * cost.seconds(index)) for index, factor in zip(indices, factors, strict=True)]
    learner.saw_steps([(indices[0], 30 * cost.seconds(indices[0])), *steps])
    return learner


def again(learner: CostLearner, after: float = 0.0) -> CostLearner:
    """As a new process finds it, that much later."""
    found = CostLearner.from_json(learner.to_json(NOW), NOW + after)
    assert found is not None
    return found


def flow(loads: int, threads: int, interval: float) -> list[tuple[float, float]]:
    """Loads that begin and end in turns, one ending every `interval`, each as long as all threads need for one."""
    return [(max(0, n - threads + 1) * interval, (n + 1) * interval) for n in range(loads)]


def assert_sound(costs: Costs) -> None:
    numbers = []
    if costs.compute:
        numbers += [costs.compute.base, costs.compute.slope]
    if costs.load:
        numbers += [costs.load.latency, costs.load.bandwidth - 1, costs.load.interval]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)


# The model.


def test_compute_cost_is_a_line() -> None:
    assert ComputeCost(0.5, 0.25).seconds(0) == 0.5
    assert ComputeCost(0.5, 0.25).seconds(6) == 2.0


def test_load_cost_of_the_paper() -> None:
    """Cake, 7B: 256 MiB per chunk at 32 Gbps (of 2^30 bits) take about 62.4 ms."""
    load = LoadCost(0.0, 32 * 2**30 / 8, 256 * 2**20)
    assert load.seconds == load.interval == pytest.approx(0.0624, rel=2e-3)
    assert load.finish(0) == 0.0


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 5), st.integers(1, 30))
def test_finish_is_what_threads_in_a_queue_need(latency: int, transfer: int, threads: int, count: int) -> None:
    transfer += 1
    free, path, arrivals = [0] * threads, 0, []
    for _ in range(count):
        thread = min(range(threads), key=lambda n: free[n])
        path = max(path, free[thread] + latency) + transfer
        free[thread] = path
        arrivals.append(path)
    load = LoadCost(latency, 1024.0, 1024.0 * transfer, threads)
    assert [load.finish(n + 1) for n in range(count)] == pytest.approx(arrivals)
    per_round = load.finish(count + threads) - load.finish(count)
    assert per_round == pytest.approx(threads * load.interval)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, 1e300, 10**400, True])
def test_costs_out_of_range_are_refused(bad: float) -> None:
    good: dict[str, Any] = {"latency": 0.0, "bandwidth": 1e9, "chunk_bytes": 1e6, "threads": 1}
    for name in good:
        with pytest.raises(ValueError, match="must be between"):
            LoadCost(**{**good, name: bad if bad is not True else False})
    with pytest.raises(ValueError, match="compute base must be between 0 and 1e\\+06 seconds"):
        ComputeCost(bad)
    with pytest.raises(ValueError, match="compute slope"):
        ComputeCost(0.0, bad)


# What the estimates are made of.


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=12))
def test_busy_seconds_is_the_length_of_the_union(lengths: list[tuple[int, int]]) -> None:
    spans = [(float(start), float(start + length)) for start, length in lengths]
    assert busy_seconds(spans) == len({tick for start, length in lengths for tick in range(start, start + length)})


@given(
    st.floats(0, 100),
    st.floats(0, 10),
    st.lists(st.integers(0, 300), min_size=10, max_size=40, unique=True),
    st.lists(st.floats(0, 1e6), max_size=2),
)
def test_fit_line_ignores_a_few_wild_points(base: float, slope: float, xs: list[int], wild: list[float]) -> None:
    points = [(float(x), base + slope * x) for x in xs]
    for order, y in enumerate(wild):
        points[order] = (points[order][0], y)
    assert fit_line(points) == pytest.approx((base, slope), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e6)), min_size=1, max_size=12))
def test_fit_line_is_never_negative(points: list[tuple[float, float]]) -> None:
    intercept, slope = fit_line(points)
    assert intercept >= 0
    assert slope >= 0


def test_falling_and_too_steep_lines() -> None:
    assert fit_line([(0, 3.0), (1, 2.0), (2, 1.0)]) == (2.0, 0.0)
    assert fit_line([(1, 1.0), (2, 4.0), (3, 9.0)]) == (0.0, 2.0)


# Learning.


@settings(max_examples=40)
@given(seeds, st.floats(0.001, 1.0), st.floats(0, 0.1), st.integers(20, STEPS))
def test_the_compute_cost_is_learned_from_its_steps(seed: int, base: float, relative_slope: float, steps: int) -> None:
    random, cost = Random(seed), ComputeCost(base, base * relative_slope)
    learnt = learn_steps(random, cost, list(range(steps))).costs().compute
    assert learnt is not None
    for index in (0, steps // 2, steps - 1):
        assert learnt.seconds(index) == pytest.approx(cost.seconds(index), rel=0.1)
    if steps >= 50 and relative_slope > 0.01:
        assert learnt.slope == pytest.approx(cost.slope, rel=0.2)


@settings(max_examples=40)
@given(seeds, st.floats(0.01, 1.0), st.floats(0, 0.1), st.lists(st.floats(0.1, 10), min_size=1, max_size=PROMPTS + 3))
def test_the_last_prompt_tells_how_dear_computing_is_and_all_tell_its_shape(
    seed: int, base: float, relative_slope: float, levels: list[float]
) -> None:
    """The first prompts compute 20 chunks each, under loads of their own. The last one computes only the first chunk."""
    cost, learner = ComputeCost(base, base * relative_slope), CostLearner()
    for level in levels:
        learner.saw_steps([(index, level * cost.seconds(index)) for index in range(20)])
    learner.saw_steps([(0, 3.0 * cost.seconds(0))])
    learnt = learner.costs().compute
    assert learnt is not None
    for index in (0, 7, 19):
        assert learnt.seconds(index) == pytest.approx(3.0 * cost.seconds(index), rel=0.05)


@settings(max_examples=40)
@given(st.floats(1e6, 1e11), st.integers(1, 4), st.lists(st.floats(0.03, 30), min_size=1, max_size=12))
def test_the_last_prompt_tells_what_loading_takes(bandwidth: float, threads: int, factors: list[float]) -> None:
    learner = CostLearner()
    for factor in (30.0, *factors):  # the first one is cold
        learner.saw_loads(CHUNK, flow(12, threads, factor * CHUNK / bandwidth))
    load = learner.costs().load
    assert load is not None
    assert (load.chunk_bytes, load.threads) == (CHUNK, threads)
    assert load.interval == pytest.approx(factors[-1] * CHUNK / bandwidth)
    assert learner.costs(chunk_bytes=3 * CHUNK).load == LoadCost(load.latency, load.bandwidth, 3 * CHUNK, threads)


@given(st.integers(2, 4), st.floats(0.1, 5), st.floats(0.1, 10))
def test_few_loads_scale_what_many_have_told(threads: int, latency: float, factor: float) -> None:
    """One load alone cannot tell latency from bandwidth; both are as before, times what it took."""
    learner = CostLearner()
    for _ in range(2):
        learner.saw_loads(CHUNK, queue(4 * threads + 2, threads, latency, 1.0))
    before = learner.costs().load
    assert before is not None
    learner.saw_loads(CHUNK, [(0.0, factor * before.seconds)])
    after = learner.costs().load
    assert after is not None
    assert after.threads == before.threads
    assert after.finish(20) == pytest.approx(factor * before.finish(20))


@pytest.mark.parametrize(
    ("worked", "quiet"), [((1.0, 2.0, 1.9), 0.5), ((None, None, None), 1.0), ((9.0, -1.0, 0.0), 1.0)]
)
def test_what_others_left_is_told_from_what_a_chunk_takes(worked: tuple[float | None, ...], quiet: float) -> None:
    learner, pace = CostLearner(), Pace(Costs())
    for chunk, seconds in enumerate(worked):
        pace.saw_forward(chunk, 2.0 * (chunk + 1), worked=seconds)
    learner.saw_restore(pace, [], CHUNK)
    assert learner.quiet == quiet
    assert again(learner).quiet == quiet
    learner.saw_restore(Pace(Costs()), [], CHUNK)  # it has measured nothing
    assert learner.quiet == quiet


def test_loads_that_never_arrived_are_known_to_be_slow() -> None:
    """Else a path that has become slow would be believed to be fast for ever, as all is computed before a load arrives."""
    learner = CostLearner()
    for _ in range(2):
        learner.saw_loads(CHUNK, [(0.0, 1.0), (1.0, 2.0)])
    pace = Pace(learner.costs())
    pace.loading(0.0)
    pace.end(7.0)
    learner.saw_restore(pace, [], CHUNK)
    load = learner.costs().load
    assert load is not None
    assert load.seconds == pytest.approx(7.0)


def queue(loads: int, threads: int, latency: float, transfer: float) -> list[tuple[float, float]]:
    """Each thread, when free, puts its next load on the path; the load ends a latency after it came off the path."""
    free, path, spans = [0.0] * threads, 0.0, []
    for _ in range(loads):
        thread = free.index(min(free))
        begin = free[thread]
        path = max(path, begin) + transfer
        free[thread] = path + latency
        spans.append((begin, free[thread]))
    return spans


@given(st.floats(0, 1), st.floats(0.001, 1), st.integers(1, 4), st.integers(1, 40))
def test_latency_is_told_from_bandwidth_by_how_loads_overlap(
    latency: float, transfer: float, threads: int, loads: int
) -> None:
    learner, truth = CostLearner(), LoadCost(latency, CHUNK / transfer, CHUNK, threads)
    learner.saw_loads(CHUNK, queue(loads, threads, latency, transfer))
    found = learner.costs().load
    assert found is not None
    assert found.seconds == pytest.approx(truth.seconds)
    assert found.finish(loads) == pytest.approx(truth.finish(loads))
    if loads >= threads:
        assert found.interval == pytest.approx(truth.interval)
        assert found.finish(3 * loads) == pytest.approx(truth.finish(3 * loads), rel=1 / threads)
    if loads > threads > 1 and (loads - 1) % threads:
        assert found.latency == pytest.approx(latency, abs=1e-6)


def test_nothing_is_known_at_first_and_a_cold_measurement_is_better_than_none() -> None:
    learner = CostLearner()
    assert learner.costs() == Costs(None, None)
    learner.saw_steps([(2, 9.0)])
    learner.saw_loads(CHUNK, [(0.0, 1.0)])
    assert learner.costs() == Costs(ComputeCost(9.0, 0.0), LoadCost(0.0, CHUNK, CHUNK))
    learner.saw_steps([(2, 1.0)])
    learner.saw_loads(CHUNK, [(0.0, 0.5)])
    assert learner.costs() == Costs(ComputeCost(1.0, 0.0), LoadCost(0.0, 2 * CHUNK, CHUNK))


def test_a_part_of_a_chunk_counts_only_until_a_whole_one_was_seen() -> None:
    learner = CostLearner()
    learner.saw_part(8, 1.0)
    assert learner.costs().compute == ComputeCost(1.0, 0.0)
    assert again(learner).costs().compute == ComputeCost(1.0, 0.0)
    learner.saw_steps([(8, 2.0)])
    learner.saw_part(8, 1.0)
    assert learner.costs().compute == ComputeCost(2.0, 0.0)
    for seconds in (-1.0, float("nan")):
        other = CostLearner()
        other.saw_part(0, seconds)
        assert other.costs().compute is None


def test_overlapping_loads_share_the_bandwidth() -> None:
    learner = CostLearner()
    learner.saw_loads(CHUNK, [(0.0, 2.0), (0.0, 2.0), (10.0, 11.0)])
    assert learner.costs().load == LoadCost(0.0, CHUNK, CHUNK, 2)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=12))
def test_most_at_once_is_the_crowd_in_the_fullest_moment(lengths: list[tuple[int, int]]) -> None:
    spans = [(float(start), float(start + length)) for start, length in lengths]
    moments = [sum(start <= tick < start + length for start, length in lengths) for tick in range(40)]
    assert most_at_once(spans) == max(moments)


def test_a_change_is_followed_and_memory_is_bounded() -> None:
    learner = CostLearner()
    for _ in range(3 * PROMPTS):
        learner.saw_steps([(index, 1.0) for index in range(3 * STEPS)])
        learner.saw_loads(CHUNK, [(0.0, 1.0)])
    learner.saw_steps([(1, 7.0)])
    learner.saw_loads(CHUNK, [(0.0, 7.0)])
    assert learner.costs() == Costs(ComputeCost(7.0, 0.0), LoadCost(0.0, CHUNK / 7, CHUNK))
    plain = json.loads(learner.to_json(NOW))
    assert (len(plain["steps"]), len(plain["loads"])) == (PROMPTS, PROMPTS)
    assert max(len(steps) for steps in plain["steps"]) == STEPS


def test_many_points_are_thinned_and_keep_their_line() -> None:
    learner = CostLearner()
    for begin in range(0, 4 * FIT_POINTS, 16):
        learner.saw_steps([(index, 1.0 + 0.5 * index) for index in range(begin, begin + 16)])
    compute = learner.costs().compute
    assert compute is not None
    assert (compute.base, compute.slope) == pytest.approx((1.0, 0.5), rel=1e-3)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(any_int, any_float), max_size=8),
    st.lists(st.tuples(any_int, st.lists(st.tuples(any_float, any_float), max_size=4)), max_size=6),
)
def test_no_measurement_makes_a_senseless_cost(
    steps: list[tuple[int, float]], restores: list[tuple[int, list[tuple[float, float]]]]
) -> None:
    learner = CostLearner()
    for step in steps:
        learner.saw_steps([step])
    learner.saw_steps(steps)
    for chunk_bytes, spans in restores:
        learner.saw_loads(chunk_bytes, spans)
    assert_sound(learner.costs())
    assert again(learner).costs() == learner.costs()


# At rest.


def a_document() -> dict[str, Any]:
    learner = learn_steps(Random(7), ComputeCost(0.1, 0.01), list(range(5)))
    for _ in range(3):
        learner.saw_loads(CHUNK, flow(4, 2, 0.01))
    plain: dict[str, Any] = json.loads(learner.to_json(NOW))
    return plain


def test_what_comes_back_from_json_learns_on_from_there() -> None:
    learner = CostLearner.from_json(json.dumps(a_document()), NOW)
    assert learner is not None
    before = learner.costs()
    learner.saw_steps([(3, 1e5)])  # cold again: a new process
    learner.saw_loads(CHUNK, [(0.0, 1e5)])
    assert learner.costs() == before
    learner.saw_steps([(3, 5.0)])
    compute = learner.costs().compute
    assert compute is not None
    assert compute.seconds(3) == pytest.approx(5.0)


def test_an_old_or_doubtful_note_is_a_start_and_one_from_the_future_is_none() -> None:
    learner = CostLearner()
    learner.saw_steps([(0, 1.0), (0, 1.0)])
    learner.credit = 5.0
    assert again(learner, 60.0).credit == -COLD_DEBT  # a first trial is cold, and has to be earned
    learner.credit = -2 * COLD_DEBT
    assert again(learner, 60.0).credit == -2 * COLD_DEBT
    old = again(learner, OLD_SECONDS + 1)
    assert old.costs() == learner.costs()
    assert old.credit > 1e5  # any trial is earned
    for _ in range(2):
        learner.saw_steps([(0, 1.0)])
    learner.saw_steps([(0, 9.0)])
    assert learner.spread() == pytest.approx(9.0)
    assert again(learner, 60.0).credit > 1e5
    assert CostLearner.from_json(learner.to_json(NOW), NOW - 86400) is None


@given(st.text() | json_values.map(json.dumps))
def test_any_text_is_ignored(text: str) -> None:
    assert CostLearner.from_json(text, NOW) is None


@settings(max_examples=150)
@given(st.sampled_from(sorted(a_document())), json_values)
def test_a_damaged_field_is_ignored_or_harmless(name: str, value: Any) -> None:
    learner = CostLearner.from_json(json.dumps({**a_document(), name: value}), NOW)
    if learner is not None:
        assert_sound(learner.costs())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "other"),
        ("version", 1),
        ("version", True),
        ("written", NOW + 86400),
        ("written", -1),
        ("written", math.nan),
        ("spread", 0.5),
        ("spread", math.nan),
        ("credit", math.inf),
        ("quiet", 0.0),
        ("quiet", 1.5),
        ("steps", {}),
        ("steps", [[0, 1.0]]),
        ("steps", [[[0, -1.0]]]),
        ("steps", [[[-1, 1.0]]]),
        ("steps", [[[0.5, 1.0]]]),
        ("steps", [[[0, math.nan]]]),
        ("steps", [[[0, math.inf]]]),
        ("steps", [[[0, 10**400]]]),
        ("steps", [[[0, 1.0, 2.0]]]),
        ("steps", [[[True, 1.0]]]),
        ("loads", [[CHUNK, 1, 1.0]]),
        ("loads", [[CHUNK, 0, 1.0, 1.0, 1]]),
        ("loads", [[CHUNK, 1, 0.0, 0.0, 1]]),
        ("loads", [[CHUNK, 1, 1.0, 0.0, 1]]),
        ("loads", [[CHUNK, 1, 1.0, 2.0, 1]]),
        ("loads", [[CHUNK, 2, 1.0, 0.5, 3]]),
        ("loads", [[CHUNK, 2, 1.0, 0.5, 0]]),
        ("loads", [[0, 1, 1.0, 1.0, 1]]),
        ("loads", [[2 * MAX_BYTES, 1, 1.0, 1.0, 1]]),
        ("loads", [[1.5, 1, 1.0, 1.0, 1]]),
        ("loads", ["abc"]),
        ("cold_step", [0]),
        ("cold_load", 3),
    ],
)
def test_a_note_with_absurd_values_is_ignored(name: str, value: Any) -> None:
    assert CostLearner.from_json(json.dumps(a_document()), NOW) is not None
    assert CostLearner.from_json(json.dumps({**a_document(), name: value}), NOW) is None


def test_missing_fields_and_deep_nesting_are_ignored() -> None:
    for name in a_document():
        assert CostLearner.from_json(json.dumps({k: v for k, v in a_document().items() if k != name}), NOW) is None
    assert CostLearner.from_json("[" * 100_000, NOW) is None
    assert CostLearner.from_json("9" * 10_000, NOW) is None
