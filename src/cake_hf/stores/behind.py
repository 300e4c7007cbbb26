"""Work on values that nobody waits for: a queue bounded in bytes, and one thread of low priority behind it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

logger = logging.getLogger("cake_hf")

NICENESS = 19
"""The thread yields the processor to the model: what it does is never urgent."""


@dataclass(frozen=True)
class Errand:
    """One piece of work.

    Attributes:
        key: of the value that it is about.
        nbytes: of the value, which it holds on to.
        run: does it; what it raises is logged and goes no further.
    """

    key: str
    nbytes: int
    run: Callable[[], None]


class Behind:
    """Queue and thread. Both may be used from any thread; nothing but `changing`, `flush` and `close` ever waits.

    Invariant: `bytes of queued errands + bytes of the one that is being run <= capacity`. An offer that would break it is
    refused at once.

    Args:
        capacity: bytes of values that may be under way.
        exit_seconds: how long `close`, and leaving the interpreter, wait for what is queued.
    """

    def __init__(self, capacity: int, exit_seconds: float) -> None:
        self._capacity = capacity
        self._exit_seconds = exit_seconds
        self._changed = threading.Condition()
        self._queue: deque[Errand] = deque()
        self._bytes = 0
        self._running: str | None = None
        self._changing: Counter[str] = Counter()
        self._stamp = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        # As early as this, so that it is called after those who may still bring something when the interpreter ends.
        atexit.register(self.close)

    def stamp(self) -> int:
        """Take this before a value is read, and offer it along with an errand that carries the value on."""
        with self._changed:
            return self._stamp

    def has_room(self, nbytes: int) -> bool:
        """Whether a value of that size would be taken now; asked before it is copied."""
        with self._changed:
            return not self._closed and self._bytes + nbytes <= self._capacity

    def offer(self, errand: Errand, stamp: int | None = None) -> bool:
        """Queue an errand; False, and nothing happens, where it does not fit or comes too late.

        Args:
            errand: to be run once, after those before it.
            stamp: from before its value was read. Where any key was changed since, the value may be an old one: too late.
        """
        with self._changed:
            late = self._changing[errand.key] > 0 or stamp not in (None, self._stamp)
            if self._closed or late or self._bytes + errand.nbytes > self._capacity or not self._has_thread():
                return False
            self._queue.append(errand)
            self._bytes += errand.nbytes
            self._changed.notify_all()
            return True

    @contextmanager
    def changing(self, key: str) -> Iterator[None]:
        """While a key's value is replaced or deleted: no errand with an older value of it is run, in here or later.

        What is queued for the key is dropped, what is being run for it is waited for.
        """
        with self._changed:
            self._changing[key] += 1
            kept = deque(errand for errand in self._queue if errand.key != key)
            self._bytes -= sum(errand.nbytes for errand in self._queue) - sum(errand.nbytes for errand in kept)
            self._queue = kept
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._running != key)
        try:
            yield
        finally:
            with self._changed:
                self._stamp += 1
                self._changing[key] -= 1
                if not self._changing[key]:
                    del self._changing[key]

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued or being run; False if `timeout` seconds did not suffice."""
        with self._changed:
            return self._changed.wait_for(lambda: self._bytes == 0 and self._running is None, timeout)

    def close(self) -> bool:
        """Take nothing more, wait for what is queued (with a bound), and end the thread; False on time-out."""
        thread = self._thread
        self.retire()
        flushed = self.flush(self._exit_seconds)
        # A daemon thread that is still inside native code when the interpreter goes down can abort the process.
        if flushed and thread is not None and thread is not threading.current_thread():
            thread.join(self._exit_seconds)
        return flushed

    def retire(self) -> None:
        """Take nothing more; the thread ends by itself when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._thread is None:
                atexit.unregister(self.close)

    def _has_thread(self) -> bool:
        """Start the thread if there is none; False where the system gives no more threads."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="cake-behind", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        # Only Linux has a niceness per thread; elsewhere this lowers nothing or is refused.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (errand := self._take()) is not None:
            try:
                errand.run()
            except Exception:
                logger.exception("Chunk %s was not carried on in the background.", errand.key)
            nbytes = errand.nbytes
            del errand  # and with it the value, before its bytes count as free
            with self._changed:
                self._bytes -= nbytes
                self._running = None
                self._changed.notify_all()

    def _take(self) -> Errand | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._queue:
                errand = self._queue.popleft()
                self._running = errand.key
                return errand
            self._thread = None
            atexit.unregister(self.close)
            return None
