"""Many prompts at once: one budget of reads, and no chunk is loaded or computed by two of them at the same time."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cake_hf import CakeCache, Limits, LocalStore, MemoryStore, Store
from cake_hf.chunks.codec import parse_header
from cake_hf.layers import TokenMajorLayer
from cake_hf.model.kv_layout import kv_template
from cake_hf.restore import bound_store
from cake_hf.testing import FaultStore, GateStore, WrapperStore, expected_faults
from cake_hf.testing.contract import run_together
from cake_hf.transfer.single_flight import LEFT_PER_READ, ReadSlot, Sharing, sharing_of
from forwards import before_forward
from hanging import no_waiting_for, no_waiting_when
from models import CHUNK, CHUNKS, Outcome, difference, expected, oracle, prompt, run, shared_model
from stored import filled_store, keys_in_order, without
from waiting import PATIENCE, await_answer, await_true, join_loaders, loaders

BYTES = torch.arange(4, dtype=torch.uint8)


# The board and the budget.


def test_a_second_prompt_copies_the_chunks_that_the_first_makes() -> None:
    sharing = Sharing()
    with sharing.flight("a", "first", computes=False) as leading:
        assert leading.followed is None
        with (
            sharing.flight("a", "second", computes=False) as following,
            sharing.flight("b", "second", computes=False) as other,
        ):
            assert following.followed is not None
            assert other.followed is None
            assert not following.followed.wait(0)
        leading.payload = lambda: BYTES.clone()
    assert following.followed.wait(PATIENCE)
    assert following.followed.payload is not None
    assert torch.equal(following.followed.payload, BYTES)
    with sharing.flight("a", "second", computes=False) as again:
        assert again.followed is None


def test_nothing_is_copied_without_followers() -> None:
    sharing = Sharing()
    with sharing.flight("a", "first", computes=True) as leading:
        leading.payload = lambda: pytest.fail("copied without a follower")


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_copy_that_cannot_be_made_does_no_harm(error: type[Exception]) -> None:
    sharing = Sharing()

    def fail() -> torch.Tensor:
        raise error("no memory is left")

    with sharing.flight("a", "first", computes=False) as leading:
        with sharing.flight("a", "second", computes=False) as following:
            assert following.followed is not None
        leading.payload = fail
    assert following.followed.wait(0)
    assert following.followed.payload is None


def test_a_flight_that_fails_lets_its_followers_go() -> None:
    sharing = Sharing()
    plans = []

    def fail() -> None:
        with sharing.flight("a", "first", computes=False), sharing.flight("a", "second", computes=False) as following:
            plans.append(following)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    [following] = plans
    assert following.followed is not None
    assert following.followed.wait(PATIENCE)
    assert following.followed.payload is None


def test_the_two_sides_of_a_restore_do_not_follow_each_other() -> None:
    sharing, mine = Sharing(), object()
    with sharing.flight("a", mine, computes=True), sharing.flight("a", mine, computes=False) as contested:
        assert contested.followed is None


def test_a_prompt_that_computes_does_not_wait_for_a_load() -> None:
    sharing = Sharing()
    with sharing.flight("a", "first", computes=False), sharing.flight("a", "second", computes=True) as plan:
        assert plan.followed is None
    with sharing.flight("a", "first", computes=True), sharing.flight("a", "second", computes=False) as plan:
        assert plan.followed is not None


def test_an_abandoned_flight_is_free_for_others() -> None:
    sharing = Sharing()
    with sharing.flight("a", "first", computes=False) as stuck:
        with sharing.flight("a", "second", computes=False) as following:
            sharing.abandon("first")
            assert following.followed is not None
            assert following.followed.wait(PATIENCE)
        with sharing.flight("a", "third", computes=False) as plan:
            assert plan.followed is None
            stuck.payload = lambda: BYTES
    assert following.followed.payload is None


def test_reads_share_a_budget() -> None:
    sharing, entered = Sharing(), threading.Semaphore(0)
    slots = [sharing.begin_read(2, lambda: False) for _ in range(2)]

    def third() -> None:
        slot = sharing.begin_read(2, lambda: False)
        assert slot is not None
        entered.release()

    thread = threading.Thread(target=third, daemon=True)
    thread.start()
    assert sharing.reads() == 2
    assert slots[0] is not None
    slots[0].release()
    slots[0].release()  # once is enough
    assert entered.acquire(timeout=PATIENCE)
    thread.join(PATIENCE)
    assert sharing.reads() == 2


def test_a_read_that_is_no_longer_needed_does_not_wait_for_a_slot() -> None:
    sharing, done, result = Sharing(), threading.Event(), []
    assert sharing.begin_read(1, lambda: False) is not None
    thread = threading.Thread(target=lambda: result.append(sharing.begin_read(1, done.is_set)), daemon=True)
    thread.start()
    done.set()
    sharing.wake()
    thread.join(PATIENCE)
    assert result == [None]


class Clock:
    """Seconds that go by when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def begin(sharing: Sharing, limit: int = 2, patience: float = 10.0) -> ReadSlot:
    slot = sharing.begin_read(limit, lambda: False, patience)
    assert slot is not None
    return slot


