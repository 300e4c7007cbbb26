"""The byte budget of a directory, shared by any number of processes: reserves bytes for new chunks and evicts old ones.

Before a chunk is written its bytes are reserved: they are added to the shared byte count, and the partial file gets its final
size. So files and reservations together never exceed the budget, however many processes write. A killed process's reservation
is its leftover file, and ends with that file's removal.

Pins, chunks that are not evicted until a date, are listed in one small file: each line is a key and a date, in seconds since
the epoch. The file is changed, and checked before an eviction, under the lock of the byte count, so a chunk is safe as soon as
it is pinned.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cake_hf.errors import StoreError
from cake_hf.stores.byte_count import ByteCount, OpenCount
from cake_hf.stores.default_budget import FreeShare
from cake_hf.stores.eviction import Entry, Order, least_recently_used
from cake_hf.stores.folder import BYTES, Folder, ShardListing
from cake_hf.stores.marker import PINS
from cake_hf.stores.safe_paths import directory, opened, replace_file, status_of
from cake_hf.util.redaction import shown
from cake_hf.util.sizes import bytes_text

logger = logging.getLogger("cake_hf")

SURVEY_SECONDS = 60.0
"""Seconds after which the directory is surveyed again, to see recent uses and files that other programs added or removed."""

ATTEMPTS = 3

MOST_EVICTIONS = 256
"""Most files that are deleted before other processes may take the lock."""

PAUSE = 0.005

COARSE_SECONDS = 2.5
"""Coarsest resolution of folder dates on any filesystem: a folder that changed so shortly before a survey may have changed
again after it, without a change of its date."""

_told: set[str] = set()
"""Stores whose budget was logged already."""


@dataclass(frozen=True)
class Survey:
    """The result of a survey of the directory.

    Attributes:
        begun: when the survey started, in nanoseconds since the epoch.
        shards: the folders with chunks.
        candidates: chunks in the order of eviction.
    """

    begun: int
    shards: dict[str, ShardListing]
    candidates: list[Entry]

    def may_have_missed(self, shard: ShardListing) -> bool:
        """Returns whether the folder may have changed after it was listed without a change of its date."""
        return shard.changed > self.begun - COARSE_SECONDS * 10**9


class ByteBudget:
    """Reserves and counts bytes; with a budget, also evicts chunks.

    Args:
        folder: the folder with the chunks.
        budget: most bytes of the folder's chunks and those being written, or a share from which the budget is computed at the
            first write; None for no limit.
        order: the order of eviction.
        clock: gives monotonic seconds.
    """

    def __init__(
        self, folder: Folder, budget: int | FreeShare | None, order: Order, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._share = budget if isinstance(budget, FreeShare) else None
        self._budget = None if isinstance(budget, FreeShare) else budget
        self._order = order
        self._clock = clock
        self._count = ByteCount(folder.root / BYTES)
        # Chunks found by the last survey, in the order of eviction. Guarded by the byte count's lock, like all that follows.
        self._candidates: deque[Entry] = deque()
        self._evictable = 0
        self._survey_due = -float("inf")
        self._pins = Pins(folder.root)
        self._pins_seen: Mark = None

    @property
    def budget(self) -> int | None:
        """The budget in bytes; None for no limit, or if it has not been computed yet."""
        return self._budget

    def reserve(self, descriptor: int, nbytes: int) -> None:
        """Gives a partial file its final size, once there is room for it.

        A survey of a large directory takes long, so it runs while other processes may write; only folders that have changed
        meanwhile are listed again under the lock.

        Raises:
            StoreError: the chunk can never fit, or evicting all evictable chunks would not suffice; nothing was evicted then.
            OSError: passed through.
        """
        if self._share is not None and self._budget is None:
            self._work_out(self._share)
        if self._budget is not None and nbytes > self._budget:
            raise StoreError(f"A chunk of {nbytes:,} bytes is over the store's budget of {self._said()}; raise it.")
        survey = self._look() if self._budget is not None and self._clock() >= self._survey_due else None
        looks = 0
        while True:
            with self._count.opened(create=self._budget is not None) as count:
                room = count is None or self._budget is None or self._make_room(count, nbytes, survey)
                if room is True:
                    self._take(descriptor, nbytes, count)
                    return
            if room is None:  # many chunks have to be evicted: other processes may take the lock in between
                survey = None
                time.sleep(PAUSE)
                continue
            looks += 1
            if looks > ATTEMPTS:
                raise self._no_room(nbytes)
            survey = self._look()

    @contextmanager
    def counting(self) -> Iterator[Callable[[int], object]]:
        """Locks the byte count while files change; yields a function that adds a number of bytes (negative to subtract)."""
        with self._count.opened() as count:
            yield (lambda nbytes: None) if count is None else count.add

    def give_back(self, nbytes: int) -> None:
        """Cancels a reservation. If that cannot be recorded, the byte count is too high until the next survey."""
        with suppress(StoreError, OSError), self.counting() as add:
            add(-nbytes)

    def worked_out(self, stored: int) -> int | None:
        """Returns the budget in bytes, or what it would be if it were computed now; None for no limit. Changes nothing."""
        if self._share is None or self._budget is not None:
            return self._budget
        return self._share.bytes_for(self._folder.root, stored)

    def pinned(self) -> dict[str, int]:
        """Returns the chunks that are pinned now: key -> end of the pin, in seconds since the epoch."""
        return self._pins.read(time.time())

    def pin(self, pinned: Mapping[str, int], unpinned: Iterable[str]) -> None:
        """Pins chunks until a date, and unpins others.

        Raises:
            StoreError: another process holds the lock for too long.
            OSError: passed through.
        """
        with self._count.opened(create=True):
            self._pins.change(pinned, unpinned, time.time())

    def _work_out(self, share: FreeShare) -> None:
        """Computes the budget in bytes, and logs it once per store and process."""
        with self._count.opened() as count:
            stored = None if count is None else count.total
        if stored is None:
            stored = sum(entry.nbytes for entry in self._folder.entries())
        self._budget = share.bytes_for(self._folder.root, stored)
        if self._budget is None:
            self._share = None
            return
        # The byte count includes writes of other processes, so the directory is surveyed only when the budget is reached.
        self._survey_due = float("inf")
        if (place := os.path.realpath(self._folder.root)) not in _told:
            _told.add(place)
            logger.info(
                "The store %s may take %s, %s; file:///path?budget=50GB sets another budget.",
                shown(str(self._folder.root)),
                bytes_text(self._budget),
                share,
            )

    def _take(self, descriptor: int, nbytes: int, count: OpenCount | None) -> None:
        if count is not None:
            count.add(nbytes)
        try:
            os.ftruncate(descriptor, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if count is not None:
                    count.add(-nbytes)
                raise
            # Not every filesystem can extend a file. Until the bytes are written, only the byte count includes them.

    def _make_room(self, count: OpenCount, nbytes: int, survey: Survey | None) -> bool | None:
        """Evicts chunks until `nbytes` fit.

        Returns:
            True if there is room now; False if the directory has to be surveyed (again); None if more evictions are needed.

        Raises:
            StoreError: the directory was just surveyed, and evicting all evictable chunks would not suffice.
        """
        if survey is not None:
            self._take_in(count, survey)
        total, budget = count.total, self._budget
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
            if not self._candidates:  # many of the listed chunks are gone or were used again
                return False
            entry = self._candidates.popleft()
            self._evictable -= entry.nbytes
            total = count.add(-self._folder.discard(entry))
        return True if total + nbytes <= budget else None

    def _look(self) -> Survey:
        """Surveys the directory itself, without the lock."""
        self._folder.sweep()
        now = time.time_ns()
        shards = {shard: self._folder.shard_listing(shard) for shard in self._folder.shards()}
        return Survey(now, shards, self._order([entry for shard in shards.values() for entry in shard.entries]))

    def _take_in(self, count: OpenCount, survey: Survey) -> None:
        """Applies a survey, and lists again the folders that changed since: each added or removed name changes the date."""
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
        if self._share is not None and self._budget is not None:  # a share never declares stored chunks to be too many
            self._budget = max(self._budget, stored)
        count.set(stored + self._folder.partial_bytes())

    def _no_room(self, nbytes: int) -> StoreError:
        return StoreError(
            f"There is no room for {nbytes:,} bytes within the store's budget of {self._said()}: all of it is taken by "
            "chunks that are being written, read or pinned; raise the budget."
        )

    def _said(self) -> str:
        return f"{self._budget:,}" + (f" ({self._share})" if self._share else "")


MAX_PINS_BYTES = 2**26
"""More than a million chunks."""

_PIN_LINE = re.compile(rb"([0-9a-f]{40}) ([0-9]{1,12})")

Mark = tuple[int, int, int] | None
"""Distinguishes versions of the file without reading it: inode, mtime and size."""


class Pins:
    """The file with the pins. Methods pass OSError through; callers of `change` hold the lock of the byte count."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def mark(self) -> Mark:
        """Returns a mark that differs after each change; None if there is no file."""
        with suppress(FileNotFoundError), directory(self._root) as root:
            found = status_of(PINS, root)
            return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
        return None

    def read(self, now: float) -> dict[str, int]:
        """Returns the chunks that are pinned now: key -> end of the pin, in seconds since the epoch."""
        with (
            suppress(FileNotFoundError),
            directory(self._root) as root,
            opened(PINS, os.O_RDONLY, root) as (file, status),
        ):
            lines = os.pread(file, min(status.st_size, MAX_PINS_BYTES), 0).splitlines()
            found = (_PIN_LINE.fullmatch(line) for line in lines)
            return {line[1].decode(): int(line[2]) for line in found if line and int(line[2]) > now}
        return {}

    def change(self, pinned: Mapping[str, int], unpinned: Iterable[str], now: float) -> None:
        """Adds some pins and removes others; expired pins are removed, too."""
        wanted = {**self.read(now), **pinned}
        for key in unpinned:
            wanted.pop(key, None)
        text = "".join(f"{key} {until}\n" for key, until in sorted(wanted.items()))
        with directory(self._root) as root:
            replace_file(PINS, text.encode(), root)
