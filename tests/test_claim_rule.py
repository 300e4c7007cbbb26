"""No load starts that the main thread would reach first, and none that might still be needed is lost by that.

`Acts` plays the other side wherever a thread would wait, so that most of these tests need no second thread.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation.simulator import Setting, simulate, steps
from cake_hf import CakeCache, Limits
from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.frontier import Frontier, Outcome, State, Strategy
from cake_hf.scheduling.pace import Pace
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from paces import Told, in_place, no, staged, told, too_late, yes
from stored import filled_store
from waiting import PATIENCE, join_loaders, loaders

TIMEOUT = 10.0


class Acts:
    """Stands in for the condition and the clock of a frontier: where a thread would wait, `action` is what happens."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.now = 0.0
        self.action = action

    def __call__(self) -> float:
        return self.now

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait(self, timeout: float | None = None) -> None:
        self.action()

    def notify_all(self) -> None: ...


def frontier_of(chunks: int, judge: Told, action: Callable[[], None] = lambda: pytest.fail("waits")) -> Frontier:
    acts = Acts(action)
    return Frontier([True] * chunks, judge=judge, read_timeout=TIMEOUT, clock=acts, changed=acts)


def late_below(chunk: int) -> Callable[[int], float]:
    """Loads of the chunks before that one would come too late."""
    return lambda index: staged(index) if index >= chunk else too_late(index)


# What the ledger does with the answer.


def test_no_load_starts_that_would_come_too_late() -> None:
    frontier = frontier_of(4, Told(late_below(3)))
    assert frontier.advance() == 0
    assert frontier.claim() == 3
    assert not frontier.has_claims()
    assert frontier.claim() is None
    assert frontier.counts() == {State.COMPUTING: 1, State.WAITING: 2, State.LOADING: 1}


def test_without_the_rule_it_would() -> None:
    """Negative control: the same, but no load would come too late."""
    frontier = frontier_of(4, Told(staged))
    assert frontier.advance() == 0
    assert [frontier.claim() for _ in range(5)] == [3, 2, 1, 0, None]


@pytest.mark.parametrize("strategy", [Strategy.LOAD, Strategy.COMPUTE])
def test_the_rule_is_for_both_sides_only(strategy: Strategy) -> None:
    frontier = Frontier([True], strategy=strategy, judge=Told(too_late))
    assert frontier.claim() == (0 if strategy is Strategy.LOAD else None)


def test_the_chunk_that_is_being_computed_is_not_loaded_too_late_either() -> None:
    judge = Told(too_late)
    frontier = frontier_of(1, judge)
    assert frontier.advance() == 0
    assert frontier.claim() is None
    judge.slacks = staged
    assert frontier.claim() == 0


def test_a_refused_chunk_is_claimed_when_the_belief_changes() -> None:
    judge = Told(too_late)
    frontier = frontier_of(3, judge)
    assert frontier.advance() == 0
    assert frontier.claim() is None
    frontier.computed(0)
    judge.slacks = in_place  # chunk 0 took much longer than believed
    assert frontier.await_claim()
    assert frontier.claim() == 2
    assert not frontier.is_staged(2)


@pytest.mark.parametrize("event", ["computed", "settled", "given back", "waits"])
def test_a_loader_with_nothing_to_claim_wakes_up_when_that_may_have_changed(event: str) -> None:
    """With real threads: it blocks in `await_claim` before the event, and is told of it."""
    judge = Told(late_below(3), yes)
    frontier = Frontier([True] * 4, judge=judge, read_timeout=10 * PATIENCE)
    assert frontier.claim() == 3
    if event == "given back":
        judge.is_worth, judge.is_tried = no, yes
    assert frontier.advance() == 0
    answers: list[bool] = []
    loader = threading.Thread(target=lambda: answers.append(frontier.await_claim()), daemon=True)
    if event == "given back":
        assert frontier.is_trial(0)  # it would rather wait: everything may be loaded
        assert frontier.has_claims()
        frontier.give_back(0)
    loader.start()
    judge.slacks = staged
    if event == "computed":
        frontier.computed(0)
    elif event == "settled":
        assert frontier.settle(3, Outcome.LOADED)
    elif event == "waits":
        judge.slacks, judge.is_worth = too_late, no
        frontier.computed(0)
        threading.Thread(target=frontier.advance, daemon=True).start()
    loader.join(PATIENCE)
    assert answers == [True]
    frontier.stop()


