"""The budget of a directory: who goes first, that it holds with many processes, and that no death or stranger breaks it."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cake_hf import StoreError
from cake_hf.chunks.codec import ChunkMetadata, checksums, encode_header
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.stores import LocalStore, Store
from cake_hf.stores.byte_count import ByteCount
from cake_hf.stores.eviction import (
    EVICTIONS,
    START_BYTES,
    ChunkPosition,
    Entry,
    FrontFirst,
    front_first,
    least_recently_used,
    order_named,
    place_in,
)
from cake_hf.stores.folder import ShardListing
from cake_hf.testing import StoreContract, check_against_dict
from cake_hf.testing.contract import key_of, run_together, value_of
from children import many_children, start_together
from commands import run_command

PATIENCE = 60.0
LONG_AGO = 1_000_000_000.0
"""Seconds since the epoch: before any of these files was used."""


class TestBudgetedStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path, budget=2**30)

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, LocalStore)
        return LocalStore(store.root, budget=2**30)


class TestFrontFirstStore(TestBudgetedStore):
    def make_store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path, budget=2**30, eviction="front-first")


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_store_with_room_behaves_like_a_dict(tmp_path: Path, eviction: str) -> None:
    numbers = iter(range(10**6))
    make = lambda: LocalStore(tmp_path / str(next(numbers)), budget=10**6, eviction=eviction)  # noqa: E731
    assert check_against_dict(make, max_examples=60) >= 1000


# Who goes first.


def chain(name: str, uses: Sequence[float], first: int = 0, parent: str = "") -> dict[Entry, ChunkPosition]:
    """A prompt's chunks "a0", "a1", ... with when each was used."""
    chunks = {}
    for index, used in enumerate(uses, start=first):
        chunks[Entry(f"{name}{index}", 1, used)] = ChunkPosition(index, parent)
        parent = f"{name}{index}"
    return chunks


def in_order(chunks: dict[Entry, ChunkPosition], seed: int = 0) -> list[str]:
    entries = random.Random(seed).sample(sorted(chunks, key=str), len(chunks))
    return [entry.key for entry in front_first(entries, {entry.key: place for entry, place in chunks.items()})]


def test_lru_takes_what_was_used_longest_ago() -> None:
    entries = [Entry(key, 1, used) for key, used in (("a", 3), ("b", 1), ("c", 2))]
    assert [entry.key for entry in least_recently_used(entries)] == ["b", "c", "a"]


def test_front_first_takes_a_prompt_from_its_front() -> None:
    """Loads go from the back, so the end of a prompt is what was used longest ago: LRU would take it first."""
    chunks = chain("a", [4, 3, 2, 1])
    assert in_order(chunks) == ["a0", "a1", "a2", "a3"]
    assert [entry.key for entry in least_recently_used(list(chunks))] == ["a3", "a2", "a1", "a0"]


def test_front_first_takes_the_prompt_first_that_was_used_longest_ago() -> None:
    """One use of any of its chunks is a use of the prompt: the front is often computed and not read."""
    assert in_order({**chain("a", [1, 1, 9]), **chain("b", [5, 5, 5])}) == ["b0", "b1", "b2", "a0", "a1", "a2"]


def test_a_shared_prefix_belongs_to_the_prompt_that_was_used_last() -> None:
    shared = chain("s", [1, 1])
    chunks = {**shared, **chain("a", [5, 5], 2, "s1"), **chain("b", [7, 7], 2, "s1")}
    assert in_order(chunks) == ["a2", "a3", "s0", "s1", "b2", "b3"]


def test_a_use_of_the_shared_prefix_alone_is_a_use_of_one_prompt_only() -> None:
    chunks = {**chain("s", [9]), **chain("a", [2], 1, "s0"), **chain("b", [3], 1, "s0")}
    assert in_order(chunks) == ["a1", "s0", "b1"]


def test_what_stands_behind_a_hole_is_a_prompt_of_its_own() -> None:
    chunks = {**chain("a", [5, 5]), **chain("a", [3, 3], 4, "a3")}
    assert in_order(chunks) == ["a4", "a5", "a0", "a1"]