def test_reads_that_hang_keep_others_from_beginning_until_one_has_come_back() -> None:
    clock = Clock()
    sharing = Sharing(clock)
    slots = [begin(sharing), begin(sharing)]
    for slot in slots:
        slot.leave()
    clock.now = 9.0  # they are slow, and may be healthy
    other = begin(sharing)
    clock.now = 10.0
    assert sharing.hanging() == 2
    assert sharing.begin_read(2, lambda: False, 10.0) is None
    assert sharing.begin_beside(2, 10.0) is None
    assert sharing.begin_read(3, lambda: False, 10.0) is not None  # a more generous reader
    slots[0].release()
    assert sharing.hanging() == 1
    assert sharing.begin_beside(2, 10.0) is not None
    other.release()
    begin(sharing)


def test_a_read_that_is_over_cannot_be_left() -> None:
    sharing = Sharing(Clock())
    slot = begin(sharing, patience=0.0)
    slot.release()
    slot.leave()
    assert (sharing.reads(), sharing.hanging()) == (0, 0)


def test_a_long_read_that_somebody_waits_for_does_not_hang() -> None:
    clock = Clock()
    sharing = Sharing(clock)
    begin(sharing)
    clock.now = 1000.0
    assert sharing.hanging() == 0


@pytest.mark.parametrize("comes_back", [True, False])
def test_reads_that_were_left_are_bounded_before_they_hang(*, comes_back: bool) -> None:
    """Prompts may follow each other much faster than a read is known to hang."""
    clock = Clock()
    sharing, result = Sharing(clock), []
    left = []
    for _ in range(LEFT_PER_READ):
        left.append(begin(sharing, limit=1))
        left[-1].leave()
    assert sharing.begin_beside(1, 10.0) is None
    thread = threading.Thread(target=lambda: result.append(sharing.begin_read(1, lambda: False)), daemon=True)
    thread.start()
    if comes_back:
        left[0].release()
    else:
        clock.now = 10.0
        sharing.wake()
    thread.join(PATIENCE)
    assert [slot is not None for slot in result] == [comes_back]


def test_two_stores_of_one_directory_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    one, other = LocalStore(tmp_path / "store"), LocalStore(tmp_path / "link")
    assert sharing_of(one) is sharing_of(other)
    assert sharing_of(LocalStore(tmp_path / "third")) is not sharing_of(one)
    memory = MemoryStore()
    assert sharing_of(memory) is sharing_of(memory)
    assert sharing_of(MemoryStore()) is not sharing_of(memory)


# Whole prompts.


