"""The background queue that saving, tiers and notes share: its bounds, its order, its thread, and what is dropped."""

from __future__ import annotations

import gc
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cake_hf import Limits, LocalStore, MemoryStore, Report, Store, Tier, TierStore
from cake_hf.stores import background_queue
from cake_hf.stores.background_queue import NOTES, PURPOSES, TIERS, WRITER, QueueUser, Task
from cake_hf.transfer.cost_notes import flush_notes, note_of
from cake_hf.transfer.hits import count_hits, flush_hits, read_hits
from cake_hf.transfer.writer import Writer
from children import command_of
from faulty import Faulty, hanging
from waiting import PATIENCE, await_true


@pytest.fixture(autouse=True)
def no_thread_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(background_queue, "IDLE_SECONDS", 0.05)
    before = threads()
    yield
    await_true(lambda: threads() <= before)


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name in PURPOSES}


def user_of(
    place: object = None, capacity: int = 100, exit_seconds: float = PATIENCE, purpose: str = TIERS
) -> QueueUser:
    """A user at a place; without one, at a place of its own."""
    own = object() if place is None else place
    return QueueUser(purpose, lambda: own, capacity, exit_seconds)


class Gate:
    """A task's work that waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.go.wait(PATIENCE)


def nothing() -> None:
    pass


# Bounds.


def test_the_queue_keeps_its_bound() -> None:
    gate, ran = Gate(), []
    user = user_of()
    assert user.offer(Task("a", 60, gate))
    assert not user.offer(Task("b", 50, lambda: ran.append("b")))
    assert not user.has_room(50)
    assert user.has_room(40)
    assert user.offer(Task("c", 40, lambda: ran.append("c")))
    gate.go.set()
    assert user.flush(PATIENCE)
    assert ran == ["c"]
    assert user.close()
    assert not user.offer(Task("d", 1, nothing))
    assert not user.has_room(1)


def test_all_users_of_a_place_share_one_bound_and_one_thread() -> None:
    gate = Gate()
    users = [user_of("place") for _ in range(3)]
    before = threads()
    assert users[0].offer(Task("a", 60, gate))
    assert users[1].offer(Task("b", 40, nothing))
    assert not users[2].offer(Task("c", 1, nothing))
    assert len(threads() - before) == 1
    gate.go.set()
    assert all(user.close() for user in users)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_place_of_another_purpose_has_a_queue_of_its_own(purpose: str) -> None:
    gate = Gate()
    busy, other = user_of("place", purpose=WRITER if purpose != WRITER else NOTES), user_of("place", purpose=purpose)
    busy.offer(Task("a", 60, gate))
    assert other.offer(Task("b", 60, nothing))
    assert other.close()
    gate.go.set()
    assert busy.close()


def test_closing_waits_no_longer_than_told() -> None:
    gate = Gate()
    user = user_of(exit_seconds=0.01)
    user.offer(Task("a", 60, gate))
    assert user.close() is False
    gate.go.set()
    assert user.flush(PATIENCE)


def test_a_user_does_not_wait_for_another_ones_tasks() -> None:
    gate = Gate()
    busy, other = user_of("place"), user_of("place")
    assert other.offer(Task("a", 1, nothing))
    assert other.flush(PATIENCE)
    assert busy.offer(Task("b", 1, gate))
    assert gate.begun.wait(PATIENCE)
    assert other.close()  # would take PATIENCE
    assert not busy.is_idle()
    gate.go.set()
    assert busy.close()


def test_a_task_that_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("unforeseen")

    ran: list[int] = []
    user = user_of()
    user.offer(Task("a", 60, fail))
    user.offer(Task("b", 40, lambda: ran.append(1)))
    assert user.close()
    assert ran == [1]
    assert "unforeseen" in caplog.text


# The thread.


def test_a_thread_without_tasks_ends_by_itself_and_another_comes_with_the_next_one() -> None:
    before, user, ran = threads(), user_of(), []
    for number in range(3):
        assert user.offer(Task("a", 60, lambda number=number: ran.append(number)))
        assert user.flush(PATIENCE)
        await_true(lambda: threads() <= before)
    assert ran == [0, 1, 2]
    assert user.close()


def test_a_user_that_is_closed_ends_the_thread_for_others_only_until_their_next_task() -> None:
    one, other, before = user_of("place"), user_of("place"), threads()
    for user in (one, other):
        assert user.offer(Task("a", 1, nothing))
    assert one.close()
    assert other.flush(PATIENCE)
    await_true(lambda: threads() <= before)
    assert other.offer(Task("b", 1, nothing))
    assert other.close()


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_system_without_threads_takes_no_task(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    user = user_of(purpose=purpose)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not user.offer(Task("a", 60, nothing))
        assert user.is_idle()
    assert user.offer(Task("a", 100, nothing))  # and it holds no bytes
    assert user.close()


# What is dropped.


def test_what_was_read_before_a_change_comes_too_late() -> None:
    user = user_of()
    before = user.stamp()
    with user.changing("a"):
        assert not user.offer(Task("a", 1, nothing))
        during = user.stamp()
    for stamp in (before, during):
        assert not user.offer(Task("a", 1, nothing), stamp)
    assert user.offer(Task("a", 1, nothing), user.stamp())
    user.close()


def test_a_newer_task_takes_the_place_of_those_that_wait() -> None:
    gate, ran, user, other = Gate(), [], user_of("place"), user_of("place")

    def offer(who: QueueUser, key: str, text: str) -> None:
        assert who.offer(Task(key, 20, lambda: ran.append(text)), supersede=True)

    assert user.offer(Task("a", 20, gate))  # runs already: it is not dropped
    assert gate.begun.wait(PATIENCE)
    offer(other, "a", "another user's")
    offer(user, "b", "another key's")
    for number in range(5):
        offer(user, "a", f"text {number}")
    gate.go.set()
    assert user.close()
    assert other.close()
    assert ran == ["another user's", "another key's", "text 4"]


# Its users.


def saves_to(store: Store) -> QueueUser:
    return Writer(store, 100, PATIENCE)._queue


def copies_to(store: Store) -> QueueUser:
    return TierStore([MemoryStore(), Tier(store, write="behind")])._queue


@pytest.mark.parametrize("make", [saves_to, copies_to])
def test_users_of_one_directory_share_a_queue_and_those_of_two_do_not(
    make: Callable[[Store], QueueUser], tmp_path: Path
) -> None:
    first, second, other = (make(LocalStore(tmp_path / name)) for name in ("one", "one", "two"))
    assert first.queue is second.queue
    assert first.queue is not other.queue


def test_notes_of_one_directory_share_a_queue_and_two_directories_do_not(tmp_path: Path) -> None:
    costs, more = note_of(tmp_path / "notes" / "costs-1.json"), note_of(tmp_path / "notes" / "costs-2.json")
    elsewhere = note_of(tmp_path / "elsewhere" / "costs-1.json")
    assert costs.queue.queue is more.queue.queue
    assert costs.queue.queue is not elsewhere.queue.queue


@pytest.mark.fault(
    "Time and bounds",
    "The directory of a store's notes hangs while prompts go by.",
    "The notes that wait are bounded in bytes, one thread hangs, and no prompt waits; later prompts are not counted.",
)
@pytest.mark.parametrize("what", ["hits", "costs"])
def test_notes_that_hang_are_bounded(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, before, gate = LocalStore(tmp_path), threads(), Gate()
    busy = note_of(tmp_path / "notes" / "costs-0.json")
    assert busy.queue.offer(Task("busy", 0, gate))
    report = Report(tokens=10, chunk_size=4, chunks_loaded=1)
    monkeypatch.setattr("cake_hf.transfer.cost_notes.QUEUE_BYTES", 200)
    notes = [note_of(tmp_path / "notes" / f"costs-{number}.json") for number in range(1, 9)]
    for note in notes:
        note.queue._capacity = 200
        for number in range(50):
            if what == "hits":
                count_hits(store, report, Limits())
            else:
                note.write(f"{number}" * 30)
    assert busy.queue.queue.nbytes <= 200
    assert len(threads() - before) == 1
    gate.go.set()
    assert flush_hits(store, PATIENCE)
    assert all(note.queue.flush(PATIENCE) for note in notes)
    if what == "hits":
        assert 1 <= sum(found.prompts for found in read_hits(tmp_path / "notes").values()) <= 200 // 20
    else:
        assert notes[0].read(PATIENCE) == "49" * 30  # the newest of those that wait


def test_a_note_that_waits_to_be_written_is_read_by_all_who_ask_for_it(tmp_path: Path) -> None:
    gate, file = Gate(), tmp_path / "notes" / "costs-1.json"
    busy = note_of(tmp_path / "notes" / "costs-0.json")
    assert busy.queue.offer(Task("busy", 0, gate))
    note_of(file).write("text")
    gc.collect()  # only its queue holds that note
    assert note_of(file).read(PATIENCE) == "text"
    gate.go.set()
    assert flush_notes(PATIENCE)
    assert file.read_text() == "text"


EXIT = """
import atexit
from pathlib import Path
from cake_hf.stores import LocalStore
from cake_hf.limits import Limits
from cake_hf.report import Report
from cake_hf.transfer.cost_notes import recall_costs, note_of
from cake_hf.transfer.hits import count_hits
store = LocalStore(sys.argv[1])
for _ in range(3):
    count_hits(store, Report(tokens=10, chunk_size=4, chunks_loaded=1), Limits())
