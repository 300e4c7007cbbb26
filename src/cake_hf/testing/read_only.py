"""The reading half of the contract, for read-only stores, which get their values when they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.stores.base import Store
from cake_hf.testing.contract import key_of, read_parts, read_unknown, read_whole, run_together, value_of

SIZES = {1: 1000, 2: 15_000, 3: 2**22 + 1, 4: 1}
CONTENT = {key_of(number): value_of(number, size) for number, size in SIZES.items()}
ABSENT = key_of(99)


class ReadOnlyContract:
    """The reading half of the contract as tests. Subclass it as `Test...` and override `make_filled`."""

    threads = 8

    def make_filled(self, tmp_path: Path, content: Mapping[str, bytes]) -> Store:
        """Makes a store that holds exactly these values; `tmp_path` is a directory for it alone."""
        raise NotImplementedError("Override make_filled, or the `store` fixture.")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = self.make_filled(tmp_path, CONTENT)
        yield store
        store.close()

    @pytest.mark.parametrize("number", SIZES)
    def test_a_value_comes_back(self, store: Store, number: int) -> None:
        assert read_parts(store, key_of(number), [SIZES[number]]) == CONTENT[key_of(number)]
        assert read_whole(store, key_of(number)) == CONTENT[key_of(number)]

    def test_values_are_scattered_over_any_parts(self, store: Store) -> None:
        assert read_parts(store, key_of(1), [3, 0, 500, 497]) == CONTENT[key_of(1)]
        assert read_parts(store, key_of(2), [5] * 3000) == CONTENT[key_of(2)]
        assert read_parts(store, key_of(3), [2**21 + 1, 2**21]) == CONTENT[key_of(3)]

    def test_no_reference_to_a_buffer_is_kept(self, store: Store) -> None:
        buffer = bytearray(1000)
        store.read_into(key_of(1), [memoryview(buffer)])
        buffer[:] = bytes(1000)
        assert read_whole(store, key_of(1)) == CONTENT[key_of(1)]

    def test_a_miss_is_none_or_false(self, store: Store) -> None:
        assert store.read_into(ABSENT, [memoryview(bytearray(10))]) is None
        assert read_whole(store, ABSENT) is None
        assert read_unknown(store, ABSENT, 10) is None
        assert store.read_range(ABSENT, [memoryview(bytearray(10))], 5) is False
        assert store.size(ABSENT) is None
        assert store.contains([ABSENT]) == [False]

    @pytest.mark.parametrize("sizes", [[999], [1001], [500, 499], [500, 501], []])
    def test_buffers_of_another_size_are_refused(self, store: Store, sizes: list[int]) -> None:
        with pytest.raises(CorruptChunk):
            store.read_into(key_of(1), [memoryview(bytearray(size)) for size in sizes])
        assert read_parts(store, key_of(1), [1000]) == CONTENT[key_of(1)]

    @pytest.mark.parametrize(
        ("number", "offset", "sizes"),
        [
            *((1, offset, sizes) for offset, sizes in [(0, [1000]), (1, [3, 0, 500]), (990, [10]), (1000, [])]),
            *((3, offset, sizes) for offset, sizes in [(2**20, [2**20]), (2**20 - 1, [1, 1]), (2**22, [1])]),
            (3, 5, [2**20, 2**21, 7]),
        ],
    )
    def test_a_range_comes_back(self, store: Store, number: int, offset: int, sizes: list[int]) -> None:
        buffers = [bytearray(size) for size in sizes]
        assert store.read_range(key_of(number), [memoryview(buffer) for buffer in buffers], offset) is True
        assert b"".join(buffers) == CONTENT[key_of(number)][offset : offset + sum(sizes)]

    @pytest.mark.parametrize(("offset", "size"), [(0, 1001), (999, 2), (1000, 1), (5000, 1)])
    def test_a_range_beyond_the_end_is_refused(self, store: Store, offset: int, size: int) -> None:
        with pytest.raises(CorruptChunk):
            store.read_range(key_of(1), [memoryview(bytearray(size))], offset)

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_a_value_of_unknown_size_comes_back(self, store: Store, number: int) -> None:
        for spare in (0, 1, 5000):
            room = SIZES[number] + spare
            assert read_unknown(store, key_of(number), room) == CONTENT[key_of(number)]

    @pytest.mark.parametrize("room", [0, 999])
    def test_a_value_that_does_not_fit_is_refused(self, store: Store, room: int) -> None:
        with pytest.raises(CorruptChunk):
            store.read_up_to(key_of(1), memoryview(bytearray(room)))

    def test_what_there_is_can_be_asked(self, store: Store) -> None:
        assert store.contains([key_of(3), ABSENT, key_of(1), key_of(3)]) == [True, False, True, True]
        assert store.contains([]) == []
        assert sorted(store.keys()) == sorted(CONTENT)
        assert {key: store.size(key) for key in store.keys()} == {  # noqa: SIM118 (a store is not a dict)
            key: len(value) for key, value in CONTENT.items()
        }

    def test_many_readers_at_once(self, store: Store) -> None:
        def read() -> None:
            for number, size in SIZES.items():
                assert read_parts(store, key_of(number), [size // 3, size - size // 3]) == CONTENT[key_of(number)]

        run_together([read] * self.threads)

    def test_nothing_can_be_written(self, store: Store) -> None:
        assert store.read_only
        for attempt in (
            lambda: store.write(ABSENT, [b"new"]),
            lambda: store.write(key_of(1), [b"other"], replace=True),
            lambda: store.delete(key_of(1)),
            store.check_writable,
        ):
            with pytest.raises(StoreError):
                attempt()
        assert sorted(store.keys()) == sorted(CONTENT)
        assert read_whole(store, key_of(1)) == CONTENT[key_of(1)]

    def test_closing_twice_is_fine(self, store: Store) -> None:
        store.close()
        store.close()