class Watched(WrapperStore):
    """Notes how many reads there were, and were under way at once, of each key and in all."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.reads: Counter[str] = Counter()
        self.most_of_a_key = 0
        self.most = 0
        self._now: Counter[str] = Counter()
        self._lock = threading.Lock()

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        with self._lock:
            self.reads[key] += 1
            self._now[key] += 1
            self.most_of_a_key = max(self.most_of_a_key, self._now[key])
            self.most = max(self.most, self._now.total())
        try:
            return super().read_into(key, parts)
        finally:
            with self._lock:
                self._now[key] -= 1


def test_a_chunk_that_another_prompt_loads_is_copied() -> None:
    """The first prompt's read of the last chunk is held up; the second prompt's loader waits for it and does not read, too."""
    model = shared_model("llama")
    kv_template(model)
    watched = Watched(filled_store(model))
    gate = GateStore(watched)
    outcomes: dict[str, Outcome] = {}
    reports = {}

    def generate(name: str) -> None:
        # The budget is that of the cache that asks: the second's loader may begin while the first's is at its one read.
        limits = Limits(loader_threads=["first", "second"].index(name) + 1, read_timeout=PATIENCE)
        with CakeCache(model, gate, chunk_size=CHUNK, save=False, strategy="load", limits=limits) as cache:
            outcomes[name] = run(model, prompt(), cache)
            reports[name] = cache.report

    threads = [threading.Thread(target=generate, args=(name,), daemon=True) for name in ("first", "second")]
    threads[0].start()
    board = sharing_of(gate)
    await_true(lambda: board.reads() == 1)
    threads[1].start()
    await_true(lambda: any(flight.followed_by for flight in board.flights()))
    gate.open()
    for thread in threads:
        thread.join(PATIENCE)
    assert [difference(outcomes[name], expected("llama")) for name in ("first", "second")] == ["", ""]
    assert watched.most_of_a_key == 1
    assert sum(report.chunks_shared for report in reports.values()) >= 1
    for report in reports.values():
        assert report.chunks_loaded + report.chunks_shared == CHUNKS
    assert watched.reads.total() == sum(report.chunks_loaded for report in reports.values())


def test_a_chunk_that_another_prompt_computes_is_copied() -> None:
    model, store = shared_model("llama"), MemoryStore()
    kv_template(model)
    board = sharing_of(store)
    inside, go_on = threading.Event(), threading.Event()
    first_thread = []

    def hold(forward: int) -> None:
        if threading.current_thread() is first_thread[0] and not inside.is_set():
            inside.set()
            assert go_on.wait(PATIENCE)

    outcomes: dict[str, Outcome] = {}
    reports = {}

    def generate(name: str) -> None:
        with CakeCache(model, store, chunk_size=CHUNK, limits=Limits(read_timeout=PATIENCE)) as cache:
            outcomes[name] = run(model, prompt(), cache)
            cache.flush(PATIENCE)
            reports[name] = cache.report

    threads = [threading.Thread(target=generate, args=(name,), daemon=True) for name in ("first", "second")]
    first_thread.append(threads[0])
    # The hook comes after ours: it holds the forward on chunk 0, which the restore runs.
    with CakeCache(model, store, chunk_size=CHUNK), before_forward(model, hold):
        threads[0].start()
        assert inside.wait(PATIENCE)
        threads[1].start()
        await_true(lambda: any(flight.followed_by for flight in board.flights()))
        go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert [difference(outcomes[name], expected("llama")) for name in ("first", "second")] == ["", ""]
    assert reports["second"].chunks_shared >= 1
    for report in reports.values():
        assert report.chunks_computed + report.chunks_loaded + report.chunks_shared == CHUNKS
    assert len(list(store.keys())) == CHUNKS


def test_a_copied_chunk_lands_where_the_layers_have_moved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loads were late and the layers have moved out; then another prompt computes the next chunk that is missing."""
    model = shared_model("llama")
    complete = filled_store(model)
    hole = CHUNKS - 1
    key = keys_in_order(complete)[hole]
    value = complete.read(key)
    assert value is not None
    payload = torch.frombuffer(bytearray(value), dtype=torch.uint8)[-parse_header(value)[1].payload_bytes :]
    gate = GateStore(without(complete, hole))
    gate.open(hole - 1)  # all but one
    board, moved = sharing_of(gate), []
    move_out = TokenMajorLayer.move_out
    monkeypatch.setattr(TokenMajorLayer, "move_out", lambda *args: (moved.append(1), move_out(*args))[1])
    outcomes: list[Outcome] = []
    limits = Limits(loader_threads=1, read_timeout=PATIENCE)

    def generate() -> None:
        with CakeCache(model, gate, chunk_size=CHUNK, strategy="load", limits=limits) as cache:
            with no_waiting_when(lambda: gate._reads_begun == hole):  # one loader: all others have come
                outcomes.append(run(model, prompt(), cache))
            assert cache.report.chunks_shared == 1
            gate.open()

    with board.flight(key, "another prompt", computes=True) as leading:
        assert leading.followed is None
        leading.payload = payload.clone
        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        await_true(lambda: any(flight.followed_by for flight in board.flights()))
        assert moved
    thread.join(PATIENCE)
    assert difference(outcomes[0], expected("llama")) == ""
    join_loaders()
    assert [gate.read(key) for key in keys_in_order(gate)] == [complete.read(key) for key in keys_in_order(complete)]


@pytest.mark.parametrize("strategy", ["both", "load"])
def test_many_prompts_at_once(strategy: str, tmp_path: Path) -> None:
    """Prompts that begin alike, each in a thread and a cache of its own, some of them on a warm store."""
    model, budget = shared_model("qwen3"), 2
    watched = Watched(filled_store(shared_model("qwen3")))
    ids = [prompt(), prompt(), prompt()[:, : 6 * CHUNK + 3], torch.cat([prompt()[:, :50], prompt(seed=7)], dim=1)]
    outcomes: dict[int, Outcome] = {}

    def generate(number: int) -> None:
        limits = Limits(loader_threads=budget, read_timeout=PATIENCE)
        with CakeCache(model, watched, chunk_size=CHUNK, strategy=strategy, limits=limits) as cache:
            outcomes[number] = run(model, ids[number], cache)

    run_together([lambda number=number: generate(number) for number in range(len(ids))])  # type: ignore[misc]
    for number, outcome in outcomes.items():
        assert difference(outcome, oracle(model, ids[number])) == ""
    if strategy == "load":  # else reads that were overtaken may still be under way, and count no more
        assert watched.most <= budget
        assert watched.most_of_a_key == 1


