"""Each method of a store goes wrong in every way, from the first call on or later: prompts get the right tokens all the same.

What a store raises, hangs at or returns stays where it belongs, and nobody waits longer than `Limits` say.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import cake_hf
from cake_hf import CakeCache, Limits, MemoryStore, StoreError
from cake_hf.stores import LocalStore, Store, TierStore
from faulty import METHODS, Faulty, Hang, Panic, hanging, our_threads, raising
from models import CHUNK, CHUNKS, NEW_TOKENS, difference, expected, prompt, run, shared_model
from stored import filled_store
from waiting import PATIENCE, await_true, join_loaders

QUICK = Limits(read_timeout=0.2, lookup_timeout=0.2, exit_flush_seconds=0.2)
"""For what hangs. Answers do not depend on whether something else is late, too."""

PATIENT = Limits(read_timeout=PATIENCE, lookup_timeout=PATIENCE, exit_flush_seconds=PATIENCE)

MOST_THREADS = 12
"""Loaders that may hang, a writer, and a question of each kind."""

RAISED = {
    "OSError": OSError(errno.EIO, "no such luck"),
    "StoreError": StoreError("The store is down."),
    "odd": KeyError("an author's mistake"),
    "panic": Panic("index out of bounds"),
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(3),
    "cancelled": asyncio.CancelledError(),
    "stop": StopIteration(),
}


@pytest.fixture(autouse=True)
def no_loader_stays() -> Iterator[None]:
    yield
    join_loaders()


def opened(store: Any, **options: Any) -> CakeCache:
    return CakeCache(shared_model("llama"), store, chunk_size=CHUNK, **options)


def is_right(cache: CakeCache) -> bool:
    return difference(run(shared_model("llama"), prompt(), cache), expected()) == ""


def plain_tokens() -> list[int]:
    return expected().tokens[0].tolist()


def prompts_go_well(store: Faulty, limits: Limits) -> None:
    """Two caches after each other, on a model that has not been seen with that store."""
    for strategy in ("both", "load"):
        with opened(store, strategy=strategy, limits=limits) as cache:
            assert is_right(cache)
            cache.flush(limits.exit_flush_seconds)
        join_loaders()


@pytest.mark.fault(
    "Stores",
    "A store raises in any method: an error, a panic of native code, an interrupt, `SystemExit`.",
    "That chunk is computed or not saved, that question counts as failed; the next prompt asks again.",
)
@pytest.mark.parametrize(
    ("method", "error", "first"),
    [
        *((method, error, 0) for method in METHODS for error in ("odd", "panic")),
        *((method, "exit", 2) for method in METHODS),
        *(("contains", error, 0) for error in RAISED),
        *(("read_gradually", error, 1) for error in RAISED),
    ],
)
def test_whatever_a_store_raises_stays_with_it(method: str, error: str, first: int) -> None:
    inner = filled_store(shared_model("llama"))
    store = Faulty(inner, method, raising(RAISED[error]), first)
    if method == "check_writable" and not first:
        wanted = type(RAISED[error]) if isinstance(RAISED[error], Exception) else StoreError
        with pytest.raises(wanted):
            opened(store)
        return
    prompts_go_well(store, PATIENT)
    store.fault = None
    with opened(store, strategy="load", limits=PATIENT) as cache:
        assert is_right(cache)
        assert cache.report.chunks_loaded == CHUNKS
        assert cache.flush(PATIENCE)


@pytest.mark.parametrize("error", RAISED)
def test_a_writer_outlives_what_a_store_raises(error: str) -> None:
    store = Faulty(MemoryStore(), "write", raising(RAISED[error]))
    with opened(store, limits=PATIENT) as cache:
        assert is_right(cache)
        assert cache.flush(PATIENCE)
        assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (0, CHUNKS)
        store.fault = None
        cache.reset()
        assert is_right(cache)
        assert cache.flush(PATIENCE)
        assert cache.report.chunks_saved == CHUNKS


@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize("error", ["StoreError", "panic", "interrupt"])
@pytest.mark.parametrize("method", ["contains", "read_into", "write"])
def test_what_one_tier_raises_is_no_matter_to_the_others(method: str, error: str, where: str) -> None:
    good, bad = filled_store(shared_model("llama")), Faulty(MemoryStore(), method, raising(RAISED[error]))
    store = TierStore([bad, good] if where == "near" else [good, bad])
    for _ in range(2):
        with opened(store, strategy="load", limits=PATIENT) as cache:
            assert is_right(cache)
            assert cache.report.chunks_loaded == CHUNKS
            assert cache.flush(PATIENCE)
    assert store.flush(PATIENCE)


NONSENSE: list[Any] = [None, True, False, 0, -1, 10**6, "yes", b"", [], [True], ["no"] * 500, object(), 1.5, np.ones(3)]


@pytest.mark.fault(
    "Stores", "A method of a store returns nonsense.", "What was not checked is not used; the chunk is computed."
)
@pytest.mark.parametrize(
    ("method", "values"),
    [
        *((method, values) for method in METHODS for values in ([None], [True], NONSENSE, NONSENSE[::-1])),
        *(("contains", [value]) for value in NONSENSE),
    ],
)
def test_nonsense_of_a_store_changes_no_token(method: str, values: list[Any]) -> None:
    each = itertools.cycle(values)
    store = Faulty(filled_store(shared_model("llama")), method, lambda method: next(each))
    prompts_go_well(store, PATIENT)


class Overconfident(MemoryStore):
    """Says of parts that they are there, or not, as it likes; and what it has is wrong."""

    def __init__(self, inner: Store, said: Callable[[int], list[Any]]) -> None:
        super().__init__()
        self.said = said
        for key in inner.keys():  # noqa: SIM118  # a store is no mapping
            value = inner.read(key) or bytearray()
            value[-1] ^= 1
            self.write(key, [value])

    def read_gradually(self, key: str, parts: Any, arrived: Callable[[int], None]) -> int | None:
        count = self.read_into(key, parts)
        for number in self.said(len(parts)):
            try:
                arrived(number)
            except Exception:  # its author thinks that nothing can go wrong there
                continue
        return count


@pytest.mark.parametrize(
    "said", [lambda n: [], lambda n: [n], lambda n: [1], lambda n: [n + 5, -3, 0], lambda n: [n, n], lambda n: ["all"]]
)
def test_a_store_that_says_nothing_of_what_came_is_checked_all_the_same(said: Callable[[int], list[Any]]) -> None:
    store = Overconfident(filled_store(shared_model("llama")), said)
    with opened(store, strategy="load", limits=PATIENT, save=False) as cache:
        assert is_right(cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (0, CHUNKS)


@pytest.mark.fault(
    "Time and bounds",
    "A store hangs in any method, from the start or later.",
    "Each question is given up after its limit, and not asked again while it hangs; prompts are computed.",
)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_hang_in_any_method_costs_its_limit_and_few_threads(method: str, first: int) -> None:
    before = len(our_threads())
    with hanging() as hang:
        store = Faulty(filled_store(shared_model("llama")), method, hang, first)
        begin = time.monotonic()
        for _ in range(3):
            with opened(store, strategy="load", limits=QUICK) as cache:
                assert is_right(cache)
                cache.flush(0.1)
            if method in ("read_into", "read_range", "read_gradually"):
                store.inner = filled_store(shared_model("llama"))
        assert time.monotonic() - begin < PATIENCE / 2  # far from where `Hang` itself ends
        assert len(our_threads()) <= before + MOST_THREADS
    join_loaders()


# Opening.


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


def generated(path: Any, **options: Any) -> list[int]:
    return cake_hf.generate(  # type: ignore[no-any-return]
        shared_model("llama"),
        prompt(),
        store=path,
        chunk_size=CHUNK,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )[0].tolist()


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
            assert caches[-1].report.reason.startswith("the store cannot be used for now: ")
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


@pytest.mark.parametrize("error", [StoreError("no"), OSError(errno.ENOENT, "gone"), ValueError("odd"), Panic("oh")])
def test_a_store_that_never_was_usable_raises(
    error: BaseException, openings: Callable[[Any], None], tmp_path: Path
) -> None:
    openings(lambda: raising(error)(""))
    wanted = type(error) if isinstance(error, Exception) else StoreError
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
    "error",
    [StoreError("down"), OSError(errno.EMFILE, "too many"), OSError(errno.ENOENT, "gone"), ValueError(), Panic("oh")],
)
def test_a_known_store_that_cannot_be_opened_is_gone_without(
    error: BaseException, openings: Callable[[Any], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as cache:
        assert is_right(cache)
    openings(lambda: raising(error)(""))
    with opened(tmp_path) as held:
        for _ in range(3):
            with opened(tmp_path) as cache:
                assert is_right(cache)
                assert cache.report.reason.startswith("the store cannot be used for now: ")
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
    openings(lambda: raising(OSError(errno.EMFILE, "too many"))(""))
    assert generated(tmp_path / "store") == plain_tokens()
    with pytest.raises(OSError, match="too many"):
        opened(tmp_path / "other")
    openings(lambda: raising(StoreError("eviction=typo"))(""))  # the user's mistake, and not the system's fault
    with pytest.raises(StoreError):
        opened(f"file://{tmp_path}/store?eviction=typo")


@pytest.mark.fault(
    "Stores",
    "A store that was usable cannot be written to any more (read-only, a full disk).",
    "It is read all the same; nothing is saved, with one warning, until it can be written to again.",
)
@pytest.mark.parametrize("error", [StoreError("read-only"), OSError(errno.EROFS, "read-only"), Panic("oh")])
def test_a_known_store_that_cannot_be_written_to_is_read(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    store = Faulty(filled_store(shared_model("llama")), "check_writable", raising(error), first=1)
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
    store = Faulty(filled_store(shared_model("llama")), "contains", raising(ConnectionError("down")))
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
@pytest.mark.parametrize("error", [Watchdog("too long"), RuntimeError("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["contains", "objection", "notes_folder", "check_writable", "flush", "identity"])
def test_what_a_signal_handler_raises_while_a_store_hangs_is_the_users(method: str, error: BaseException) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise error

    hang = Hang()

    def send_and_hang(method: str) -> Any:
        signal.pthread_kill(main, signal.SIGUSR1)
        return hang(method)

    store = Faulty(MemoryStore(), method, send_and_hang)
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(type(error)) as caught:
            prompts_go_well(store, PATIENT)
        assert caught.value is error
    finally:
        signal.signal(signal.SIGUSR1, before)
        hang.release()
    store.fault = None
    await_true(lambda: not [one for one in our_threads() if one.name != "cake-writer"])
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
        nbytes = scratch._session.layout().nbytes
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
