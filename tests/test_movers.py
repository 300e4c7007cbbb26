"""The background threads: what they load lies where it belongs, what they save is durable, and nothing they meet raises."""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cake_hf import StoreError
from cake_hf.chunks.codec import ChunkMetadata, check_file, checksums, encode_header, header_size
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.errors import DeadlineExceeded
from cake_hf.scheduling.frontier import Frontier, Outcome, State
from cake_hf.stores import LocalStore, MemoryStore, Store
from cake_hf.testing import FaultStore, GateStore, WrapperStore
from cake_hf.transfer import chunk_reads
from cake_hf.transfer.copy_streams import Slot, SlotRing, let_copies_out_end
from cake_hf.transfer.deadline import Late, ask
from cake_hf.transfer.landing import (
    DevicePlace,
    HostLanding,
    HostPlace,
    Landing,
    Place,
    _DeviceLanding,
    byte_view,
    place_for,
)
from cake_hf.transfer.loader import LoadJob, run_loader, start_loaders
from cake_hf.transfer.writer import SaveJob, Writer, pack
from children import command_of
from device_marks import devices
from paces import Told
from waiting import PATIENCE, await_true

SPACE = "2c" * 20
CHUNK, CHUNKS, CAPACITY = 16, 5, 100

LAYOUT = ChunkLayout(
    CHUNK,
    (
        Piece("layers.0.keys", 2, 4, torch.float32),
        Piece("layers.0.values", 2, 3, torch.bfloat16),
        Piece("layers.1.keys", 1, 5, torch.float16),
    ),
)


def key_of(index: int) -> str:
    return f"{index:040x}"


def payload_of(index: int) -> bytes:
    return random.Random(index).randbytes(LAYOUT.nbytes)


def metadata_of(index: int, payload: bytes = b"") -> ChunkMetadata:
    return ChunkMetadata(key_of(index), SPACE, index, SPACE, "a model", checksums(payload, LAYOUT) if payload else ())


def filled_store() -> MemoryStore:
    store = MemoryStore()
    for index in range(CHUNKS):
        payload = payload_of(index)
        store.write(key_of(index), [encode_header(LAYOUT, metadata_of(index, payload)), payload])
    return store


def make_buffers(device: str = "cpu") -> list[torch.Tensor]:
    """Zeroed, and longer than the prompt, as those of the cache's layers are."""
    return [
        torch.zeros(1, CAPACITY, piece.heads, piece.head_dim, dtype=piece.dtype, device=device)
        for piece in LAYOUT.pieces
    ]


def chunk_in(buffers: Sequence[torch.Tensor], index: int) -> bytes:
    """The bytes at a chunk's place, in payload order; cut out by tokens, which is not how a `Place` does it."""
    tokens = slice(index * CHUNK, (index + 1) * CHUNK)
    return b"".join(buffer[0, tokens].cpu().contiguous().view(torch.uint8).numpy().tobytes() for buffer in buffers)


def untouched(buffers: Sequence[torch.Tensor], index: int) -> bool:
    return not any(chunk_in(buffers, index))


# Places.


def fill_parts(landing: Landing, index: int) -> None:
    payload, offset = payload_of(index), 0
    for part, size in zip(landing.parts, LAYOUT.sizes, strict=True):
        assert part.nbytes == size
        part[:] = payload[offset : offset + size]
        offset += size


def test_the_parts_of_a_host_place_are_the_memory_of_the_buffers() -> None:
    buffers = make_buffers()
    place = HostPlace(buffers, LAYOUT)
    for index in range(CHUNKS):
        landing = place.landing(index, staged=False)
        fill_parts(landing, index)
        landing.release()
    assert [chunk_in(buffers, index) for index in range(CHUNKS)] == [payload_of(index) for index in range(CHUNKS)]
    assert all(not buffer[0, CHUNKS * CHUNK :].any() for buffer in buffers)


@devices
def test_a_device_place_changes_the_buffers_on_commit_only(device: str) -> None:
    buffers = make_buffers(device)
    place = DevicePlace(buffers, LAYOUT)
    for index in (3, 1):
        landing = place.landing(index, staged=False)
        fill_parts(landing, index)
        place.catch_up()
        assert untouched(buffers, index)
        landing.commit(len(LAYOUT.pieces))
        landing.release()
        place.catch_up()
        assert chunk_in(buffers, index) == payload_of(index)
    assert all(untouched(buffers, index) for index in (0, 2, 4, 5))


