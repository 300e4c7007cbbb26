"""Where the two sides meet, both may work on one chunk: whoever is done first wins, and no bit depends on who it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import CakeCache, Limits
from cake_hf.model.kv_layout import kv_template
from cake_hf.restore.pacing import RestorePace
from cake_hf.scheduling import planner
from cake_hf.scheduling.frontier import Frontier, Outcome, State
from cake_hf.testing import GateStore
from forwards import attentions, before_forward
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from paces import Told, no, tell, yes
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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_a_load_that_does_not_come_is_overtaken(
    family: str, dtype: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No deadline is needed for that: the main thread computes what loaders hold near the front.

    Had it expected all loads to be there at once they would come into place, where nobody else may write.
    """
    model = shared_model(family, dtype)
    gate = GateStore(filled_store(model))
    held = 2
    if in_place:
        tell(monkeypatch, worth=no, overdue=yes)
    with CakeCache(
        model, gate, chunk_size=CHUNK, save=False, limits=Limits(loader_threads=held, read_timeout=60)
    ) as cache:
        gate.open(CHUNKS - held)
        outcome = run(model, prompt(), cache)
        assert cache.report.chunks_failed == 0
        assert cache.report.chunks_computed >= held  # at least those whose reads the gate held back
        assert cache.report.chunks_computed == held or not in_place
        gate.open()  # what comes now is nobody's
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
            ["claim", "settle", "advance", "computed", "give back", "wait or not", "late or not", "try or not"]
        ),
        st.integers(0, 7),
    ),
    max_size=80,
)


@settings(max_examples=200)
@given(
    present=st.lists(st.booleans(), min_size=1, max_size=9),
    near=st.integers(1, 4),
    steps=moves,
    outcomes=st.lists(st.sampled_from([Outcome.LOADED, Outcome.LOADED, Outcome.CORRUPT, Outcome.MISSED]), min_size=1),
    turns=st.booleans(),
)
def test_conservation_under_any_interleaving(
    present: list[bool], near: int, steps: list[tuple[str, int]], outcomes: list[Outcome], turns: bool
) -> None:
    """One thread plays all parts, in an order that hypothesis draws, then everybody finishes.

    Now and then the main thread would rather wait, so that loads go into place, and now and then these are late. What it
    computes although it would rather wait it may give back. Where what is
    on its way into place can be turned aside, all but contested loads go there.
    """
    waits = late = tries = left_the_place = False

    def restage(index: int) -> None:
        assert index in loading
        in_place.remove(index)

    frontier = Frontier(
        present,
        judge=Told(near, lambda _: not waits, lambda _: late, lambda _: tries),
        supersedes_in_place=not turns,
        clock=standing_clock,
        restage=restage if turns else None,
    )
    loading: list[int] = []
    computing: int | None = None
    in_place: set[int] = set()
    done: dict[int, str] = {}
    met = False

    def play(move: str, number: int) -> None:
        nonlocal computing, met, waits, late, tries, left_the_place
        if move == "wait or not":
            waits = not waits
        elif move == "late or not":
            late = not late
        elif move == "try or not":
            tries = not tries
        elif move == "give back" and computing is not None and frontier.is_trial(computing):
            frontier.give_back(computing)
            computing = None
        elif move == "claim":
            index = frontier.claim()
            if index is not None:
                assert present[index]
                assert index not in loading
                assert index not in done
                if not frontier.is_staged(index):
                    in_place.add(index)
                    assert index != computing
                assert not turns or (index in in_place) == (index != computing)
                loading.append(index)
        elif move == "settle" and loading:
            index = loading.pop(number % len(loading))
            outcome = outcomes[number % len(outcomes)]
            accepted = frontier.settle(index, outcome)
            assert not (accepted and left_the_place)
            if accepted and outcome is Outcome.LOADED:
                assert done.setdefault(index, "loaded") == "loaded"
        elif move == "advance" and computing is None and not met and _will_not_block():
            computing = frontier.advance()
            met = computing is None
            if frontier.take_abandoned():
                assert not turns
                assert computing in in_place
                assert late
                left_the_place = True
            assert computing is None or left_the_place or not (computing in in_place and computing in loading)
        elif move == "computed" and computing is not None:
            if frontier.preempted(computing):
                assert done[computing] == "loaded"
            else:
                frontier.computed(computing)
                assert done.setdefault(computing, "computed") == "computed"
            computing = None
        assert sum(frontier.counts().values()) == len(present)

    def _will_not_block() -> bool:
        """What is waited for at the front nobody else could settle meanwhile."""
        front = next((index for index in range(len(present)) if done.get(index) is None), None)
        if front is None or left_the_place:
            return True
        if front in loading:
            return late if front in in_place and not turns else not waits
        return not waits

    for move, number in steps:
        play(move, number)
    waits, late, tries = False, True, False
    for _ in range(200):
        for move in ("settle", "advance", "computed", "claim", "settle"):
            play(move, 0)
    assert met
    assert set(done) == set(range(len(present)))
    counts = frontier.counts()
    assert counts[State.COMPUTED] + counts[State.LOADED] == len(present)
    assert counts[State.LOADED] == sum(outcome is Outcome.LOADED for outcome in frontier.outcomes().values())
    landed = frontier.take_staged()
    assert all(done[index] == "loaded" and index not in in_place for index in landed)
    assert set(landed) == {index for index, how in done.items() if how == "loaded"} - in_place
    assert frontier.left_behind() or not left_the_place
    assert frontier.take_staged() == []


