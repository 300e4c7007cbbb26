"""Room for one more chunk in a directory with a budget that any number of processes share.

Before a chunk is written its bytes are reserved: counted in the shared account, and visible as the size of the partial file.
So files and reservations together never pass the budget, however many processes write; what a killed one had reserved is its
leftover file, and goes with that.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cake_hf.errors import StoreError
from cake_hf.stores.byte_count import Account, Balance
from cake_hf.stores.default_budget import FreeShare
from cake_hf.stores.eviction import Entry, Order, least_recently_used
from cake_hf.stores.folder import BYTES, Folder, ShardListing
from cake_hf.stores.pins import Mark, Pins
from cake_hf.util.redaction import shown
from cake_hf.util.sizes import bytes_text

logger = logging.getLogger("cake_hf")

SURVEY_SECONDS = 60.0
"""After so long the directory is looked at again: what was used meanwhile, and what came or went by other hands."""

ATTEMPTS = 3

MOST_EVICTIONS = 256
"""Files that are deleted before others get the lock."""

PAUSE = 0.005

COARSE_SECONDS = 2.5
"""Dates of folders are no finer than that everywhere: what changed so shortly before a look may have changed again after it."""

_told: set[str] = set()
"""Stores of which it was logged how much they may take."""


@dataclass(frozen=True)
class Survey:
    """What a look at the directory has found.

    Attributes:
        begun: when it began, in nanoseconds since the epoch.
        shards: the folders with chunks.
        candidates: chunks, by who goes first.
    """

    begun: int
    shards: dict[str, ShardListing]
    candidates: list[Entry]

    def may_have_missed(self, shard: ShardListing) -> bool:
        """Whether a folder's date cannot tell what came after it was listed."""
        return shard.changed > self.begun - COARSE_SECONDS * 10**9


