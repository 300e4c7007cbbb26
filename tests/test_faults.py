"""Law 3: no fault of a store raises into `generate`, hangs it or changes its result; each is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cake_hf import CakeCache, Limits, MemoryStore, StoreError, reads_only
from cake_hf.model.kv_layout import kv_template
from cake_hf.testing import FaultStore, WrapperStore
from families import family_model, here
from hanging import no_waiting_for, no_waiting_when
from little_memory import of_a_chunk, refusing
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from stored import filled_store, keys_in_order
from waiting import PATIENCE, join_loaders, loaders

PATIENT = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)


@pytest.fixture(autouse=True)
def no_thread_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    join_loaders()  # one whose load was overtaken may still be about to notice
    assert loaders() == []


@pytest.mark.parametrize("position", range(CHUNKS))
@pytest.mark.parametrize("fault", ["truncate", "flip", "drop", "error"])
def test_a_broken_chunk_is_computed(fault: str, position: int) -> None:
    inner = filled_store(shared_model("llama"))
    keys = keys_in_order(inner)
    store = FaultStore(inner, {keys[position]: fault})
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, strategy="load", limits=PATIENT) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.flush(60)
        report = warm.report
    assert store.injected == [(keys[position], fault)]
    assert difference(outcome, expected()) == ""
    assert (report.chunks_loaded, report.chunks_computed) == (CHUNKS - 1, 1)
    assert (report.chunks_missed, report.chunks_failed) == ((1, 0) if fault == "drop" else (0, 1))
    healed = fault != "error"
    assert report.chunks_saved == healed  # a corrupt chunk is replaced by the good one, a lost one comes back


@pytest.mark.parametrize("position", range(CHUNKS))
def test_a_hanging_chunk_is_computed_and_may_write_later(position: int) -> None:
    inner = filled_store(shared_model("llama"))
    keys = keys_in_order(inner)
    store = FaultStore(inner, {keys[position]: "stall"})
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, strategy="load", limits=PATIENT) as warm:
        with no_waiting_for(store):
            outcome = run(shared_model("llama"), prompt(), warm)
        assert difference(outcome, expected()) == ""
        assert warm.report.chunks_failed == 1
        assert (warm.report.chunks_loaded, warm.report.chunks_computed) == (CHUNKS - 1, 1)
        # The late read now writes garbage to where it was told to: nothing of that may be in the cache.
        store.release()
        join_loaders()
        for layer, keys_before, values_before in zip(warm.layers, outcome.keys, outcome.values, strict=True):
            assert torch.equal(layer.keys, keys_before)
            assert torch.equal(layer.values, values_before)


def test_all_chunks_hang() -> None:
    inner = filled_store(shared_model("llama"))
    keys = keys_in_order(inner)
    store = FaultStore(inner, dict.fromkeys(keys, "stall"))
    with no_waiting_for(store), CakeCache(shared_model("llama"), store, chunk_size=CHUNK, limits=PATIENT) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.report.chunks_computed == CHUNKS
    assert difference(outcome, expected()) == ""
    store.release()
    join_loaders()


@pytest.mark.parametrize("strategy", ["load", "both"])
@pytest.mark.parametrize("seed", range(20))
def test_random_faults(seed: int, strategy: str) -> None:
    store = FaultStore(filled_store(shared_model("llama")), rate=0.5, seed=seed)
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, limits=PATIENT, strategy=strategy) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        report = warm.report
    assert difference(outcome, expected()) == ""
    assert report.chunks_loaded + report.chunks_computed == CHUNKS
    unusable = report.chunks_missed + report.chunks_failed
    # A bad load of a chunk that was computed meanwhile has done no harm, and is not counted.
    assert unusable == len(store.injected) if strategy == "load" else unusable <= len(store.injected)


class BrokenLookup(WrapperStore):
    """A store whose `contains` raises, hangs or lies."""

    def __init__(self, inner: MemoryStore, how: str) -> None:
        super().__init__(inner)
        self.how = how
        self.released = threading.Event()

    def contains(self, keys: Sequence[str]) -> list[bool]:
        if self.how == "raise":
            raise ConnectionError("no route to the store")
        if self.how == "hang":
            self.released.wait(PATIENCE)
        return [True] * len(keys)


@pytest.mark.parametrize("how", ["raise", "hang"])
def test_a_store_that_cannot_be_asked(how: str) -> None:
    store = BrokenLookup(filled_store(shared_model("llama")), how)
    limits = Limits(lookup_timeout=0.2 if how == "hang" else PATIENCE)
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, limits=limits) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.report.chunks_computed == CHUNKS
        assert warm.report.reason_code == "store-not-asked"
    store.released.set()
    assert difference(outcome, expected()) == ""


def test_a_store_that_promises_what_it_does_not_have() -> None:
    store = BrokenLookup(MemoryStore(), "lie")
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, limits=PATIENT) as warm:
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.report.chunks_computed == CHUNKS
    assert difference(outcome, expected()) == ""


class FullStore(WrapperStore):
    def write(self, key: str, parts: Sequence[object], *, replace: bool = False) -> bool:
        raise StoreError("No space left on device: free some space or choose another directory.")


def test_a_full_store_is_said_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with CakeCache(shared_model("llama"), FullStore(MemoryStore()), chunk_size=CHUNK) as cache:
        outcome = run(shared_model("llama"), prompt(), cache)
        assert cache.flush(60)
        assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (0, CHUNKS)
    assert [record for record in caplog.messages if "free some space" in record] == caplog.messages
    assert len(caplog.messages) == 1
    assert difference(outcome, expected()) == ""


class SlowWrites(WrapperStore):
    """Writes wait at a gate."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.gate = threading.Event()

    def write(self, key: str, parts: Sequence[bytes], *, replace: bool = False) -> bool:
        self.gate.wait(60)
        return super().write(key, parts, replace=replace)


