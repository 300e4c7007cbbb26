"""Background queues: one queue per place, bounded in bytes, with one thread of low priority.

A store that hangs blocks its thread for ever. So all users of one place in a process share a *line* (queue and thread),
however many they are: each user has a *share* of the line, which counts that user's work.

The sum of all waits is bounded, too. A line that has been busy with one piece of work for longer than the caller would wait is
not waited for again; and when the interpreter ends, all lines are waited for at the same time.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass

from cake_hf.util.forks import Lock, renewed_in_child
from cake_hf.util.threads import refusal

logger = logging.getLogger("cake_hf")

NICENESS = 19
"""Niceness of the thread, which yields the processor to the model: background work is never urgent."""

WRITER, BEHIND = "cake-writer", "cake-behind"
"""The kinds of lines, by thread name. They are emptied in this order, since writing to tiers queues work for BEHIND."""


@dataclass(frozen=True)
class Work:
    """One piece of background work on a value.

    Attributes:
        key: key of the value.
        nbytes: bytes of the value, which the work keeps in memory.
        run: does the work; exceptions are logged and not raised.
    """

    key: str
    nbytes: int
    run: Callable[[], None]


class Line:
    """A background queue and its thread. Get it from `line_of`, and use it through a `Share`.

    Invariant: `bytes of queued work + bytes of running work <= the largest capacity of a share`.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin_anew()
        renewed_in_child(self._begin_anew)

    def _begin_anew(self) -> None:
        """Initializes the state; also in a forked child, since the parent's running and queued work is done by the parent."""
        self.changed = threading.Condition()  # finalizers re-enter its lock
        self.queue: deque[tuple[Share, Work]] = deque()
        self.nbytes = 0
        self.running: tuple[Share, str] | None = None
        self.since = 0.0
        self.shares: weakref.WeakSet[Share] = weakref.WeakSet()
        self.pending: dict[Share, int] = {}
        self._thread: threading.Thread | None = None

    def add(self, share: Share, work: Work) -> bool:
        """Queues work; returns False if no thread can be started. Called with the lock held."""
        if not self._has_thread():
            return False
        self.shares.add(share)  # a forked child starts without shares
        self.queue.append((share, work))
        self.nbytes += work.nbytes
        self.pending[share] = self.pending.get(share, 0) + 1
        self.changed.notify_all()
        return True

    def drop(self, share: Share, key: str) -> None:
        """Drops a share's queued work on a key. Called with the lock held."""
        dropped = [work for owner, work in self.queue if owner is share and work.key == key]
        self.queue = deque(one for one in self.queue if one[0] is not share or one[1].key != key)
        for work in dropped:
            self._settle(share, work.nbytes)

    def end(self, until: float) -> None:
        """Waits for the thread to end, if this was the last share and no work is left."""
        thread = self._thread
        # A daemon thread that is still in native code when the interpreter shuts down can abort the process.
        if thread is not None and not self.shares and not self.pending and thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))

    def _has_thread(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            if refusal(thread) is not None:
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        # Only Linux has a niceness per thread; elsewhere this has no effect or is refused.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (taken := self._take()) is not None:
            share, work = taken
            try:
                work.run()
            except BaseException:
                logger.exception("Chunk %s was not carried on in the background.", work.key)
            nbytes = work.nbytes
            del taken, work  # releases the value before its bytes count as free
            with self.changed:
                self.running = None
                self._settle(share, nbytes)
            del share

    def _take(self) -> tuple[Share, Work] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.queue or not self.shares)
            if not self.queue:
                self._thread = None
                return None
            share, work = self.queue.popleft()
            self.running, self.since = (share, work.key), time.monotonic()
            return share, work

    def _settle(self, share: Share, nbytes: int) -> None:
        self.nbytes -= nbytes
        self.pending[share] -= 1
        if not self.pending[share]:
            del self.pending[share]
        self.changed.notify_all()


