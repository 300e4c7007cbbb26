"""Background work on values, void once the value changes: copies between tiers, writes behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from cake_hf.stores.background_queue import BEHIND, Share, Work, line_of
from cake_hf.util.forks import renewed_in_child

Errand = Work


class Behind:
    """The part that one store has of a line. May be used from any thread; nothing but `changing`, `flush` and `close` waits.

    Args:
        capacity: bytes of values that may be under way, those of other stores at the same place included.
        exit_seconds: how long `close`, and leaving the interpreter, wait for what is queued.
        place: gives what stores at the same place have in common; by default this is the only one.
    """

    def __init__(self, capacity: int, exit_seconds: float, place: Callable[[], Hashable] | None = None) -> None:
        own = object()
        self._exit_seconds = exit_seconds
        self._share = Share(lambda: line_of(BEHIND, own if place is None else place()), capacity, self._exit_seconds)
        self._changing: Counter[str] = Counter()
        self._stamp = 0
        renewed_in_child(self._renew)

    def stamp(self) -> int:
        """Take this before a value is read, and offer it along with an errand that carries the value on."""
        return self._stamp

    def has_room(self, nbytes: int) -> bool:
        """Whether a value of that size would be taken now; asked before it is copied."""
        return self._share.has_room(nbytes)

    def offer(self, errand: Errand, stamp: int | None = None) -> bool:
        """Queue an errand; False, and nothing happens, where it does not fit or comes too late.

        Args:
            errand: to be run once, after those before it.
            stamp: from before its value was read. Where any key was changed since, the value may be an old one: too late.
        """

        def late() -> bool:
            return self._changing[errand.key] > 0 or stamp not in (None, self._stamp)

        return self._share.offer(errand, late)

    @contextmanager
    def changing(self, key: str) -> Iterator[None]:
        """While a key's value is replaced or deleted: no errand with an older value of it is run, in here or later.

        What is queued for the key is dropped, what is being run for it is waited for.
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
        """Wait until nothing is queued or being run; False if `timeout` seconds did not suffice."""
        return self._share.flush(timeout)

    def close(self) -> bool:
        """Take nothing more, wait for what is queued (with a bound), and end the thread; False on time-out."""
        return self._share.close()

    def retire(self) -> None:
        """Take nothing more; the thread ends by itself when the queue is empty."""
        self._share.retire()

    def _renew(self) -> None:
        """In a child: changes that other threads had begun end in the parent only."""
        self._changing.clear()