def test_a_bad_contested_load_leaves_the_computation_alone() -> None:
    frontier = Frontier([True], judge=Told(1))
    assert frontier.advance() == 0
    assert frontier.claim() == 0
    assert frontier.is_staged(0)
    assert frontier.settle(0, Outcome.CORRUPT)
    assert not frontier.preempted(0)
    assert frontier.claim() is None  # once is enough
    frontier.computed(0)
    assert frontier.advance() is None


def test_loads_go_into_place_while_the_main_thread_would_rather_wait() -> None:
    """They are not copied once more then. Whether they can be overtaken there is decided by whoever knows the memory."""
    for overtakes in (True, False):
        frontier = Frontier([True] * 3, judge=Told(3, no), supersedes_in_place=overtakes)
        assert frontier.claim() == 2
        assert frontier.is_staged(2) == (not overtakes)


def test_between_two_steps_loads_near_the_front_go_aside() -> None:
    """The main thread is not done with computing; it is only not at it."""
    told = Told(4)
    frontier = Frontier([True] * 4, judge=told, supersedes_in_place=True)
    assert frontier.advance() == 0
    frontier.computed(0)
    told.is_worth = no  # of chunk 0, which is there
    assert frontier.claim() == 3
    assert frontier.is_staged(3)


@pytest.mark.parametrize("few", [CHUNKS, CHUNKS + 1])
def test_only_what_is_short_is_loaded_in_place_to_be_overtaken_there(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last piece, the prompt takes the room of one chunk more. Of a long one, too much would be in memory twice."""
    model = shared_model("llama")
    monkeypatch.setattr(planner, "FEW_CHUNKS", few)
    tell(monkeypatch, worth=no)
    is_staged, staged = Frontier.is_staged, []
    monkeypatch.setattr(Frontier, "is_staged", lambda *args: (staged.append(is_staged(*args)), staged[-1])[1])
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, save=False) as cache:
        assert difference(run(model, prompt(), cache), expected()) == ""
        assert cache.report.chunks_loaded == CHUNKS
    assert any(staged) == (few == CHUNKS)


def test_a_late_load_in_place_is_overtaken_with_all_that_is_under_way() -> None:
    late = False
    frontier = Frontier([True] * 4, judge=Told(4, no, lambda _: late), supersedes_in_place=True, clock=standing_clock)
    assert [frontier.claim() for _ in range(4)] == [3, 2, 1, 0]
    assert frontier.settle(3, Outcome.LOADED)
    late = True
    assert frontier.advance() == 0
    assert frontier.take_abandoned()
    assert frontier.claim() is None
    assert not frontier.settle(2, Outcome.LOADED)  # it came to where the layers were before
    for expected_next in (1, 2):
        frontier.computed(expected_next - 1)
        assert frontier.advance() == expected_next
    frontier.computed(2)
    assert frontier.advance() is None
    assert frontier.outcomes() == {3: Outcome.LOADED}


def test_a_late_load_in_place_is_turned_aside_and_may_still_win() -> None:
    late, turned = False, list[int]()
    frontier = Frontier([True] * 4, judge=Told(4, lambda _: late), restage=turned.append, clock=standing_clock)
    assert [frontier.claim() for _ in range(3)] == [3, 2, 1]
    assert frontier.claim() == 0
    assert not any(frontier.is_staged(index) for index in range(4))
    late = True
    assert frontier.advance() == 0
    assert turned == [0]
    assert frontier.is_staged(0)
    assert not frontier.take_abandoned()
    assert frontier.settle(0, Outcome.LOADED)
    assert frontier.preempted(0)
    assert frontier.take_staged() == []  # the forward on it has not been left yet
    assert frontier.advance() == 1
    assert frontier.take_staged() == [0]
    frontier.computed(1)
    assert not frontier.settle(1, Outcome.LOADED)  # it was overtaken
    assert frontier.settle(2, Outcome.LOADED)  # as if nothing had been late
    assert frontier.settle(3, Outcome.LOADED)
    assert frontier.take_staged() == []
    assert frontier.advance() is None


def test_without_nearness_there_is_no_contest() -> None:
    frontier = Frontier([True])
    assert frontier.advance() == 0
    assert frontier.claim() is None


def test_worth_decides_between_waiting_and_computing() -> None:
    asked: list[int] = []

    def worth(chunk: int) -> bool:
        asked.append(chunk)
        return len(asked) > 2  # two times no, then yes

    frontier = Frontier([True, True], judge=Told(2, worth), clock=standing_clock)
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
    tell(monkeypatch, worth=no)
    tried: list[int] = []
    goes_on, saw_forward = Frontier.goes_on, RestorePace.saw_forward

    def tries(pace: RestorePace, chunk: int, *_: object) -> bool:
        tried.append(chunk)
        return len(tried) == 1

    def judge(frontier: Frontier, index: int) -> bool:
        monkeypatch.setattr(RestorePace, "worth", lambda *_, **__: turns_out)
        answer = goes_on(frontier, index)
        monkeypatch.setattr(RestorePace, "worth", lambda *_, **__: False)
        return answer

    shares: list[float] = []

    def saw(pace: RestorePace, chunk: int, seconds: float, share: float = 1.0, *, worked: float | None = None) -> None:
        shares.append(share)
        saw_forward(pace, chunk, seconds, share, worked=worked)
        if not turns_out or share == 1:
            gate.open()

    monkeypatch.setattr(RestorePace, "tries", tries)
    monkeypatch.setattr(Frontier, "goes_on", judge)
    monkeypatch.setattr(RestorePace, "saw_forward", saw)
    limits = Limits.from_environment(loader_threads=1)
    with CakeCache(model, gate, chunk_size=CHUNK, save=False, limits=limits) as cache:
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
    told = Told(4, no, is_tried=yes)
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
    frontier = Frontier([True], judge=Told(1, no, is_tried=yes), clock=standing_clock)
    assert frontier.advance() == 0
    assert frontier.claim() == 0  # beside the trial
    frontier.give_back(0)
    assert frontier.counts()[State.LOADING] == 1
    assert frontier.settle(0, Outcome.LOADED)
    assert frontier.advance() is None


def test_a_chunk_whose_load_failed_during_its_trial_is_computed() -> None:
    frontier = Frontier([True], judge=Told(1, no, is_tried=yes), clock=standing_clock)
    assert frontier.advance() == 0
    assert frontier.claim() == 0
    assert frontier.settle(0, Outcome.CORRUPT)
    frontier.give_back(0)
    assert frontier.advance() == 0
    frontier.computed(0)
    assert frontier.advance() is None