def test_chunks_without_a_place_go_by_their_use() -> None:
    entries = [*chain("a", [4, 4]), Entry("x", 1, 3), Entry("y", 1, 5)]
    places = {entry.key: place for entry, place in chain("a", [4, 4]).items()}
    assert [entry.key for entry in front_first(entries, places)] == ["x", "a0", "a1", "y"]


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), max_size=6), st.integers(0, 99))
def test_front_first_on_prompts_that_share_nothing(prompts: list[list[int]], seed: int) -> None:
    chunks: dict[Entry, ChunkPosition] = {}
    for number, uses in enumerate(prompts):
        chunks |= chain(f"{number}-", uses)
    order = in_order(chunks, seed)
    expected = sorted(range(len(prompts)), key=lambda number: (max(prompts[number]), f"{number}-0"))
    assert order == [f"{number}-{index}" for number in expected for index in range(len(prompts[number]))]


@given(
    st.dictionaries(
        st.sampled_from("abcdefgh"),
        st.tuples(
            st.integers(0, 9), st.none() | st.builds(ChunkPosition, st.integers(0, 4), st.sampled_from("abcdefghz"))
        ),
    )
)
def test_front_first_leaves_no_document_out_whatever_headers_say(
    chunks: dict[str, tuple[int, ChunkPosition | None]],
) -> None:
    entries = [Entry(key, 1, used) for key, (used, _) in chunks.items()]
    places = {key: place for key, (_, place) in chunks.items() if place}
    order = front_first(entries, places)
    assert sorted(order, key=str) == sorted(entries, key=str)
    position = {entry.key: number for number, entry in enumerate(order)}
    for one, other in pairwise(order):
        place = places.get(other.key)
        if place and place.parent == one.key and places.get(one.key, ChunkPosition(-2, "")).index == place.index - 1:
            assert position[one.key] < position[other.key]


def test_the_place_of_a_chunk_is_asked_for_once() -> None:
    asked: list[str] = []

    def place_of(key: str) -> ChunkPosition:
        asked.append(key)
        return ChunkPosition(0, "")

    order = FrontFirst(place_of)
    entries = [Entry("a", 1, 1), Entry("b", 1, 2)]
    assert order(entries) == order(entries) == entries
    assert sorted(asked) == ["a", "b"]
    order(entries[:1])
    order(entries)
    assert sorted(asked) == ["a", "b", "b"], "places of chunks that are gone are forgotten"


def test_an_unknown_eviction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of lru, front-first"):
        LocalStore(tmp_path, budget=1, eviction="back-first")
    assert order_named("lru", lambda key: None) is least_recently_used


# The place of a chunk, read from its header.

LAYOUT = ChunkLayout(16, tuple(Piece(f"layers.{n}.keys", 2, 4, torch.float32) for n in range(3)))


def chunk(number: int, index: int, parent: str, model: str = "a model") -> bytes:
    """A whole chunk, as the library writes it."""
    payload = value_of(number, LAYOUT.nbytes)
    return (
        encode_header(LAYOUT, ChunkMetadata(key_of(number), parent, index, "0" * 40, model, checksums(payload, LAYOUT)))
        + payload
    )


CHUNK_BYTES = len(chunk(0, 0, ""))


@pytest.mark.parametrize("model", ["", '"index":"7"', '","index":"7","parent":"', "模型" * 64])
def test_a_place_is_what_the_codec_wrote(model: str) -> None:
    """The two know of each other only here."""
    assert place_in(chunk(1, 23, "ab" * 20, model)[:START_BYTES]) == ChunkPosition(23, "ab" * 20)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b'{"__metadata__":',
        b'{"__metadata__":{"index":"1"}}',
        b'{"__metadata__":{"index":"-1","parent":"a"}}',
        b'{"__metadata__":{"index":"one","parent":"a"}}',
        b'{"__metadata__":{"index":1e999,"parent":"a"}}',
        b'{"__metadata__":{"index":"1","parent":null}}',
        b'{"__metadata__":' + b"[" * 50_000,
        b'{"x":{},"__metadata__":{"index":"1","parent":"a"}}',
    ],
)
def test_what_is_no_header_has_no_place(header: bytes) -> None:
    assert place_in(len(header).to_bytes(8, "little") + header) is None


