"""The stores that come with the library keep the contract, and what each of them promises beyond it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf import CorruptChunk, StoreError
from cake_hf.chunks.codec import ChunkMetadata, check_header, check_pieces, checksums, encode_header
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.stores import LocalStore, MemoryStore, Store, open_store
from cake_hf.stores.base import total_bytes
from cake_hf.testing import FaultStore, GateStore, StoreContract, ThrottledStore, WrapperStore, check_against_dict
from cake_hf.testing.contract import key_of, read_parts, run_together, split, value_of
from children import command_of

PATIENCE = 60.0


class TestMemoryStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return MemoryStore()


class TestLocalStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path)

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, LocalStore)
        return LocalStore(store.root)


class TestWrapperStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return WrapperStore(MemoryStore())


class TestThrottledStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return ThrottledStore(MemoryStore(), bytes_per_second=1e12)


class TestFaultStoreWithoutFaults(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return FaultStore(LocalStore(tmp_path))


class TestOpenGateStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        store = GateStore(MemoryStore())
        store.open()
        return store


class Careless(MemoryStore):
    """Breaks one promise at a time, to show that the contract notices."""

    def __init__(self, sin: str) -> None:
        super().__init__()
        self.sin = sin

    def read_into(self, key: str, parts: Any) -> int | None:
        if self.sin == "raises on a miss" and not super().contains([key])[0]:
            raise KeyError(key)
        if self.sin == "pads" and (size := super().size(key)) is not None:
            value = memoryview(bytearray(max(size, total_bytes(parts))))
            super().read_into(key, [value[:size]])
            for part in parts:
                part[:], value = value[: part.nbytes], value[part.nbytes :]
            return total_bytes(parts)
        return super().read_into(key, parts)

    def write(self, key: str, parts: Any, *, replace: bool = False) -> bool:
        if self.sin == "overwrites":
            return super().write(key, parts, replace=True)
        if self.sin == "first part only":
            return super().write(key, parts[:1], replace=replace)
        return super().write(key, parts, replace=replace)

    def keys(self) -> Iterator[str]:
        return iter([*super().keys(), "partial"] if self.sin == "lists too much" else list(super().keys()))

    def contains(self, keys: Any) -> list[bool]:
        mask = super().contains(keys)
        return sorted(mask, reverse=True) if self.sin == "counts a prefix" else mask

    def delete(self, key: str) -> bool:
        return super().delete(key) or self.sin == "always deletes"


@pytest.mark.parametrize(
    ("sin", "test"),
    [
        ("raises on a miss", "test_a_miss_is_none_or_false"),
        ("pads", "test_buffers_of_another_size_are_refused"),
        ("overwrites", "test_a_key_is_written_once"),
        ("first part only", "test_parts_are_gathered_and_scattered_as_they_are"),
        ("lists too much", "test_keys_lists_exactly_what_is_stored"),
        ("counts a prefix", "test_contains_is_a_mask_in_the_order_asked"),
        ("always deletes", "test_delete_says_whether_there_was_something"),
    ],
)
def test_the_contract_finds_a_careless_store(sin: str, test: str) -> None:
    extra = ([1001],) if "size" in test else ()
    getattr(StoreContract(), test)(Careless("none"), *extra)
    with pytest.raises((AssertionError, KeyError, StoreError, pytest.fail.Exception)):
        getattr(StoreContract(), test)(Careless(sin), *extra)


@pytest.mark.parametrize("sin", ["counts a prefix", "always deletes"])
def test_the_comparison_with_a_dict_finds_a_careless_store(sin: str) -> None:
    with pytest.raises(AssertionError):
        check_against_dict(lambda: Careless(sin), max_examples=100)


def test_memory_store_behaves_like_a_dict() -> None:
    assert check_against_dict(MemoryStore) >= 1000


def test_local_store_behaves_like_a_dict(tmp_path: Path) -> None:
    assert check_against_dict(lambda: LocalStore(tempfile.mkdtemp(dir=tmp_path)), max_examples=60) >= 1000


def test_test_tools_come_in_only_with_the_contract() -> None:
    """In a process of its own, which has nothing in it yet."""
    script = """