note = note_of(Path(sys.argv[1]) / "notes" / "costs-x.json")
note.queue.exit_seconds = 60.0
note.write("{}")
"""


def test_leaving_the_interpreter_writes_the_notes(tmp_path: Path) -> None:
    LocalStore(tmp_path).write("1" * 40, [b"value"])
    ended = subprocess.run(command_of(EXIT, tmp_path, bare=False), check=True, capture_output=True, timeout=PATIENCE)
    assert ended.stderr == b""
    assert [found.prompts for found in read_hits(tmp_path / "notes").values()] == [3]
    assert (tmp_path / "notes" / "costs-x.json").read_text() == "{}"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_users_that_hang_do_not_add_up_when_the_interpreter_ends(purpose: str) -> None:
    """Each has waited as long as it may when the first one has: they are waited for side by side."""
    with hanging() as hang:
        users = [user_of(exit_seconds=0.05, purpose=purpose) for _ in range(5)]
        store = Faulty(MemoryStore(), "write", hang)
        for user in users:
            assert user.offer(Task("a", 1, lambda: store.write("1" * 40, [b""])))
        await_true(lambda: hang.begun == 5)
        begin = users[0].queue.since
        assert not any(user.settle(begin) for user in users)
        assert not any(user.flush() for user in users)  # not again, either