@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_bytes_upset_the_reading_of_a_place(noise: bytes, at: int) -> None:
    raw = bytearray(chunk(1, 1, "a" * 40))
    raw[at : at + len(noise)] = noise
    place_in(bytes(raw[:START_BYTES]))
    place_in(noise)


# The budget holds.


def total(root: Path) -> int:
    """Bytes of all chunks, and of what is being written or was left behind; exact, since all that adds bytes takes the lock."""
    with ByteCount(root / "bytes").opened():
        found: dict[int, int] = {}  # by inode: for a moment a new chunk has two names
        for pattern in ("*/*.safetensors", "partial/*"):
            for path in root.glob(pattern):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found[status.st_ino] = status.st_size
    return sum(found.values())


def account(root: Path) -> int:
    return int((root / "bytes").read_text())


def present(store: Store, numbers: Sequence[int]) -> list[int]:
    return [n for n, has in zip(numbers, store.contains([key_of(n) for n in numbers]), strict=True) if has]


def use(store: LocalStore, number: int, seconds: float) -> None:
    """Let a chunk's last use be so many seconds after LONG_AGO."""
    path = store.root / key_of(number)[:2] / f"{key_of(number)}.safetensors"
    os.utime(path, (LONG_AGO + seconds,) * 2)


def test_the_budget_holds_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=3000)
    for number in (1, 2, 3):
        store.write(key_of(number), [value_of(number)])
        use(store, number, number)
    use(store, 1, 10)
    assert store.write(key_of(4), [value_of(4)]) is True
    assert present(store, [1, 2, 3, 4]) == [1, 3, 4]
    assert total(tmp_path) == account(tmp_path) == 3000
    assert store.write(key_of(5), [bytes(2500)]) is True
    assert present(store, [1, 2, 3, 4, 5]) == [5]


def test_reading_a_chunk_counts_as_a_use(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=3000)
    for number in (1, 2, 3):
        store.write(key_of(number), [value_of(number)])
        use(store, number, number)
    assert store.read(key_of(1)) == value_of(1)
    assert store.read_range(key_of(2), [memoryview(bytearray(10))], 5)
    store.write(key_of(4), [value_of(4)])
    assert present(store, [1, 2, 3, 4]) == [1, 2, 4]


def test_a_look_or_a_failed_read_is_no_use(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write(key_of(1), [value_of(1)])
    use(store, 1, 0)
    store.contains([key_of(1)])
    store.size(key_of(1))
    store.place(key_of(1))
    with pytest.raises(StoreError):
        store.read_into(key_of(1), [memoryview(bytearray(7))])
    store.marks_use = False
    store.read(key_of(1))
    store.read_range(key_of(1), [memoryview(bytearray(10))], 5)
    assert store.entries() == [Entry(key_of(1), 1000, LONG_AGO)]


def test_a_file_is_touched_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, touched = LocalStore(tmp_path), 0
    utime = os.utime

    def count(*args: Any) -> None:
        nonlocal touched
        touched += 1
        utime(*args)

    store.write(key_of(1), [value_of(1)])
    use(store, 1, 0)
    monkeypatch.setattr(os, "utime", count)
    for _ in range(5):
        store.read(key_of(1))
    assert touched == 1


def test_a_file_that_may_not_be_touched_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    store = LocalStore(tmp_path)
    store.write(key_of(1), [value_of(1)])
    use(store, 1, 0)
    monkeypatch.setattr(os, "utime", refuse)
    assert store.read(key_of(1)) == value_of(1)


def fill_with_prompts(store: LocalStore) -> None:
    """Prompt 10 of four chunks, then prompt 20, the first one used last."""
    for start in (10, 20):
        parent = "0" * 40
        for index in range(4):
            store.write(key_of(start + index), [chunk(start + index, index, parent)])
            use(store, start + index, start + (4 - index))  # loads go from the back: the end was used first
            parent = key_of(start + index)
    use(store, 13, 99)


@pytest.mark.parametrize(
    ("eviction", "left"),
    [("front-first", [10, 11, 12, 13, 22, 23]), ("lru", [10, 13, 20, 21, 22, 23])],
)
def test_the_two_evictions_on_two_prompts(tmp_path: Path, eviction: str, left: list[int]) -> None:
    store = LocalStore(tmp_path, budget=8 * CHUNK_BYTES, eviction=eviction)
    fill_with_prompts(store)
    for number in (30, 31):
        store.write(key_of(number), [chunk(number, number, "f" * 40)])
    assert present(store, [*range(10, 14), *range(20, 24)]) == left


def test_front_first_leaves_the_end_of_a_prompt_that_is_larger_than_the_budget(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=3 * CHUNK_BYTES, eviction="front-first")
    for index in range(8):
        store.write(key_of(index), [chunk(index, index, key_of(index - 1) if index else "0" * 40)])
    assert present(store, range(8)) == [5, 6, 7]


def test_a_chunk_over_the_budget_is_refused_and_drives_nothing_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=1000)
    store.write(key_of(1), [bytes(1000)])
    with pytest.raises(StoreError, match="over the store's budget of 1,000"):
        store.write(key_of(2), [bytes(600), bytes(401)])
    assert present(store, [1, 2]) == [1]
    assert total(tmp_path) == account(tmp_path) == 1000


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_is_positive(tmp_path: Path, budget: int) -> None:
    with pytest.raises(ValueError, match="budget must be positive"):
        LocalStore(tmp_path, budget=budget)


