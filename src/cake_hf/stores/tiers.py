"""Tiers: several stores behind one another, nearest first, such as this process's memory, this machine's disk, a shared bucket.

    reading   from the nearest tier that has the value; if a tier fails, the next one is asked
    writing   to each tier by its own policy: at once, behind, or never
    behind    one background thread copies values found in a far tier to nearer ones, and does the writes of policy "behind"

No lock is held while a tier works, so threads that load different chunks use different tiers at the same time.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.limits import Limits
from cake_hf.stores.background import Behind, Errand
from cake_hf.stores.base import Part, Store, place_of, total_bytes
from cake_hf.stores.health import TierCounts
from cake_hf.stores.memory import MemoryStore
from cake_hf.stores.pieces import joined
from cake_hf.stores.tier import Faults, Tier, TierAnswer, TierPlace, TierRow

Check = Callable[[bytearray, str], object]
"""Called with a value and its key; raises `CorruptChunk` if the value does not belong to the key."""

Level = Tier | Store | Sequence[Tier | Store]


class TierStore(Store):
    """One store made of several. If one tier fails, the others take over.

    *Reading* asks the nearest tier first and moves on at a miss, a fault or a value of another size. It raises a `StoreError`
    only if no tier has the value and at least one failed. A value read from a far tier is copied to the nearer tiers in the
    background.

    *Tiers of one level* are equally near: two disks, or a disk and a network that are both worth using. A read goes to the
    tier that should finish it first, judging by its pace so far and the reads under way there; so two loader threads share
    the tiers, and the throughputs add up. Levels are not weighed against each other: the nearer one is meant to be much
    faster, and a chunk fetched from a farther one would be the chunk that everything else waits for.

    *Writing* tries every tier with `write=True` before it returns, and raises only if none of them took the value; nothing is
    listed then. The value is durable as soon as the first durable tier has it (memory is not durable). If such a tier fails,
    the value is only as safe as the tiers that took it; the log says so once.
    `replace` reaches every tier: if a wrong value can be neither replaced nor deleted in a tier, it is quarantined there.

    *A tier in trouble* (two faults in a row, or an operation that hangs) is left alone for a while: it is asked last, and
    left out of lookups and writes that other tiers can serve.

    Args:
        levels: nearest first: stores, tiers, or sequences of them that are equally near.
        queue_bytes: bytes of values that may wait in the background queue; beyond that, copies are skipped and counted.
        close_seconds: how long `close`, and leaving the interpreter, wait for the background queue.
        check: check that a value has to pass before it is copied to a nearer tier, so that damaged values do not spread.
        clock: monotonic seconds; replaceable for tests.

    Raises:
        ValueError: there is no tier, or values are to be written behind but to no tier at once.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        queue_bytes: int = Limits.tier_queue_bytes,
        close_seconds: float = 30.0,
        check: Check | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = [
            TierPlace(tier if isinstance(tier, Tier) else Tier(tier), number, clock)
            for number, level in enumerate(levels)
            for tier in ([level] if isinstance(level, (Tier, Store)) else level)
        ]
        policies = {place.tier.write for place in self._places}
        if not self._places:
            raise ValueError("A tier store needs at least one tier.")
        if "behind" in policies and True not in policies:
            raise ValueError('Where a tier is written "behind", another must be written at once (write=True).')
        self._row = TierRow(self._places)
        self.reads_ranges = all(place.store.reads_ranges for place in self._places)
        self.range_seconds = max(place.store.range_seconds for place in self._places)
        self.read_only = all(place.tier.read_only for place in self._places)
        self._check = check
        self._behind = Behind(queue_bytes, close_seconds, partial(_lasting_place, self._places))
        weakref.finalize(self, self._behind.retire).atexit = False

    def __repr__(self) -> str:
        return f"TierStore([{', '.join(place.health.name for place in self._places)}])"

    def counts(self) -> list[TierCounts]:
        """Returns the counts of each tier so far, nearest first."""
        return [place.health.counts() for place in self._places]

    def identity(self) -> Hashable:
        """Returns the identities of the lasting tiers: two tier stores are equal if those are, whatever their memory tiers."""
        return _lasting_place(self._places)

    # Queries.

    def mismatch_reason(self, namespace: str, facts: Callable[[], Mapping[str, Any]]) -> str:
        """Returns the first mismatch reason that a tier gives."""
        return next(filter(None, (place.store.mismatch_reason(namespace, facts) for place in self._places)), "")

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Asks each tier once, about the keys that the tiers before it lack. A tier that fails counts as empty.

        Raises:
            StoreError: all tiers failed.
        """
        found, faults = self._row.look_up(keys)
        faults.tell("None of the tiers can be asked for chunks.")
        return found

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        stamp, nbytes = self._behind.stamp(), total_bytes(parts)
        answer = self._row.first(key, lambda store: store.read_into(key, parts), nbytes)
        if answer.place is not None:
            self._carry_on(key, parts, stamp, answer)
        return answer.value

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        answer = self._row.first(key, lambda store: store.read_range(key, parts, offset) or None, total_bytes(parts))
        return answer.place is not None

    def head(self, key: str, nbytes: int) -> bytes | None:
        return self._row.first(key, lambda store: store.head(key, nbytes)).value

    def read(self, key: str) -> bytearray | None:
        """Returns the value from the first tier that has it.

        It is not copied to nearer tiers: callers of this method go through the whole store.
        """
        answer = self._row.first(key, lambda store: store.read(key))
        if answer.place is not None and answer.value is not None:
            answer.place.health.count(reads=1, bytes_read=len(answer.value))
        return answer.value

    def size(self, key: str) -> int | None:
        return self._row.first(key, lambda store: store.size(key)).value

    def keys(self) -> Iterator[str]:
        """Iterates over the keys of all tiers, each key once; a tier that cannot be listed counts as empty.

        Raises:
            StoreError: none of the tiers can be listed.
        """
        seen: set[str] = set()
        faults = Faults()
        for place in self._places:
            new: list[str] = []
            with faults.caught():
                new = [key for key in place.listing() if key not in seen]
            seen.update(new)
            yield from new
        if faults.count == len(self._places):
            faults.tell("None of the tiers can be listed.")

    # Changes.

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        if not replace and self._row.look_up([key])[0][0]:
            return False
        if replace:
            with self._behind.changing(key):
                written = self._write_now(key, parts, replace=True)
        else:
            written = self._write_now(key, parts, replace=False)
        self._write_behind(key, parts, replace=replace)
        return written

    def delete(self, key: str) -> bool:
        """Removes a key from all tiers.

        Raises:
            StoreError: a tier failed, or has the key and is read-only. The key was still removed from the others.
        """
        deleted, faults = False, Faults()
        with self._behind.changing(key):
            for place in self._places:
                with faults.caught():
                    deleted |= place.delete(key)
        faults.tell(f"Chunk {key} cannot be deleted from all tiers.")
        return deleted

    def check_writable(self) -> None:
        """Checks the tiers that are written at once; a tier that refuses is logged.

        Raises:
            StoreError: all of these tiers refuse.
        """
        eager, faults = self._eager(), Faults()
        for place in eager:
            with faults.caught():
                place.health.change("written", place.store.check_writable)
        if faults.count == len(eager):
            faults.tell("Nothing can be written to any tier.")

    def look_only(self) -> None:
        for place in self._places:
            place.store.look_only()

    def leaves_traces(self) -> bool:
        noting = (place.store for place in self._places if place.store.notes_folder() is not None)
        return all(store.leaves_traces() for store in islice(noting, 1))

    def notes_folder(self) -> Path | None:
        folders = (place.store.notes_folder() for place in self._places)
        return next((folder for folder in folders if folder is not None), None)

    def notes(self) -> Mapping[str, bytes]:
        """Returns the notes of all tiers that can be read; of two notes with the same name, the nearest tier's."""
        found: dict[str, bytes] = {}
        for place in self._places:
            with Faults().caught():
                found = {**place.store.notes(), **found}
        return found

    def put_note(self, name: str, note: bytes | None) -> None:
        """Keeps the note in every tier that values are written to; faults are ignored."""
        for place in self._places:
            if place.tier.write:
                with Faults().caught():
                    place.store.put_note(name, note)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until the background queue is empty; returns False if `timeout` seconds did not suffice.

        Without a timeout it waits as long as there is progress, and returns False once one copy takes longer than
        `close_seconds`.
        """
        return self._behind.flush(timeout)

    def close(self) -> None:
        """Waits for the background queue, at most `close_seconds`, and closes the tiers that are owned."""
        self._behind.close()
        with ExitStack() as stack:
            for place in self._places:
                if place.tier.owned:
                    stack.callback(place.store.close)

    # Internals: promotion and writes.

    def _carry_on(self, key: str, parts: Sequence[memoryview], stamp: int, answer: TierAnswer[int]) -> None:
        """Queues copies of a value that was read to the nearer tiers that lack it, if they fit. Never waits."""
        targets, nbytes = answer.targets(), total_bytes(parts)
        if targets and self._behind.has_room(nbytes):
            errand = Errand(key, nbytes, partial(self._promote, key, joined(parts), targets))
            if self._behind.offer(errand, stamp):
                return
        for place, _ in targets:
            place.health.count(skipped=1)

    def _promote(self, key: str, value: bytearray, targets: Sequence[tuple[TierPlace, bool]]) -> None:
        try:
            if self._check is not None:
                self._check(value, key)
        except CorruptChunk:  # The reader of the value finds that out as well, and reports it.
            return
        for place, wrong in targets:
            place.health.count(promoted=place.put(key, value, replace=wrong))

    def _eager(self) -> list[TierPlace]:
        places = [place for place in self._places if place.tier.write is True]
        if not places:
            raise StoreError("No tier takes new values; give one of them write=True, or only read (save=False).")
        return places

    def _write_now(self, key: str, parts: Sequence[Part], *, replace: bool) -> bool:
        """Writes to the tiers that are written at once; to tiers in trouble only if no other tier takes the value."""
        written: dict[TierPlace, bool] = {}
        faults = Faults()
        for place in sorted(self._eager(), key=lambda place: place.health.writes_badly()):
            if written and place.health.writes_badly():
                place.health.count(skipped=1)
                continue
            with faults.caught():
                written[place] = place.write(key, parts, replace=replace)
        if not written:
            faults.tell(f"Chunk {key} cannot be written to any tier.")
        for place in self._places:
            place.health.count(written=written.get(place, False))
            if replace and place not in written:
                place.disown(key)
        return any(written.values())

    def _write_behind(self, key: str, parts: Sequence[Part], *, replace: bool) -> None:
        places = [place for place in self._places if place.tier.write == "behind"]
        if not places:
            return

        def run() -> None:
            for place in places:
                place.health.count(written=place.put(key, value, replace=replace))

        nbytes = total_bytes(parts)
        if self._behind.has_room(nbytes):
            value = joined(parts)
            if self._behind.offer(Errand(key, nbytes, run)):
                return
        for place in places:
            place.health.count(skipped=1)


def _lasting_place(places: Sequence[TierPlace]) -> Hashable:
    stores = [place.store for place in places]
    lasting = [store for store in stores if not isinstance(store, MemoryStore)]
    return (TierStore.__name__, tuple(map(place_of, lasting or stores)))


def open_tiers(specs: Sequence[object], open_one: Callable[[Any], Store], limits: Limits | None = None) -> TierStore:
    """Opens tiers from the user's specs; chunks are checked before they are copied to a nearer tier.

    Args:
        specs: nearest first: each a spec that `open_one` takes, a `Tier`, or a list of those, which are then equally near.
        open_one: opens one store. A store that it makes is owned, so it is closed with the tiers; a store object that was
            passed in stays open.
        limits: how many bytes may wait in the background queue (`tier_queue_bytes`), and how long closing waits for it
            (`exit_flush_seconds`); None for the defaults.

    Raises:
        StoreError: the list is empty, a store cannot be opened, or the tiers do not go together; stores opened so far are
            closed again.
    """
    from cake_hf.chunks.codec import check_file  # imported here since it imports torch

    limits = limits or Limits()
    if not specs:
        raise StoreError('The list of stores is empty; give one or more, such as ["memory:4GB", "~/.cache/cake_hf"].')
    with ExitStack() as opened:

        def tier(spec: object, number: int) -> Tier:
            if isinstance(spec, Tier):
                return spec
            try:
                _refuse_no_member(spec)
                store = open_one(spec)
            except StoreError as error:
                raise StoreError(f"Store {number} of the list cannot be used: {error}") from error
            if store is not spec:
                opened.callback(store.close)
            return Tier(store, owned=store is not spec)

        levels = [
            [tier(one, number) for one in spec or (spec,)] if isinstance(spec, (list, tuple)) else tier(spec, number)
            for number, spec in enumerate(specs, start=1)
        ]
        try:
            tiers = TierStore(
                levels,
                queue_bytes=limits.tier_queue_bytes,
                close_seconds=limits.exit_flush_seconds,
                check=check_file,
            )
        except ValueError as error:
            raise StoreError(str(error)) from error
        opened.pop_all()
        return tiers


def _refuse_no_member(spec: object) -> None:
    if spec is None:
        raise StoreError("It is None; give a path, a URL or a Store.")
    if isinstance(spec, (list, tuple)):
        raise StoreError("A list in a list has stores in it that are equally near: one or more, and no lists.")
