"""Stores behind one another: each policy keeps the contract, a fault of one tier is no fault of the whole."""

from __future__ import annotations

import gc
import logging
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cake_hf import CakeCache, CorruptChunk, Limits, StoreError, Tier, TierStore
from cake_hf.stores import LocalStore, MemoryStore, Store
from cake_hf.stores.background_queue import TIERS
from cake_hf.stores.base import Part
from cake_hf.stores.health import REST_SECONDS, STUCK_SECONDS
from cake_hf.stores.tiers import open_tiers
from cake_hf.testing import FaultStore, GateStore, StoreContract, WrapperStore, check_against_dict
from cake_hf.testing.contract import PATIENCE, key_of, read_parts, run_together, split, value_of
from children import command_of
from hanging import no_waiting_for
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from stored import keys_in_order
from waiting import await_true, join_loaders

KEY, VALUE = key_of(1), value_of(1)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    for thread in background_threads():
        thread.join(PATIENCE)
    assert background_threads() == []


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == TIERS]


# The contract, for each policy.

POLICIES: dict[str, Callable[[Path], list[Any]]] = {
    "memory and disk": lambda root: [MemoryStore(), LocalStore(root)],
    "a tier that is written behind": lambda root: [MemoryStore(), Tier(LocalStore(root), write="behind")],
    "a cache of what is read": lambda root: [Tier(MemoryStore(), write=False, promote=True), MemoryStore()],
    "two that are equally near": lambda root: [[MemoryStore(), MemoryStore()], MemoryStore()],
    "tiers within tiers": lambda root: [MemoryStore(), TierStore([MemoryStore(), MemoryStore()])],
}