import cake_hf.testing
assert cake_hf.testing.GateStore
assert not {"pytest", "hypothesis"} & set(sys.modules)
assert cake_hf.testing.StoreContract
assert {"pytest", "hypothesis"} <= set(sys.modules)
"""
    subprocess.run(command_of(script, bare=False), check=True, timeout=PATIENCE)


# Memory.


def test_the_budget_of_a_memory_store_holds_and_the_least_recently_used_goes() -> None:
    store = MemoryStore(budget_bytes=300)
    for number in (1, 2, 3):
        store.write(key_of(number), [bytes(100)])
    store.read(key_of(1))
    store.write(key_of(4), [bytes(100)])
    assert store.contains([key_of(n) for n in (1, 2, 3, 4)]) == [True, False, True, True]
    store.write(key_of(5), [bytes(300)])
    assert list(store.keys()) == [key_of(5)]


def test_replacing_and_deleting_give_room_back() -> None:
    store = MemoryStore(budget_bytes=200)
    store.write(key_of(1), [bytes(100)])
    for _ in range(5):
        store.write(key_of(2), [bytes(100)], replace=True)
    assert set(store.keys()) == {key_of(1), key_of(2)}
    store.delete(key_of(2))
    store.write(key_of(3), [bytes(100)])
    assert set(store.keys()) == {key_of(1), key_of(3)}


def test_a_value_over_the_budget_is_refused_and_drives_nothing_out() -> None:
    store = MemoryStore(budget_bytes=100)
    store.write(key_of(1), [bytes(100)])
    with pytest.raises(StoreError, match="budget of 100"):
        store.write(key_of(2), [bytes(60), bytes(41)])
    assert list(store.keys()) == [key_of(1)]


def test_the_budget_holds_under_many_threads() -> None:
    store = MemoryStore(budget_bytes=1000)

    def fill(first: int) -> None:
        for number in range(first, first + 50):
            store.write(key_of(number), [bytes(100)])
            sizes = [store.size(key) or 0 for key in store.keys()]  # noqa: SIM118
            assert sum(sizes) <= 1000

    run_together([partial(fill, first) for first in range(0, 400, 50)])
    assert len(list(store.keys())) == 10


@pytest.mark.parametrize("budget", [0, -1])
def test_a_memory_store_needs_a_budget(budget: int) -> None:
    with pytest.raises(ValueError, match="budget_bytes must be positive"):
        MemoryStore(budget)


# A directory.


def partial_files(root: Path) -> list[str]:
    return sorted(os.listdir(root / "partial")) if (root / "partial").exists() else []


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="is a file; give the path of a directory"):
        LocalStore(file)
    with pytest.raises(StoreError, match="a part of the path is a file"):
        LocalStore(file / "below")


def test_a_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a" / "b", budget=None)
    assert store.write(key_of(1), [b"value"])
    assert repr(store) == f"LocalStore({str(tmp_path / 'a' / 'b')!r})"


def test_opening_reading_and_asking_write_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.contains([key_of(1)])
    store.read(key_of(1))
    assert list(store.keys()) == []
    assert os.listdir(tmp_path) == []


def test_a_store_whose_directory_vanished_has_nothing_until_it_is_written_to(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.write(key_of(1), [b"value"])
    shutil.rmtree(tmp_path / "store")
    assert list(store.keys()) == []
    assert store.read(key_of(1)) is None
    assert store.write(key_of(1), [b"value"])
    assert store.read(key_of(1)) == b"value"


@contextmanager
def failing(name: str, number: int, root: Path, after: int = 0) -> Iterator[None]:
    """Let a function of `os` raise, but for its first `after` calls; paths outside of the store are left alone."""
    real: Callable[..., Any] = getattr(os, name)
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else ""
        if os.path.isabs(path) and not path.startswith(str(root)):
            return real(*args, **kwargs)
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


FAULTS = [
    (errno.ENOSPC, "free some space"),
    (errno.EDQUOT, "quota is used up"),
    (errno.EROFS, "read-only"),
    (errno.EACCES, "lack the permission"),
    (errno.EIO, "check it"),
    (errno.ENXIO, "check the path and the disk"),
]


@pytest.mark.parametrize(("number", "advice"), FAULTS)
@pytest.mark.parametrize("function", ["open", "writev", "fsync", "mkdir", "rename"])
def test_a_write_that_fails_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, function: str, number: int, advice: str
) -> None:
    store = LocalStore(tmp_path)
    links = failing("link", errno.EOPNOTSUPP, tmp_path) if function == "rename" else nullcontext()
    with links, failing(function, number, tmp_path), pytest.raises(StoreError, match=advice):
        store.write(key_of(1), [value_of(1)])
    assert list(store.keys()) == []
    assert store.contains([key_of(1)]) == [False]
    assert partial_files(tmp_path) == []
    assert store.write(key_of(1), [value_of(1)]) is True


def test_a_disk_that_fills_up_midway_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with failing("writev", errno.ENOSPC, tmp_path, after=2), pytest.raises(StoreError, match="free some space"):
        store.write(key_of(1), split(value_of(1, 5000), range(1, 5000)))
    assert list(store.keys()) == []
    assert partial_files(tmp_path) == []


def test_a_replacement_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write(key_of(1), [b"old"])
    with failing("rename", errno.ENOSPC, tmp_path), pytest.raises(StoreError):
        store.write(key_of(1), [b"new"], replace=True)
    assert store.read(key_of(1)) == b"old"


@pytest.mark.parametrize(("number", "advice"), FAULTS)
def test_check_writable_says_what_to_do(tmp_path: Path, number: int, advice: str) -> None:
    store = LocalStore(tmp_path)
    with failing("open", number, tmp_path), pytest.raises(StoreError, match=advice) as caught:
        store.check_writable()
    assert "save=False" in str(caught.value)
    store.check_writable()
    assert partial_files(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_every_fault_of_a_directory_is_a_store_error(tmp_path: Path, number: int) -> None:
    store = LocalStore(tmp_path)
    store.write(key_of(1), [value_of(1)])
    faults: list[tuple[str, Callable[[], object]]] = [
        ("open", lambda: read_parts(store, key_of(1), [1000])),
        ("preadv", lambda: read_parts(store, key_of(1), [1000])),
        ("stat", lambda: store.size(key_of(1))),
        ("unlink", lambda: store.delete(key_of(1))),
        ("scandir", lambda: list(store.keys())),
    ]
    for function, call in faults:
        with failing(function, number, tmp_path), pytest.raises(StoreError):
            call()
    assert store.read(key_of(1)) == value_of(1)


def test_a_store_that_cannot_be_swept_can_be_read(tmp_path: Path) -> None:
    """Somebody else's store: their `partial` directory is none of our business."""
    LocalStore(tmp_path).write(key_of(1), [b"value"])
    store = LocalStore(tmp_path)
    with failing("scandir", errno.EACCES, tmp_path):
        assert store.sweep() == 0
    assert store.read(key_of(1)) == b"value"