@devices
@pytest.mark.parametrize("kind", [place_for, DevicePlace])
def test_what_is_aside_waits_for_the_main_thread_piece_by_piece(
    device: str, kind: Callable[[list[torch.Tensor], ChunkLayout], Place]
) -> None:
    buffers = make_buffers(device)
    place = kind(buffers, LAYOUT)
    landing = place.landing(2, staged=True)
    fill_parts(landing, 2)
    landing.commit(len(LAYOUT.pieces))
    place.catch_up()
    assert untouched(buffers, 2)
    first = LAYOUT.sizes[0]
    landing.commit_parts(1)
    place.catch_up()
    assert chunk_in(buffers, 2) == payload_of(2)[:first] + bytes(LAYOUT.nbytes - first)
    landing.commit_parts(len(LAYOUT.pieces))
    landing.release()
    place.catch_up()
    assert chunk_in(buffers, 2) == payload_of(2)


@devices
def test_threads_of_a_device_place_do_not_share_host_memory(device: str) -> None:
    buffers = make_buffers(device)
    place = DevicePlace(buffers, LAYOUT)
    filled = threading.Barrier(CHUNKS)

    def load(index: int) -> None:
        landing = place.landing(index, staged=False)
        fill_parts(landing, index)
        filled.wait(PATIENCE)
        landing.commit(len(LAYOUT.pieces))
        landing.release()

    run_all([threading.Thread(target=load, args=(index,), daemon=True) for index in range(CHUNKS)])
    place.catch_up()
    assert [chunk_in(buffers, index) for index in range(CHUNKS)] == [payload_of(index) for index in range(CHUNKS)]


@devices
def test_what_was_let_go_comes_to_no_device(device: str) -> None:
    buffers = make_buffers(device)
    place = DevicePlace(buffers, LAYOUT)
    landing = place.landing(2, staged=False)
    fill_parts(landing, 2)
    landing.let_go()
    landing.commit(len(LAYOUT.pieces))
    landing.release()
    place.catch_up()
    assert untouched(buffers, 2)


@pytest.mark.parametrize("kind", [HostPlace, DevicePlace])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_load_that_was_given_up_brings_nothing_more(kind: type[Place], *, staged: bool, begun: bool) -> None:
    """It was given up between a loader's claim and its first read, or between its first piece and the next one.

    What it reads directly into the buffers still comes there: the layers go on in other ones.
    """
    buffers = make_buffers()
    restore = Restore(filled_store(), kind(buffers, LAYOUT))
    restore.frontier.is_staged = lambda index: staged  # type: ignore[method-assign]
    index = restore.frontier.claim()
    assert index is not None
    landing = restore.job.lands(index) if begun else None
    restore.frontier.stop()
    restore.job.drop_late()
    if landing is None:
        landing = restore.job.lands(index)
    fill_parts(landing, index)
    landing.commit(len(LAYOUT.pieces))
    landing.commit_parts(len(LAYOUT.pieces))
    restore.job.commit_staged()
    restore.job.place.catch_up()
    assert untouched(buffers, index) == (not restore.job.place.is_read_into or staged)


@pytest.mark.parametrize("kind", [HostPlace, DevicePlace])
def test_a_load_that_was_superseded_before_it_began_brings_nothing(kind: type[Place]) -> None:
    buffers = make_buffers()
    restore = Restore(filled_store(), kind(buffers, LAYOUT))
    restore.frontier = restore.job.frontier = Frontier([True], judge=Told())
    assert restore.frontier.claim() == 0
    assert restore.frontier.advance() == 0
    restore.frontier.computed(0)
    landing = restore.job.lands(0)
    fill_parts(landing, 0)
    landing.commit(len(LAYOUT.pieces))
    assert landing.staged
    assert 0 not in restore.job.staged
    assert untouched(buffers, 0)


def test_slots_go_round_once_there_are_enough() -> None:
    ring = SlotRing(16, 2, pinned=False)
    first, second = ring.take(), ring.take()
    third = ring.take()  # all are taken: a user that takes more has a bound of its own
    assert len({id(slot.memory) for slot in (first, second, third)}) == 3
    for slot in (second, first, third):
        ring.give_back(slot)
    assert [ring.take() for _ in range(3)] == [second, first, third]


