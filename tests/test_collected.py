"""Caches that were not closed: what the collector does for them, in whatever thread, at whatever moment."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cake_hf import CakeCache, MemoryStore
from cake_hf.restore import hook
from cake_hf.stores.base import Part
from cake_hf.util.forks import FinalizerLock
from families import family_model, here
from family_runs import generate
from models import CHUNK, CHUNKS, build, prompt, run, shared_model
from stored import filled_store
from waiting import await_answer, await_true

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("family", here("llama", "gemma2", "qwen3_next"))
@pytest.mark.parametrize("strategy", ["compute", "load", "both"])
def test_a_cache_that_is_dropped_is_gone_at_once(family: str, strategy: str, no_collector: None) -> None:
    """Its KV may be most of the device's memory; the collector may be long in coming."""
    model = family_model(family)
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy=strategy) as cache:  # type: ignore[arg-type]
        generate(model, cache, prompt())
        gone = [weakref.ref(thing) for thing in (cache, cache._session, cache.layers[-1])]
    del cache
    assert [ref() for ref in gone] == [None, None, None]


# Locks.


def test_a_call_from_within_is_made_when_the_lock_is_given_back() -> None:
    turns, made = FinalizerLock(), []
    with turns:
        turns.soon(lambda: made.append("later"))
        made.append("first")
    assert made == ["first", "later"]
    turns.soon(lambda: turns.soon(lambda: made.append("of a call")))
    assert made == ["first", "later", "of a call"]


def test_a_call_from_another_thread_does_not_wait_and_is_not_lost() -> None:
    turns, made = FinalizerLock(), []
    with turns:
        await_answer(lambda: turns.soon(lambda: made.append("left")))
        assert made == []
    assert made == ["left"]


def test_a_call_that_fails_gives_the_lock_back() -> None:
    turns = FinalizerLock()
    with pytest.raises(ZeroDivisionError):
        turns.soon(lambda: 1 / 0)
    with turns:
        pass


def test_the_collector_may_come_while_a_hook_is_being_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped cache's finalizer then runs under the lock, in the thread that has it."""
    leaving, coming = hook.ModelHook.attach(build("llama")), build("llama")
    make = hook.ModelHook.__init__

    def collect(self: hook.ModelHook, model: object) -> None:
        leaving.detach()
        make(self, model)  # type: ignore[arg-type]

    monkeypatch.setattr(hook.ModelHook, "__init__", collect)
    arrived = await_answer(lambda: hook.ModelHook.attach(coming))
    assert leaving not in hook._hooks.values()
    assert arrived in hook._hooks.values()
    arrived.detach()
    assert not coming._forward_pre_hooks


def test_the_collector_waits_for_no_store(no_collector: None) -> None:
    """A copy to a slow tier is under way when the last one who knew of it is gone."""
    model, gate, begun = shared_model("llama"), threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
            begun.set()
            assert gate.wait(60)
            return super().write(key, parts, replace=replace)

    cache = CakeCache(model, [Slow(), filled_store(model)], chunk_size=CHUNK, strategy="load", save=False)
    run(model, prompt(), cache)
    assert begun.wait(60)
    assert cache.report.chunks_loaded == CHUNKS
    try:
        del cache
        await_answer(gc.collect)
        assert not gate.is_set()
    finally:
        gate.set()
    await_true(lambda: not [thread for thread in threading.enumerate() if thread.name in ("cake-close", "cake-tiers")])


def test_a_store_that_the_cache_has_opened_is_closed_by_the_collector_too(tmp_path: Path) -> None:
    model, closed = shared_model("llama"), threading.Event()
    cache = CakeCache(model, tmp_path / "store", chunk_size=CHUNK)
    cache.store.close = closed.set  # type: ignore[method-assign]
    del cache
    gc.collect()
    assert closed.wait(60)