def test_a_prompt_that_is_done_waits_for_no_other_prompts_reads() -> None:
    """Its loaders have waited for a place among the reads, and are not needed any more."""
    model, other = shared_model("llama"), prompt(seed=5)
    inner = filled_store(model)
    with CakeCache(model, inner, chunk_size=CHUNK) as cache:
        run(model, other, cache)
        assert cache.flush(60)
    gate = GateStore(inner)
    with (
        CakeCache(model, gate, chunk_size=CHUNK, strategy="load", limits=IMPATIENT) as slow,
        CakeCache(model, gate, chunk_size=CHUNK, limits=IMPATIENT) as quick,
    ):
        thread = threading.Thread(target=run, args=(model, prompt(), slow))
        thread.start()
        gate.await_begun(IMPATIENT.loader_threads)
        outcome = await_answer(lambda: run(model, other, quick))
        assert (quick.report.chunks_loaded, quick.report.chunks_computed) == (0, CHUNKS)
        gate.open()
        thread.join(60)
        assert slow.report.chunks_loaded == CHUNKS
    assert difference(outcome, oracle(model, other)) == ""


# A store that hangs.

IMPATIENT = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)


@pytest.fixture
def hung() -> Iterator[FaultStore]:
    """All its reads hang."""
    inner = filled_store(shared_model("llama"))
    store = FaultStore(inner, dict.fromkeys(inner.keys(), "stall"))
    yield store
    store.release()
    join_loaders()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The one by which reads hang."""
    clock = Clock()
    board = Sharing(clock)
    monkeypatch.setattr(bound_store, "sharing_of", lambda store: board)
    return clock


def prefill(store: Store, strategy: str = "both") -> CakeCache:
    model = shared_model("llama")
    with CakeCache(model, store, chunk_size=CHUNK, save=False, strategy=strategy, limits=IMPATIENT) as cache:
        assert difference(run(model, prompt(), cache), expected("llama")) == ""
    return cache


def test_reads_that_hang_cost_no_more_threads_with_each_prompt(
    hung: FaultStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(8):
        with no_waiting_for(hung):
            assert prefill(hung, "load").report.chunks_computed == CHUNKS
        clock.now += PATIENCE
    assert len(hung.injected) == len(loaders()) == IMPATIENT.loader_threads
    assert caplog.messages.count("Nothing is loaded as long as reads of earlier prompts hang: 2.") == 7
    hung.release()
    join_loaders()
    hung.faults.clear()
    assert prefill(hung, "load").report.chunks_loaded == CHUNKS


def test_prompts_in_quick_succession_leave_a_bounded_number_of_reads(hung: FaultStore, clock: Clock) -> None:
    """Each is done long before its reads are known to hang."""
    model, limit = shared_model("llama"), IMPATIENT.loader_threads
    kv_template(model)
    most = LEFT_PER_READ * limit
    for number in range(LEFT_PER_READ + 3):
        alive = min(number * limit, most) + limit

        def all_at_it(forward: int, alive: int = alive) -> None:
            await_true(lambda: forward > 1 or (len(loaders()) >= alive and len(hung.injected) >= min(alive, most)))

        # The hook comes after ours: it holds the forward on chunk 0, which the restore runs.
        with CakeCache(model, hung, chunk_size=CHUNK), before_forward(model, all_at_it), no_waiting_for(hung):
            assert prefill(hung).report.chunks_computed == CHUNKS
        await_true(lambda: len(loaders()) <= most)
    assert len(hung.injected) == most


def test_a_read_that_hangs_does_not_keep_the_cache(hung: FaultStore) -> None:
    with no_waiting_for(hung):
        cache = weakref.ref(prefill(hung, "load"))
    gc.collect()
    assert loaders()
    assert cache() is None


class HungLookups(WrapperStore):
    """Lookups wait at a gate."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.asked = 0
        self.gate = threading.Event()

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self.asked += 1
        assert self.gate.wait(PATIENCE)
        return super().contains(keys)


def test_while_a_lookup_hangs_nothing_is_asked() -> None:
    model = shared_model("llama")
    store = HungLookups(filled_store(model))
    reasons = []
    for seconds in (0.01, PATIENCE, PATIENCE):
        limits = Limits(lookup_timeout=seconds)
        # A warning that is kept would keep the session.
        with expected_faults(), CakeCache(model, store, chunk_size=CHUNK, save=False, limits=limits) as cache:
            assert difference(run(model, prompt(), cache), expected("llama")) == ""
            reasons.append(cache.report.reason)
        ended = weakref.ref(cache._session)
        del cache
        gc.collect()
        assert ended() is None
    assert store.asked == 1
    assert "did not answer (lookup) within" in reasons[0]
    assert all("An earlier question (lookup) is still not answered" in reason for reason in reasons[1:])
    store.gate.set()
    await_true(lambda: not sharing_of(store).lookups)
    assert prefill(store, "load").report.chunks_loaded == CHUNKS
    assert store.asked == 2