def test_nothing_is_evicted_for_what_cannot_fit_beside_the_chunks_that_are_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path, budget=3000)
    store.write(key_of(1), [value_of(1)])
    writing, go_on, fsync = threading.Event(), threading.Event(), os.fsync

    def wait(descriptor: int) -> None:
        writing.set()
        assert go_on.wait(PATIENCE)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    writer = threading.Thread(target=store.write, args=(key_of(2), [bytes(1500)]), daemon=True)
    writer.start()
    assert writing.wait(PATIENCE)
    assert account(tmp_path) == 2500
    other = LocalStore(tmp_path, budget=3000)
    with pytest.raises(StoreError, match="taken by chunks that are being written"):
        other.write(key_of(3), [bytes(1501)])
    assert present(store, [1]) == [1]
    go_on.set()
    writer.join(PATIENCE)
    assert present(store, [1, 2, 3]) == [1, 2]
    assert other.write(key_of(3), [bytes(1501)]) is True
    assert total(tmp_path) == account(tmp_path) == 1501


def test_a_chunk_that_is_used_after_it_was_listed_stays(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=4000)
    for number in (1, 2, 3, 4):
        store.write(key_of(number), [value_of(number)])
        use(store, number, number)
    store.write(key_of(5), [value_of(5)])  # lists them, and takes number 1
    store.read(key_of(2))
    store.write(key_of(6), [value_of(6)])
    assert present(store, range(1, 7)) == [2, 4, 5, 6]
    entry = Entry(key_of(2), 1000, LONG_AGO)
    assert store.evict(entry) is False
    assert store.read(key_of(2)) == value_of(2)


def test_a_reader_keeps_the_chunk_that_is_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = LocalStore(tmp_path, budget=1000), LocalStore(tmp_path, budget=1000)
    store.write(key_of(1), [value_of(1)])
    preadv = os.preadv

    def evict_first(fd: int, parts: Any, offset: int) -> int:
        monkeypatch.setattr(os, "preadv", preadv)
        assert other.write(key_of(2), [value_of(2)])
        return preadv(fd, parts, offset)

    monkeypatch.setattr(os, "preadv", evict_first)
    assert store.read(key_of(1)) == value_of(1)
    assert present(store, [1, 2]) == [2]


# The account is right, and what makes it wrong is noticed.


def test_all_that_changes_the_directory_is_counted(tmp_path: Path) -> None:
    store, plain = LocalStore(tmp_path, budget=10**6), LocalStore(tmp_path)
    store.write(key_of(1), [value_of(1)])
    draw = random.Random(0)
    for step in range(300):
        actor = draw.choice([store, plain])
        key = key_of(draw.randrange(8))
        if draw.random() < 0.6:
            actor.write(key, [bytes(draw.randrange(1, 5000))], replace=draw.random() < 0.5)
        elif draw.random() < 0.7:
            actor.delete(key)
        else:
            for entry in actor.entries()[:1]:
                actor.evict(entry)
        assert account(tmp_path) == total(tmp_path), step