def test_a_full_queue_skips_saving_and_never_waits() -> None:
    model = shared_model("llama")
    store = SlowWrites(MemoryStore())
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as scratch:
        room_for_two = Limits(save_queue_bytes=2 * scratch._session.bound_model.layout().nbytes)
    with CakeCache(model, store, chunk_size=CHUNK, limits=room_for_two) as cache:
        outcome = run(model, prompt(), cache)  # would hang here if it waited for room
        store.gate.set()
        assert cache.flush(60)
        assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (2, CHUNKS - 2)
    assert difference(outcome, expected()) == ""


@pytest.mark.parametrize("threads", ["cake-load", "cake-lookup"])
def test_a_system_without_threads_computes(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(threads):
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start
    store = filled_store(shared_model("llama"))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with (
        no_waiting_when(lambda: True),
        CakeCache(shared_model("llama"), store, chunk_size=CHUNK, limits=PATIENT) as warm,
    ):
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.report.chunks_computed == CHUNKS
    assert difference(outcome, expected()) == ""


def test_a_system_without_a_thread_for_the_writer_saves_nothing_and_then_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        if thread.name == "cake-writer":
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK, limits=PATIENT) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            assert difference(run(shared_model("llama"), prompt(), cache), expected()) == ""
            assert cache.flush(60)
            assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (0, CHUNKS)
        cache.reset()
        run(shared_model("llama"), prompt(), cache)
        assert cache.flush(60)
        assert cache.report.chunks_saved == CHUNKS


class OddStore(MemoryStore):
    """Its author has read the contract in a hurry."""

    def __init__(self, answer: Callable[[list[bool]], Any]) -> None:
        super().__init__()
        self.answer = answer

    def contains(self, keys: Sequence[str]) -> Any:
        return self.answer(super().contains(keys))

    def mismatch_reason(self, namespace: str, facts: object) -> str:
        raise KeyError(namespace)


@pytest.mark.parametrize(
    "answer",
    [
        lambda mask: mask[:-1],
        lambda mask: [*mask, True],
        lambda mask: None,
        np.array,
        lambda mask: [],
        lambda mask: 1 / 0,
    ],
)
def test_odd_answers_of_a_store_are_no_errors_of_the_prompt(answer: Callable[[list[bool]], Any]) -> None:
    store = OddStore(answer)
    for _ in range(2):
        with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, limits=PATIENT) as cache:
            assert difference(run(shared_model("llama"), prompt(), cache), expected()) == ""
            assert cache.flush(60)