@pytest.mark.parametrize("end", ["close", "stop", "end"])
def test_a_loader_with_nothing_to_claim_ends_with_the_restore(end: str) -> None:
    frontier = Frontier([True] * 2, judge=Told(too_late))
    assert frontier.advance() == 0
    answers: list[bool] = []
    loader = threading.Thread(target=lambda: answers.append(frontier.await_claim()), daemon=True)
    loader.start()
    getattr(frontier, end)()
    loader.join(PATIENCE)
    assert answers == [False]


def test_a_loader_ends_once_all_is_claimed_or_computed_and_not_before() -> None:
    waits = 0

    def compute_on() -> None:
        nonlocal waits
        waits += 1
        index = frontier.advance()
        if index is not None:
            frontier.computed(index)

    frontier = frontier_of(4, Told(late_below(3)), compute_on)
    assert frontier.await_claim()
    assert frontier.claim() == 3
    assert not frontier.await_claim()
    assert waits == 3


def test_a_chunk_on_trial_may_be_given_back_so_loaders_stay() -> None:
    judge = Told(staged, no, yes)
    frontier = frontier_of(1, judge, lambda: frontier.give_back(0))
    assert frontier.advance() == 0
    judge.slacks = too_late
    assert frontier.await_claim()
    assert frontier.claim() == 0


def test_a_main_thread_that_would_rather_wait_has_everything_loaded() -> None:
    """Whatever the loaders believe. Its deadline counts from then on, however long nothing was loaded before."""
    judge, claimed = Told(too_late), list[int]()

    def load() -> None:
        index = frontier.claim()
        assert index is not None
        claimed.append(index)
        assert frontier.settle(index, Outcome.LOADED)

    frontier = frontier_of(4, judge, load)
    assert frontier.advance() == 0
    assert frontier.claim() is None
    frontier._clock.now = 10 * TIMEOUT  # type: ignore[attr-defined]
    frontier.computed(0)
    judge.is_worth = no
    assert frontier.advance() is None
    assert claimed == [3, 2, 1]
    assert set(frontier.outcomes().values()) == {Outcome.LOADED}


def test_what_is_refused_again_after_a_wait_is_refused() -> None:
    judge = Told(too_late, no)
    frontier = frontier_of(3, judge, lambda: setattr(judge, "is_worth", yes))
    assert frontier.advance() == 0  # after a moment of waiting
    assert frontier.claim() is None


events = st.lists(
    st.tuples(st.sampled_from(["claim", "settle", "belief", "worth", "trial"]), st.integers(0, 7)), max_size=60
)


@settings(max_examples=300)
@given(present=st.lists(st.booleans(), min_size=1, max_size=9), moves=events, most=st.integers(0, 3))
def test_the_main_thread_never_waits_for_what_no_loader_will_load(
    present: list[bool], moves: list[tuple[str, int]], most: int
) -> None:
    """Two loaders. Beliefs change at any moment. Wherever the main thread waits, a load is under way or can be claimed."""
    judge, loading = Told(too_late), list[int]()
    script, ended = iter(moves), 0

    def act(move: str, number: int) -> None:
        if move == "claim" and len(loading) < 2 and (index := frontier.claim()) is not None:
            loading.append(index)
        elif move == "settle" and loading:
            frontier.settle(loading.pop(number % len(loading)), Outcome.LOADED if number else Outcome.CORRUPT)
        elif move == "belief":
            judge.slacks = (too_late, too_late, staged, in_place)[number % 4]
        elif move == "worth":
            judge.is_worth = yes if number % 2 else no
        elif move == "trial":
            judge.is_tried = yes if number % 2 else no

    def wait() -> None:
        assert loading or frontier.has_claims()
        for move, number in [next(script, ("claim", 1)), ("claim", 1), ("settle", 1)]:
            act(move, number)

    acts = Acts(wait)
    frontier = Frontier(present, judge=judge, most_staged=most, read_timeout=TIMEOUT, clock=acts, changed=acts)
    while (index := frontier.advance()) is not None:
        for move, number in [next(script, ("claim", 1)) for _ in range(2)]:
            act(move, number)
        if frontier.is_trial(index) and not frontier.goes_on(index):
            frontier.give_back(index)
            judge.is_tried = no
        elif not frontier.preempted(index):
            frontier.computed(index)
        ended += 1
        assert ended < 1000
        counts = frontier.counts()
        assert sum(counts.values()) == len(present)
    assert set(frontier.counts()) <= {State.COMPUTED, State.LOADED}
    for index in loading:
        frontier.settle(index, Outcome.LOADED)
    assert not frontier.await_claim()
    assert not frontier.take_abandoned()


