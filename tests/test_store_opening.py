"""Stores that cannot be opened, or not written to, when a cache is made; and what many caches on one store cost in sum."""

from __future__ import annotations

import errno
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cake_hf import CakeCache, Limits, MemoryStore, StoreError
from cake_hf.stores import LocalStore
from faulty import IDLE, Faulty, Hang, hanging, our_threads, raising
from models import CHUNK, CHUNKS, build, prompt, shared_model
from store_runs import PATIENT, QUICK, RAISED, generated, is_right, opened, plain_tokens, prompts_go_well
from stored import filled_store
from waiting import PATIENCE, await_true, join_loaders


@pytest.fixture(autouse=True)
def no_loader_stays() -> Iterator[None]:
    yield
    join_loaders()


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Gives a function that has `LocalStore` do something before it opens; None for nothing."""
    make = LocalStore.__init__
    doing: list[Any] = [None]

    def init(self: LocalStore, *args: Any, **kwargs: Any) -> None:
        if doing[0] is not None:
            doing[0]()
        make(self, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "__init__", init)
    yield lambda what: doing.__setitem__(0, what)
    doing[0] = None


@pytest.mark.fault(
    "Time and bounds",
    "A store hangs while it is opened (a mount whose server is gone, a silent endpoint).",
    "After `Limits.lookup_timeout` the cache goes on without it; what comes of the opening is used once it is there.",
)
@pytest.mark.parametrize("how", ["path", "url", "tiers"])
def test_a_store_that_hangs_when_it_is_opened(
    how: str, openings: Callable[[Any], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"path": tmp_path, "url": f"file://{tmp_path}", "tiers": ["memory:1MB", str(tmp_path)]}[how]
    with hanging() as hang:
        openings(hang)
        caches = []
        for _ in range(4):
            caches.append(opened(spec, limits=QUICK))
            assert is_right(caches[-1])
            assert caches[-1].report.reason_code == "store-unusable"
            assert caches[-1].flush(0.1)
        assert generated(spec, limits=QUICK) == plain_tokens()
        assert hang.begun == 1
    assert sum("The store cannot be used for now" in line for line in caplog.messages) == 1
    openings(None)

    def has_come_back() -> bool:
        caches[0].reset()
        assert is_right(caches[0])
        return not caches[0].report.reason.startswith("the store cannot be used for now")

    await_true(has_come_back)
    assert caches[0].flush(PATIENCE)
    assert caches[0].report.chunks_saved == CHUNKS
    for cache in caches:
        cache.close()


@pytest.mark.parametrize("error", ["StoreError", "OSError", "odd", "panic"])
def test_a_store_that_never_was_usable_raises(error: str, openings: Callable[[Any], None], tmp_path: Path) -> None:
    openings(raising(RAISED[error]))
    raised = RAISED[error]()
    wanted = type(raised) if isinstance(raised, Exception) else StoreError
    for _ in range(2):
        with pytest.raises(wanted):
            opened(tmp_path)
        with pytest.raises(wanted):
            generated(tmp_path)
    openings(None)
    assert generated(tmp_path) == plain_tokens()


@pytest.mark.fault(
    "Stores",
    "A store that was usable cannot be opened any more: it is down, its directory is gone, descriptors have run out.",
    "Prompts are computed, with one warning, and the store is tried again with a later prompt.",
)
@pytest.mark.parametrize(
    "error", [*RAISED.values(), lambda: OSError(errno.EMFILE, "too many"), lambda: OSError(errno.ENOENT, "gone")]
)
def test_a_known_store_that_cannot_be_opened_is_gone_without(
    error: Callable[[], BaseException],
    openings: Callable[[Any], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with opened(tmp_path) as cache:
        assert is_right(cache)
    openings(raising(error))
    with opened(tmp_path) as held:
        for _ in range(2):
            with opened(tmp_path) as cache:
                assert is_right(cache)
                assert cache.report.reason_code == "store-unusable"
                assert cache.flush(PATIENCE)
            assert generated(tmp_path) == plain_tokens()
        assert sum("The store cannot be used for now" in line for line in caplog.messages) == 1
        openings(None)
        for cache in (held, opened(tmp_path)):
            assert is_right(cache)
            assert cache.report.chunks_loaded + cache.report.chunks_computed == CHUNKS
            assert cache.report.reason == ""
            cache.close()


def test_a_directory_with_a_store_in_it_is_known_to_a_process_that_has_not_used_it(
    openings: Callable[[Any], None], tmp_path: Path
) -> None:
    LocalStore(tmp_path / "store").check_writable()
    (tmp_path / "other").mkdir()
    openings(raising(lambda: OSError(errno.EMFILE, "too many")))
    assert generated(tmp_path / "store") == plain_tokens()
    with pytest.raises(OSError, match="too many"):
        opened(tmp_path / "other")
    openings(raising(lambda: StoreError("eviction=typo")))  # the user's mistake, and not the system's fault
    with pytest.raises(StoreError):
        opened(f"file://{tmp_path}/store?eviction=typo")


@pytest.mark.fault(
    "Stores",
    "A store that was usable cannot be written to any more (read-only, a full disk).",
    "It is read all the same; nothing is saved, with one warning, until it can be written to again.",
)
@pytest.mark.parametrize("error", ["StoreError", "OSError", "panic"])
def test_a_known_store_that_cannot_be_written_to_is_read(error: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty(filled_store(shared_model("llama")), "check_writable", raising(RAISED[error]), first=1)
    opened(store).close()
    for _ in range(3):
        with opened(store, strategy="load") as cache:
            assert is_right(cache)
            assert cache.report.chunks_loaded == CHUNKS
    assert len(caplog.messages) == 1
    assert "Chunks are not being saved" in caplog.messages[0]
    with opened(store) as cache:
        store.inner, store.fault = MemoryStore(), None
        assert is_right(cache)
        assert cache.flush(PATIENCE)
        assert cache.report.chunks_saved == CHUNKS


def test_a_wiped_directory_is_a_store_again(tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "store"
    with opened(root) as held:
        assert is_right(held)
        assert held.flush(PATIENCE)
        shutil.rmtree(root)
        held.reset()
        assert is_right(held)
        assert held.flush(PATIENCE)
        shutil.rmtree(root, ignore_errors=True)
        with opened(root) as cache:
            assert is_right(cache)
            assert cache.flush(PATIENCE)
            assert cache.report.chunks_saved == CHUNKS


def test_a_failing_lookup_is_said_once_until_it_works_again(caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty(filled_store(shared_model("llama")), "contains", raising(lambda: ConnectionError("down")))
    for _ in range(3):
        with opened(store) as cache:
            assert is_right(cache)
            assert cache.report.reason == "the store could not be asked: down"
    assert len(caplog.messages) == 1
    fault, store.fault = store.fault, None
    with opened(store) as cache:
        assert is_right(cache)
    store.fault = fault
    with opened(store) as cache:
        assert is_right(cache)
    assert len(caplog.messages) == 2


# The main thread's own errors.


class Watchdog(TimeoutError):
    """What a user's signal handler raises."""


