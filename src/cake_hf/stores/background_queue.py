"""The background queue: one per place and purpose, bounded in bytes, with one thread of low priority.

Saving, copies between tiers, and notes beside a store all go through it. A store that hangs blocks its thread for ever. So all
users of one place in a process share a `BackgroundQueue`, however many they are; each has a `QueueUser`, which counts that
user's tasks.

The sum of all waits is bounded, too. A queue that has been busy with one task for longer than the caller would wait is not
waited for again; and when the interpreter ends, all queues are waited for at the same time.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cake_hf.util.forks import Lock, refusal, renewed_in_child

logger = logging.getLogger("cake_hf")

NICENESS = 19
"""Niceness of the thread, which yields the processor to the model: background work is never urgent."""

IDLE_SECONDS = 2.0
"""Seconds after which a thread without tasks ends; a new task starts another. It ends at once when a user is closed."""

WRITER, TIERS, NOTES = PURPOSES = ("cake-writer", "cake-tiers", "cake-note-writer")
"""The purposes of queues, by thread name. At exit they are emptied in this order, since writing to tiers queues copies."""


@dataclass(frozen=True)
class Task:
    """One piece of background work.

    Attributes:
        key: what it is about, such as the key of a value.
        nbytes: bytes that it keeps in memory.
        run: does the work; exceptions are logged and not raised.
    """

    key: str
    nbytes: int
    run: Callable[[], None]


class BackgroundQueue:
    """The tasks of one place and purpose, and their thread. It is used through `QueueUser`.

    Invariant: `bytes of queued tasks + bytes of the running task <= the largest capacity of a user`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._start_empty()
        renewed_in_child(self._start_empty)

    def _start_empty(self) -> None:
        """Initializes the state; also in a forked child, since the parent's tasks are done by the parent."""
        self.changed = threading.Condition()  # finalizers re-enter its lock
        self.tasks: deque[tuple[QueueUser, Task]] = deque()
        self.nbytes = 0
        self.running: tuple[QueueUser, str] | None = None
        self.since = 0.0
        self.pending: Counter[QueueUser] = Counter()
        self._ends = False
        self._thread: threading.Thread | None = None

    def add(self, user: QueueUser, task: Task) -> bool:
        """Queues a task; returns False if no thread can be started. Called with the lock held."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            if refusal(thread) is not None:
                return False
            self._thread, self._ends = thread, False
        self.tasks.append((user, task))
        self.nbytes += task.nbytes
        self.pending[user] += 1
        self.changed.notify_all()
        return True

    def drop(self, user: QueueUser, key: str) -> None:
        """Drops a user's queued tasks on a key. Called with the lock held."""
        dropped = [task for owner, task in self.tasks if owner is user and task.key == key]
        self.tasks = deque(one for one in self.tasks if one[0] is not user or one[1].key != key)
        for task in dropped:
            self._settle(user, task.nbytes)

    def end_thread(self) -> None:
        """Makes the thread end as soon as no task is left. Finalizers may call it."""
        with self.changed:
            self._ends = True
            self.changed.notify_all()

    def await_thread(self, until: float) -> None:
        """Waits for the thread to end, unless another user has it go on."""
        with self.changed:
            thread = self._thread
            if thread is None or thread is threading.current_thread():
                return
            left = until - time.monotonic()
            ended = self.changed.wait_for(lambda: self._thread is not thread or self.pending, max(0.0, left))
        if ended and self._thread is not thread:
            # A daemon thread that is still in native code when the interpreter shuts down can abort the process.
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        # Only Linux has a niceness per thread; elsewhere this has no effect or is refused.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (taken := self._take()) is not None:
            user, task = taken
            try:
                task.run()
            except BaseException:
                logger.exception("Chunk %s was not carried on in the background.", task.key)
            nbytes = task.nbytes
            del taken, task  # releases the value before its bytes count as free
            with self.changed:
                self.running = None
                self._settle(user, nbytes)
            del user

    def _take(self) -> tuple[QueueUser, Task] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.tasks or self._ends, IDLE_SECONDS)
            if not self.tasks:
                self._thread = None
                self.changed.notify_all()
                return None
            user, task = self.tasks.popleft()
            self.running, self.since = (user, task.key), time.monotonic()
            return user, task

    def _settle(self, user: QueueUser, nbytes: int) -> None:
        self.nbytes -= nbytes
        self.pending[user] -= 1
        if not self.pending[user]:
            del self.pending[user]
        self.changed.notify_all()