class TestTierStore(StoreContract):
    @pytest.fixture(params=POLICIES)
    def store(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
        self.policy, self.root = POLICIES[request.param], tmp_path
        with TierStore(self.policy(tmp_path)) as store:
            yield store

    def reopen(self, store: Store) -> Store | None:
        assert isinstance(store, TierStore)
        assert store.flush(PATIENCE)
        return TierStore(self.policy(self.root)) if store.notes_folder() else None


@pytest.mark.parametrize("policy", POLICIES)
def test_tiers_behave_like_a_dict(policy: str, tmp_path: Path) -> None:
    def make() -> Store:
        return TierStore(POLICIES[policy](Path(tempfile.mkdtemp(dir=tmp_path))))

    assert check_against_dict(make, max_examples=60) >= 1000


# Stores to watch and to break.


class Watched(WrapperStore):
    """Takes down what it is asked, and raises where it is told to."""

    def __init__(self, *numbers: int, broken: Sequence[str] = ()) -> None:
        super().__init__(MemoryStore())
        for number in numbers:
            self.inner.write(key_of(number), [value_of(number)])
        self.asked: list[tuple[str, Any]] = []
        self.broken = set(broken)
        self.closed = 0

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._ask("contains", list(keys))
        return super().contains(keys)

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        self._ask("read_into", key)
        return super().read_into(key, parts)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        self._ask("read_range", key)
        return super().read_range(key, parts, offset)

    def read(self, key: str) -> bytearray | None:
        self._ask("read", key)
        return self.inner.read(key)

    def size(self, key: str) -> int | None:
        self._ask("size", key)
        return super().size(key)

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        self._ask("write", key)
        return super().write(key, parts, replace=replace)

    def delete(self, key: str) -> bool:
        self._ask("delete", key)
        return super().delete(key)

    def keys(self) -> Iterator[str]:
        self._ask("keys", None)
        return super().keys()

    def check_writable(self) -> None:
        self._ask("check_writable", None)

    def close(self) -> None:
        self.closed += 1

    def has(self, number: int) -> bytearray | None:
        """What really is in there."""
        return self.inner.read(key_of(number))

    def _ask(self, what: str, about: Any) -> None:
        self.asked.append((what, about))
        if what in self.broken:
            raise StoreError(f"{what} is broken")


class Held(Watched):
    """Operations of one kind on one key wait until they are let go."""

    def __init__(self, *numbers: int, what: str, number: int) -> None:
        super().__init__(*numbers)
        self.held = (what, key_of(number))
        self.begun, self.go = threading.Event(), threading.Event()

    def _ask(self, what: str, about: Any) -> None:
        super()._ask(what, about)
        if (what, about) == self.held:
            self.begun.set()
            assert self.go.wait(PATIENCE)


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def start(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def get(store: Store, number: int = 1) -> bytes | None:
    return read_parts(store, key_of(number), [400, 600])


# Reading.


def test_the_nearest_tier_that_has_a_value_is_read() -> None:
    near, far = Watched(1), Watched(1, 2)
    with TierStore([near, far]) as store:
        assert get(store, 1) == value_of(1)
        assert get(store, 2) == value_of(2)
        assert [count.reads for count in store.counts()] == [1, 1]
        assert [count.bytes_read for count in store.counts()] == [1000, 1000]
    assert ("read_into", key_of(1)) not in far.asked


@pytest.mark.parametrize("reading", ["read_into", "read_range", "read", "size"])
@pytest.mark.parametrize("tiers", [2, 3])
def test_a_fault_falls_through_to_the_next_tier(reading: str, tiers: int, caplog: pytest.LogCaptureFixture) -> None:
    for bad in range(tiers):
        stores = [Watched(1, broken=[reading] if number == bad else []) for number in range(tiers)]
        # What is nearer than the broken one has nothing, so that it is come to.
        for nearer in stores[:bad]:
            nearer.inner.delete(KEY)
        store = TierStore([Tier(store, promote=False) for store in stores])
        if bad == tiers - 1:
            with pytest.raises(StoreError, match=f"{reading} is broken"):
                ask(store, reading)
        else:
            assert ask(store, reading) == answer(reading)
        assert store.counts()[bad].faults == 1
    assert len([line for line in caplog.messages if f"{reading} is broken" in line]) == tiers


def ask(store: Store, reading: str) -> object:
    buffer = bytearray(300)
    if reading == "read_range":
        return store.read_range(KEY, [memoryview(buffer)], 100) and bytes(buffer)
    return {"read_into": get, "size": lambda s: s.size(KEY), "read": lambda s: bytes(s.read(KEY) or b"")}[reading](
        store
    )


def answer(reading: str) -> object:
    return {"read_into": VALUE, "read_range": VALUE[100:400], "size": 1000, "read": VALUE}[reading]


@pytest.mark.parametrize("reading", ["read_into", "read_range", "read", "size"])
def test_it_is_no_miss_where_somebody_failed(reading: str) -> None:
    """The value may be in the tier that failed: to say that there is none would be a guess."""
    store = TierStore([Watched(broken=[reading]), Watched()])
    with pytest.raises(StoreError, match=f"cannot be read from any tier. {reading} is broken"):
        ask(store, reading)


def test_a_client_that_raises_what_it_likes_is_a_fault_like_others() -> None:
    class Rude(MemoryStore):
        def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
            raise ConnectionResetError("peer")

        def contains(self, keys: Sequence[str]) -> list[bool]:
            return []

    with TierStore([Rude(), Watched(1)]) as store:
        assert get(store) == VALUE
        assert store.contains([KEY]) == [True]
        assert store.counts()[0].faults == 2


def test_a_value_of_another_size_is_passed_over_and_put_right() -> None:
    near, far = Watched(), Watched(1)
    near.inner.write(KEY, [b"short"])
    with TierStore([near, far]) as store:
        assert get(store) == VALUE
        assert store.flush(PATIENCE)
        assert near.has(1) == VALUE


def test_a_value_of_another_size_is_corrupt_where_there_is_no_other() -> None:
    """Also where another tier failed: what is corrupt is replaced, what only cannot be read is not."""
    near, far = Watched(broken=["read_into"]), Watched(1)
    far.inner.write(KEY, [b"short"], replace=True)
    with pytest.raises(CorruptChunk):
        get(TierStore([near, far]))


def test_ranges_are_promised_where_all_tiers_keep_the_promise() -> None:
    whole = WrapperStore(MemoryStore())
    whole.reads_ranges = False
    assert TierStore([MemoryStore(), MemoryStore()]).reads_ranges
    assert not TierStore([MemoryStore(), whole]).reads_ranges


# Looking up.


def test_each_tier_gets_one_question_about_what_is_still_missing() -> None:
    near, middle, far = Watched(1, 4), Watched(2), Watched(1, 3)
    store = TierStore([near, middle, far])
    keys = [key_of(n) for n in (4, 3, 2, 1, 0)]
    assert store.contains(keys) == [True, True, True, True, False]
    assert near.asked == [("contains", keys)]
    assert middle.asked == [("contains", [key_of(n) for n in (3, 2, 0)])]
    assert far.asked == [("contains", [key_of(n) for n in (3, 0)])]
    assert store.contains([key_of(4)]) == [True]
    assert len(near.asked) == 2
    assert len(far.asked) == 1


def test_a_tier_that_cannot_be_asked_has_nothing_and_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    near, far = Watched(1, broken=["contains"]), Watched(2)
    store = TierStore([near, far])
    for _ in range(5):
        assert store.contains([key_of(1), key_of(2)]) == [False, True]
    assert [line for line in caplog.messages if "contains is broken" in line] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_lookup_that_all_tiers_fail_is_a_fault() -> None:
    store = TierStore([Watched(broken=["contains"]), Watched(broken=["contains"])])
    with pytest.raises(StoreError, match="None of the tiers can be asked"):
        store.contains([KEY])


def test_keys_are_listed_once_and_failing_tiers_list_none() -> None:
    assert sorted(TierStore([Watched(1, 2), Watched(2, 3)]).keys()) == sorted(map(key_of, (1, 2, 3)))
    assert list(TierStore([Watched(1, broken=["keys"]), Watched(2)]).keys()) == [key_of(2)]
    with pytest.raises(StoreError, match="None of the tiers can be listed"):
        list(TierStore([Watched(1, broken=["keys"])]).keys())


# Tiers in trouble.


def test_a_tier_that_fails_twice_in_a_row_is_left_alone_for_a_while() -> None:
    clock, near, far = FakeClock(), Watched(1, 2, broken=["read_into"]), Watched(1)
    store = TierStore([near, far], clock=clock)
    for _ in range(5):
        assert get(store) == VALUE
    assert near.asked.count(("read_into", KEY)) == 2
    assert store.contains([key_of(2)]) == [False]  # not even asked: it might take its time-out over it
    clock.now += REST_SECONDS
    near.broken.clear()
    assert store.contains([key_of(2)]) == [True]
    assert get(store) == VALUE
    assert near.asked.count(("read_into", KEY)) == 3


def test_a_tier_in_trouble_is_still_asked_for_what_no_other_tier_has() -> None:
    near, far = Watched(1, 2, broken=["read_into"]), Watched(1)
    store = TierStore([near, far], clock=FakeClock())
    for _ in range(3):
        get(store)
    near.broken.clear()
    assert get(store, 2) == value_of(2)
    assert store.contains([key_of(2)]) == [True]  # it has shown that it is well


def test_one_fault_is_no_trouble() -> None:
    near, far = Watched(1, broken=["read_into"]), Watched(1)
    store = TierStore([near, far], clock=FakeClock())
    for _ in range(5):
        near.broken = {"read_into"}
        get(store)
        near.broken.clear()
        get(store)
    assert near.asked.count(("read_into", KEY)) == 10


def test_values_of_a_wrong_size_are_no_trouble_of_the_store() -> None:
    near, far = Watched(2), Watched(1)
    near.inner.write(KEY, [b"short"])
    store = TierStore([Tier(near, promote=False), far], clock=FakeClock())
    for _ in range(5):
        assert get(store) == VALUE
    assert near.asked.count(("read_into", KEY)) == 5


def test_a_full_tier_is_still_read() -> None:
    near, far = Watched(1, broken=["write"]), Watched()
    store = TierStore([near, far], clock=FakeClock())
    for number in range(2, 6):
        assert store.write(key_of(number), [value_of(number)])
    assert [what for what, _ in near.asked].count("write") == 2
    assert store.counts()[0].skipped == 2
    assert get(store) == VALUE
    assert store.counts()[0].reads == 1


def test_a_tier_that_hangs_is_asked_last_as_long_as_it_does() -> None:
    clock, near = FakeClock(), Held(1, 2, what="read_into", number=2)
    store = TierStore([near, Watched(1, 2)], clock=clock)
    reader = start(lambda: get(store, 2))
    assert near.begun.wait(PATIENCE)
    assert get(store) == VALUE
    assert store.counts()[0].reads == 1
    clock.now += STUCK_SECONDS + 1
    assert get(store) == VALUE
    assert [count.reads for count in store.counts()] == [1, 1]
    near.go.set()
    reader.join(PATIENCE)
    assert get(store) == VALUE
    assert store.counts()[0].reads == 3


# Several threads: different tiers, equally near ones.


def test_two_tiers_load_different_chunks_at_the_same_time() -> None:
    near, far = Held(1, what="read_into", number=1), Held(2, what="read_into", number=2)
    store = TierStore([Tier(near, promote=False), far])
    values: list[bytes | None] = []
    readers = [start(lambda n=n: values.append(get(store, n))) for n in (1, 2)]
    for tier in (near, far):
        assert tier.begun.wait(PATIENCE)  # both are at it
    assert values == []
    for tier in (near, far):
        tier.go.set()
    for reader in readers:
        reader.join(PATIENCE)
    assert sorted(map(bytes, filter(None, values))) == sorted([value_of(1), value_of(2)])


def test_reads_spread_over_tiers_that_are_equally_near() -> None:
    gates = [GateStore(Watched(*range(4))) for _ in range(2)]
    store = TierStore([gates])
    readers = []
    for n in range(4):
        readers.append(start(lambda n=n: get(store, n)))
        await_true(lambda n=n: sum(gate._reads_begun for gate in gates) == n + 1)
    for gate in gates:
        assert gate._reads_begun == 2
        gate.open()
    for reader in readers:
        reader.join(PATIENCE)
    assert [count.reads for count in store.counts()] == [2, 2]


def test_one_reader_takes_tiers_that_are_equally_near_in_turn() -> None:
    store = TierStore([[Watched(*range(8)), Watched(*range(8))]])
    assert [get(store, number) for number in range(8)] == [value_of(number) for number in range(8)]
    assert [count.reads for count in store.counts()] == [4, 4]


@pytest.mark.parametrize("slow", [0, 1])
def test_of_tiers_that_are_equally_near_the_one_that_is_slow_gets_fewer_reads(slow: int) -> None:
    stores = [Watched(*range(6)), Watched(*range(6))]
    stores[slow] = Held(*range(6), what="read_into", number=slow)
    store = TierStore([stores])
    for _ in range(slow):
        get(store, 5)
    reader = start(lambda: get(store, slow))
    assert stores[slow].begun.wait(PATIENCE)  # type: ignore[attr-defined]
    before = store.counts()[1 - slow].reads
    for number in range(2, 6):
        assert get(store, number) == value_of(number)
    assert store.counts()[1 - slow].reads == before + 4
    stores[slow].go.set()  # type: ignore[attr-defined]
    reader.join(PATIENCE)


# Promotion.


def test_what_is_found_far_away_comes_nearer() -> None:
    near, middle, far = Watched(), Watched(), Watched(1)
    with TierStore([near, middle, far]) as store:
        assert get(store) == VALUE
        assert store.flush(PATIENCE)
        assert (near.has(1), middle.has(1)) == (VALUE, VALUE)
        assert [count.promoted for count in store.counts()] == [1, 1, 0]
        assert get(store) == VALUE
        assert [count.reads for count in store.counts()] == [1, 0, 1]


def test_only_tiers_that_take_copies_get_them() -> None:
    near, middle, far = Watched(), Watched(), Watched(1)
    with TierStore([Tier(near, promote=False), Tier(middle, write=False), far]) as store:
        assert get(store) == VALUE
        assert store.flush(PATIENCE)
    assert (near.has(1), middle.has(1)) == (None, None)
    assert background_threads() == []


def test_looking_through_a_store_promotes_nothing() -> None:
    near, far = Watched(), Watched(1)
    with TierStore([near, far]) as store:
        assert store.read(KEY) == VALUE
        assert store.size(KEY) == 1000
        assert store.read_range(KEY, [memoryview(bytearray(10))], 0)
        assert (store.counts()[1].reads, store.counts()[1].bytes_read) == (2, 1010)
        assert store.flush(PATIENCE)
    assert near.has(1) is None


def test_a_promoted_value_is_a_copy_of_its_own() -> None:
    """The read's buffers are the caller's again as soon as it returns."""
    near, far = Held(what="write", number=1), Watched(1)
    buffers = [bytearray(0), bytearray(300), bytearray(700)]
    with TierStore([near, far]) as store:
        store.read_into(KEY, [memoryview(buffer) for buffer in buffers])
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))
        near.go.set()
        assert store.flush(PATIENCE)
    assert near.has(1) == VALUE