def test_short_reads_and_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may move fewer bytes than asked; it does so for large values and on some filesystems."""
    preadv, writev = os.preadv, os.writev
    store, value = LocalStore(tmp_path), value_of(1)
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [memoryview(parts[0])[:7]]))
    store.write(key_of(1), split(value, [3, 3, 500]))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: preadv(fd, [memoryview(parts[0])[:13]], offset))
    assert read_parts(store, key_of(1), [2, 0, 900, 98]) == value


def test_a_file_that_shrinks_under_a_read_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.write(key_of(1), [value_of(1)])
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: 0)
    with pytest.raises(CorruptChunk, match="ended early"):
        store.read(key_of(1))


def test_a_value_is_one_file_named_by_its_key(tmp_path: Path) -> None:
    LocalStore(tmp_path).write(key_of(1), [b"value"])
    assert (tmp_path / key_of(1)[:2] / f"{key_of(1)}.safetensors").read_bytes() == b"value"


def test_foreign_files_are_ignored(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write(key_of(1), [b"value"])
    shard = key_of(1)[:2]
    other = "00" if shard != "00" else "11"
    for name in (
        "README.md",
        "ab",
        f"{key_of(2)}.safetensors",
        f"{shard}/notes.txt",
        f"{shard}/{key_of(1)}.safetensors.bak",
        f"{shard}/{key_of(1)[:39]}.safetensors",
        f"{shard}/{shard}{'G' * 38}.safetensors",
        f"{shard}/{shard}{'A' * 38}.safetensors",
        f"{other}/{key_of(1)}.safetensors",
        f"long/{key_of(1)}.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"foreign")
    again = LocalStore(tmp_path)
    assert list(again.keys()) == [key_of(1)]
    assert again.read(key_of(1)) == b"value"
    assert (tmp_path / "README.md").read_bytes() == b"foreign"


def test_a_reader_keeps_the_file_that_another_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read is from the descriptor: what happens to the name meanwhile does not matter."""
    store, other = LocalStore(tmp_path), LocalStore(tmp_path)
    store.write(key_of(1), [value_of(1)])
    preadv = os.preadv

    def delete_first(fd: int, parts: Any, offset: int) -> int:
        other.delete(key_of(1))
        return preadv(fd, parts, offset)

    monkeypatch.setattr(os, "preadv", delete_first)
    assert read_parts(store, key_of(1), [1000]) == value_of(1)
    assert store.read(key_of(1)) is None


