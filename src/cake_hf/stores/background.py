"""Background work on values (copies between tiers, writes behind), which is dropped once the value changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from cake_hf.stores.background_queue import BEHIND, Share, Work, line_of
from cake_hf.util.forks import renewed_in_child

Errand = Work


class Behind:
    """One store's share of a background queue. Any thread may use it; only `changing`, `flush` and `close` wait.

    Args:
        capacity: bytes of values that may be queued or running, those of other stores at the same place included.
        exit_seconds: how long `close`, and leaving the interpreter, wait for queued work.
        place: returns a value that is equal for stores at the same place; by default this store shares with no other.
    """

    def __init__(self, capacity: int, exit_seconds: float, place: Callable[[], Hashable] | None = None) -> None:
        own = object()
        self._exit_seconds = exit_seconds
        self._share = Share(lambda: line_of(BEHIND, own if place is None else place()), capacity, self._exit_seconds)
        self._changing: Counter[str] = Counter()
        self._stamp = 0
        renewed_in_child(self._renew)

    def stamp(self) -> int:
        """Returns a stamp to take before a value is read; it is passed to `offer` with the work that copies the value."""
        return self._stamp

    def has_room(self, nbytes: int) -> bool:
        """Returns whether a value of that size would be accepted now; asked before it is copied."""
        return self._share.has_room(nbytes)

    def offer(self, errand: Errand, stamp: int | None = None) -> bool:
        """Queues work; returns False and does nothing if it does not fit or comes too late.

        Args:
            errand: the work, run once, after all work queued before it.
            stamp: the stamp from before the value was read. If any key was changed since, the value may be outdated, so the
                work comes too late.
        """

        def late() -> bool:
            return self._changing[errand.key] > 0 or stamp not in (None, self._stamp)

        return self._share.offer(errand, late)

    @contextmanager
    def changing(self, key: str) -> Iterator[None]:
        """Wraps a replacement or deletion of a key's value: no work with an older value runs in the body or after it.

        Queued work on the key is dropped, and running work on it is waited for.
        """
        line = self._share.line
        with line.changed:
            self._changing[key] += 1
            line.drop(self._share, key)
            line.changed.wait_for(lambda: not self._share.is_at(key))
        try:
            yield
        finally:
            with line.changed:
                self._stamp += 1
                self._changing[key] -= 1
                if self._changing[key] <= 0:
                    del self._changing[key]

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until no work is queued or running; returns False if `timeout` seconds did not suffice."""
        return self._share.flush(timeout)

    def close(self) -> bool:
        """Accepts no more work, waits for queued work (with a bound), and ends the thread; returns False on time-out."""
        return self._share.close()

    def retire(self) -> None:
        """Accepts no more work; the thread ends by itself when the queue is empty."""
        self._share.retire()

    def _renew(self) -> None:
        """Resets a forked child: changes that other threads had started end in the parent only."""
        self._changing.clear()
