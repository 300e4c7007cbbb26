"""Where the two sides meet, both may work on one chunk: whoever is done first wins, and no bit depends on who it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import CakeCache, Limits
from cake_hf.arithmetic.frontier import Frontier, Outcome, State
from cake_hf.cache.probe import kv_like
from cake_hf.stores.wrappers import GateStore
from forwards import attentions, before_forward
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
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
        kv_like(model)

        def arrive(forward: int) -> None:
            if forward == contested + 1:
                gate.open()
                await_true(cache._lost)

        with before_forward(attentions(model)[layer], arrive):
            outcome = run(model, prompt(), cache)
        report = cache.report
    assert difference(outcome, expected(family, dtype)) == ""
    assert (report.chunks_computed, report.chunks_loaded) == (contested, CHUNKS - contested)
    assert [span.chunk for span in report.timeline if span.outcome == "left"] == [contested]


@pytest.mark.parametrize(("family", "dtype"), VARIANTS)
def test_a_load_that_does_not_come_is_overtaken(family: str, dtype: str) -> None:
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
        gate.open()  # what comes now is nobody's
        join_loaders()
        for layer, keys in zip(cache.layers, outcome.keys, strict=True):
            assert torch.equal(layer.keys, keys)
    assert difference(outcome, expected(family, dtype)) == ""


def standing_clock() -> float:
    """No read is ever late by it."""
    return 0.0


moves = st.lists(st.tuples(st.sampled_from(["claim", "settle", "advance", "computed"]), st.integers(0, 7)), max_size=80)


@settings(max_examples=200)
@given(
    present=st.lists(st.booleans(), min_size=1, max_size=9),
    near=st.integers(1, 4),
    steps=moves,
    outcomes=st.lists(st.sampled_from([Outcome.LOADED, Outcome.LOADED, Outcome.CORRUPT, Outcome.MISSED]), min_size=1),
)
def test_conservation_under_any_interleaving(
    present: list[bool], near: int, steps: list[tuple[str, int]], outcomes: list[Outcome]
) -> None:
    """One thread plays all parts, in an order that hypothesis draws, then everybody finishes."""
    frontier = Frontier(present, near=near, clock=standing_clock)
    loading: list[int] = []
    computing: int | None = None
    in_place: set[int] = set()
    done: dict[int, str] = {}
    met = False

    def play(move: str, number: int) -> None:
        nonlocal computing, met
        if move == "claim":
            index = frontier.claim()
            if index is not None:
                assert present[index]
                assert index not in loading
                assert index not in done
                if not frontier.lands_aside(index):
                    in_place.add(index)
                    assert index != computing
                loading.append(index)
        elif move == "settle" and loading:
            index = loading.pop(number % len(loading))
            outcome = outcomes[number % len(outcomes)]
            accepted = frontier.settle(index, outcome)
            if accepted and outcome is Outcome.LOADED:
                assert done.setdefault(index, "loaded") == "loaded"
        elif move == "advance" and computing is None and not met and _will_not_block():
            computing = frontier.advance()
            met = computing is None
            assert computing is None or not (computing in in_place and computing in loading)
        elif move == "computed" and computing is not None:
            if frontier.lost(computing):
                assert done[computing] == "loaded"
            else:
                frontier.computed(computing)
                assert done.setdefault(computing, "computed") == "computed"
            computing = None
        assert sum(frontier.counts().values()) == len(present)

    def _will_not_block() -> bool:
        """An in-place load at the front is waited for; here nobody else could settle it meanwhile."""
        front = next((index for index in range(len(present)) if done.get(index) is None), None)
        return front is None or not (front in loading and front in in_place)

    for move, number in steps:
        play(move, number)
    for _ in range(200):
        for move in ("settle", "advance", "computed", "claim", "settle"):
            play(move, 0)
    assert met
    assert set(done) == set(range(len(present)))
    counts = frontier.counts()
    assert counts[State.COMPUTED] + counts[State.LOADED] == len(present)
    assert counts[State.LOADED] == sum(outcome is Outcome.LOADED for outcome in frontier.outcomes().values())
    landed = frontier.take_landed()
    assert all(done[index] == "loaded" and index not in in_place for index in landed)
    assert set(landed) == {index for index, how in done.items() if how == "loaded"} - in_place
    assert frontier.take_landed() == []


def test_a_bad_contested_load_leaves_the_computation_alone() -> None:
    frontier = Frontier([True], near=1)
    assert frontier.advance() == 0
    assert frontier.claim() == 0
    assert frontier.lands_aside(0)
    assert frontier.settle(0, Outcome.CORRUPT)
    assert not frontier.lost(0)
    assert frontier.claim() is None  # once is enough
    frontier.computed(0)
    assert frontier.advance() is None


def test_without_nearness_there_is_no_contest() -> None:
    frontier = Frontier([True])
    assert frontier.advance() == 0
    assert frontier.claim() is None


def test_worth_decides_between_waiting_and_computing() -> None:
    asked: list[tuple[int, int]] = []

    def worth(chunk: int, loads_left: int, loads_done: int, idle_seconds: float) -> bool:
        asked.append((chunk, loads_left))
        return len(asked) > 2  # two times no, then yes

    frontier = Frontier([True, True], near=2, worth=worth, clock=standing_clock)
    assert frontier.claim() == 1
    assert frontier.advance() == 0
    assert asked == [(0, 2)] * 3
