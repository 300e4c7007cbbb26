"""Where the two sides meet, both may work on one chunk: the first to be done wins, and no bit depends on which it was."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import CakeCache, Limits
from cake_hf.model.kv_layout import kv_template
from cake_hf.scheduling.frontier import HEDGE, Frontier, Judge, Outcome, State
from cake_hf.testing import GateStore, RestorePace, Rules
from forwards import attentions, before_forward
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from paces import Told, in_place, no, yes
from stored import filled_store
from waiting import await_true, join_loaders

VARIANTS = [("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "float32"), ("gpt_neox", "bfloat16")]
LAYERS = 3


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("contested", [0, 3, CHUNKS - 2])
@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_a_forward_is_left_at_the_next_layer(family: str, dtype: str, contested: int, layer: int) -> None:
    """All later chunks are loaded; then, in the middle of the forward on this one, it arrives, too."""
    model = shared_model(family, dtype)
    gate = GateStore(filled_store(model))
    assert len(attentions(model)) == LAYERS
    with CakeCache(
        model, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
    ) as cache:
        kv_template(model)

        def arrive(forward: int) -> None:
            if forward == contested + 1:
                gate.open()
                await_true(cache._work.preempted)

        with before_forward(attentions(model)[layer], arrive):
            outcome = run(model, prompt(), cache)
        report = cache.report
    assert difference(outcome, expected(family, dtype)) == ""
    assert (report.chunks_computed, report.chunks_loaded) == (contested, CHUNKS - contested)
    assert [span.chunk for span in report.timeline if span.outcome == "preempted"] == [contested]


@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_a_staged_load_that_does_not_come_is_superseded(family: str, dtype: str) -> None:
    """No deadline is needed for that: the main thread computes what loaders hold near the front."""
    model = shared_model(family, dtype)
    gate = GateStore(filled_store(model))
    held = 2
    with CakeCache(
        model, gate, chunk_size=CHUNK, save=False, limits=Limits(loader_threads=held, read_timeout=60)
    ) as cache:
        gate.open(CHUNKS - held)
        outcome = run(model, prompt(), cache)
        assert cache.report.chunks_failed == 0
        assert cache.report.chunks_computed >= held  # at least those whose reads the gate held back
        gate.open()  # what comes now belongs to no restore
        join_loaders()
        for layer, keys in zip(cache.layers, outcome.keys, strict=True):
            assert torch.equal(layer.keys, keys)
    assert difference(outcome, expected(family, dtype)) == ""


def standing_clock() -> float:
    """No read is ever late by it."""
    return 0.0


moves = st.lists(
    st.tuples(
        st.sampled_from(
            ["claim", "settle", "advance", "computed", "give back", "wait or not", "try or not", "slack", "commit"]
        ),
        st.integers(0, 7),
    ),
    max_size=80,
)
SLACKS = (0.0, 0.5, 1.0, 1.0, HEDGE, math.inf)


@settings(max_examples=300)
@given(
    present=st.lists(st.booleans(), min_size=1, max_size=9),
    most=st.integers(0, 4),
    steps=moves,
    outcomes=st.lists(st.sampled_from([Outcome.LOADED, Outcome.LOADED, Outcome.CORRUPT, Outcome.MISSED]), min_size=1),
)
def test_conservation_under_any_interleaving(
    present: list[bool], most: int, steps: list[tuple[str, int]], outcomes: list[Outcome]
) -> None:
    """One thread plays all parts, in an order that hypothesis draws, then everybody finishes.

    Beliefs change at any moment: the main thread would rather wait, or not; loads would come too late, may be late, or will
    not be. What it computes although it would rather wait it may give back.
    """
    waits = tries = False
    slack = 1.0
    frontier = Frontier(
        present,
        most_staged=most,
        judge=Told(lambda _: slack, lambda _: not waits, lambda _: tries),
        clock=standing_clock,
    )
    loading: list[int] = []
    computing: int | None = None
    in_place: set[int] = set()
    done: dict[int, str] = {}
    committed: set[int] = set()
    met = False

    def play(move: str, number: int) -> None:
        nonlocal computing, met, waits, tries, slack
        if move == "wait or not":
            waits = not waits
        elif move == "try or not":
            tries = not tries
        elif move == "slack":
            slack = SLACKS[number % len(SLACKS)]
        elif move == "give back" and computing is not None and frontier.is_trial(computing):
            frontier.give_back(computing)
            computing = None
        elif move == "claim":
            claims = frontier.has_claims()
            index = frontier.claim()
            assert claims == (index is not None)
            if index is not None:
                assert present[index]
                assert index not in loading
                assert index not in done
                if not frontier.is_staged(index):
                    in_place.add(index)
                    assert index != computing
                loading.append(index)
        elif move == "settle" and loading:
            index = loading.pop(number % len(loading))
            outcome = outcomes[number % len(outcomes)]
            accepted = frontier.settle(index, outcome)
            assert accepted or index not in in_place  # what goes in place is waited for
            if accepted and outcome is Outcome.LOADED:
                assert done.setdefault(index, "loaded") == "loaded"
        elif move == "advance" and computing is None and not met and _will_not_block():
            computing = frontier.advance()
            met = computing is None
            assert computing is None or not (computing in in_place and computing in loading)
        elif move == "computed" and computing is not None:
            if frontier.preempted(computing):
                assert done[computing] == "loaded"
            else:
                frontier.computed(computing)
                assert done.setdefault(computing, "computed") == "computed"
            computing = None
        elif move == "commit":
            landed = frontier.take_staged()
            assert computing not in landed
            assert not committed.intersection(landed)
            committed.update(landed)
        assert sum(frontier.counts().values()) == len(present)
        assert sum(frontier.is_staged(index) for index in loading if index not in done) <= most

    def _will_not_block() -> bool:
        """The other side cannot settle what is waited for at the front meanwhile."""
        front = next((index for index in range(len(present)) if done.get(index) is None), None)
        if front is None:
            return True
        return not (waits or (front in loading and front in in_place))

    for move, number in steps:
        play(move, number)
    waits, tries = False, True
    for _ in range(200):
        for move in ("settle", "advance", "computed", "claim", "settle"):
            play(move, 0)
    assert met
    assert set(done) == set(range(len(present)))
    counts = frontier.counts()
    assert counts[State.COMPUTED] + counts[State.LOADED] == len(present)
    assert counts[State.LOADED] == sum(outcome is Outcome.LOADED for outcome in frontier.outcomes().values())
    play("commit", 0)
    assert all(done[index] == "loaded" and index not in in_place for index in committed)
    assert committed == {index for index, how in done.items() if how == "loaded"} - in_place
    assert not frontier.take_abandoned()
    assert not frontier.has_claims()
    assert not frontier.await_claim()


def test_a_bad_contested_load_leaves_the_computation_alone() -> None:
    frontier = Frontier([True], judge=Told())
    assert frontier.advance() == 0
    assert frontier.claim() == 0
    assert frontier.is_staged(0)
    assert frontier.settle(0, Outcome.CORRUPT)
    assert not frontier.preempted(0)
    assert frontier.claim() is None  # once is enough
    frontier.computed(0)
    assert frontier.advance() is None


@pytest.mark.parametrize(("slack", "is_staged"), [(1.0, True), (HEDGE * 0.99, True), (HEDGE, False), (math.inf, False)])
def test_a_load_is_staged_that_the_front_may_reach_first(slack: float, *, is_staged: bool) -> None:
    frontier = Frontier([True] * 3, judge=Told(lambda _: slack))
    assert frontier.claim() == 2
    assert frontier.is_staged(2) == is_staged


def test_no_more_is_staged_than_there_is_room_for() -> None:
    """Until the main thread has committed it, a staged chunk takes room, whether it has arrived or not."""
    frontier = Frontier([True] * 6, most_staged=2, judge=Told())  # too few to keep a third
    assert [frontier.claim(), frontier.claim(), frontier.claim()] == [5, 4, 3]
    assert [frontier.is_staged(index) for index in (5, 4, 3)] == [True, True, False]
    assert frontier.settle(5, Outcome.LOADED)
    assert frontier.claim() == 2
    assert not frontier.is_staged(2)
    assert frontier.take_staged() == [5]
    assert frontier.claim() == 1
    assert frontier.is_staged(1)


def test_a_third_of_the_room_is_kept_for_the_chunks_nearest_to_the_front() -> None:
    frontier = Frontier([True] * 8, most_staged=6, judge=Told())
    assert [frontier.claim() for _ in range(8)] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert [frontier.is_staged(index) for index in range(8)] == [True, True, False, False, True, True, True, True]


def test_a_late_load_in_place_is_waited_for_until_its_deadline_and_given_up_with_all_that_is_under_way() -> None:
    now = 0.0
    frontier = Frontier([True] * 4, judge=Told(in_place), read_timeout=10.0, clock=lambda: now)
    assert [frontier.claim() for _ in range(4)] == [3, 2, 1, 0]
    assert frontier.settle(3, Outcome.LOADED)
    now = 10.0
    assert frontier.advance() == 0
    assert frontier.take_abandoned()
    assert frontier.claim() is None
    assert not frontier.settle(2, Outcome.LOADED)  # it came to where the layers were before
    for expected_next in (1, 2):
        frontier.computed(expected_next - 1)
        assert frontier.advance() == expected_next
    frontier.computed(2)
    assert frontier.advance() is None
    assert frontier.outcomes() == {0: Outcome.LATE, 1: Outcome.LATE, 2: Outcome.LATE, 3: Outcome.LOADED}


def test_a_staged_load_and_the_main_thread_race() -> None:
    worth = no
    frontier = Frontier([True] * 4, judge=Told(is_worth=lambda chunk: worth(chunk)), clock=standing_clock)
    assert [frontier.claim() for _ in range(4)] == [3, 2, 1, 0]
    worth = yes
    assert frontier.advance() == 0
    assert frontier.settle(0, Outcome.LOADED)
    assert frontier.preempted(0)
    assert frontier.take_staged() == []  # the forward on it has not ended yet
    assert frontier.advance() == 1
    assert frontier.take_staged() == [0]
    frontier.computed(1)
    assert not frontier.settle(1, Outcome.LOADED)  # it was superseded
    assert frontier.settle(2, Outcome.LOADED)
    assert frontier.settle(3, Outcome.LOADED)
    assert frontier.take_staged() == [2, 3]
    assert frontier.advance() is None
    assert not frontier.take_abandoned()
    assert frontier.left_behind()


def test_where_nothing_is_staged_there_is_no_contest() -> None:
    for judge, most_staged in ((Judge(), 2**31), (Told(in_place), 2**31), (Told(), 0)):
        frontier = Frontier([True], judge=judge, most_staged=most_staged)
        assert frontier.advance() == 0
        assert frontier.claim() is None


def test_worth_decides_between_waiting_and_computing() -> None:
    asked: list[int] = []

    def worth(chunk: int) -> bool:
        asked.append(chunk)
        return len(asked) > 2  # two times no, then yes

    frontier = Frontier([True, True], judge=Told(is_worth=worth), clock=standing_clock)
    assert frontier.claim() == 1
    assert frontier.advance() == 0
    assert asked == [0] * 3


# Trials: a main thread that waits computes a chunk to find out what it costs.


@pytest.mark.parametrize("turns_out", [False, True])
@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_a_trial_is_left_after_a_layer_or_goes_on(
    family: str, dtype: str, turns_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate holds the loads back until the trial is over; whichever it comes to, no bit differs."""
    model = shared_model(family, dtype)
    gate = GateStore(filled_store(model))
    tried: list[int] = []
    shares: list[float] = []
    asked = threading.Event()  # whether the trial goes on
    goes_on = Frontier.goes_on

    class Trying(RestorePace):
        """Tries once, and finds nothing worth computing but, as it turns out, what it tries."""

        def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
            return turns_out and asked.is_set()

        def tries(self, chunk: int, loads_left: int, now: float) -> bool:
            tried.append(chunk)
            return len(tried) == 1

        def saw_forward(self, chunk: int, seconds: float, share: float = 1.0, *, worked: float | None = None) -> None:
            shares.append(share)
            super().saw_forward(chunk, seconds, share, worked=worked)
            if not turns_out or share == 1:
                gate.open()

    def judge(frontier: Frontier, index: int) -> bool:
        asked.set()
        answer = goes_on(frontier, index)
        asked.clear()
        return answer

    monkeypatch.setattr(Frontier, "goes_on", judge)
    limits, rules = Limits.from_environment(loader_threads=1), Rules(pace=Trying)
    with CakeCache(model, gate, chunk_size=CHUNK, save=False, limits=limits, rules=rules) as cache:
        outcome = run(model, prompt(), cache)
        report = cache.report
    assert difference(outcome, expected(family, dtype)) == ""
    assert tried[0] == 0
    assert shares == ([1 / LAYERS, 1.0] if turns_out else [1 / LAYERS, 1 / LAYERS])
    assert (report.chunks_computed, report.chunks_loaded) == (int(turns_out), CHUNKS - turns_out)
    assert next(span.outcome for span in report.timeline if span.chunk == 0) == (
        "computed" if turns_out else "preempted"
    )