def test_a_read_waits_for_no_promotion_and_what_has_no_room_is_skipped() -> None:
    near, far = Held(what="write", number=1), Watched(1, 2, 3)
    with TierStore([near, far], queue_bytes=2000) as store:
        for number in (1, 2, 3):
            assert get(store, number) == value_of(number)  # would hang here if it waited
        assert not store.flush(0)
        assert store.counts()[0].skipped == 1
        near.go.set()
        assert store.flush(PATIENCE)
        assert store.counts()[0].promoted == 2
        assert get(store, 3) == value_of(3)
        assert store.flush(PATIENCE)
        assert near.has(3) == value_of(3)


def test_a_tier_that_takes_no_copies_costs_no_read(caplog: pytest.LogCaptureFixture) -> None:
    near, far = Watched(broken=["write"]), Watched(*range(10))
    with TierStore([near, far], clock=FakeClock()) as store:
        for number in range(10):
            assert get(store, number) == value_of(number)
            assert store.flush(PATIENCE)
        assert (store.counts()[0].faults, store.counts()[0].promoted) == (2, 0)
    assert len([line for line in caplog.messages if "write is broken" in line]) == 1


def test_what_does_not_pass_the_check_is_not_promoted() -> None:
    def check(value: bytearray, key: str) -> None:
        if value != VALUE:
            raise CorruptChunk("not what the key says")

    near, far = Watched(), FaultStore(Watched(1), {KEY: "flip"})
    with TierStore([near, far], check=check) as store:
        assert get(store) != VALUE
        assert store.flush(PATIENCE)
        assert near.has(1) is None
        far.faults.clear()
        assert get(store) == VALUE
        assert store.flush(PATIENCE)
        assert near.has(1) == VALUE