def test_an_error_of_the_model_leaves_the_cache_usable() -> None:
    """A forward that dies in the middle of a restore (out of memory, Ctrl-C) must not leave half a prompt behind."""
    model = shared_model("llama")
    store = filled_store(model)
    forwards = 0

    def fail(module: torch.nn.Module, args: object, kwargs: object) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:
            raise MemoryError("simulated")

    with CakeCache(model, store, chunk_size=CHUNK, strategy="compute") as cache:
        kv_template(model)
        handle = model.register_forward_pre_hook(reads_only(fail), with_kwargs=True)
        with pytest.raises(MemoryError):
            run(model, prompt(), cache)
        handle.remove()
        assert cache.get_seq_length() == 0
        assert difference(run(model, prompt(), cache), expected()) == ""


def fail_for_want_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("buffer", [1, 3, 4])
def test_too_little_memory_for_the_prompt_is_the_frameworks_own_error(turn: int, buffer: int) -> None:
    """The first layer's, the second one's, and keys without values."""
    model = shared_model("llama")
    store = filled_store(model)
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
        if turn == 2:
            cache.prefill(prompt()[:, : 2 * CHUNK], whole=True)
            join_loaders()
        before = threading.active_count()
        asked: list[int] = []

        def is_refused(nbytes: int, dtype: torch.dtype) -> bool:
            asked.extend([nbytes] if nbytes else [])
            return nbytes > 0 and len(asked) == buffer

        with refusing(fail_for_want_of_memory, is_refused), pytest.raises(torch.OutOfMemoryError):
            run(model, prompt(), cache)
        assert len(set(asked)) == 1, "it was another buffer"
        assert cache.get_seq_length() == (turn - 1) * 2 * CHUNK
        assert turn == 2 or not any(layer.is_initialized for layer in cache.layers)
        assert threading.active_count() <= before
        assert difference(run(model, prompt(), cache), expected()) == ""


@pytest.mark.parametrize("family", here("gemma3", "mistral"))
def test_too_little_memory_for_windows_takes_none_for_the_prompt(family: str) -> None:
    """Windows are in tensors of the model's type, whole prompts in bytes that start on a page."""
    model, store = family_model(family), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cold:
        first = run(model, prompt(), cold)
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
        with (
            refusing(fail_for_want_of_memory, lambda nbytes, dtype: nbytes > 0 and dtype is not torch.uint8),
            pytest.raises(torch.OutOfMemoryError),
        ):
            run(model, prompt(), cache)
        assert not any(layer.is_initialized for layer in cache.layers)
        assert difference(run(model, prompt(), cache), first) == ""
        assert cache.report.chunks_missed == 0


def test_loads_that_are_given_up_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    inner = filled_store(shared_model("llama"))
    store = FaultStore(inner, dict.fromkeys(inner.keys(), "stall"))
    with (
        no_waiting_for(store),
        CakeCache(shared_model("llama"), store, chunk_size=CHUNK, strategy="load", limits=PATIENT) as warm,
    ):
        outcome = run(shared_model("llama"), prompt(), warm)
        assert warm.report.chunks_failed == PATIENT.loader_threads
    assert difference(outcome, expected()) == ""
    said = [message for message in caplog.messages if "did not bring in time" in message]
    assert len(said) == 1
    assert f"2 of 2, given up after {PATIENCE:g} s (Limits.read_timeout)" in said[0]
    store.release()
    join_loaders()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_no_memory_for_a_copy_is_said_once_and_nothing_is_saved(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error("cannot allocate memory")

    store, model = MemoryStore(), shared_model("llama")
    with CakeCache(model, store, chunk_size=CHUNK) as cold, refusing(fail, of_a_chunk(model, CHUNK)):
        assert difference(run(shared_model("llama"), prompt(), cold), expected()) == ""
        assert cold.flush(60)
        assert (cold.report.chunks_saved, cold.report.chunks_unsaved) == (0, CHUNKS)
    assert list(store.keys()) == []
    assert len([line for line in caplog.messages if "Chunks are not being saved" in line]) == 1