class QueueUser:
    """One user of a background queue. Any thread may use it; only `changing`, `flush` and `close` wait.

    Args:
        purpose: one of `PURPOSES`.
        place: returns a value that is equal for all users that share a queue; called by the thread that first offers a task.
            It may ask a store for its identity.
        capacity: bytes that may be queued or running, those of other users of the queue included. An offer beyond that is
            refused at once.
        exit_seconds: how long `close`, and leaving the interpreter, wait for queued tasks.
    """

    def __init__(self, purpose: str, place: Callable[[], Hashable], capacity: int, exit_seconds: float) -> None:
        self.purpose = purpose
        self.exit_seconds = exit_seconds
        self._place = place
        self._capacity = capacity
        self._queue: BackgroundQueue | None = None
        self._closed = False
        self._changing: Counter[str] = Counter()
        self._stamp = 0
        renewed_in_child(self._forget_changes)
        with _lock:
            _users.add(self)

    @property
    def queue(self) -> BackgroundQueue:
        """The queue, which is made when it is first needed."""
        if self._queue is None:
            place = self._place()
            with _lock:
                self._queue = self._queue or _queue_of(self.purpose, place)
        return self._queue

    def has_room(self, nbytes: int) -> bool:
        """Returns whether a task with that many bytes would be accepted now; asked before a value is copied."""
        queue = self._queue
        return not self._closed and (0 if queue is None else queue.nbytes) + nbytes <= self._capacity

    def stamp(self) -> int:
        """Returns a stamp to take before a value is read; it is passed to `offer` with the task that copies the value."""
        return self._stamp

    def offer(self, task: Task, stamp: int | None = None, *, supersede: bool = False) -> bool:
        """Queues a task to be run once, after all tasks queued before it by any user.

        Args:
            task: the task.
            stamp: the stamp from before the value was read. If any key was changed since, the value may be outdated, so the
                task comes too late.
            supersede: whether the task takes the place of this user's queued tasks on the same key.

        Returns:
            False if the task does not fit or comes too late, the user is closed, or no thread can be started; nothing is
            queued then.
        """
        queue = self.queue
        with queue.changed:
            late = self._changing[task.key] > 0 or stamp not in (None, self._stamp)
            if supersede:
                queue.drop(self, task.key)
            if self._closed or late or queue.nbytes + task.nbytes > self._capacity:
                return False
            return queue.add(self, task)

    @contextmanager
    def changing(self, key: str) -> Iterator[None]:
        """Wraps a replacement or deletion of a key's value: no task with an older value runs in the body or after it.

        Queued tasks on the key are dropped, and a running one is waited for.
        """
        queue = self.queue
        with queue.changed:
            self._changing[key] += 1
            queue.drop(self, key)
            queue.changed.wait_for(lambda: queue.running != (self, key))
        try:
            yield
        finally:
            with queue.changed:
                self._stamp += 1
                self._changing[key] -= 1
                if self._changing[key] <= 0:
                    del self._changing[key]

    def is_idle(self) -> bool:
        """Returns whether no task of this user is queued or running."""
        queue = self._queue
        return queue is None or self not in queue.pending

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until no task of this user is queued or running; returns False if `timeout` seconds did not suffice.

        Without a timeout it waits as long as there is progress, and returns False once the queue has spent `exit_seconds` on
        one task.
        """
        queue = self._queue
        if queue is None:
            return True
        if timeout is None:
            return self._wait(queue, math.inf)
        with queue.changed:
            return queue.changed.wait_for(self.is_idle, timeout)

    def close(self) -> bool:
        """Accepts no more tasks, waits for queued ones (with a bound), and ends the thread; returns False on time-out."""
        self.retire()
        return self.settle(time.monotonic())

    def retire(self) -> None:
        """Accepts no more tasks; queued ones are still done. Finalizers may call it."""
        self._closed = True
        if self._queue is not None:
            self._queue.end_thread()

    def settle(self, begin: float) -> bool:
        """Waits for queued tasks until `exit_seconds` after `begin`; returns False on time-out.

        It does not wait if the queue has already spent that long on one task, since earlier waits for it were in vain.
        """
        queue, until = self._queue, begin + self.exit_seconds
        if queue is None:
            return True
        if not self._wait(queue, until):
            return False
        queue.await_thread(until)
        return True

    def _wait(self, queue: BackgroundQueue, until: float) -> bool:
        """Waits until no task of this user is left, or until `until`, or until one task has taken `exit_seconds`."""
        with queue.changed:
            while not self.is_idle():
                now = time.monotonic()
                since = now if queue.running is None else queue.since  # the queue is between two tasks
                left = min(until, since + self.exit_seconds) - now
                if left <= 0:
                    return False
                if not queue.changed.wait(left) and queue.running is None:
                    return self.is_idle()
        return True

    def _forget_changes(self) -> None:
        """Resets a forked child: changes that other threads had started end in the parent only."""
        self._changing.clear()


_queues: weakref.WeakValueDictionary[tuple[str, Hashable], BackgroundQueue] = weakref.WeakValueDictionary()
_users: weakref.WeakSet[QueueUser] = weakref.WeakSet()
_lock = Lock()


def _queue_of(purpose: str, place: Hashable) -> BackgroundQueue:
    """Returns this process's only queue of a purpose for a place. It lives as long as it has a user or a task."""
    queue = _queues.get((purpose, place))
    if queue is None:
        queue = _queues[purpose, place] = BackgroundQueue(purpose)
    return queue


def users_of(purpose: str) -> list[QueueUser]:
    """Returns all users of that purpose in this process."""
    with _lock:
        return [user for user in _users if user.purpose == purpose]


@atexit.register
def _empty_all() -> None:
    """Waits for queued tasks at exit: for each user its own time, but for all users at once."""
    begin = time.monotonic()
    for purpose in PURPOSES:
        users = users_of(purpose)
        for user in users:
            user.retire()
        for user in users:
            user.settle(begin)