def test_what_a_trial_gives_back_is_loaded_or_computed_as_before() -> None:
    told = Told(is_worth=no, is_tried=yes)
    frontier = Frontier([True] * 3, judge=told, clock=standing_clock)
    assert frontier.claim() == 2
    assert frontier.advance() == 0
    assert frontier.is_trial(0)
    assert not frontier.goes_on(0)
    frontier.give_back(0)
    assert frontier.counts()[State.WAITING] == 2
    told.is_tried = no
    assert [frontier.claim(), frontier.claim()] == [1, 0]
    told.is_worth = yes
    assert frontier.advance() == 0
    assert not frontier.is_trial(0)


def test_a_load_of_a_chunk_on_trial_keeps_it_when_it_is_given_back() -> None:
    frontier = Frontier([True], judge=Told(is_worth=no, is_tried=yes), clock=standing_clock)
    assert frontier.advance() == 0
    assert frontier.claim() == 0  # beside the trial
    frontier.give_back(0)
    assert frontier.counts()[State.LOADING] == 1
    assert frontier.settle(0, Outcome.LOADED)
    assert frontier.advance() is None


def test_a_chunk_whose_load_failed_during_its_trial_is_computed() -> None:
    frontier = Frontier([True], judge=Told(is_worth=no, is_tried=yes), clock=standing_clock)
    assert frontier.advance() == 0
    assert frontier.claim() == 0
    assert frontier.settle(0, Outcome.CORRUPT)
    frontier.give_back(0)
    assert frontier.advance() == 0
    frontier.computed(0)
    assert frontier.advance() is None