@pytest.mark.fault(
    "Time and bounds",
    "A signal handler of the user raises while the main thread waits for a store.",
    "Its error reaches the user: it is not taken for the store's.",
)
@pytest.mark.parametrize(
    ("method", "error"),
    [
        *((method, Watchdog) for method in ("mismatch_reason", "notes_folder", "check_writable", "flush", "identity")),
        *(("contains", error) for error in (Watchdog, RuntimeError, KeyboardInterrupt)),
    ],
)
def test_what_a_signal_handler_raises_while_a_store_hangs_is_the_users(method: str, error: type[BaseException]) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise error("enough")

    hang = Hang()

    def send_and_hang(method: str) -> Any:
        signal.pthread_kill(main, signal.SIGUSR1)
        return hang(method)

    store = Faulty(MemoryStore(), method, send_and_hang)
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(error, match="enough"):
            prompts_go_well(store, PATIENT)
    finally:
        signal.signal(signal.SIGUSR1, before)
        hang.release()
    store.fault = None
    await_true(lambda: not [one for one in our_threads() if one.name not in IDLE])
    with opened(store, limits=PATIENT) as cache:
        assert is_right(cache)
        assert cache.flush(PATIENCE)


# In sum.


@pytest.mark.fault(
    "Time and bounds",
    "Many caches save to a store that hangs on writes.",
    "They share one thread and one budget of bytes; closing them takes one `exit_flush_seconds`, not one for each.",
)
@pytest.mark.parametrize("how", ["object", "path", "tiers"])
def test_many_caches_on_a_store_that_hangs_on_writes(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = shared_model("llama"), our_threads()
    with opened(MemoryStore()) as scratch:
        nbytes = scratch._session.bound_model.layout().nbytes
    limits = Limits(save_queue_bytes=3 * nbytes, exit_flush_seconds=0.5)
    with hanging() as hang:
        monkeypatch.setattr(LocalStore, "write", hang)
        stores: dict[str, Any] = {
            "object": Faulty(MemoryStore(), "write", hang),
            "path": tmp_path,
            "tiers": ["memory:1MB", tmp_path],
        }
        caches = [CakeCache(model, stores[how], chunk_size=CHUNK, limits=limits) for _ in range(20)]
        for cache in caches:
            cache.prefill(prompt())
        saved = sum(CHUNKS - cache.report.chunks_unsaved for cache in caches)
        assert saved <= 3
        assert len({one for one in our_threads() - before if one.name == "cake-writer"}) == 1
        begin = time.monotonic()
        for cache in caches:
            cache.close()
        assert time.monotonic() - begin < PATIENCE / 4
        assert hang.begun == 1
    assert all(cache.flush(PATIENCE) for cache in caches)


def test_each_session_waits_for_its_own_chunks_only() -> None:
    """Another one's chunk comes later in the line, and hangs there."""
    with hanging() as hang:
        store = Faulty(MemoryStore(), "write", hang, first=CHUNKS)
        with opened(store, limits=QUICK) as first, opened(store, limits=QUICK) as second:
            first.prefill(prompt(), whole=True)
            second.prefill(prompt(seed=2), whole=True)
            assert first.flush(PATIENCE)
            assert not second.flush(0.01)
            assert first.report.chunks_saved == CHUNKS


def test_a_failure_to_open_keeps_neither_the_model_nor_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = build("llama")
    for _ in range(2):
        with pytest.raises(StoreError):
            CakeCache(model, tmp_path / "file")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
