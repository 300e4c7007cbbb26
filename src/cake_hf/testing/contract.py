"""The contract of `cake_hf.stores.base.Store` as tests: subclass it, define how to make a store, run pytest.

The tests know nothing about how a store works. They check what the restore relies on: values come back whole or not at
all, a miss is not an exception, and any number of threads may call any method at the same time.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cake_hf.errors import CorruptChunk
from cake_hf.stores.base import Store

PATIENCE = 60.0
"""Seconds after which a thread that should have ended counts as hanging. No passing test waits that long."""


def key_of(number: int) -> str:
    """Returns a key like the library's: 40 hexadecimal digits, far apart for close numbers."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=20).hexdigest()


def value_of(number: int, nbytes: int = 1000) -> bytes:
    """Returns random bytes that are fixed by the number and unlike those of any other number."""
    return random.Random(number).randbytes(nbytes)


def split(value: bytes, cuts: Sequence[int]) -> list[memoryview]:
    """Returns views of the value, cut at these offsets."""
    edges = [0, *sorted(cuts), len(value)]
    return [memoryview(value)[start:end] for start, end in pairwise(edges)]


def read_parts(store: Store, key: str, sizes: Sequence[int]) -> bytes | None:
    """Reads a value scattered over buffers of these sizes, and joins them again; None for a miss."""
    buffers = [bytearray(size) for size in sizes]
    count = store.read_into(key, [memoryview(buffer) for buffer in buffers])
    if count is None:
        return None
    assert count == sum(sizes), f"read_into returned {count} for a value of {sum(sizes)} bytes"
    return b"".join(buffers)


def read_unknown(store: Store, key: str, room: int) -> bytes | None:
    """Reads a value of unknown size into a buffer with that room; None for a miss."""
    buffer = bytearray(room)
    size = store.read_up_to(key, memoryview(buffer))
    return None if size is None else bytes(buffer[:size])


def read_whole(store: Store, key: str) -> bytes | None:
    """Returns the result of `Store.read` as bytes; None for a miss."""
    value = store.read(key)
    return None if value is None else bytes(value)


def run_together(calls: Sequence[Callable[[], None]]) -> None:
    """Runs each call in a thread of its own, all started at the same moment; raises the first error of a call."""
    barrier = threading.Barrier(len(calls))
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            barrier.wait(PATIENCE)
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs in the store"
    if errors:
        raise errors[0]


