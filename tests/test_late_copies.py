"""The place that serves GPUs, where copies are as late as they may be (see `late_copies`): no bit depends on when that is."""

from __future__ import annotations

import pytest
import torch

import test_gated
from cake_hf import CakeCache, Limits
from cake_hf.layers import TokenMajorLayer
from cake_hf.testing import FaultStore, GateStore
from forwards import attentions, before_forward
from hanging import no_waiting_for
from late_copies import LateCopies, _late_copies  # noqa: F401  # for each test in here
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from stored import filled_store, keys_in_order
from test_batches import test_faults_change_no_bit, test_missing_chunks_are_computed  # noqa: F401
from test_carried import test_an_abandoned_read_changes_nothing_when_it_ends, test_holes_anywhere  # noqa: F401
from test_contest import test_a_forward_is_left_at_the_next_layer  # noqa: F401
from test_faults import (  # noqa: F401
    test_a_broken_chunk_is_computed,
    test_a_hanging_chunk_is_computed_and_may_write_later,
    test_all_chunks_hang,
    test_an_error_of_the_model_leaves_the_cache_usable,
    test_random_faults,
    test_too_little_memory_for_the_prompt_is_the_frameworks_own_error,
)
from test_parity import test_every_meeting_point, test_holes_are_computed_and_filled  # noqa: F401
from waiting import PATIENCE, join_loaders


@pytest.mark.parametrize("held", [1, 2])
def test_a_load_that_does_not_come_is_superseded_alone(held: int) -> None:
    """It is staged: no deadline is needed, and all other loads go on."""
    model = shared_model("llama")
    gate = GateStore(filled_store(model))
    limits = Limits(loader_threads=held, read_timeout=PATIENCE)
    with CakeCache(model, gate, chunk_size=CHUNK, save=False, limits=limits) as cache:
        gate.open(CHUNKS - held)
        outcome = run(model, prompt(), cache)
        report = cache.report
        assert (report.chunks_failed, report.chunks_loaded + report.chunks_computed) == (0, CHUNKS)
        gate.open()  # what comes now belongs to no restore
        join_loaders()
        for layer, keys in zip(cache.layers, outcome.keys, strict=True):
            assert torch.equal(layer.keys, keys)
    assert difference(outcome, expected()) == ""


@pytest.mark.parametrize("strategy", ["load", "both"])
def test_each_layer_waits_for_its_copies(strategy: str) -> None:
    test_gated.test_a_second_turn_is_gated_too(strategy)
    test_gated.test_a_last_piece_that_fails_leaves_the_cache_as_it_was(strategy)
    test_gated.test_prefill_comes_back_when_all_is_there(strategy)


def refuse(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("past", [0, 2 * CHUNK])
def test_a_read_that_hangs_until_its_deadline_needs_no_memory(past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers need not go on in other buffers for what it may still bring."""
    model = shared_model("llama")
    inner = filled_store(model)
    store = FaultStore(inner, {keys_in_order(inner)[CHUNKS - 2]: "stall"})
    limits = Limits(loader_threads=2, read_timeout=PATIENCE)
    with CakeCache(model, store, chunk_size=CHUNK, save=False, strategy="load", limits=limits) as cache:
        if past:
            cache.prefill(prompt()[:, :past], whole=True)
            join_loaders()
        monkeypatch.setattr(TokenMajorLayer, "move_out", refuse)
        with no_waiting_for(store):
            outcome = run(model, prompt(), cache)
        assert cache.report.chunks_failed == 1
        store.release()
        join_loaders()
        for layer, keys in zip(cache.layers, outcome.keys, strict=True):
            assert torch.equal(layer.keys, keys)
    assert difference(outcome, expected()) == ""


@pytest.mark.parametrize("past", [0, 2 * CHUNK])
def test_an_error_of_the_model_needs_no_memory(past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama")
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, save=False) as cache:
        if past:
            cache.prefill(prompt()[:, :past], whole=True)
        with monkeypatch.context() as patched:
            patched.setattr(TokenMajorLayer, "move_out", refuse)
            with before_forward(attentions(model)[1], refuse), pytest.raises(torch.OutOfMemoryError):
                run(model, prompt(), cache)
        assert cache.get_seq_length() == past
        assert difference(run(model, prompt(), cache), expected()) == ""


def test_a_missing_wait_for_copies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests in here could fail."""
    monkeypatch.setattr(LateCopies, "catch_up", lambda self: None)
    model = shared_model("llama")
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy="load") as cache:
        assert difference(run(model, prompt(), cache), expected()) != ""


def test_refilling_a_slot_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("late_copies.Event.synchronize", lambda self: None)
    model, limits = shared_model("llama"), Limits(loader_threads=1)
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy="load", limits=limits) as cache:
        assert difference(run(model, prompt(), cache), expected()) != ""