def test_closing_finishes_what_is_queued_and_ends_the_thread() -> None:
    near, far = Watched(), Watched(1)
    store = TierStore([near, far])
    get(store)
    store.close()
    assert near.has(1) == VALUE
    assert background_threads() == []
    store.close()
    near.inner.delete(KEY)
    assert get(store) == VALUE  # and nothing is promoted any more
    assert store.flush(PATIENCE)
    assert near.has(1) is None


def test_a_store_that_is_dropped_lets_its_thread_go() -> None:
    near = Watched()
    store = TierStore([near, Watched(1)])
    get(store)
    gone = weakref.ref(store)
    assert store.flush(PATIENCE)
    del store
    gc.collect()
    assert gone() is None
    for thread in background_threads():
        thread.join(PATIENCE)
    assert background_threads() == []


def test_a_system_without_threads_promotes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with TierStore([Watched(), Watched(1)]) as store:
        assert get(store) == VALUE
        assert store.counts()[0].skipped == 1


def test_what_comes_when_the_interpreter_ends_is_written_behind_all_the_same(tmp_path: Path) -> None:
    """The writer's queue is flushed then, through a store that is still open."""
    script = """
import atexit
from cake_hf.stores import LocalStore, MemoryStore
from cake_hf.stores.tiers import Tier, TierStore
store = TierStore([MemoryStore(), Tier(LocalStore(sys.argv[1]), write="behind")])
store.write("1" * 40, [b"before"])
atexit.register(lambda: store.write("2" * 40, [b"at the end"]))
"""
    subprocess.run(command_of(script, tmp_path), check=True, timeout=PATIENCE)
    assert [LocalStore(tmp_path).read(digit * 40) for digit in "12"] == [b"before", b"at the end"]