class StoreContract:
    """The contract as tests. Subclass it as `Test...`, override `make_store`, and `reopen` if values outlive the store object.

    A store that needs more than a directory may override the `store` fixture instead.
    """

    threads = 8

    def make_store(self, tmp_path: Path) -> Store:
        """Makes a new, empty store; `tmp_path` is a directory for it alone."""
        raise NotImplementedError("Override make_store, or the `store` fixture.")

    def reopen(self, store: Store) -> Store | None:
        """Opens another store object on the same values; returns None (the default) if values end with the object."""
        return None

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = self.make_store(tmp_path)
        yield store
        store.close()

    # Values come back unchanged.

    def test_a_value_comes_back(self, store: Store) -> None:
        assert store.write(key_of(1), [value_of(1)]) is True
        assert read_parts(store, key_of(1), [1000]) == value_of(1)
        assert read_whole(store, key_of(1)) == value_of(1)

    def test_parts_are_gathered_and_scattered_as_they_are(self, store: Store) -> None:
        value = value_of(2)
        assert store.write(key_of(2), split(value, [0, 1, 17, 17, 999]))
        assert read_parts(store, key_of(2), [3, 0, 500, 497]) == value

    def test_any_kind_of_byte_buffer_can_be_written(self, store: Store) -> None:
        store.write(key_of(3), [b"one", bytearray(b"two"), memoryview(b"three")])
        assert read_parts(store, key_of(3), [11]) == b"onetwothree"

    def test_a_value_may_have_thousands_of_parts(self, store: Store) -> None:
        value = value_of(4, 15_000)
        store.write(key_of(4), split(value, range(7, 15_000, 7)))
        assert read_parts(store, key_of(4), [5] * 3000) == value

    def test_a_large_value_comes_back(self, store: Store) -> None:
        value = value_of(5, 2**22 + 1)
        store.write(key_of(5), split(value, [2**20, 2**21]))
        assert read_parts(store, key_of(5), [2**21 + 1, 2**21]) == value

    def test_no_reference_to_a_written_buffer_is_kept(self, store: Store) -> None:
        buffer = bytearray(value_of(6))
        store.write(key_of(6), [memoryview(buffer)])
        buffer[:] = bytes(1000)
        assert read_parts(store, key_of(6), [1000]) == value_of(6)

    def test_no_reference_to_a_read_buffer_is_kept(self, store: Store) -> None:
        store.write(key_of(7), [value_of(7)])
        buffer = bytearray(1000)
        store.read_into(key_of(7), [memoryview(buffer)])
        buffer[:] = bytes(1000)
        assert read_parts(store, key_of(7), [1000]) == value_of(7)

    # A miss is not an exception, but a wrong size is.

    def test_a_miss_is_none_or_false(self, store: Store) -> None:
        store.write(key_of(1), [value_of(1)])
        absent = key_of(2)
        assert store.read_into(absent, [memoryview(bytearray(10))]) is None
        assert read_whole(store, absent) is None
        assert read_unknown(store, absent, 10) is None
        assert store.read_range(absent, [memoryview(bytearray(10))], 5) is False
        assert store.size(absent) is None
        assert store.delete(absent) is False
        assert store.contains([absent]) == [False]

    @pytest.mark.parametrize("sizes", [[999], [1001], [500, 499], [500, 501], []])
    def test_buffers_of_another_size_are_refused(self, store: Store, sizes: list[int]) -> None:
        store.write(key_of(1), [value_of(1)])
        with pytest.raises(CorruptChunk):
            store.read_into(key_of(1), [memoryview(bytearray(size)) for size in sizes])
        assert read_parts(store, key_of(1), [1000]) == value_of(1)

    @pytest.mark.parametrize(("offset", "sizes"), [(0, [1000]), (0, [10]), (1, [3, 0, 500]), (990, [10]), (1000, [])])
    def test_a_range_comes_back(self, store: Store, offset: int, sizes: list[int]) -> None:
        store.write(key_of(1), [value_of(1)])
        buffers = [bytearray(size) for size in sizes]
        assert store.read_range(key_of(1), [memoryview(buffer) for buffer in buffers], offset) is True
        assert b"".join(buffers) == value_of(1)[offset : offset + sum(sizes)]

    @pytest.mark.parametrize(("offset", "size"), [(0, 1001), (999, 2), (1000, 1), (5000, 1)])
    def test_a_range_beyond_the_end_is_refused(self, store: Store, offset: int, size: int) -> None:
        store.write(key_of(1), [value_of(1)])
        with pytest.raises(CorruptChunk):
            store.read_range(key_of(1), [memoryview(bytearray(size))], offset)

    @pytest.mark.parametrize("room", [1000, 1001, 2**16])
    def test_a_value_of_unknown_size_comes_back(self, store: Store, room: int) -> None:
        store.write(key_of(1), [value_of(1)])
        assert read_unknown(store, key_of(1), room) == value_of(1)

    @pytest.mark.parametrize("room", [0, 1, 999])
    def test_a_value_that_does_not_fit_is_refused(self, store: Store, room: int) -> None:
        store.write(key_of(1), [value_of(1)])
        with pytest.raises(CorruptChunk):
            store.read_up_to(key_of(1), memoryview(bytearray(room)))
        assert read_unknown(store, key_of(1), 1000) == value_of(1)

    @pytest.mark.parametrize("size", [1, 4095, 4096, 3 * 2**20, 3 * 2**20 + 5])
    def test_a_buffer_is_not_touched_beyond_the_value(self, store: Store, size: int) -> None:
        value = value_of(2, size)
        store.write(key_of(2), [value])
        buffer = bytearray(b"\xa5" * (size + 5000))
        assert store.read_up_to(key_of(2), memoryview(buffer)) == size
        assert buffer == value + b"\xa5" * 5000

    def test_size_is_the_bytes_of_all_parts(self, store: Store) -> None:
        store.write(key_of(1), [b"123", b"", b"45"])
        assert store.size(key_of(1)) == 5

    # Writing, replacing, deleting.

    def test_a_key_is_written_once(self, store: Store) -> None:
        assert store.write(key_of(1), [b"first"]) is True
        assert store.write(key_of(1), [b"second, longer"]) is False
        assert read_whole(store, key_of(1)) == b"first"

    def test_replace_overwrites(self, store: Store) -> None:
        store.write(key_of(1), [b"first"])
        assert store.write(key_of(1), [b"second, longer"], replace=True) is True
        assert read_whole(store, key_of(1)) == b"second, longer"
        assert store.size(key_of(1)) == 14
        assert list(store.keys()) == [key_of(1)]

    def test_replace_of_nothing_is_a_plain_write(self, store: Store) -> None:
        assert store.write(key_of(1), [b"value"], replace=True) is True
        assert read_whole(store, key_of(1)) == b"value"

    def test_delete_says_whether_there_was_something(self, store: Store) -> None:
        store.write(key_of(1), [value_of(1)])
        store.write(key_of(2), [value_of(2)])
        assert store.delete(key_of(1)) is True
        assert store.delete(key_of(1)) is False
        assert store.contains([key_of(1), key_of(2)]) == [False, True]
        assert read_whole(store, key_of(1)) is None
        assert store.write(key_of(1), [b"again"]) is True

    # Queries.

    def test_contains_is_a_mask_in_the_order_asked(self, store: Store) -> None:
        for number in (1, 3, 4):
            store.write(key_of(number), [value_of(number)])
        assert store.contains([key_of(n) for n in (4, 2, 3, 0, 4)]) == [True, False, True, False, True]
        assert store.contains([]) == []

    def test_keys_lists_exactly_what_is_stored(self, store: Store) -> None:
        assert list(store.keys()) == []
        for number in range(20):
            store.write(key_of(number), [value_of(number)])
        store.delete(key_of(7))
        assert sorted(store.keys()) == sorted(key_of(n) for n in range(20) if n != 7)

    def test_keys_may_be_deleted_while_they_are_listed(self, store: Store) -> None:
        for number in range(20):
            store.write(key_of(number), [value_of(number)])
        for key in store.keys():  # noqa: SIM118 (a store is not a dict)
            store.delete(key)
        assert list(store.keys()) == []

    def test_questions_change_nothing(self, store: Store) -> None:
        store.write(key_of(1), [value_of(1)])
        store.check_writable()
        store.contains([key_of(1), key_of(2)])
        store.size(key_of(2))
        store.read(key_of(2))
        assert list(store.keys()) == [key_of(1)]
        assert read_whole(store, key_of(1)) == value_of(1)

    # Life cycle of a store.

    def test_notes_are_kept_beside_values_or_not_at_all(self, store: Store) -> None:
        store.write(key_of(1), [value_of(1)])
        for name, note in ((key_of(2), b"first"), (key_of(2), b"second"), (key_of(3), b"other")):
            store.put_note(name, note)
        kept = {key_of(2): b"second", key_of(3): b"other"} if store.notes() else {}
        assert dict(store.notes()) == kept
        assert list(store.keys()) == [key_of(1)]
        assert store.contains([key_of(2)]) == [False]
        store.put_note(key_of(2), None)
        store.put_note(key_of(2), None)
        kept.pop(key_of(2), None)
        assert dict(store.notes()) == kept

    def test_close_may_be_called_twice(self, store: Store) -> None:
        with store:
            store.write(key_of(1), [value_of(1)])
        store.close()

    def test_values_outlive_the_store_object(self, store: Store) -> None:
        store.write(key_of(1), split(value_of(1), [300]))
        again = self.reopen(store)
        if again is None:
            pytest.skip("values of this store end with the object")
        with again:
            assert list(again.keys()) == [key_of(1)]
            assert read_whole(again, key_of(1)) == value_of(1)
            assert again.write(key_of(1), [b"other"]) is False

    # Many threads.

    def test_threads_write_and_read_keys_of_their_own(self, store: Store) -> None:
        def work(first: int) -> None:
            for number in range(first, first + 10):
                assert store.write(key_of(number), split(value_of(number), [400]))
                assert read_parts(store, key_of(number), [1, 999]) == value_of(number)

        run_together([partial(work, 100 * n) for n in range(self.threads)])
        assert len(set(store.keys())) == 10 * self.threads

    def test_threads_write_the_same_key(self, store: Store) -> None:
        written: list[bool] = []
        value = value_of(1, 100_000)
        run_together([lambda: written.append(store.write(key_of(1), split(value, [70_000])))] * self.threads)
        assert any(written)
        assert list(store.keys()) == [key_of(1)]
        assert read_parts(store, key_of(1), [50_000, 50_000]) == value

    def test_a_reader_never_sees_a_part_of_a_value(self, store: Store) -> None:
        old, new = b"o" * 100_000, b"n" * 100_000
        store.write(key_of(1), [old])

        def replace() -> None:
            for value in [new, old] * 5:
                store.write(key_of(1), split(value, [99_000]), replace=True)

        def read() -> None:
            for _ in range(10):
                value = read_parts(store, key_of(1), [40_000, 60_000])
                assert value in (old, new, None), "a read saw parts of two values"

        run_together([replace, replace] + [read] * (self.threads - 2))
        assert read_whole(store, key_of(1)) == old

    def test_a_value_deleted_under_a_reader_is_whole_or_a_miss(self, store: Store) -> None:
        value = value_of(1, 100_000)

        def churn() -> None:
            for _ in range(10):
                store.write(key_of(1), [value])
                store.delete(key_of(1))

        def read() -> None:
            for _ in range(10):
                assert read_parts(store, key_of(1), [40_000, 60_000]) in (value, None)
                assert store.contains([key_of(1)]) in ([True], [False])
                assert store.size(key_of(1)) in (len(value), None)
                assert set(store.keys()) <= {key_of(1)}

        run_together([churn, churn] + [read] * (self.threads - 2))
        assert list(store.keys()) == []


