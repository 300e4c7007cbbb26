"""Room for one more chunk in a directory with a budget that any number of processes share.

Before a chunk is written its bytes are reserved: counted in the shared account, and visible as the size of the partial file.
So files and reservations together never pass the budget, however many processes write; what a killed one had reserved is its
leftover file, and goes with that.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cake_hf.arithmetic.errors import StoreError
from cake_hf.stores.account import Account, Balance
from cake_hf.stores.eviction import Entry, Order
from cake_hf.stores.folder import BYTES, Folder

SURVEY_SECONDS = 60.0
"""After so long the directory is looked at again: what was used meanwhile, and what came or went by other hands."""

ATTEMPTS = 3


class Room:
    """Reserves and counts bytes; with a budget, also makes room.

    Args:
        folder: with the chunks.
        budget: most bytes that the chunks of the folder, and those being written, may have; None for no limit of ours.
        order: in which chunks go.
        clock: monotonic seconds; replaceable for tests.
    """

    def __init__(
        self, folder: Folder, budget: int | None, order: Order, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._budget = budget
        self._order = order
        self._clock = clock
        self._account = Account(folder.root / BYTES)
        # What the last look at the directory found, by who goes first. Guarded by the account's lock, like all that follows.
        self._candidates: deque[Entry] = deque()
        self._evictable = 0
        self._survey_due = -float("inf")

    def reserve(self, descriptor: int, nbytes: int) -> None:
        """Give a partial file its size, once there is room for it.

        Raises:
            StoreError: it can never fit, or what could go does not suffice; nothing was evicted for it then.
            OSError: as it comes.
        """
        budget = self._budget
        if budget is not None and nbytes > budget:
            raise StoreError(f"A chunk of {nbytes:,} bytes is over the store's budget of {budget:,}; raise it.")
        with self._account.opened(create=budget is not None) as balance:
            if balance is not None:
                if budget is not None:
                    self._make_room(balance, nbytes, budget)
                balance.add(nbytes)
            try:
                os.ftruncate(descriptor, nbytes)
            except OSError:
                if balance is not None:
                    balance.add(-nbytes)
                raise

    @contextmanager
    def counting(self) -> Iterator[Callable[[int], object]]:
        """While files change: gives a function to be called with how many bytes there are more (or, negative, less)."""
        with self._account.opened() as balance:
            yield (lambda nbytes: None) if balance is None else balance.add

    def give_back(self, nbytes: int) -> None:
        """Nothing came of a reservation. Where that cannot be noted, the account is too high until the next look."""
        with suppress(StoreError, OSError), self.counting() as count:
            count(-nbytes)

    def _make_room(self, balance: Balance, nbytes: int, budget: int) -> None:
        for _ in range(ATTEMPTS):
            total = balance.total
            if total is None or self._clock() >= self._survey_due or total + nbytes - self._evictable > budget:
                total = self._survey(balance)
            if total + nbytes - self._evictable > budget:
                break
            while total + nbytes > budget and self._candidates:
                entry = self._candidates.popleft()
                self._evictable -= entry.nbytes
                total = balance.add(-self._folder.discard(entry))
            if total + nbytes <= budget:
                return
            self._survey_due = self._clock()  # much of what was listed is gone or in use again
        raise StoreError(
            f"There is no room for {nbytes:,} bytes within the store's budget of {budget:,}: all of it is taken by chunks that "
            "are being written or read; raise the budget."
        )

    def _survey(self, balance: Balance) -> int:
        """Look at the directory itself. The lock is held, so nobody's reservation comes or goes meanwhile."""
        self._folder.sweep()
        entries = list(self._folder.entries())
        self._candidates = deque(self._order(entries))
        self._evictable = sum(entry.nbytes for entry in entries)
        self._survey_due = self._clock() + SURVEY_SECONDS
        return balance.set(self._evictable + self._folder.partial_bytes())