# Writing.


def test_all_tiers_get_a_new_value() -> None:
    stores = [Watched(), Watched(), Watched()]
    store = TierStore(stores)
    assert store.write(KEY, split(VALUE, [10])) is True
    assert [one.has(1) for one in stores] == [VALUE] * 3
    assert [count.written for count in store.counts()] == [1, 1, 1]


@pytest.mark.parametrize("holder", range(3))
def test_a_key_that_any_tier_has_is_not_written(holder: int) -> None:
    stores = [Watched(*[1] * (number == holder)) for number in range(3)]
    assert TierStore(stores).write(KEY, [b"other"]) is False
    assert [one.has(1) for one in stores] == [VALUE if number == holder else None for number in range(3)]


@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("replace", [False, True])
def test_a_tier_that_refuses_does_not_stop_the_others(
    bad: int, replace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stores = [Watched(broken=["write"] if number == bad else []) for number in range(3)]
    with TierStore(stores) as store:
        for number in (1, 2, 3):
            assert store.write(key_of(number), [value_of(number)], replace=replace) is True
            assert get(store, number) == value_of(number)
    assert [one.has(1) is not None for one in stores] == [number != bad for number in range(3)]
    assert len([line for line in caplog.messages if "write is broken" in line]) == 1


def test_a_write_that_no_tier_takes_is_a_fault_and_lists_nothing() -> None:
    store = TierStore([Watched(broken=["write"]), Watched(broken=["write"])])
    for _ in range(3):
        with pytest.raises(StoreError, match=r"cannot be written to any tier\. write is broken"):
            store.write(KEY, [VALUE])
    assert list(store.keys()) == []


def test_tiers_that_are_only_read_are_left_alone() -> None:
    near, shared = Watched(), Watched(2)
    with TierStore([near, Tier(shared, write=False)]) as store:
        store.write(KEY, [VALUE])
        assert shared.has(1) is None
        assert get(store, 2) == value_of(2)
        with pytest.raises(StoreError, match="only read here"):
            store.delete(key_of(2))
        assert store.delete(KEY) is True
    assert not {"write", "delete"} & {what for what, _ in shared.asked}


def test_tiers_that_are_all_read_only_say_so() -> None:
    store = TierStore([Tier(Watched(1), write=False)])
    for call in (store.check_writable, partial(store.write, key_of(2), [VALUE])):
        with pytest.raises(StoreError, match="write=True"):
            call()


def test_a_tier_that_is_written_behind_keeps_no_caller_waiting() -> None:
    far, value = Held(what="write", number=1), bytearray(VALUE)
    with TierStore([Watched(), Tier(far, write="behind")]) as store:
        assert store.write(KEY, [memoryview(value)]) is True
        value[:] = bytes(1000)
        assert get(store) == VALUE
        far.go.set()
        assert store.flush(PATIENCE)
        assert far.has(1) == VALUE
        assert [count.written for count in store.counts()] == [1, 1]


def test_what_has_no_room_behind_is_skipped_and_counted() -> None:
    far = Held(what="write", number=0)
    with TierStore([Watched(), Tier(far, write="behind")], queue_bytes=2500) as store:
        for number in range(5):
            assert store.write(key_of(number), [value_of(number)]) is True
        assert store.counts()[1].skipped == 3
        far.go.set()
    assert sum(far.has(number) is not None for number in range(5)) == 2


def test_a_tier_that_fails_behind_is_told_of_once_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with TierStore([Watched(), Tier(Watched(broken=["write"]), write="behind")], clock=FakeClock()) as store:
        for number in range(5):
            assert store.write(key_of(number), [value_of(number)]) is True
        assert store.flush(PATIENCE)
        assert (store.counts()[1].faults, store.counts()[1].skipped) == (2, 3)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("levels", "message"),
    [([], "at least one tier"), ([Tier(MemoryStore(), write="behind")], "must be written at once")],
)
def test_tiers_that_make_no_sense_are_refused(levels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TierStore(levels)


def test_one_writable_tier_is_enough_and_the_others_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    TierStore([Watched(), Watched(broken=["check_writable"])]).check_writable()
    assert "check_writable is broken" in caplog.text
    with pytest.raises(StoreError, match="Nothing can be written to any tier"):
        TierStore([Watched(broken=["check_writable"])] * 2).check_writable()


# Replacing what is wrong.


@pytest.mark.parametrize("write", [True, "behind", False])
@pytest.mark.parametrize("position", range(2))
def test_replace_reaches_every_tier_that_has_the_value(write: Any, position: int) -> None:
    """Whatever a tier's policy is, the wrong value must not be read again."""
    odd, plain = Watched(), Watched()
    tiers = [Tier(odd, write=write), Tier(plain, promote=False)]
    with TierStore(tiers if position == 0 else tiers[::-1]) as store:
        for one in (odd, plain):
            one.inner.write(KEY, [b"w" * 1000])
        assert store.write(KEY, [VALUE], replace=True) is True
        assert get(store) == VALUE
        assert store.flush(PATIENCE)
        assert get(store) == VALUE
        plain.inner.delete(KEY)
        # What is only read keeps its wrong value, which no reader gets any more; the others have the good one.
        assert get(store) == (None if write is False else VALUE)
        assert store.contains([KEY]) == [write is not False]


def test_a_cache_of_what_is_read_gives_up_its_wrong_copy() -> None:
    near, far = Watched(), Watched()
    near.inner.write(KEY, [b"w" * 1000])
    with TierStore([Tier(near, write=False, promote=True), far]) as store:
        store.write(KEY, [VALUE], replace=True)
        assert near.has(1) is None
        assert get(store) == VALUE
        assert store.flush(PATIENCE)
        assert near.has(1) == VALUE


@pytest.mark.parametrize("deletable", [True, False])
def test_a_wrong_value_that_cannot_be_replaced_is_not_read_again(deletable: bool) -> None:
    clock, near, far = FakeClock(), Watched(1, broken=["write"] if deletable else ["write", "delete"]), Watched()
    with TierStore([near, far], clock=clock) as store:
        assert store.write(KEY, [b"good"], replace=True) is True
        assert read_parts(store, KEY, [4]) == b"good"
        assert (near.has(1) is None) is deletable
        near.broken.clear()
        clock.now += REST_SECONDS
        assert store.write(KEY, [b"better"], replace=True) is True
        assert store.flush(PATIENCE)
        assert near.has(1) == b"better"
        far.inner.delete(KEY)
        assert read_parts(store, KEY, [6]) == b"better"  # and the tier's value counts again


def test_a_replacement_that_no_tier_takes_leaves_all_as_it_was() -> None:
    store = TierStore([Watched(1, broken=["write"]), Watched(1, broken=["write"])])
    with pytest.raises(StoreError):
        store.write(KEY, [b"new"], replace=True)
    assert get(store) == VALUE


def test_an_old_value_on_its_way_is_overtaken_by_a_change() -> None:
    """A promotion that is queued, and one whose value was read before the change and comes only now."""
    near, far = Held(what="write", number=1), Held(1, 2, 3, what="read_into", number=3)
    with TierStore([Tier(near, write=False, promote=True), far]) as store:
        get(store, 1)
        assert near.begun.wait(PATIENCE)  # the background is busy with another key
        get(store, 2)
        late = start(lambda: get(store, 3))
        assert far.begun.wait(PATIENCE)
        for number in (2, 3):
            assert store.write(key_of(number), [b"n" * 1000], replace=True) is True
        far.go.set()
        late.join(PATIENCE)
        near.go.set()
        assert store.flush(PATIENCE)
        assert [near.has(number) for number in (1, 2, 3)] == [value_of(1), None, None]


def test_deleting_waits_for_a_promotion_of_the_same_key_only() -> None:
    near = Held(what="write", number=1)
    with TierStore([near, Watched(1, 2)]) as store:
        get(store, 1)
        assert near.begun.wait(PATIENCE)
        assert store.delete(key_of(2)) is True  # would hang here
        deleted: list[bool] = []
        deleter = start(lambda: deleted.append(store.delete(KEY)))
        near.go.set()
        deleter.join(PATIENCE)
        assert deleted == [True]
        assert list(store.keys()) == []


def test_promotions_and_deletions_at_the_same_time_leave_nothing_behind() -> None:
    stores = [MemoryStore(), MemoryStore(), MemoryStore()]
    with TierStore(stores) as store:

        def churn(number: int) -> None:
            for _ in range(50):
                stores[2].write(key_of(number % 2), [value_of(number % 2)])
                get(store, number % 2)
                store.delete(key_of(number % 2))

        run_together([partial(churn, number) for number in range(6)])
        assert store.flush(PATIENCE)
        for number in range(2):
            store.delete(key_of(number))
        assert store.flush(PATIENCE)
        assert list(store.keys()) == []


# Deleting, life.


@pytest.mark.parametrize("bad", range(3))
def test_deleting_goes_through_all_tiers(bad: int) -> None:
    stores = [Watched(1) for _ in range(3)]
    store = TierStore(stores)
    stores[bad].broken = {"delete"}
    with pytest.raises(StoreError, match=r"cannot be deleted from all tiers\. delete is broken"):
        store.delete(KEY)
    assert [one.has(1) is None for one in stores] == [number != bad for number in range(3)]
    stores[bad].broken.clear()
    assert store.delete(KEY) is True
    assert store.delete(KEY) is False


def test_only_owned_tiers_are_closed_even_if_one_fails() -> None:
    class Stubborn(Watched):
        def close(self) -> None:
            super().close()
            raise StoreError("no")

    stores = [Watched(), Stubborn(), Watched()]
    store = TierStore([Tier(stores[0], owned=True), Tier(stores[1], owned=True), stores[2]])
    with pytest.raises(StoreError, match="no"):
        store.close()
    assert [one.closed for one in stores] == [1, 1, 0]


def test_notes_go_to_the_first_tier_that_has_room_for_them(tmp_path: Path) -> None:
    first, second = LocalStore(tmp_path / "first"), LocalStore(tmp_path / "second")
    assert TierStore([MemoryStore(), first, second]).notes_folder() == first.notes_folder()
    assert TierStore([MemoryStore()]).notes_folder() is None
    assert repr(TierStore([MemoryStore(), first])) == f"TierStore([MemoryStore, {first!r}])"


def test_tiers_are_opened_from_what_users_write(tmp_path: Path) -> None:
    own = Watched()
    opened: list[Watched] = []

    def open_one(spec: Any) -> Store:
        if isinstance(spec, Store):
            return spec
        if spec == "bad":
            raise StoreError("no such store")
        opened.append(Watched())
        return opened[-1]

    with open_tiers(["a", own, ["b", Tier(MemoryStore(), write=False)]], open_one) as store:
        assert [(place.level, place.tier.write) for place in store._places] == [
            (0, True),
            (1, True),
            (2, True),
            (2, False),
        ]
    assert [one.closed for one in (*opened, own)] == [1, 1, 0]
    with pytest.raises(StoreError, match="no such store"):
        open_tiers(["c", own, "bad"], open_one)
    assert [one.closed for one in (*opened, own)] == [1, 1, 1, 0]
    with pytest.raises(StoreError, match="list of stores is empty"):
        open_tiers([], open_one)
    with pytest.raises(StoreError, match="another must be written at once"):
        open_tiers([Tier(MemoryStore(), write="behind")], open_one)


# With a model.

PATIENT = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)