def test_where_no_pages_can_be_locked_slots_are_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("the system locks no more pages")
        return torch.zeros(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    slot = SlotRing(16, 1, pinned=True).take()
    assert slot.memory.shape == (16,)
    slot.await_copy()

    def none(*size: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("there is no memory at all")

    monkeypatch.setattr(torch, "empty", none)
    with pytest.raises(RuntimeError, match="no memory at all"):
        SlotRing(16, 1, pinned=True).take()


def test_a_slot_is_not_taken_before_its_copy_is_done() -> None:
    class Copy:
        """Stands in for an event on a device."""

        awaited = False

        def synchronize(self) -> None:
            self.awaited = True

    ring, copy = SlotRing(16, 1, pinned=False), Copy()
    slot = ring.take()
    slot.copied_by([copy])  # type: ignore[list-item]
    ring.give_back(slot)
    assert not copy.awaited
    assert ring.take() is slot
    assert copy.awaited


@devices
@pytest.mark.parametrize("kind", [place_for, DevicePlace])
@pytest.mark.parametrize("made_in", [True, False])
def test_threads_load_into_what_was_made_under_inference_mode(
    device: str, kind: Callable[[list[torch.Tensor], ChunkLayout], Place], made_in: bool
) -> None:
    """`generate` runs under inference mode; its tensors refuse writes from threads that do not."""
    with torch.inference_mode():
        buffers = make_buffers(device)
    with torch.inference_mode(made_in):
        place = kind(buffers, LAYOUT)
    restore = Restore(filled_store(), place)
    run_all(start_loaders(restore.job, 2))
    place.catch_up()
    assert [chunk_in(buffers, index) for index in range(CHUNKS)] == [payload_of(index) for index in range(CHUNKS)]


def test_the_place_goes_with_the_device() -> None:
    assert isinstance(place_for(make_buffers(), LAYOUT), HostPlace)
    assert isinstance(place_for(make_buffers("meta"), LAYOUT), DevicePlace)


def test_a_byte_view_is_shared_and_writable() -> None:
    tensor = torch.zeros(3, 2, dtype=torch.bfloat16)
    view = byte_view(tensor)
    assert view.nbytes == 12
    view[:2] = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert tensor.flatten().tolist() == [1, 0, 0, 0, 0, 0]


# Loader.


def run_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is None:
            thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


@dataclass
class Restore:
    """A load job and what came of it."""

    store: Store
    place: Place
    present: Sequence[bool] = (True,) * CHUNKS
    records: list[tuple[str, int, float, float, str]] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.frontier = Frontier(self.present, read_timeout=PATIENCE)
        keys = [key_of(index) for index in range(CHUNKS)]
        self.job = LoadJob(self.store, keys, LAYOUT, self.place, self.frontier, self.record, self.clock)

    def record(self, *happened: Any) -> None:
        self.records.append(happened)

    def clock(self) -> float:
        self.now += 1.0
        return self.now


def test_a_loader_brings_all_chunks_from_the_back(caplog: pytest.LogCaptureFixture) -> None:
    buffers = make_buffers()
    restore = Restore(filled_store(), HostPlace(buffers, LAYOUT))
    run_loader(restore.job, "load-7")
    assert [chunk_in(buffers, index) for index in range(CHUNKS)] == [payload_of(index) for index in range(CHUNKS)]
    assert restore.frontier.counts() == {State.LOADED: CHUNKS}
    expected = [("load-7", chunk, 2.0 * n + 1, 2.0 * n + 2, "loaded") for n, chunk in enumerate((4, 3, 2, 1, 0))]
    assert restore.records == expected
    assert caplog.records == []


def test_loaders_share_the_work_and_end_by_themselves() -> None:
    buffers = make_buffers()
    restore = Restore(filled_store(), HostPlace(buffers, LAYOUT), present=[True, False, True, False, True])
    threads = start_loaders(restore.job, 3)
    assert [thread.name for thread in threads] == ["cake-load-0", "cake-load-1", "cake-load-2"]
    assert all(thread.daemon for thread in threads)
    run_all(threads)
    assert sorted(chunk for _, chunk, *_ in restore.records) == [0, 2, 4]
    assert all(untouched(buffers, index) for index in (1, 3))


class Raising(WrapperStore):
    """A store whose client raises whatever it likes."""

    def __init__(self, inner: Store, error: Exception) -> None:
        super().__init__(inner)
        self.error = error

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        if key == key_of(2):
            raise self.error
        return super().read_into(key, parts)


def other_header(index: int, **changes: object) -> MemoryStore:
    """A store in which one chunk's header is a good one, but another's."""
    store, payload = filled_store(), payload_of(index)
    facts = ChunkMetadata(**{**vars(metadata_of(index, payload)), **changes})  # type: ignore[arg-type]
    store.write(key_of(index), [encode_header(LAYOUT, facts), payload], replace=True)
    return store


def short_value() -> MemoryStore:
    store = filled_store()
    store.write(key_of(2), [b"short"], replace=True)
    return store


def other_layout() -> MemoryStore:
    """As large as ours, header included, but its tensors have other shapes."""
    store, payload = filled_store(), payload_of(2)
    first, *rest = LAYOUT.pieces
    turned = ChunkLayout(CHUNK, (Piece(first.name, first.head_dim, first.heads, first.dtype), *rest))
    assert header_size(turned) == header_size(LAYOUT)
    store.write(key_of(2), [encode_header(turned, metadata_of(2, payload)), payload], replace=True)
    return store


@pytest.mark.parametrize(
    ("make_store", "outcome"),
    [
        (lambda: FaultStore(filled_store(), {key_of(2): "drop"}), Outcome.MISSED),
        (lambda: FaultStore(filled_store(), {key_of(2): "flip"}), Outcome.CORRUPT),
        (lambda: FaultStore(filled_store(), {key_of(2): "truncate"}), Outcome.CORRUPT),
        (short_value, Outcome.CORRUPT),
        (lambda: other_header(2, key=key_of(3)), Outcome.CORRUPT),
        (lambda: other_header(2, checksums=("0" * 32,) * len(LAYOUT.pieces)), Outcome.CORRUPT),
        (other_layout, Outcome.CORRUPT),
        (lambda: FaultStore(filled_store(), {key_of(2): "error"}), Outcome.ERROR),
        (lambda: Raising(filled_store(), OSError("the network is gone")), Outcome.ERROR),
        (lambda: Raising(filled_store(), MemoryError()), Outcome.ERROR),
        (lambda: Raising(filled_store(), StopIteration()), Outcome.ERROR),
    ],
)
def test_a_bad_read_is_an_outcome_and_the_next_chunk_is_loaded(
    make_store: Callable[[], Store], outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    buffers = make_buffers()
    restore = Restore(make_store(), DevicePlace(buffers, LAYOUT))
    run_loader(restore.job, "load-0")
    assert restore.frontier.outcomes() == {n: outcome if n == 2 else Outcome.LOADED for n in range(CHUNKS)}
    assert [Outcome(happened[-1]) for happened in restore.records] == [Outcome.LOADED] * 2 + [outcome] + [
        Outcome.LOADED
    ] * 2
    assert untouched(buffers, 2), "a chunk that was refused came into the cache"
    assert all(chunk_in(buffers, n) == payload_of(n) for n in range(CHUNKS) if n != 2)
    assert len(caplog.records) == (0 if outcome is Outcome.MISSED else 1)


class Gradual(WrapperStore):
    """Says of each part that it is there."""

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Callable[[int], None]) -> int | None:
        found = self.inner.read_into(key, parts)
        for count in range(1, len(parts) + 1):
            arrived(count)
        return found


@pytest.mark.parametrize(("step", "commits"), [(1, [1, 2, 3]), (sum(LAYOUT.sizes[:2]), [2, 3]), (2**23, [3])])
def test_pieces_are_brought_on_by_the_step(step: int, commits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    commit = _DeviceLanding.commit

    def count(landing: _DeviceLanding, end: int) -> None:
        counts.append(end)
        commit(landing, end)

    monkeypatch.setattr(chunk_reads, "COMMIT_STEP", step)
    monkeypatch.setattr(_DeviceLanding, "commit", count)
    buffers = make_buffers()
    restore = Restore(Gradual(filled_store()), DevicePlace(buffers, LAYOUT))
    run_loader(restore.job, "load-0")
    assert counts == commits * CHUNKS
    assert [chunk_in(buffers, index) for index in range(CHUNKS)] == [payload_of(index) for index in range(CHUNKS)]


@pytest.mark.parametrize(("owner", "method"), [(HostPlace, "landing"), (HostLanding, "commit")])
def test_a_place_that_fails_is_an_outcome_too(owner: type, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(owner, method, fail)
    place = HostPlace(make_buffers(), LAYOUT)
    restore = Restore(filled_store(), place)
    run_loader(restore.job, "load-0")
    assert set(restore.frontier.outcomes().values()) == {Outcome.ERROR}


@pytest.mark.parametrize("over", [False, True])
def test_a_load_that_comes_too_late_is_told_apart(*, over: bool) -> None:
    """What it took counts as long as the restore goes on, and is dropped afterwards."""
    store = GateStore(filled_store())
    restore = Restore(store, DevicePlace(make_buffers(), LAYOUT))
    held = threading.Event()
    claim = restore.frontier.claim

    def claim_and_tell() -> int | None:
        index = claim()
        held.set()
        return index

    restore.frontier.claim = claim_and_tell  # type: ignore[method-assign]
    threads = start_loaders(restore.job, 1)
    assert held.wait(PATIENCE)
    restore.frontier.stop()
    if over:
        restore.job.let_go()
    store.open()
    run_all(threads)
    assert restore.frontier.outcomes() == {4: Outcome.LATE}
    assert restore.frontier.take_abandoned() is True
    assert [outcome for *_, outcome in restore.records] == ["superseded"] * (not over)


class Hanging:
    """A loader at a read that hangs, until `end`."""

    def __init__(self, place: Place, *, staged: bool) -> None:
        self.store = FaultStore(filled_store(), {key_of(4): "stall"})
        restore = Restore(self.store, place)
        self.job, self.frontier = restore.job, restore.frontier
        if staged:
            self.frontier.is_staged = lambda index: True  # type: ignore[method-assign]
        self.threads = start_loaders(self.job, 1)
        await_true(lambda: bool(self.store.injected))

    def end(self) -> None:
        self.store.release()
        run_all(self.threads)


@pytest.mark.parametrize(("place", "staged"), [(HostPlace, True), (DevicePlace, False), (DevicePlace, True)])
def test_a_read_that_hangs_holds_no_memory_but_its_own(place: type[Place], *, staged: bool) -> None:
    arrays = [np.zeros(buffer.nbytes, np.uint8) for buffer in make_buffers()]
    buffers = [
        torch.from_numpy(array).view(buffer.dtype).view(buffer.shape)
        for array, buffer in zip(arrays, make_buffers(), strict=True)
    ]
    hanging = Hanging(place(buffers, LAYOUT, 2), staged=staged)
    held = [weakref.ref(array) for array in arrays]
    ring = weakref.ref(hanging.job.place._ring.take())
    hanging.frontier.stop()
    hanging.job.let_go()
    del arrays, buffers
    gc.collect()
    assert [array() for array in held] == [None] * len(held)
    assert ring() is None
    hanging.end()
    assert hanging.frontier.outcomes() == {4: Outcome.LATE}


def test_a_restore_that_ends_while_a_loader_begins_holds_no_memory() -> None:
    buffers = make_buffers()
    restore = Restore(filled_store(), HostPlace(buffers, LAYOUT))
    index = restore.frontier.claim()
    restore.frontier.stop()
    restore.job.let_go()
    assert index is not None
    assert restore.job.lands(index).parts == []
    assert not restore.job.staged


def test_loaders_that_may_not_read_leave_all_to_the_main_thread(caplog: pytest.LogCaptureFixture) -> None:
    restore = Restore(filled_store(), HostPlace(make_buffers(), LAYOUT))
    restore.job.most_reads = 1
    read = restore.job.sharing.begin_read(1, lambda: False, 0.0)
    assert read is not None
    read.leave()
    run_loader(restore.job, "load-0")
    assert restore.frontier.counts() == {State.WAITING: CHUNKS}
    assert ask(restore.frontier.advance, PATIENCE / 2, "advance").get() == 0
    assert caplog.messages == ["Nothing is loaded as long as reads of earlier prompts hang: 1."]


# Writer.


class GatedWrites(WrapperStore):
    """Writes wait until they are let through, and are counted."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.order: list[str] = []
        self.nice: list[int] = []

    def write(self, key: str, parts: Sequence[Any], *, replace: bool = False) -> bool:
        assert self.gate.wait(PATIENCE)
        self.order.append(key)
        self.nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return super().write(key, parts, replace=replace)


class Broken(WrapperStore):
    """Writes always fail."""

    def __init__(self, error: Exception) -> None:
        super().__init__(MemoryStore())
        self.error = error

    def write(self, key: str, parts: Sequence[Any], *, replace: bool = False) -> bool:
        raise self.error


class Saving:
    """Jobs and what they reported."""

    def __init__(self) -> None:
        self.done: dict[int, bool] = {}

    def job(self, index: int, *, overwrite: bool = False) -> SaveJob:
        payload = Slot(LAYOUT.nbytes, pinned=False)
        byte_view(payload.memory)[:] = payload_of(index)
        return SaveJob(
            metadata_of(index), LAYOUT, payload, overwrite, lambda stored: self.report(index, stored is not None)
        )

    def report(self, index: int, durable: bool) -> None:
        self.done[index] = durable


def writer_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "cake-writer"}


@pytest.fixture(autouse=True)
def no_writer_is_left() -> Iterator[None]:
    """A closed or retired writer's thread ends by itself."""
    before = writer_threads()
    yield
    for thread in writer_threads() - before:
        thread.join(PATIENCE)
    assert writer_threads() <= before


def test_what_is_offered_becomes_a_chunk_in_the_store() -> None:
    store, saving = MemoryStore(), Saving()
    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    assert all(writer.offer(saving.job(index)) for index in range(CHUNKS))
    assert writer.flush(PATIENCE) is True
    assert saving.done == dict.fromkeys(range(CHUNKS), True)
    for index in range(CHUNKS):
        value = store.read(key_of(index))
        assert value is not None
        assert check_file(value, key_of(index)) == metadata_of(index, payload_of(index))
        assert value.endswith(payload_of(index))
    assert writer.close() is True


def test_what_is_saved_can_be_loaded() -> None:
    store, saving = MemoryStore(), Saving()
    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    for index in range(CHUNKS):
        writer.offer(saving.job(index))
    writer.close()
    buffers = make_buffers()
    restore = Restore(store, HostPlace(buffers, LAYOUT))
    run_loader(restore.job, "load-0")
    assert [chunk_in(buffers, index) for index in range(CHUNKS)] == [payload_of(index) for index in range(CHUNKS)]


def test_the_queue_is_bounded_in_bytes_and_refuses_at_once() -> None:
    store, saving = GatedWrites(MemoryStore()), Saving()
    writer = Writer(store, capacity=3 * LAYOUT.nbytes - 1, exit_flush_seconds=PATIENCE)
    assert writer.has_room(LAYOUT.nbytes) is True
    assert [writer.offer(saving.job(index)) for index in range(4)] == [True, True, False, False]
    assert writer.has_room(LAYOUT.nbytes) is False
    assert writer.has_room(LAYOUT.nbytes - 1) is True
    assert writer.flush(0.01) is False
    store.gate.set()
    assert writer.flush(PATIENCE) is True
    assert writer.offer(saving.job(4)) is True
    writer.close()
    assert store.order == [key_of(0), key_of(1), key_of(4)]
    assert saving.done == {0: True, 1: True, 4: True}


def test_asking_for_room_takes_none() -> None:
    writer = Writer(MemoryStore(), capacity=100, exit_flush_seconds=PATIENCE)
    assert [writer.has_room(100) for _ in range(3)] == [True, True, True]
    assert writer.has_room(101) is False


def test_a_writer_has_no_thread_before_it_has_work() -> None:
    before = writer_threads()
    writer = Writer(MemoryStore(), capacity=100, exit_flush_seconds=PATIENCE)
    assert writer.flush(0) is True
    assert writer.close() is True
    assert writer_threads() <= before


def test_close_may_be_called_twice_and_ends_the_thread() -> None:
    saving = Saving()
    writer = Writer(MemoryStore(), capacity=2**20, exit_flush_seconds=PATIENCE)
    writer.offer(saving.job(0))
    assert [writer.close(), writer.close()] == [True, True]
    assert saving.done == {0: True}
    assert writer.offer(saving.job(1)) is False
    assert writer.has_room(1) is False


def test_close_waits_no_longer_than_it_may() -> None:
    store, saving = GatedWrites(MemoryStore()), Saving()
    writer = Writer(store, capacity=2**20, exit_flush_seconds=0.01)
    writer.offer(saving.job(0))
    assert writer.close() is False
    store.gate.set()
    assert writer.flush(PATIENCE) is True


def test_retire_returns_at_once_and_loses_nothing() -> None:
    store, saving = GatedWrites(MemoryStore()), Saving()
    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    writer.offer(saving.job(0))
    writer.offer(saving.job(1))
    writer.retire()
    assert saving.done == {}
    assert writer.offer(saving.job(2)) is False
    store.gate.set()
    assert writer.flush(PATIENCE) is True
    assert saving.done == {0: True, 1: True}


@pytest.mark.parametrize(
    ("error", "told"),
    [(StoreError("The disk is full: free some space."), "free some space"), (RuntimeError("odd"), "RuntimeError: odd")],
)
def test_a_failing_store_is_counted_and_told_once(
    error: Exception, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    saving = Saving()
    writer = Writer(Broken(error), capacity=2**20, exit_flush_seconds=PATIENCE)
    with caplog.at_level(logging.WARNING, logger="cake_hf"):
        for index in range(CHUNKS):
            writer.offer(saving.job(index))
        assert writer.flush(PATIENCE) is True
    assert saving.done == dict.fromkeys(range(CHUNKS), False)
    assert len(caplog.records) == 1
    assert told in caplog.text
    writer.close()


def test_a_report_that_fails_does_not_end_the_saving(caplog: pytest.LogCaptureFixture) -> None:
    """Were the thread to die of it, `flush` would wait for ever."""
    saving, store = Saving(), MemoryStore()
    good = saving.job(0)

    def fail(durable: bool) -> None:
        raise RuntimeError("no listener")

    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    writer.offer(SaveJob(good.metadata, good.layout, good.payload, False, fail))
    writer.offer(saving.job(1))
    assert writer.flush(PATIENCE) is True
    assert saving.done == {1: True}
    assert "no listener" in caplog.text
    assert writer.close() is True


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_there_is_replaced_only_when_it_was_unusable(overwrite: bool) -> None:
    store, saving = MemoryStore(), Saving()
    store.write(key_of(0), [b"there"])
    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    writer.offer(saving.job(0, overwrite=overwrite))
    writer.close()
    assert saving.done == {0: True}
    assert (store.read(key_of(0)) != b"there") is overwrite


def test_many_threads_offer_and_the_budget_holds() -> None:
    """Whatever is taken is saved; whatever is refused is not; the two are told apart for certain."""
    store, saving = MemoryStore(), Saving()
    writer = Writer(store, capacity=4 * LAYOUT.nbytes, exit_flush_seconds=PATIENCE)
    start = threading.Barrier(8)
    taken: list[int] = []

    def offer(first: int) -> None:
        start.wait(PATIENCE)
        taken.extend(index for index in range(first, first + 20) if writer.offer(saving.job(index)))

    run_all([threading.Thread(target=offer, args=(1000 * n,), daemon=True) for n in range(8)])
    assert writer.close() is True
    assert taken
    assert saving.done == dict.fromkeys(taken, True)
    assert set(store.keys()) == {key_of(index) for index in taken}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness per thread")
def test_the_writer_yields_to_the_model_and_lowers_no_other_thread() -> None:
    store, saving = GatedWrites(MemoryStore()), Saving()
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    store.gate.set()
    writer.offer(saving.job(0))
    writer.close()
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    assert store.nice[0] > mine or mine >= 10


def test_the_writer_waits_for_what_is_still_on_its_way_from_a_device() -> None:
    class Copy:
        """Stands in for an event on a device, and brings the bytes that it is waited for."""

        def __init__(self, memory: torch.Tensor, content: bytes) -> None:
            self.memory, self.content = memory, content

        def synchronize(self) -> None:
            byte_view(self.memory)[:] = self.content

    store, saving = MemoryStore(), Saving()
    job = saving.job(0)
    job.payload.memory.zero_()
    job.payload.copied_by([Copy(job.payload.memory, payload_of(0))])  # type: ignore[list-item]
    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    writer.offer(job)
    writer.close()
    assert saving.done == {0: True}
    assert check_file(store.read(key_of(0)) or b"", key_of(0)).index == 0
    assert (store.read(key_of(0)) or b"").endswith(payload_of(0))


def test_a_payload_that_cannot_be_read_does_not_end_the_saving(caplog: pytest.LogCaptureFixture) -> None:
    saving, store = Saving(), MemoryStore()
    bad = saving.job(0)
    bad.payload.memory = torch.empty(LAYOUT.nbytes, dtype=torch.uint8, device="meta")
    writer = Writer(store, capacity=2**20, exit_flush_seconds=PATIENCE)
    writer.offer(bad)
    writer.offer(saving.job(1))
    assert writer.flush(PATIENCE) is True
    assert saving.done == {0: False, 1: True}
    assert "Chunks are not being saved" in caplog.text
    writer.close()


@devices
def test_what_is_packed_is_what_was_there_then(device: str) -> None:
    """A GPU goes on computing while it is copied out, and changes it only afterwards."""
    pieces = [torch.randn(CHUNK, p.heads, p.head_dim).to(p.dtype) for p in LAYOUT.pieces]
    there = [piece.to(device, copy=True) for piece in pieces]
    packed = pack(there, LAYOUT)
    let_copies_out_end()
    for piece in there:
        piece.zero_()
    packed.await_copy()
    assert byte_view(packed.memory).tobytes() == b"".join(piece.view(torch.uint8).numpy().tobytes() for piece in pieces)


def test_packing_copies_the_pieces_in_payload_order() -> None:
    pieces = [torch.randn(CHUNK, p.heads, p.head_dim).to(p.dtype) for p in LAYOUT.pieces]
    in_heads_first_memory = [piece.transpose(0, 1).contiguous().transpose(0, 1) for piece in pieces]
    payload = pack(in_heads_first_memory, LAYOUT).memory
    expected = b"".join(piece.view(torch.uint8).numpy().tobytes() for piece in pieces)
    assert byte_view(payload).tobytes() == expected
    in_heads_first_memory[0].zero_()
    assert byte_view(payload).tobytes() == expected


EXIT = """
import atexit, threading
import torch
from cake_hf.transfer.copy_streams import Slot
from cake_hf.transfer.writer import SaveJob, Writer
from cake_hf.stores import LocalStore
from cake_hf.chunks.codec import ChunkMetadata
from cake_hf.chunks.layout import ChunkLayout, Piece
leaving = threading.Event()
class Slow(LocalStore):
    def write(self, key, parts, *, replace=False):
        leaving.wait()
        return super().write(key, parts, replace=replace)
layout = ChunkLayout(16, (Piece("layers.0.keys", 2, 4, torch.float32),))
writers = [Writer(Slow(f"{sys.argv[1]}{'/many' * n}"), 2**20, float(sys.argv[2])) for n in range(int(sys.argv[4]))]
for n in range(3 * len(writers)):
    writer = writers[n % len(writers)]
    facts = ChunkMetadata(f"{n:040x}", "0" * 40, n, "0" * 40, "m", "")
    payload = Slot(layout.nbytes, pinned=False)
    payload.memory.fill_(n)
    assert writer.offer(SaveJob(facts, layout, payload, False, print))
if sys.argv[3] == "slow":
    # Handlers run last in, first out: nothing is written before the interpreter is on its way out.
    atexit.register(leaving.set)
"""


def leave(root: Path, exit_flush_seconds: float, how: str, stores: int = 1) -> str:
    """What a process printed that ended without flush or close."""
    command = command_of(EXIT, root, exit_flush_seconds, how, stores, bare=False)
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.stderr == ""
    return ended.stdout


def test_leaving_the_interpreter_saves_what_is_queued(tmp_path: Path) -> None:
    saved = leave(tmp_path, PATIENCE, "slow").split()
    store = LocalStore(tmp_path)
    assert saved == [str(store.size(key_of(n))) for n in range(3)]
    assert sorted(store.keys()) == [key_of(n) for n in range(3)]
    for n in range(3):
        value = store.read(key_of(n))
        assert value is not None
        assert check_file(value, key_of(n)).index == n


def test_leaving_the_interpreter_does_not_wait_for_a_store_that_hangs(tmp_path: Path) -> None:
    assert leave(tmp_path, 0.05, "hanging") == ""
    assert list(LocalStore(tmp_path).keys()) == []


@pytest.mark.fault(
    "Time and bounds",
    "The interpreter ends while many stores hang on writes.",
    "They are waited for side by side: one `exit_flush_seconds` in all.",
)
def test_leaving_the_interpreter_waits_for_many_stores_side_by_side(tmp_path: Path) -> None:
    """One after the other they would take two minutes, and the process would be ended from outside."""
    assert leave(tmp_path, 4.0, "hanging", 30) == ""


# Deadlines.


@pytest.mark.parametrize("value", [7, None, []])
def test_a_call_in_time_gives_its_result(value: object) -> None:
    assert ask(lambda: value, PATIENCE, "test").get() is value


@pytest.mark.parametrize("error", [ValueError("no"), StoreError("down"), KeyboardInterrupt()])
def test_a_call_that_raises_raises_here(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        ask(fail, PATIENCE, "test").get()
    assert caught.value is error


def test_a_call_that_hangs_is_left_to_its_thread() -> None:
    go_on, before = threading.Event(), set(threading.enumerate())
    with pytest.raises(DeadlineExceeded, match=r"did not answer \(lookup\) within 0\.01 s"):
        ask(lambda: go_on.wait(PATIENCE), 0.01, "lookup").get()
    threads = [thread for thread in threading.enumerate() if thread.name == "cake-lookup" and thread not in before]
    assert [thread.daemon for thread in threads] == [True]
    go_on.set()
    run_all(threads)


def test_while_a_call_hangs_the_next_one_is_not_begun() -> None:
    go_on, late = threading.Event(), Late()
    with pytest.raises(DeadlineExceeded, match="did not answer"):
        ask(lambda: go_on.wait(PATIENCE), 0.01, "lookup", late).get()
    with pytest.raises(DeadlineExceeded, match=r"An earlier question \(lookup\) is still not answered"):
        ask(lambda: pytest.fail("begun"), PATIENCE, "lookup", late).get()
    go_on.set()
    await_true(lambda: not late)
    assert ask(lambda: 7, PATIENCE, "lookup", late).get() == 7