def test_what_is_being_written_is_neither_listed_nor_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, fsync = LocalStore(tmp_path), os.fsync
    writing, go_on = threading.Event(), threading.Event()

    def wait(descriptor: int) -> None:
        writing.set()
        assert go_on.wait(PATIENCE)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    written: list[bool] = []
    writer = threading.Thread(target=lambda: written.append(store.write(key_of(1), [value_of(1)])), daemon=True)
    writer.start()
    assert writing.wait(PATIENCE)
    again = LocalStore(tmp_path)
    assert len(partial_files(tmp_path)) == 1
    assert list(again.keys()) == []
    assert again.contains([key_of(1)]) == [False]
    assert again.read(key_of(1)) is None
    go_on.set()
    writer.join(PATIENCE)
    assert written == [True]
    assert again.read(key_of(1)) == value_of(1)
    assert partial_files(tmp_path) == []


def test_a_leftover_that_is_not_held_is_swept_when_the_store_is_first_written_to(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / f"{key_of(1)}.0123456789abcdef").write_bytes(b"half a va")
    store = LocalStore(tmp_path)
    assert len(partial_files(tmp_path)) == 1
    store.check_writable()
    assert partial_files(tmp_path) == []
    assert list(store.keys()) == []
    assert store.sweep() == 0


def test_a_sweep_that_comes_between_open_and_lock_costs_the_writer_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one moment in which a living writer's file looks like a dead one's: the writer takes a new file then."""
    store, sweeper = LocalStore(tmp_path), LocalStore(tmp_path)
    flock, swept = fcntl.flock, []

    def sweep_first(descriptor: int, how: int) -> None:
        if not swept and how & fcntl.LOCK_EX:
            swept.append(0)
            swept[0] = sweeper.sweep()
        flock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", sweep_first)
    assert store.write(key_of(1), [b"value"]) is True
    assert swept == [1]
    assert store.read(key_of(1)) == b"value"


# Wrappers.


class FakeTime:
    """Sleeping is what makes time pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_throttled_store_reads_at_its_rate() -> None:
    fake = FakeTime()
    store = ThrottledStore(MemoryStore(), bytes_per_second=1000, latency=0.5, clock=fake.clock, sleep=fake.sleep)
    store.write(key_of(1), [value_of(1, 2000)])
    assert fake.now == 100.0
    assert read_parts(store, key_of(1), [1500, 500]) == value_of(1, 2000)
    assert fake.now == pytest.approx(102.5)
    fake.now = 200.0
    read_parts(store, key_of(1), [2000])
    assert fake.now == pytest.approx(202.5)


def test_readers_of_a_throttled_store_share_the_line() -> None:
    """Two values asked for at once arrive one after the other, as over a network."""
    arrivals: list[float] = []
    clock, sleep = lambda: 100.0, lambda seconds: arrivals.append(100.0 + seconds)
    store = ThrottledStore(MemoryStore(), bytes_per_second=1000, clock=clock, sleep=sleep)
    store.write(key_of(1), [value_of(1)])
    for _ in range(3):
        read_parts(store, key_of(1), [1000])
    assert arrivals == pytest.approx([101.0, 102.0, 103.0])


def test_the_rate_of_a_throttled_store_may_change_between_reads() -> None:
    """Reads that have begun keep the line for as long as they would have."""
    arrivals: list[float] = []
    clock, sleep = lambda: 100.0, lambda seconds: arrivals.append(100.0 + seconds)
    store = ThrottledStore(MemoryStore(), bytes_per_second=1000, clock=clock, sleep=sleep)
    store.write(key_of(1), [value_of(1)])
    read_parts(store, key_of(1), [1000])
    store.bytes_per_second = 100
    read_parts(store, key_of(1), [1000])
    store.bytes_per_second *= 100
    read_parts(store, key_of(1), [1000])
    assert store.bytes_per_second == 10_000
    assert arrivals == pytest.approx([101.0, 111.0, 111.1])
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            store.bytes_per_second = rate
    assert store.bytes_per_second == 10_000