def generate(store: Store, **options: Any) -> CakeCache:
    """A run on the store, compared bit for bit with one without."""
    model = shared_model("llama")
    with CakeCache(model, store, chunk_size=CHUNK, limits=PATIENT, **options) as cake:
        assert difference(run(model, prompt(), cake), expected()) == ""
        assert cake.flush(PATIENCE)
        return cake


def filled(store: Store) -> list[str]:
    """Have all chunks of the prompt written, and give their keys in order."""
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK) as saving:
        saving.prefill(prompt(), whole=True)
    return keys_in_order(store)


def test_a_prompt_comes_back_through_tiers_and_comes_nearer(tmp_path: Path) -> None:
    bucket = MemoryStore()
    with TierStore([MemoryStore(), LocalStore(tmp_path), Tier(bucket, write="behind")]) as tiers:
        generate(tiers)
        assert tiers.flush(PATIENCE)
        assert [count.written for count in tiers.counts()] == [CHUNKS, CHUNKS, CHUNKS]
    # Another process: its memory is empty, and its disk too.
    with open_tiers([MemoryStore(), LocalStore(tmp_path / "new"), bucket], lambda store: store) as tiers:
        assert generate(tiers, strategy="load").report.chunks_loaded == CHUNKS
        assert tiers.flush(PATIENCE)
        assert [count.reads for count in tiers.counts()] == [0, 0, CHUNKS]
        assert [count.promoted for count in tiers.counts()] == [CHUNKS, CHUNKS, 0]
        assert generate(tiers, strategy="load").report.chunks_loaded == CHUNKS
        nearest, *others = (count.reads for count in tiers.counts())
        assert nearest >= CHUNKS  # where it pays, the last ones are read in several ranges
        assert others == [0, CHUNKS]