def test_without_a_budget_nothing_is_counted_or_evicted(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=None)
    for number in range(5):
        store.write(key_of(number), [value_of(number)])
    assert not (tmp_path / "bytes").exists()
    assert len(list(store.keys())) == 5


def test_a_failing_write_gives_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path, budget=3000)
    store.write(key_of(1), [value_of(1)])
    for function in ("writev", "fsync", "link", "ftruncate"):
        with monkeypatch.context() as patch:

            def fail(*_: object, **__: object) -> None:
                raise OSError(errno.ENOSPC, "full")

            patch.setattr(os, function, fail)
            patch.setattr(os, "rename", fail if function == "link" else os.rename)
            with pytest.raises(StoreError, match="free some space"):
                store.write(key_of(2), [value_of(2)])
        assert account(tmp_path) == total(tmp_path) == 1000, function


@pytest.mark.parametrize("text", ["", "no number", "9" * 19, "-" + "1" * 19, "\udcff"])
def test_an_account_that_is_no_number_is_made_anew(tmp_path: Path, text: str) -> None:
    LocalStore(tmp_path).write(key_of(1), [value_of(1)])
    (tmp_path / "bytes").write_bytes(text.encode(errors="surrogateescape"))
    LocalStore(tmp_path).write(key_of(2), [value_of(2)])
    LocalStore(tmp_path, budget=10**6).write(key_of(3), [value_of(3)])
    assert account(tmp_path) == 3000


def test_the_account_may_be_deleted_at_any_time(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=3000)
    for number in range(10):
        store.write(key_of(number), [value_of(number)])
        if number % 2:
            (tmp_path / "bytes").unlink()
        assert total(tmp_path) <= 3000
    assert account(tmp_path) == 3000 if (tmp_path / "bytes").exists() else True


def test_files_that_were_deleted_by_hand_are_not_evicted_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=4000)
    for number in range(4):
        store.write(key_of(number), [value_of(number)])
    for number in (0, 1):
        os.unlink(tmp_path / key_of(number)[:2] / f"{key_of(number)}.safetensors")
    fresh = LocalStore(tmp_path, budget=4000)
    fresh.write(key_of(4), [value_of(4)])
    assert present(fresh, range(5)) == [2, 3, 4]
    assert account(tmp_path) == 3000


def test_files_that_were_copied_in_are_counted_at_the_next_look(tmp_path: Path) -> None:
    now = [0.0]
    store = LocalStore(tmp_path, budget=4000, clock=lambda: now[0])
    store.write(key_of(0), [value_of(0)])
    for number in (1, 2, 3):
        path = tmp_path / key_of(number)[:2] / f"{key_of(number)}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(value_of(number))
    now[0] += 3600
    store.write(key_of(4), [value_of(4)])
    assert total(tmp_path) == account(tmp_path) == 4000


def test_a_dead_writers_leftover_takes_no_room(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=2000)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / f"{key_of(1)}.0123456789abcdef").write_bytes(bytes(1900))
    store.write(key_of(2), [value_of(2)])
    assert os.listdir(tmp_path / "partial") == []
    assert account(tmp_path) == total(tmp_path) == 1000


def test_a_lock_that_is_never_free_is_an_error_and_no_wait_for_ever(tmp_path: Path) -> None:
    with open(tmp_path / "bytes", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(StoreError, match="has held the lock"),
            ByteCount(tmp_path / "bytes", patience=0.01).opened(),
        ):
            raise AssertionError("the lock was given twice")