def check_against_dict(make_store: Callable[[], Store], *, max_examples: int = 50, steps: int = 30) -> int:
    """Runs random sequences of calls on a store and on a dict, and fails with the shortest sequence on which they differ.

    Args:
        make_store: makes a new, empty store; called once per sequence.
        max_examples: number of sequences.
        steps: most calls per sequence.

    Returns:
        The number of calls in all sequences, not counting those that compare the store with the dict after each call.
    """
    machines: list[StoreMachine] = []

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(make_store())
            machines.append(self)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return sum(machine.calls for machine in machines)


_keys = st.integers(0, 4).map(key_of)
_parts = st.lists(st.binary(max_size=50), min_size=1, max_size=4).filter(any)


class StoreMachine(RuleBasedStateMachine):
    """A store and the dict that it should behave like. There are few keys, so that calls often hit the same one."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.model: dict[str, bytes] = {}
        self.calls = -1  # the invariant also runs before the first call

    @rule(key=_keys, parts=_parts, replace=st.booleans())
    def write(self, key: str, parts: list[bytes], replace: bool) -> None:
        expected = replace or key not in self.model
        assert self.store.write(key, parts, replace=replace) is expected
        if expected:
            self.model[key] = b"".join(parts)

    @rule(key=_keys)
    def delete(self, key: str) -> None:
        assert self.store.delete(key) is (self.model.pop(key, None) is not None)

    @rule(key=_keys, cut=st.floats(0, 1))
    def read(self, key: str, cut: float) -> None:
        size = len(self.model.get(key, b""))
        first = int(size * cut)
        assert read_parts(self.store, key, [first, size - first]) == self.model.get(key)

    @rule(key=_keys, begin=st.floats(0, 1), end=st.floats(0, 1))
    def read_a_range(self, key: str, begin: float, end: float) -> None:
        size = len(self.model.get(key, b""))
        start, stop = sorted((int(size * begin), int(size * end)))
        buffer = bytearray(stop - start)
        assert self.store.read_range(key, [memoryview(buffer)], start) is (key in self.model)
        assert bytes(buffer) == self.model.get(key, b"")[start:stop]

    @rule(key=_keys, spare=st.integers(0, 60))
    def read_with_spare_room(self, key: str, spare: int) -> None:
        assert read_unknown(self.store, key, len(self.model.get(key, b"")) + spare) == self.model.get(key)

    @rule(key=_keys, difference=st.sampled_from([-1, 1]))
    def read_with_a_wrong_size(self, key: str, difference: int) -> None:
        buffer = memoryview(bytearray(len(self.model.get(key, b"?")) + difference))
        if key in self.model:
            with pytest.raises(CorruptChunk):
                self.store.read_into(key, [buffer])
        else:
            assert self.store.read_into(key, [buffer]) is None

    @invariant()
    def same_as_the_dict(self) -> None:
        self.calls += 1
        keys = [key_of(number) for number in range(5)]
        assert sorted(self.store.keys()) == sorted(self.model)
        assert self.store.contains(keys) == [key in self.model for key in keys]
        assert [self.store.size(key) for key in keys] == [
            len(self.model[key]) if key in self.model else None for key in keys
        ]

    def teardown(self) -> None:
        self.store.close()
