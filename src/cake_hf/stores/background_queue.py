"""Background work: per place one queue, bounded in bytes, and one thread of low priority behind it.

A store that hangs keeps the thread that is at it for ever. So those who bring work to one place share a *line*, however many
they are in a process: each has a *share* of it, which counts what is its own.

Waits are bounded in sum, too. What has been at one piece of work for longer than somebody would wait is not waited for again;
and when the interpreter ends, all lines are waited for side by side.
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
"""The thread yields the processor to the model: what it does is never urgent."""

WRITER, BEHIND = "cake-writer", "cake-behind"
"""The kinds of lines, by the names of their threads; in this order, since writing to tiers brings work for behind."""


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Attributes:
        key: of the value that it is about.
        nbytes: of the value, which it holds on to.
        run: does it; what it raises is logged and goes no further.
    """

    key: str
    nbytes: int
    run: Callable[[], None]


class Line:
    """Queue and thread. Get it from `line_of`, and use it through a `Share`.

    Invariant: `bytes of queued work + bytes of what is being run <= the largest capacity of a share`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin_anew()
        renewed_in_child(self._begin_anew)

    def _begin_anew(self) -> None:
        """In a child, too: what the parent's threads were at, and what waits for them, is the parent's to do."""
        self.changed = threading.Condition()  # its lock is re-entered by finalizers
        self.queue: deque[tuple[Share, Work]] = deque()
        self.nbytes = 0
        self.running: tuple[Share, str] | None = None
        self.since = 0.0
        self.shares: weakref.WeakSet[Share] = weakref.WeakSet()
        self.pending: dict[Share, int] = {}
        self._thread: threading.Thread | None = None

    def add(self, share: Share, work: Work) -> bool:
        """Queue work; False where the system gives no thread for it. Called with the lock held."""
        if not self._has_thread():
            return False
        self.shares.add(share)  # again in a child
        self.queue.append((share, work))
        self.nbytes += work.nbytes
        self.pending[share] = self.pending.get(share, 0) + 1
        self.changed.notify_all()
        return True

    def drop(self, share: Share, key: str) -> None:
        """Forget a share's queued work on a key. Called with the lock held."""
        dropped = [work for owner, work in self.queue if owner is share and work.key == key]
        self.queue = deque(one for one in self.queue if one[0] is not share or one[1].key != key)
        for work in dropped:
            self._settle(share, work.nbytes)

    def end(self, until: float) -> None:
        """Wait for the thread to end, if this was the last share and nothing is left to do."""
        thread = self._thread
        # A daemon thread that is still inside native code when the interpreter goes down can abort the process.
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
        # Only Linux has a niceness per thread; elsewhere this lowers nothing or is refused.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (taken := self._take()) is not None:
            share, work = taken
            try:
                work.run()
            except BaseException:
                logger.exception("Chunk %s was not carried on in the background.", work.key)
            nbytes = work.nbytes
            del taken, work  # and with it the value, before its bytes count as free
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
    """One user's part of a line. Nothing but `flush` and `close` waits.

    Args:
        line: gives the line; called when there is work for the first time, by whoever brings it.
        capacity: bytes that may be under way in the line, those of others included. An offer beyond that is refused at once.
        exit_seconds: how long `close`, and leaving the interpreter, wait for what is queued.
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
        """The line; asking for it may ask the store where it is."""
        if self._line is None:
            line = self._make_line()
            with self._lock:
                self._line = self._line or line
        return self._line

    def has_room(self, nbytes: int) -> bool:
        """Whether work with that many bytes would be taken now; asked before a value is copied."""
        line = self._line
        return not self._closed and (0 if line is None else line.nbytes) + nbytes <= self._capacity

    def offer(self, work: Work, refused: Callable[[], bool] = lambda: False) -> bool:
        """Queue work, to be run once, after what was queued before it, whoever brought that.

        Args:
            work: to be done.
            refused: asked under the line's lock.

        Returns:
            False, and nothing happens, where it does not fit, is refused, the share is closed, or can have no thread.
        """
        line = self.line
        with line.changed:
            if self._closed or refused() or line.nbytes + work.nbytes > self._capacity:
                return False
            return line.add(self, work)

    def is_idle(self) -> bool:
        """Whether nothing of this share is queued or being run."""
        line = self._line
        return line is None or self not in line.pending

    def is_at(self, key: str) -> bool:
        """Whether work of this share on a key is being run."""
        return self._line is not None and self._line.running == (self, key)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing of this share is queued or being run; False if `timeout` seconds did not suffice.

        Without a timeout as long as work is done: False once the line has been at one piece for `exit_seconds`.
        """
        line = self._line
        if line is None:
            return True
        if timeout is None:
            return self._wait(line, math.inf)
        with line.changed:
            return line.changed.wait_for(self.is_idle, timeout)

    def close(self) -> bool:
        """Take nothing more, wait for what is queued (with a bound), and end the thread; False on time-out."""
        self.retire()
        return self.settle(time.monotonic())

    def settle(self, begin: float) -> bool:
        """Wait for what is queued, `exit_seconds` from a moment on. Not at all where the line has been at one piece of work
        for that long already: whoever waited before has waited for it in vain."""
        line, until = self._line, begin + self.exit_seconds
        if line is None:
            return True
        if not self._wait(line, until):
            return False
        line.end(until)
        return True

    def _wait(self, line: Line, until: float) -> bool:
        """Until nothing of this share is left, or a moment has come, or the line has been at one piece for `exit_seconds`."""
        with line.changed:
            while not self.is_idle():
                now = time.monotonic()
                since = now if line.running is None else line.since  # between two pieces
                left = min(until, since + self.exit_seconds) - now
                if left <= 0:
                    return False
                if not line.changed.wait(left) and line.running is None:
                    return self.is_idle()
        return True

    def retire(self) -> None:
        """Take nothing more; the thread ends by itself when nobody else has work for it. For finalizers, too."""
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
    """The one line of a kind for a place in this process, as long as somebody has a share of it, or it is at work."""
    with _lock:
        line = _lines.get((name, place))
        if line is None:
            line = _lines[name, place] = Line(name)
        return line


def leaving_since() -> float:
    """When the interpreter began to end: all waits from then on count from there."""
    if not _left_since:
        _left_since.append(time.monotonic())
    return _left_since[0]


@atexit.register
def _leave() -> None:
    """Wait for what is queued, each share's time, but side by side."""
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