def test_a_lock_on_a_deleted_account_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our open and our lock the file may be deleted; a lock on it would not keep out a later process."""
    accounts, flock = ByteCount(tmp_path / "bytes"), fcntl.flock

    def delete_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / "bytes").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with accounts.opened(create=True) as balance:
        assert balance is not None
        balance.set(5)
    assert account(tmp_path) == 5


def test_a_directory_that_is_made_is_for_its_owner_alone(tmp_path: Path) -> None:
    umask = os.umask(0o002)
    try:
        store = LocalStore(tmp_path / "new")
        store.write(key_of(1), [b"value"])
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    (file,) = (tmp_path / "new").glob("*/*.safetensors")
    assert stat.S_IMODE(file.stat().st_mode) == 0o664, "within a directory that is shared, the umask decides"


# Two writers of one key, and a name that does not reach the disk.


@pytest.mark.parametrize("budget", [None, 10**6])
def test_of_two_writers_of_one_key_one_has_written_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    store, both_there, fsync = LocalStore(tmp_path, budget=budget), threading.Barrier(2), os.fsync

    def wait_for_the_other(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            both_there.wait(PATIENCE)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait_for_the_other)
    written: list[bool] = []
    run_together([lambda: written.append(store.write(key_of(1), [value_of(1)]))] * 2)
    assert sorted(written) == [False, True]
    assert store.read(key_of(1)) == value_of(1)
    assert os.listdir(tmp_path / "partial") == []
    assert budget is None or account(tmp_path) == 1000


def test_of_two_writers_without_links_one_has_written_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer comes just after the first look."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    store, other, fsync = LocalStore(tmp_path, budget=10**6), LocalStore(tmp_path, budget=10**6), os.fsync

    def write_first(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        assert other.write(key_of(1), [b"first"]) is True

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", write_first)
    assert store.write(key_of(1), [b"second"]) is False
    assert store.read(key_of(1)) == b"first"
    assert account(tmp_path) == 5


@pytest.mark.parametrize("replace", [False, True])
def test_a_name_that_does_not_reach_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """A write that raises must have listed nothing: otherwise a crash could take back what others have seen."""
    store, fsync = LocalStore(tmp_path, budget=10**6), os.fsync
    store.write(key_of(1), [b"old"])
    if not replace:
        store.delete(key_of(1))
    syncs: list[str] = []

    def fail_at_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            syncs.append("directory")
            raise OSError(errno.EIO, "broken")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_at_directories)
    with pytest.raises(StoreError, match="disk reports a fault"):
        store.write(key_of(1), [value_of(1)], replace=replace)
    assert syncs == ["directory"]
    assert list(store.keys()) == []
    assert account(tmp_path) == total(tmp_path) == 0
    monkeypatch.setattr(os, "fsync", fsync)
    assert store.write(key_of(1), [value_of(1)]) is True


# Threads and processes.


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_the_budget_holds_under_many_threads(tmp_path: Path, eviction: str) -> None:
    stores = [LocalStore(tmp_path, budget=10_000, eviction=eviction) for _ in range(2)]

    def work(store: LocalStore, first: int) -> None:
        for number in range(first, first + 12):
            assert store.write(key_of(number), [value_of(number)]) is True
            assert total(tmp_path) <= 10_000
            assert store.read(key_of(number ^ 3)) in (None, value_of(number ^ 3))

    run_together([partial(work, stores[n % 2], 100 * n) for n in range(4)])
    assert total(tmp_path) == account(tmp_path) == 10_000


# Dies before the n-th call that touches the disk, in the middle of a write that has to make room.
STEPPER = """
from cake_hf.stores.local import LocalStore
import fcntl, signal
def dying(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
store, left = LocalStore(sys.argv[1], 3000, sys.argv[3]), int(sys.argv[2])
for name in ("open", "ftruncate", "writev", "fsync", "link", "unlink", "pread", "pwrite", "scandir", "stat", "close"):
    setattr(os, name, dying(getattr(os, name)))
fcntl.flock = dying(fcntl.flock)
store.write("f" * 40, [bytes(1000)])
"""


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_writer_that_dies_at_any_step_breaks_no_budget(tmp_path: Path, eviction: str) -> None:
    evicted: list[int] = []
    with many_children(STEPPER) as die:
        for step in range(1, 200):
            root = tmp_path / str(step)
            store = LocalStore(root, budget=3000)
            for number in (1, 2, 3):
                store.write(key_of(number), [value_of(number)])
                use(store, number, number)
            code = die(root, step, eviction)
            assert code in (0, -signal.SIGKILL)
            assert total(root) <= 3000, "not even what the dead one has left passes the budget"
            assert account(root) >= sum(entry.nbytes for entry in store.entries()), (
                "an account that is too low evicts too late"
            )
            evicted.append(3 - len(present(store, [1, 2, 3])))
            for number in (4, 5, 6, 7):
                store.write(key_of(number), [value_of(number)])
                assert total(root) <= 3000
            LocalStore(root).check_writable()
            assert os.listdir(root / "partial") == []
            if code == 0:
                break
    assert code == 0
    assert evicted == sorted(evicted), "the same write, stopped later"
    assert (evicted[0], evicted[-1]) == (0, 1)
    assert step > 20


CROWD = """
from cake_hf.stores.local import LocalStore
import random
draw = random.Random(int(sys.argv[2]))
store = LocalStore(sys.argv[1], *([int(sys.argv[3]), sys.argv[4]] if sys.argv[4] else []))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(80):
    number = draw.randrange(60)
    key, value = f"{number:02x}" * 20, bytes([number]) * 1000
    if draw.random() < 0.7:
        store.write(key, [value[:99], value[99:]], replace=draw.random() < 0.3)
    elif draw.random() < 0.2:
        store.delete(key)
    assert store.read(key) in (None, value)
"""


def test_many_processes_share_a_budget(tmp_path: Path) -> None:
    processes = start_together(CROWD, *((tmp_path, seed, 10_000, EVICTIONS[seed % 2]) for seed in range(4)))
    most = 0
    while any(process.poll() is None for process in processes):
        if (tmp_path / "bytes").exists():  # before that there is no lock that would keep the sum exact
            most = max(most, total(tmp_path))
    for process in processes:
        process.communicate(timeout=PATIENCE)
    assert [process.returncode for process in processes] == [0] * 4
    assert most <= 10_000
    assert 8_000 <= account(tmp_path) == total(tmp_path) <= 10_000, (
        "who deletes or gives way leaves little free at the end"
    )


def test_a_budget_that_comes_later_counts_what_is_there(tmp_path: Path) -> None:
    plain = LocalStore(tmp_path)
    for number in range(6):
        plain.write(key_of(number), [value_of(number)])
        use(plain, number, number)
    LocalStore(tmp_path, budget=3000).write(key_of(6), [value_of(6)])
    assert present(plain, range(7)) == [4, 5, 6]
    plain.write(key_of(7), [value_of(7)])
    assert account(tmp_path) == total(tmp_path) == 4000, "who has no budget evicts nothing, but is counted"


def forbid(name: str) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} was called")

    return fail


def test_a_write_with_room_does_not_look_at_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path, budget=10**6)
    store.write(key_of(1), [value_of(1)])
    monkeypatch.setattr(os, "scandir", forbid("scandir"))
    store.write(key_of(2), [value_of(2)])


def test_one_look_serves_many_evictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path, budget=5000)
    for number in range(6):
        store.write(key_of(number), [value_of(number)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", forbid("scandir"))
        for number in range(6, 9):
            store.write(key_of(number), [value_of(number)])
    assert total(tmp_path) == 5000


def test_a_chunk_that_is_evicted_while_its_writer_makes_it_durable_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soak found it: with its partial name still there, the chunk's bytes counted as free and were not."""
    store, other = (LocalStore(tmp_path, budget=10_000) for _ in range(2))
    left: list[int] = []
    fsync = os.fsync

    def evict_it(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and other.contains([key_of(1)]) == [True]:
            assert all(other.evict(entry) for entry in other.entries())
            left.append(sum(path.stat().st_size for path in (tmp_path / "partial").iterdir()) + total(tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", evict_it)
    assert store.write(key_of(1), [value_of(1)])
    assert left == [0]


# A large directory: looking at it takes long, and nothing waits for that.


def test_others_write_while_one_looks_at_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = LocalStore(tmp_path, budget=10_000), LocalStore(tmp_path, budget=10_000)
    for number in range(5):
        other.write(key_of(number), [value_of(number)])
    looking, go_on, listing = threading.Event(), threading.Event(), store._folder.shard_listing

    def wait(shard: str) -> ShardListing:
        found = listing(shard)
        looking.set()
        assert go_on.wait(PATIENCE)
        return found

    monkeypatch.setattr(store._folder, "shard_listing", wait)
    writer = threading.Thread(target=store.write, args=(key_of(20), [bytes(4000)]), daemon=True)
    writer.start()
    assert looking.wait(PATIENCE)
    other.write(key_of(10), [value_of(10)])
    assert other.delete(key_of(0))
    other.write(key_of(11), [bytes(2000)])
    go_on.set()
    writer.join(PATIENCE)
    assert present(store, [20])
    assert account(tmp_path) == total(tmp_path) <= 10_000, "what came and went meanwhile was noticed"


def test_only_what_changed_is_looked_at_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path, budget=10**6)
    for number in range(20):
        store.write(key_of(number), [value_of(number)])
        os.utime(tmp_path / key_of(number)[:2], (LONG_AGO, LONG_AGO))
    again, listed, locked = LocalStore(tmp_path, budget=10**6), [], []
    listing, take = again._folder.shard_listing, again._budget._make_room

    def make_room(*arguments: Any) -> Any:
        locked.append(len(listed))
        return take(*arguments)

    def note(shard: str) -> ShardListing:
        listed.append(shard)
        return listing(shard)

    monkeypatch.setattr(again._folder, "shard_listing", note)
    monkeypatch.setattr(again._budget, "_make_room", make_room)
    assert again.write(key_of(50), [value_of(50)])
    shards = {key_of(number)[:2] for number in range(20)}
    assert sorted(set(listed)) == sorted(shards)
    assert len(listed) == len(shards) == locked[0], "nothing was listed again under the lock"
    assert account(tmp_path) == total(tmp_path) == 21_000


def test_much_that_has_to_go_goes_in_several_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may take the lock in between."""
    large = LocalStore(tmp_path)
    large.check_writable()
    for number in range(600):
        path = tmp_path / key_of(number)[:2] / f"{key_of(number)}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a value")
        use(large, number, number)
    turns, flock, unlink = [0], fcntl.flock, os.unlink

    def lock(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if os.path.samestat(os.fstat(descriptor), (tmp_path / "bytes").stat()) and how & fcntl.LOCK_EX:
            turns.append(0)

    def delete(path: str, **options: Any) -> None:
        turns[-1] += path.endswith(".safetensors")
        unlink(path, **options)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(os, "unlink", delete)
    LocalStore(tmp_path, budget=3000).write(key_of(700), [bytes(2990)])
    assert present(large, [*range(597, 600), 700]) == [599, 700]
    assert sum(turns) == 599
    assert max(turns) <= 256


# Clocks that were wrong.


@pytest.mark.fault(
    "Time and bounds",
    "Files are dated in the future, by a clock that was wrong.",
    "They go before all others, instead of holding the budget for ever; a read dates them right.",
)
@pytest.mark.parametrize("years", [1, 50, 0.001])
def test_files_dated_in_the_future_do_not_hold_the_budget(tmp_path: Path, years: float) -> None:
    store, ahead = LocalStore(tmp_path, budget=4000), time.time() + years * 365 * 86_400
    for number in range(4):
        store.write(key_of(number), [value_of(number)])
        path = tmp_path / key_of(number)[:2] / f"{key_of(number)}.safetensors"
        os.utime(path, (ahead + number,) * 2)
    fresh = LocalStore(tmp_path, budget=4000)
    assert fresh.read(key_of(0)) == value_of(0)
    for number in range(10, 13):
        assert fresh.write(key_of(number), [value_of(number)])
    assert present(fresh, [*range(4), *range(10, 13)]) == [0, 10, 11, 12]


def test_files_of_a_clock_that_is_a_little_ahead_are_as_good_as_others(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=2000)
    for number, seconds in ((1, 60.0), (2, -60.0)):
        store.write(key_of(number), [value_of(number)])
        path = tmp_path / key_of(number)[:2] / f"{key_of(number)}.safetensors"
        os.utime(path, (time.time() + seconds,) * 2)
    LocalStore(tmp_path, budget=2000).write(key_of(3), [value_of(3)])
    assert present(store, [1, 2, 3]) == [1, 3]


def test_gc_deletes_files_dated_in_the_future_by_age_and_first(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for number in range(4):
        store.write(key_of(number), [value_of(number)])
    future = tmp_path / key_of(2)[:2] / f"{key_of(2)}.safetensors"
    os.utime(future, (time.time() + 10**8,) * 2)
    assert run_command("gc", tmp_path, "--budget", "3KB").exit_code == 0
    assert present(store, range(4)) == [0, 1, 3]