class Share:
    """One user's share of a line. Only `flush` and `close` wait.

    Args:
        line: returns the line; called by the thread that first offers work.
        capacity: bytes that may be queued or running in the line, those of other shares included. An offer beyond that is
            refused at once.
        exit_seconds: how long `close`, and leaving the interpreter, wait for queued work.
    """

    def __init__(self, line: Callable[[], Line], capacity: int, exit_seconds: float) -> None:
        self._make_line = line
        self._line: Line | None = None
        self._lock = Lock()
        self._capacity = capacity
        self._closed = False
        self.exit_seconds = exit_seconds

    @property
    def line(self) -> Line:
        """The line; getting it may ask the store for its identity."""
        if self._line is None:
            line = self._make_line()
            with self._lock:
                self._line = self._line or line
        return self._line

    def has_room(self, nbytes: int) -> bool:
        """Returns whether work with that many bytes would be accepted now; asked before a value is copied."""
        line = self._line
        return not self._closed and (0 if line is None else line.nbytes) + nbytes <= self._capacity

    def offer(self, work: Work, refused: Callable[[], bool] = lambda: False) -> bool:
        """Queues work to be run once, after all work queued before it by any share.

        Args:
            work: the work.
            refused: called under the line's lock; returns whether to refuse the work after all.

        Returns:
            False if the work does not fit or is refused, the share is closed, or no thread can be started; nothing happens
            then.
        """
        line = self.line
        with line.changed:
            if self._closed or refused() or line.nbytes + work.nbytes > self._capacity:
                return False
            return line.add(self, work)

    def is_idle(self) -> bool:
        """Returns whether no work of this share is queued or running."""
        line = self._line
        return line is None or self not in line.pending

    def is_at(self, key: str) -> bool:
        """Returns whether work of this share on a key is running."""
        return self._line is not None and self._line.running == (self, key)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until no work of this share is queued or running; returns False if `timeout` seconds did not suffice.

        Without a timeout it waits as long as there is progress, and returns False once the line has spent `exit_seconds` on
        one piece of work.
        """
        line = self._line
        if line is None:
            return True
        if timeout is None:
            return self._wait(line, math.inf)
        with line.changed:
            return line.changed.wait_for(self.is_idle, timeout)

    def close(self) -> bool:
        """Accepts no more work, waits for queued work (with a bound), and ends the thread; returns False on time-out."""
        self.retire()
        return self.settle(time.monotonic())

    def settle(self, begin: float) -> bool:
        """Waits for queued work until `exit_seconds` after `begin`; returns False on time-out.

        It does not wait if the line has already spent that long on one piece of work, since earlier waits for it were in vain.
        """
        line, until = self._line, begin + self.exit_seconds
        if line is None:
            return True
        if not self._wait(line, until):
            return False
        line.end(until)
        return True

    def _wait(self, line: Line, until: float) -> bool:
        """Waits until no work of this share is left, or until `until`, or until one piece of work has taken `exit_seconds`."""
        with line.changed:
            while not self.is_idle():
                now = time.monotonic()
                since = now if line.running is None else line.since  # the line is between two pieces of work
                left = min(until, since + self.exit_seconds) - now
                if left <= 0:
                    return False
                if not line.changed.wait(left) and line.running is None:
                    return self.is_idle()
        return True

    def retire(self) -> None:
        """Accepts no more work; the thread ends by itself once no other share uses it. Finalizers may call it."""
        self._closed = True
        line = self._line
        if line is not None:
            with line.changed:
                line.shares.discard(self)
                line.changed.notify_all()


_lines: weakref.WeakValueDictionary[tuple[str, Hashable], Line] = weakref.WeakValueDictionary()
_lock = Lock()
_left_since: list[float] = []


def line_of(name: str, place: Hashable) -> Line:
    """Returns this process's only line of a kind for a place. The line lives as long as it has a share or work."""
    with _lock:
        line = _lines.get((name, place))
        if line is None:
            line = _lines[name, place] = Line(name)
        return line


def leaving_since() -> float:
    """Returns when the interpreter started to exit; all waits at exit count from that time."""
    if not _left_since:
        _left_since.append(time.monotonic())
    return _left_since[0]


@atexit.register
def _leave() -> None:
    """Waits for queued work at exit: for each share its own time, but for all shares at once."""
    begin = leaving_since()
    for kind in (WRITER, BEHIND):
        lines = [line for (name, _), line in list(_lines.items()) if name == kind]
        shares: set[Share] = set()
        for line in lines:
            with line.changed:
                shares.update(line.shares, line.pending)
        for share in shares:
            share.retire()
        for share in shares:
            share.settle(begin)