@pytest.mark.parametrize(("rate", "latency"), [(0, 0), (-1, 0), (1, -1)])
def test_a_throttled_store_needs_a_rate(rate: float, latency: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ThrottledStore(MemoryStore(), rate, latency)


def faulty(fault: str) -> FaultStore:
    store = FaultStore(MemoryStore(), {key_of(1): fault})
    for number in (1, 2):
        store.write(key_of(number), [value_of(number)])
    return store


def test_a_dropped_value_is_listed_and_gone() -> None:
    store = faulty("drop")
    assert store.contains([key_of(1)]) == [True]
    assert store.read(key_of(1)) is None


def test_a_truncated_value_ends_in_nothing() -> None:
    value = read_parts(faulty("truncate"), key_of(1), [600, 400])
    assert value == value_of(1)[:600] + bytes(400)


def test_a_flipped_value_has_one_wrong_bit() -> None:
    value = read_parts(faulty("flip"), key_of(1), [100, 800, 100])
    assert value is not None
    wrong = [a ^ b for a, b in zip(value, value_of(1), strict=True) if a != b]
    assert wrong == [1]


def test_a_failing_read_raises() -> None:
    with pytest.raises(StoreError, match="injected fault"):
        faulty("error").read(key_of(1))


def test_a_stalled_read_hangs_until_it_is_released_and_brings_garbage() -> None:
    store = faulty("stall")
    buffer = bytearray(1000)
    reader = threading.Thread(target=store.read_into, args=(key_of(1), [memoryview(buffer)]), daemon=True)
    reader.start()
    assert store.read(key_of(2)) == value_of(2)
    assert buffer == bytes(1000)
    store.release()
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert buffer == b"\xa5" * 1000


def test_a_forged_chunk_passes_every_check() -> None:
    layout = ChunkLayout(
        16, (Piece("layers.0.keys", 2, 4, torch.float32), Piece("layers.0.values", 2, 4, torch.float32))
    )
    payload = value_of(1, layout.nbytes)
    header = encode_header(
        layout, ChunkMetadata(key_of(1), "0" * 40, 0, "0" * 40, "a model", checksums(payload, layout))
    )
    store = FaultStore(MemoryStore(), {key_of(1): "lie"})
    store.write(key_of(1), [header, payload])
    for read in (
        lambda parts: store.read_into(key_of(1), parts),
        lambda parts: store.read_range(key_of(1), parts[:1], 0) and store.read_range(key_of(1), parts[1:], len(header)),
    ):
        parts = [memoryview(bytearray(size)) for size in (len(header), *layout.sizes)]
        assert read(parts)
        check_pieces(parts[1:], check_header(parts[0], key_of(1), layout))
        assert b"".join(parts[1:]) == bytes(layout.nbytes) != payload
    assert store.injected == [(key_of(1), "lie")] * 3
    assert store.inner.read(key_of(1)) == header + payload


def test_a_torn_write_raises_and_leaves_half_of_the_value() -> None:
    store = FaultStore(MemoryStore(), {key_of(1): "tear"})
    with pytest.raises(StoreError, match="after half of chunk"):
        store.write(key_of(1), split(value_of(1), [700]))
    assert store.read(key_of(1)) == value_of(1)[:500]
    assert store.write(key_of(1), [b"other"]) is False
    assert store.write(key_of(2), [b"other"]) is True


def test_random_torn_writes() -> None:
    store = FaultStore(MemoryStore(), rate=0.5, kinds=("tear",), seed=1)
    for number in range(50):
        with suppress(StoreError):
            store.write(key_of(number), [value_of(number)])
        store.read(key_of(number))
    assert 10 < len(store.injected) < 40
    assert {fault for _, fault in store.injected} == {"tear"}


@pytest.mark.parametrize("fault", ["drop", "truncate", "flip"])
def test_faults_are_counted_and_leave_other_keys_and_the_value_itself_alone(fault: str) -> None:
    store = faulty(fault)
    assert read_parts(store, key_of(2), [1000]) == value_of(2)
    assert store.injected == []
    assert read_parts(store, key_of(1), [500, 500]) != value_of(1)
    assert store.injected == [(key_of(1), fault)]
    assert store.inner.read(key_of(1)) == value_of(1)


def test_random_faults_come_at_their_rate_and_from_their_seed() -> None:
    def injected(seed: int, rate: float) -> list[tuple[str, str]]:
        store = FaultStore(MemoryStore(), rate=rate, kinds=("drop", "flip"), seed=seed)
        for number in range(200):
            store.write(key_of(number), [b"value"])
            store.read(key_of(number))
        return store.injected

    assert injected(1, 0.3) == injected(1, 0.3) != injected(2, 0.3)
    assert {fault for _, fault in injected(1, 0.3)} == {"drop", "flip"}
    assert 30 < len(injected(1, 0.3)) < 90
    assert injected(1, 0.0) == []
    assert len(injected(1, 1.0)) == 200


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['melt'\]; known are drop, truncate, flip, error, stall, lie, tear"):
        FaultStore(MemoryStore(), {key_of(1): "melt"})


def test_reads_wait_at_the_gate() -> None:
    store = GateStore(MemoryStore(), timeout=PATIENCE)
    store.write(key_of(1), [b"value"])
    values: list[bytearray | None] = []
    readers = [threading.Thread(target=lambda: values.append(store.read(key_of(1))), daemon=True) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert values == []
    store.open()
    store.await_reads(3)
    for reader in readers:
        reader.join(PATIENCE)
    assert values == [b"value"] * 3


def test_a_gate_that_is_not_opened_fails_instead_of_hanging() -> None:
    store = GateStore(MemoryStore(), timeout=0.01)
    store.write(key_of(1), [b"value"])
    with pytest.raises(TimeoutError):
        store.read(key_of(1))
    with pytest.raises(TimeoutError):
        store.await_reads(1)


def test_a_wrapper_hands_everything_on() -> None:
    calls: list[str] = []

    class Inner(MemoryStore):
        def check_writable(self) -> None:
            calls.append("check_writable")

        def close(self) -> None:
            calls.append("close")

    with WrapperStore(Inner()) as store:
        store.check_writable()
    assert calls == ["check_writable", "close"]


def test_what_a_wrapper_does_about_reads_it_does_about_gradual_ones() -> None:
    """Where it does nothing about them, they are as gradual as those of the store inside."""

    class Gradual(MemoryStore):
        def read_gradually(self, key: str, parts: Any, arrived: Callable[[int], None]) -> int | None:
            arrived(1)
            return super().read_gradually(key, parts, arrived)

    inner = Gradual()
    inner.write(key_of(1), [b"value"])
    for store, steps in ((WrapperStore(inner), [1, 2]), (ThrottledStore(inner, 1e9), [2]), (GateStore(inner), [2])):
        if isinstance(store, GateStore):
            store.open()
        told, parts = list[int](), [bytearray(2), bytearray(3)]
        assert store.read_gradually(key_of(1), [memoryview(part) for part in parts], told.append) == 5
        assert told == steps
        assert b"".join(parts) == b"value"
    broken = FaultStore(inner, {key_of(1): "flip"})
    parts = [bytearray(5)]
    broken.read_gradually(key_of(1), [memoryview(parts[0])], lambda count: None)
    assert parts != [b"value"]


# Opening.


def test_a_path_opens_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in (tmp_path / "store", str(tmp_path / "store"), f"file://{tmp_path}/store", "~/store", "store"):
        store = open_store(spec)
        assert isinstance(store, LocalStore)
        assert store.root == tmp_path / "store"


def test_open_store_returns_a_store_unchanged() -> None:
    store = MemoryStore()
    assert open_store(store) is store


@pytest.mark.parametrize(
    ("spec", "budget"),
    [("memory:4GB", 4 * 10**9), ("memory:512MiB", 2**29), ("memory:1.5kb", 1500), ("memory:100", 100)],
)
def test_memory_is_opened_with_its_budget(spec: str, budget: int) -> None:
    store = open_store(spec)
    assert isinstance(store, MemoryStore)
    assert store.budget() == budget


def test_memory_has_a_default_budget() -> None:
    assert isinstance(open_store("memory:"), MemoryStore)


@pytest.mark.parametrize("spec", ["memory:lots", "memory:4XB", "memory:-1GB", "memory:4GB more", "memory:0"])
def test_a_size_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(StoreError, match="like 4GB"):
        open_store(spec)


@pytest.mark.parametrize("spec", ["", "file://"])
def test_an_empty_path_is_refused(spec: str) -> None:
    with pytest.raises(StoreError, match="give a directory"):
        open_store(spec)


def test_an_unknown_scheme_is_refused_with_what_is_known() -> None:
    expected = "Unknown store URL 'gopher://x'; known are a directory path"
    with pytest.raises(StoreError, match=re.escape(expected)):
        open_store("gopher://x")
