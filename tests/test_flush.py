"""`flush()` without a timeout: as long as chunks are being written, and not for ever."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from cake_hf import CakeCache, Limits, MemoryStore, Store, Tier
from cake_hf.stores import TierStore
from cake_hf.stores import background_queue as line
from cake_hf.testing import WrapperStore
from faulty import Faulty, hanging
from models import CHUNK, CHUNKS, prompt, shared_model
from waiting import await_true

QUICK = Limits(exit_flush_seconds=0.2)


def cache_on(store: Any, limits: Limits) -> CakeCache:
    return CakeCache(shared_model("llama"), store, chunk_size=CHUNK, limits=limits)


@pytest.mark.fault(
    "Time and bounds",
    "A store hangs while `flush()` waits for it without a timeout: in a write, behind tiers, or in its own flushing.",
    "It returns False once one chunk, or the store's flushing, has taken `exit_flush_seconds`; the log says so once.",
)
@pytest.mark.parametrize("where", ["write", "behind", "flush"])
def test_a_store_that_hangs(where: str, caplog: pytest.LogCaptureFixture) -> None:
    with hanging() as hang:
        slow = Faulty(MemoryStore(), "flush" if where == "flush" else "write", hang)
        stores: dict[str, Store] = {"write": slow, "flush": slow}
        stores["behind"] = TierStore([MemoryStore(), Tier(slow, write="behind")], close_seconds=0.2)
        with cache_on(stores[where], QUICK) as cache:
            cache.prefill(prompt(), whole=True)
            assert not cache.flush()
            assert not cache.flush()
    assert sum("cannot be flushed" in message for message in caplog.messages) == 1


class Slow(WrapperStore):
    """Each write takes long, by a clock of its own."""

    def __init__(self, seconds: float) -> None:
        super().__init__(MemoryStore())
        self.now, self.seconds = 0.0, seconds
        self.begun = threading.Event()

    def write(self, key: str, parts: Any, *, replace: bool = False) -> bool:
        assert self.begun.wait(60)
        self.now += self.seconds
        return self.inner.write(key, parts, replace=replace)


@pytest.mark.parametrize("behind", [False, True])
def test_a_store_that_is_slow_is_waited_for(behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks take longer together than one of them may."""
    slow = Slow(0.75 * Limits.exit_flush_seconds)
    monkeypatch.setattr(line, "time", SimpleNamespace(monotonic=lambda: slow.now))
    store = TierStore([MemoryStore(), Tier(slow, write="behind")]) if behind else slow
    with cache_on(store, Limits()) as cache:
        if not behind:
            slow.begun.set()
        report = cache.prefill(prompt(), whole=True)
        if behind:  # the cache's own writer shares the clock: it is through before that moves
            await_true(lambda: report.chunks_saved == CHUNKS)
            slow.begun.set()
        assert cache.flush()
        assert len(list(slow.keys())) == CHUNKS


def test_with_a_timeout_that_alone_counts() -> None:
    with hanging() as hang:
        store = Faulty(MemoryStore(), "write", hang, first=CHUNKS - 1)
        with cache_on(store, QUICK) as cache:
            cache.prefill(prompt(), whole=True)
            assert not cache.flush(0.01)
            hang.release()
            assert cache.flush(60)