@pytest.mark.parametrize("seed", range(10))
def test_real_threads_with_beliefs_that_change_all_the_time_lose_nothing(seed: int) -> None:
    draw = random.Random(seed)
    judge = Told(
        lambda _: draw.choice([0.5, 0.5, 1.0, math.inf]), lambda _: draw.random() < 0.7, lambda _: draw.random() < 0.2
    )
    frontier = Frontier([draw.random() < 0.9 for _ in range(200)], judge=judge, most_staged=6, read_timeout=PATIENCE)
    claimed: list[int] = []

    def load() -> None:
        while frontier.await_claim():
            if (index := frontier.claim()) is not None:
                claimed.append(index)
                frontier.settle(index, Outcome.LOADED)

    threads = [threading.Thread(target=load, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    while (index := frontier.advance()) is not None:
        frontier.take_staged()
        if frontier.is_trial(index) and not frontier.goes_on(index):
            frontier.give_back(index)
        elif not frontier.preempted(index):
            frontier.computed(index)
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert len(set(claimed)) == len(claimed)
    assert set(frontier.counts()) <= {State.COMPUTED, State.LOADED}


# What is believed.


def pace_of(compute: float, load: LoadCost, **options: int) -> Pace:
    """That of a restore of which one load has arrived, as it was believed to."""
    pace = Pace(Costs(ComputeCost(compute), load), threads=load.threads, **options)
    pace.loading(0.0)
    pace.loaded(load.finish(1))
    return pace


def load_of(interval: float, threads: int = 1) -> LoadCost:
    return LoadCost(0.0, 2**20 / interval, 2**20, threads)


def test_slack_is_the_time_until_a_chunk_is_computed_over_the_time_until_it_is_loaded() -> None:
    pace = pace_of(1.0, load_of(2.0))
    for front, chunk, slack in ((0, 0, 0.5), (0, 3, 2.0), (2, 3, 1.0)):
        assert pace.slack(front, chunk, 1, 2.0) == pytest.approx(slack)
    assert pace.slack(0, 3, 2, 2.0) == pytest.approx(1.0)  # another load is under way


def test_a_slope_counts() -> None:
    pace = Pace(Costs(ComputeCost(1.0, 0.5), load_of(1.0)), first=2)
    pace.loading(0.0)
    assert pace.slack(1, 3, 1, 0.0) == pytest.approx(2.5 + 3.0 + 3.5)


@pytest.mark.parametrize("costs", [Costs(), Costs(ComputeCost(1.0)), Costs(None, load_of(1.0))])
def test_with_unknown_costs_everything_is_loaded_and_may_be_late(costs: Costs) -> None:
    assert Pace(costs).slack(0, 7, 3, 0.0) == 1.0


def test_until_a_load_has_arrived_none_is_refused() -> None:
    """Otherwise no restore would find out that loading has become cheaper."""
    pace = Pace(Costs(ComputeCost(1.0), load_of(1000.0, 2)), threads=2)
    assert pace.slack(0, 3, 1, 0.0) == 1.0
    pace.loading(0.0)
    assert pace.slack(0, 2, 2, 0.0) == 1.0
    pace.loaded(1000.0)
    assert pace.slack(0, 1, 2, 1000.0) < 1
    fast = Pace(Costs(ComputeCost(1.0), load_of(1000.0, 2)), threads=2)
    fast.loading(0.0)
    fast.loaded(0.5)
    fast.loaded(1.0)
    assert fast.slack(0, 1, 2, 1.0) >= 1


def test_a_forward_that_took_longer_than_believed_gives_loads_more_time() -> None:
    pace = pace_of(1.0, load_of(2.0))
    assert pace.slack(0, 0, 1, 2.0) < 1
    pace.saw_forward(0, 4.0)
    assert pace.slack(1, 1, 1, 2.0) == pytest.approx(2.0)


def test_loads_that_are_not_worth_starting_are_not_late() -> None:
    """Nothing was under way for a hundred seconds. What is believed of the next load is what the last ones took."""
    pace = Pace(Costs(ComputeCost(1.0), load_of(1.0)))
    pace.loading(0.0)
    for when in (3.0, 6.0):  # three times as long as believed
        pace.loaded(when)
    pace.paused()
    pace.paused()
    assert pace.slack(0, 8, 1, 106.0) == pytest.approx(3.0)
    assert not pace.worth(0, 0, 106.0) or pace.worth(0, 1, 106.0)
    pace.loading(106.0)
    assert pace.slack(0, 8, 1, 106.0) == pytest.approx(3.0)
    pace.loaded(109.0)
    assert pace.slack(0, 8, 1, 109.0) == pytest.approx(3.0)
    pace.end(110.0)
    assert pace.credit == pytest.approx(110.0)


def test_without_a_pause_the_same_loads_are_very_late() -> None:
    """Negative control."""
    pace = Pace(Costs(ComputeCost(1.0), load_of(1.0)))
    pace.loading(0.0)
    for when in (3.0, 6.0):
        pace.loaded(when)
    assert pace.slack(0, 8, 1, 106.0) < 0.1


any_setting = st.builds(
    lambda chunks, ratio, slope, waits, threads, holes: Setting(
        costs := steps(chunks, 1.0, slope),
        1e6,
        1e6 * chunks / (ratio * sum(costs)),
        latency=waits * ratio * sum(costs) / chunks,
        threads=threads,
        suffix=0.2,
        holes=tuple(sorted(hole for hole in holes if hole < chunks)),
    ),
    chunks=st.integers(1, 24),
    ratio=st.floats(0.05, 20.0),
    slope=st.floats(0.0, 0.2),
    waits=st.floats(0.0, 2.0),
    threads=st.integers(1, 3),
    holes=st.sets(st.integers(0, 23), max_size=3),
)


@settings(max_examples=60)
@given(where=any_setting)
def test_the_rule_costs_no_time_and_saves_loads(where: Setting) -> None:
    """With known costs. Without the rule, everything is loaded that was not computed by then."""
    ruled = simulate(where, "both")
    with pytest.MonkeyPatch.context() as patch:
        slack = Pace.slack
        patch.setattr(Pace, "slack", lambda *args: max(1.0, slack(*args)))
        free = simulate(where, "both")
    assert ruled.seconds <= free.seconds * 1.02
    assert loads(ruled.reads) <= loads(free.reads)


def loads(reads: tuple[tuple[int, float, float], ...]) -> int:
    return len({chunk for chunk, _, _ in reads})


def test_a_rule_that_refuses_more_is_slower() -> None:
    """Negative control."""
    where = Setting(steps(16, 1.0), 1e6, 1e6, threads=1)
    ruled = simulate(where, "both").seconds
    with pytest.MonkeyPatch.context() as patch:
        slack = Pace.slack
        patch.setattr(Pace, "slack", lambda *args: slack(*args) / 6)
        assert simulate(where, "both").seconds > 1.1 * ruled


def test_the_rule_saves_loads_where_computing_is_faster() -> None:
    where = Setting(steps(16, 1.0), 1e6, 0.2e6, threads=2)
    assert loads(simulate(where, "both").reads) == 3
    assert loads(simulate(replace(where, costs_known=False), "both").reads) == 4


# Whole restores.


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen3", "float32"), ("gpt_neox", "bfloat16")])
@pytest.mark.parametrize("kept", [0, 3, CHUNKS])
def test_no_bit_depends_on_what_is_refused(family: str, dtype: str, kept: int) -> None:
    """Loads of the first chunks would come too late, whatever happens; the main thread computes these."""
    model = shared_model(family, dtype)
    rules, limits = told(yes, slack=late_below(kept)), Limits(loader_threads=2)
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, save=False, limits=limits, rules=rules) as cache:
        outcome = run(model, prompt(), cache)
        report = cache.report
    join_loaders()
    assert not loaders()
    assert difference(outcome, expected(family, dtype)) == ""
    assert report.chunks_computed >= kept
    assert report.chunks_computed + report.chunks_loaded == CHUNKS
    assert (report.chunks_failed, report.chunks_missed) == (0, 0)


def test_a_restore_that_refuses_everything_and_then_waits_loads_everything() -> None:
    model = shared_model("llama")
    rules = told(lambda chunk: chunk == 0, slack=too_late)
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, save=False, rules=rules) as cache:
        assert difference(run(model, prompt(), cache), expected()) == ""
        assert cache.report.chunks_computed + cache.report.chunks_loaded == CHUNKS
        assert cache.report.chunks_computed <= 1
        assert cache.report.chunks_failed == 0