class Room:
    """Reserves and counts bytes; with a budget, also makes room.

    Args:
        folder: with the chunks.
        budget: most bytes that the chunks of the folder, and those being written, may have, or how that is worked out with the
            first write; None for no limit of ours.
        order: in which chunks go.
        clock: monotonic seconds; replaceable for tests.
    """

    def __init__(
        self, folder: Folder, budget: int | FreeShare | None, order: Order, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._share = budget if isinstance(budget, FreeShare) else None
        self._budget = None if isinstance(budget, FreeShare) else budget
        self._order = order
        self._clock = clock
        self._account = Account(folder.root / BYTES)
        # What the last look at the directory found, by who goes first. Guarded by the account's lock, like all that follows.
        self._candidates: deque[Entry] = deque()
        self._evictable = 0
        self._survey_due = -float("inf")
        self._pins = Pins(folder.root)
        self._pins_seen: Mark = None

    @property
    def budget(self) -> int | None:
        """In bytes; None for no limit, or where it has not been worked out yet."""
        return self._budget

    def reserve(self, descriptor: int, nbytes: int) -> None:
        """Give a partial file its size, once there is room for it.

        Looking at a large directory takes long, so it is done while others may write; only what has changed meanwhile is
        looked at again under the lock.

        Raises:
            StoreError: it can never fit, or what could go does not suffice; nothing was evicted for it then.
            OSError: as it comes.
        """
        if self._share is not None and self._budget is None:
            self._work_out(self._share)
        if self._budget is not None and nbytes > self._budget:
            raise StoreError(f"A chunk of {nbytes:,} bytes is over the store's budget of {self._said()}; raise it.")
        survey = self._look() if self._budget is not None and self._clock() >= self._survey_due else None
        looks = 0
        while True:
            with self._account.opened(create=self._budget is not None) as balance:
                room = balance is None or self._budget is None or self._make_room(balance, nbytes, survey)
                if room is True:
                    self._take(descriptor, nbytes, balance)
                    return
            if room is None:  # much has to go: others have their turn in between
                survey = None
                time.sleep(PAUSE)
                continue
            looks += 1
            if looks > ATTEMPTS:
                raise self._no_room(nbytes)
            survey = self._look()

    @contextmanager
    def counting(self) -> Iterator[Callable[[int], object]]:
        """While files change: gives a function to be called with how many bytes there are more (or, negative, less)."""
        with self._account.opened() as balance:
            yield (lambda nbytes: None) if balance is None else balance.add

    def give_back(self, nbytes: int) -> None:
        """Nothing came of a reservation. Where that cannot be noted, the account is too high until the next look."""
        with suppress(StoreError, OSError), self.counting() as count:
            count(-nbytes)

    def worked_out(self, stored: int) -> int | None:
        """The budget in bytes, as it is or would be worked out now; None for no limit. Changes nothing."""
        if self._share is None or self._budget is not None:
            return self._budget
        return self._share.bytes_for(self._folder.root, stored)

    def pinned(self) -> dict[str, int]:
        """Key -> until when it stays, in seconds since the epoch; of what is pinned now."""
        return self._pins.read(time.time())

    def pin(self, pinned: Mapping[str, int], unpinned: Iterable[str]) -> None:
        """Let chunks stay until a date, and others no longer.

        Raises:
            StoreError: another process holds the lock for too long.
            OSError: as it comes.
        """
        with self._account.opened(create=True):
            self._pins.change(pinned, unpinned, time.time())

    def _work_out(self, share: FreeShare) -> None:
        """From here on the budget is a number, which is logged once per store and process."""
        with self._account.opened() as balance:
            stored = None if balance is None else balance.total
        if stored is None:
            stored = sum(entry.nbytes for entry in self._folder.entries())
        self._budget = share.bytes_for(self._folder.root, stored)
        if self._budget is None:
            self._share = None
            return
        # What others have written is counted in the account, so the directory is only looked at where that does not suffice.
        self._survey_due = float("inf")
        if (place := os.path.realpath(self._folder.root)) not in _told:
            _told.add(place)
            logger.info(
                "The store %s may take %s, %s; file:///path?budget=50GB sets another budget.",
                shown(str(self._folder.root)),
                bytes_text(self._budget),
                share,
            )

    def _take(self, descriptor: int, nbytes: int, balance: Balance | None) -> None:
        if balance is not None:
            balance.add(nbytes)
        try:
            os.ftruncate(descriptor, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if balance is not None:
                    balance.add(-nbytes)
                raise
            # Not every filesystem can do that ahead. Until the bytes are written only the account knows of them.

    def _make_room(self, balance: Balance, nbytes: int, survey: Survey | None) -> bool | None:
        """Whether there is room now; False where the directory has to be looked at (again), None where more could go.

        Raises:
            StoreError: the directory was just looked at, and what could go does not suffice.
        """
        if survey is not None:
            self._take_in(balance, survey)
        total, budget = balance.total, self._budget
        if total is None or budget is None:
            return False
        if total + nbytes > budget and self._pins.mark() != self._pins_seen:
            return False
        if total + nbytes - self._evictable > budget:
            if survey is not None:
                raise self._no_room(nbytes)
            return False
        for _ in range(MOST_EVICTIONS):
            if total + nbytes <= budget:
                return True
            if not self._candidates:  # much of what was listed is gone or in use again
                return False
            entry = self._candidates.popleft()
            self._evictable -= entry.nbytes
            total = balance.add(-self._folder.discard(entry))
        return True if total + nbytes <= budget else None

    def _look(self) -> Survey:
        """Look at the directory itself, without the lock."""
        self._folder.sweep()
        now = time.time_ns()
        shards = {shard: self._folder.shard_listing(shard) for shard in self._folder.shards()}
        return Survey(now, shards, self._order([entry for shard in shards.values() for entry in shard.entries]))

    def _take_in(self, balance: Balance, survey: Survey) -> None:
        """What a look has found, and what has changed since then: names in a folder cannot come or go without its date."""
        self._pins_seen, pinned = self._pins.mark(), self._pins.read(time.time())
        known = {entry.key for entry in survey.candidates}
        listings, late = dict(survey.shards), []
        for shard in self._folder.shards():
            before = listings.get(shard)
            if before is None or survey.may_have_missed(before) or self._folder.shard_changed(shard) != before.changed:
                listings[shard] = self._folder.shard_listing(shard)
                late += [entry for entry in listings[shard].entries if entry.key not in known]
        goes = [*survey.candidates, *least_recently_used(late)]
        self._candidates = deque(entry for entry in goes if entry.key not in pinned)
        there = [entry for shard in listings.values() for entry in shard.entries]
        self._evictable = sum(entry.nbytes for entry in there if entry.key not in pinned)
        if self._share is None:
            self._survey_due = self._clock() + SURVEY_SECONDS
        stored = sum(entry.nbytes for entry in there)
        if self._share is not None and self._budget is not None:  # nobody has said that what is there is too much
            self._budget = max(self._budget, stored)
        balance.set(stored + self._folder.partial_bytes())

    def _no_room(self, nbytes: int) -> StoreError:
        return StoreError(
            f"There is no room for {nbytes:,} bytes within the store's budget of {self._said()}: all of it is taken by "
            "chunks that are being written, read or pinned; raise the budget."
        )

    def _said(self) -> str:
        return f"{self._budget:,}" + (f" ({self._share})" if self._share else "")