def test_half_a_prompt_from_each_tier() -> None:
    near, far = MemoryStore(), MemoryStore()
    for number, key in enumerate(filled(far)):
        if number % 2:
            near.write(key, [far.read(key) or b""])
            far.delete(key)
    with TierStore([Tier(near, promote=False), far]) as tiers:
        assert generate(tiers, strategy="load").report.chunks_loaded == CHUNKS
        assert [count.reads for count in tiers.counts()] == [CHUNKS // 2, CHUNKS // 2]


@pytest.mark.parametrize("position", [0, CHUNKS // 2, CHUNKS - 1])
@pytest.mark.parametrize("tier", [0, 1])
@pytest.mark.parametrize("fault", ["drop", "error", "truncate", "flip"])
def test_a_fault_in_one_tier_changes_no_bit(fault: str, tier: int, position: int) -> None:
    """The nearest tier is read, so its faults meet the other's copy; the far one's faults matter where it is alone."""
    stores = [MemoryStore(), MemoryStore()]
    keys = filled(TierStore(stores))
    faulty = FaultStore(stores[tier], {keys[position]: fault})
    if tier == 1:
        stores[0].delete(keys[position])
    with TierStore([faulty, stores[1]] if tier == 0 else [stores[0], faulty]) as tiers:
        report = generate(tiers, strategy="load").report
        assert faulty.injected == [(keys[position], fault)]
        damaged = fault in ("truncate", "flip")
        saved_by_the_other = tier == 0 and not damaged
        assert report.chunks_loaded == CHUNKS - (not saved_by_the_other)
        lost = fault == "drop" and not saved_by_the_other
        assert report.chunks_saved == (damaged or lost)  # the good value replaces the wrong one, in both tiers
        faulty.faults.clear()
        assert generate(tiers, strategy="load").report.chunks_loaded == CHUNKS


@pytest.mark.parametrize("tier", [0, 1])
def test_a_wrong_value_at_rest_is_replaced_wherever_it_is(tier: int) -> None:
    stores = [MemoryStore(), MemoryStore()]
    keys = filled(TierStore(stores))
    good = stores[0].read(keys[3]) or bytearray()
    wrong = bytearray(good)
    wrong[-1] ^= 1
    for store in stores[: tier + 1]:
        store.write(keys[3], [wrong], replace=True)
    with TierStore(stores) as tiers:
        assert generate(tiers, strategy="load").report.chunks_failed == 1
    assert [store.read(keys[3]) for store in stores] == [good, good]


@pytest.mark.parametrize("tier", [0, 1])
def test_a_hanging_tier_hangs_no_caller(tier: int) -> None:
    stores = [MemoryStore(), MemoryStore()]
    keys = filled(TierStore(stores))
    faulty = FaultStore(stores[tier], dict.fromkeys(keys, "stall"))
    if tier == 1:
        for key in keys:
            stores[0].delete(key)
    model = shared_model("llama")
    store = TierStore([faulty, stores[1]] if tier == 0 else [stores[0], faulty])
    with CakeCache(model, store, chunk_size=CHUNK, limits=PATIENT, save=False) as cake:
        with no_waiting_for(faulty):
            outcome = run(model, prompt(), cake)
        assert difference(outcome, expected()) == ""
        faulty.release()
        join_loaders()
        assert all((layer.keys == keys).all() for layer, keys in zip(cake.layers, outcome.keys, strict=True))
    store.close()


def test_no_tier_that_answers_means_plain_computing(caplog: pytest.LogCaptureFixture) -> None:
    broken = ["contains", "read_into", "write"]
    with caplog.at_level(logging.WARNING, "cake_hf"), TierStore([Watched(broken=broken)] * 2) as store:
        cake = generate(store)
    assert cake.report.chunks_computed == CHUNKS
    assert cake.report.reason_code == "store-not-asked"
