"""Children that are forked while other threads are at work: no lock of theirs holds anybody up."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cake_hf import CakeCache, MemoryStore
from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.pace import Pace
from cake_hf.stores import LocalStore
from cake_hf.stores.background_queue import TIERS, WRITER, QueueUser, Task
from cake_hf.stores.health import TierHealth
from cake_hf.transfer.cost_notes import flush_notes, note_of, recall_costs
from cake_hf.transfer.single_flight import Sharing, sharing_of
from cake_hf.transfer.telemetry import FaultLog
from cake_hf.util.forks import FinalizerLock, Lock, cached_property, renewed_in_child
from faulty import Faulty, hanging
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from stored import filled_store
from waiting import PATIENCE, join_loaders

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]

FORKS = 40


def in_child(call: Callable[[], object]) -> int:
    """Run a call in a child; 0 if it came to its end and did not raise. A child that hangs is ended, and that is no 0."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE / 2))  # its default is to end the process
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def busy(*calls: Callable[[], object]) -> Iterator[None]:
    """Threads that do nothing but call these, over and over."""
    over = threading.Event()

    def work(call: Callable[[], object]) -> None:
        while not over.is_set():
            call()

    threads = [threading.Thread(target=work, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)


class Shape:
    """With a property that takes its time."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    @cached_property
    def size(self) -> int:
        self.begun.set()
        self.go_on.wait(PATIENCE)
        return 7


def use_queue() -> None:
    user = QueueUser(TIERS, object, 10, PATIENCE)
    assert user.offer(Task("key", 1, lambda: None))
    assert user.flush(PATIENCE)
    assert user.close()


def held(lock: Any) -> Callable[[Callable[[], int]], int]:
    """Have another thread hold a lock while something is done."""

    def meanwhile(act: Callable[[], int]) -> int:
        taken, let_go = threading.Event(), threading.Event()

        def hold() -> None:
            with lock:
                taken.set()
                let_go.wait(PATIENCE)

        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        assert taken.wait(PATIENCE)
        try:
            return act()
        finally:
            let_go.set()
            thread.join(PATIENCE)

    return meanwhile


def locked_things(path: Path) -> dict[str, tuple[Any, Callable[[], object]]]:
    """By name: a lock that another thread holds, and what needs it in the child."""
    memory, turns, standing = MemoryStore(), FinalizerLock(), TierHealth("store", lambda: 0.0)
    sharing, queue, note = Sharing(), QueueUser(WRITER, object, 10, PATIENCE), note_of(path / "note")
    costs = recall_costs(LocalStore(path), "ns", "cpu")

    def take(turns: FinalizerLock) -> None:
        with turns:
            pass

    def looked(standing: TierHealth) -> None:
        with standing.look("read"):
            pass

    return {
        "memory": (memory._lock, lambda: memory.write("0" * 40, [b"value"])),
        "turns": (turns._lock, lambda: take(turns)),
        "standing": (standing._lock, lambda: looked(standing)),
        "sharing": (sharing._changed, lambda: sharing.begin_read(1, lambda: False)),
        "queue": (queue.queue.changed, lambda: queue.offer(Task("key", 1, lambda: None)) and queue.flush(PATIENCE)),
        "note": (note.queue.queue.changed, lambda: (note.write("text"), note.queue.flush(PATIENCE))),
        "costs": (costs._lock, lambda: costs.costs(100)),
    }


@pytest.mark.fault(
    "Processes",
    "A process forks while another thread holds a lock of the library.",
    "Each lock is a new one in the child, and what only the parent's threads could end is forgotten there.",
)
@pytest.mark.parametrize("name", ["memory", "turns", "standing", "sharing", "queue", "note", "costs"])
def test_a_lock_that_was_held_does_not_block_the_child(name: str, tmp_path: Path) -> None:
    lock, needs_it = locked_things(tmp_path)[name]
    assert held(lock)(lambda: in_child(needs_it)) == 0


def test_a_plain_lock_stays_locked_in_a_child() -> None:
    """The negative control."""
    lock = threading.Lock()
    assert held(lock)(lambda: in_child(lambda: 1 / lock.acquire(timeout=0.01))) != 0


def test_a_lock_held_during_a_fork_is_released_in_the_child() -> None:
    lock = Lock()
    with lock:
        child = os.fork()
    if child == 0:
        os._exit(0 if lock.acquire(timeout=1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lock.acquire(blocking=False)


def test_what_is_renewed_in_children_is_not_kept_alive() -> None:
    class Thing:
        def renew(self) -> None:
            raise AssertionError

    renewed_in_child(Thing().renew)
    assert in_child(lambda: None) == 0


def test_a_property_that_is_being_computed_does_not_block_the_child() -> None:
    busy_one, other = Shape(), Shape()
    other.go_on.set()
    thread = threading.Thread(target=lambda: busy_one.size, daemon=True)
    thread.start()
    assert busy_one.begun.wait(PATIENCE)
    assert in_child(lambda: other.size) == 0
    busy_one.go_on.set()
    thread.join(PATIENCE)
    assert busy_one.size == 7
    assert busy_one.__dict__["size"] == 7


def test_children_of_a_busy_process(tmp_path: Path) -> None:
    store, log = MemoryStore(), FaultLog()

    def use_store() -> None:
        store.write("0" * 40, [b"x" * 100], replace=True)
        assert store.contains(["0" * 40])

    def use_sharing() -> None:
        slot = sharing_of(store).begin_read(2, lambda: False)
        assert slot is not None
        slot.release()

    def use_costs() -> None:
        recall_costs(LocalStore(tmp_path), "ns", "cpu").learn(Pace(Costs()), [], 100)

    jobs = (use_store, use_sharing, use_costs, use_queue, lambda: log.tell("kind", "%s", "text"))
    with busy(*jobs):
        assert [in_child(lambda: [job() for job in jobs]) for _ in range(FORKS)] == [0] * FORKS
    assert flush_notes(PATIENCE)


@pytest.mark.fault(
    "Processes",
    "A cache of the parent is used in a forked child, while the parent's writer is at work, or hangs.",
    "The child has a writer of its own and saves; what the parent had queued is the parent's to save.",
)
@pytest.mark.parametrize("hangs", [False, True])
def test_a_parents_cache_saves_in_the_child(tmp_path: Path, *, hangs: bool) -> None:
    model = shared_model("llama")
    expected()
    with hanging() as hang:
        store = Faulty(LocalStore(tmp_path), "write", hang)
        store.fault = hang if hangs else None
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            cache.prefill(prompt(seed=3))

            def child() -> None:
                store.fault = None
                store.inner = LocalStore(tmp_path / "child")
                cache.reset()
                assert difference(run(model, prompt(), cache), expected()) == ""
                assert cache.flush(PATIENCE / 4)
                assert cache.report.chunks_saved == CHUNKS

            assert in_child(child) == 0
            hang.release()
            assert cache.flush(PATIENCE)
    assert len(list(LocalStore(tmp_path / "child").keys())) == CHUNKS


def test_a_prompt_is_restored_in_a_child_of_a_process_that_restores() -> None:
    model = shared_model("llama")
    expected()
    store = filled_store(model)
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as mine:

        def restore() -> None:
            with CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
                cache.prefill(prompt())

        def child() -> None:
            mine.reset()
            assert difference(run(model, prompt(), mine), expected()) == ""

        with busy(restore):
            assert [in_child(child) for _ in range(5)] == [0] * 5
    join_loaders()
