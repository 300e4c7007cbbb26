"""Tiers: several stores behind one another, nearest first, such as this process's memory, this machine's disk, a shared bucket.

    reading   from the nearest tier that has the value; if a tier fails, the next one is asked
    writing   to each tier by its own policy: at once, behind, or never
    behind    the background queue copies values found in a far tier to nearer ones, and does the writes of policy "behind"

No lock is held while a tier works, so threads that load different chunks use different tiers at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.limits import Limits
from cake_hf.stores.background_queue import TIERS, QueueUser, Task
from cake_hf.stores.base import Part, Store, place_of, total_bytes
from cake_hf.stores.health import TierCounts
from cake_hf.stores.memory import MemoryStore
from cake_hf.stores.pieces import joined
from cake_hf.stores.tier import Targets, Tier, TierPlace, collected, first, look_up, raise_any

Check = Callable[[bytearray, str], object]
"""Called with a value and its key; raises `CorruptChunk` if the value does not belong to the key."""

Level = Tier | Store | Sequence[Tier | Store]


class TierStore(Store):
    """One store made of several. If one tier fails, the others take over.

    *Reading* asks the nearest tier first and moves on at a miss, a fault or a value of another size. It raises a `StoreError`
    only if no tier has the value and at least one failed. A value read from a far tier is copied to the nearer tiers in the
    background.

    *Tiers of one level* are equally near, such as two disks. A read goes to the tier with the fewest operations under way, and
    otherwise to each in turn; so two loader threads share the tiers, and the throughputs add up. Levels are not weighed
    against each other: the nearer one is meant to be much faster, and a chunk fetched from a farther one would be the chunk
    that everything else waits for.

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
        self.reads_ranges = all(place.store.reads_ranges for place in self._places)
        self.range_seconds = max(place.store.range_seconds for place in self._places)
        self.read_only = all(place.tier.read_only for place in self._places)
        self.in_memory = all(place.store.in_memory for place in self._places)
        self._check = check
        self._queue = QueueUser(TIERS, partial(_lasting_place, self._places), queue_bytes, close_seconds)

    def __repr__(self) -> str:
        return f"TierStore([{', '.join(place.health.name for place in self._places)}])"

    def counts(self) -> list[TierCounts]:
        """Returns the counts of each tier so far, nearest first."""
        return [place.health.counts() for place in self._places]

    def identity(self) -> Hashable:
        """Returns the identities of the lasting tiers: two tier stores are equal if those are, whatever their memory tiers."""
        return _lasting_place(self._places)

    # Queries.

    def mismatch_reason(self, namespace: str, metadata: Callable[[], Mapping[str, Any]]) -> str:
        """Returns the first mismatch reason that a tier gives."""
        return next(filter(None, (place.store.mismatch_reason(namespace, metadata) for place in self._places)), "")

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Asks each tier once, about the keys that the tiers before it lack. A tier that fails counts as empty.

        Raises:
            StoreError: all tiers failed.
        """
        found, faults = look_up(self._places, keys)
        raise_any(faults, "None of the tiers can be asked for chunks.")
        return found

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        stamp, nbytes = self._queue.stamp(), total_bytes(parts)
        size, place, lacking = first(self._places, key, lambda store: store.read_into(key, parts), nbytes)
        if place is not None:
            self._promote(key, parts, place, lacking, stamp)
        return size

    def read_up_to(self, key: str, buffer: memoryview) -> int | None:
        stamp = self._queue.stamp()
        size, place, lacking = first(self._places, key, lambda store: store.read_up_to(key, buffer))
        if place is not None and size is not None:
            place.health.count(reads=1, bytes_read=size)
            self._promote(key, [buffer[:size]], place, lacking, stamp)
        return size

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        nbytes = total_bytes(parts)
        return bool(first(self._places, key, lambda store: store.read_range(key, parts, offset) or None, nbytes)[0])

    def head(self, key: str, nbytes: int) -> bytes | None:
        return first(self._places, key, lambda store: store.head(key, nbytes))[0]

    def read(self, key: str) -> bytearray | None:
        """Returns the value from the first tier that has it.

        It is not copied to nearer tiers: callers of this method go through the whole store.
        """
        value, place, _ = first(self._places, key, lambda store: store.read(key))
        if place is not None and value is not None:
            place.health.count(reads=1, bytes_read=len(value))
        return value

    def size(self, key: str) -> int | None:
        return first(self._places, key, lambda store: store.size(key))[0]

    def keys(self) -> Iterator[str]:
        """Iterates over the keys of all tiers, each key once; a tier that cannot be listed counts as empty.

        Raises:
            StoreError: none of the tiers can be listed.
        """
        seen: set[str] = set()
        faults: list[BaseException] = []
        for place in self._places:
            new: list[str] = []
            with collected(faults):
                new = [key for key in place.listing() if key not in seen]
            seen.update(new)
            yield from new
        if len(faults) == len(self._places):
            raise_any(faults, "None of the tiers can be listed.")

    # Changes.

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        if replace:
            with self._queue.changing(key):
                written = self._write_now(key, parts, replace=True)
        elif look_up(self._places, [key])[0][0]:
            return False
        else:
            written = self._write_now(key, parts, replace=False)
        behind = [(place, replace) for place in self._places if place.tier.write == "behind"]
        self._copy_soon(key, parts, behind, "written")
        return written

    def delete(self, key: str) -> bool:
        """Removes a key from all tiers.

        Raises:
            StoreError: a tier failed, or has the key and is read-only. The key was still removed from the others.
        """
        deleted = False
        faults: list[BaseException] = []
        with self._queue.changing(key):
            for place in self._places:
                with collected(faults):
                    deleted |= place.delete(key)
        raise_any(faults, f"Chunk {key} cannot be deleted from all tiers.")
        return deleted

    def check_writable(self) -> None:
        """Checks the tiers that are written at once; a tier that refuses is logged.

        Raises:
            StoreError: all of these tiers refuse.
        """
        eager = self._eager()
        faults: list[BaseException] = []
        for place in eager:
            with collected(faults), place.health.change("written"):
                place.store.check_writable()
        if len(faults) == len(eager):
            raise_any(faults, "Nothing can be written to any tier.")

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
            with collected([]):
                found = {**place.store.notes(), **found}
        return found

    def put_note(self, name: str, note: bytes | None) -> None:
        """Keeps the note in every tier that values are written to; faults are ignored."""
        for place in self._places:
            if place.tier.write:
                with collected([]):
                    place.store.put_note(name, note)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until the background queue is empty; returns False if `timeout` seconds did not suffice.

        Without a timeout it waits as long as there is progress, and returns False once one copy takes longer than
        `close_seconds`.
        """
        return self._queue.flush(timeout)

    def close(self) -> None:
        """Waits for the background queue, at most `close_seconds`, and closes the tiers that are owned."""
        self._queue.close()
        with ExitStack() as stack:
            for place in self._places:
                if place.tier.owned:
                    stack.callback(place.store.close)

    # Internals.

    def _eager(self) -> list[TierPlace]:
        places = [place for place in self._places if place.tier.write is True]
        if not places:
            raise StoreError("No tier takes new values; give one of them write=True, or only read (save=False).")
        return places

    def _write_now(self, key: str, parts: Sequence[Part], *, replace: bool) -> bool:
        """Writes to the tiers that are written at once; to tiers in trouble only if no other tier takes the value."""
        written: dict[TierPlace, bool] = {}
        faults: list[BaseException] = []
        for place in sorted(self._eager(), key=lambda place: place.health.writes_badly()):
            if written and place.health.writes_badly():
                place.health.count(skipped=1)
                continue
            with collected(faults):
                written[place] = place.write(key, parts, replace=replace)
        if not written:
            raise_any(faults, f"Chunk {key} cannot be written to any tier.")
        for place in self._places:
            place.health.count(written=written.get(place, False))
            if replace and place not in written:
                place.discard(key)
        return any(written.values())

    def _promote(self, key: str, parts: Sequence[memoryview], place: TierPlace, lacking: Targets, stamp: int) -> None:
        """Copies a value that was read from a tier to the nearer ones, soon."""
        targets = [(near, wrong) for near, wrong in lacking if near.level < place.level and near.takes_copies()]
        self._copy_soon(key, parts, targets, "promoted", self._check, stamp)

    def _copy_soon(
        self,
        key: str,
        parts: Sequence[Part],
        targets: Targets,
        counted: Literal["promoted", "written"],
        check: Check | None = None,
        stamp: int | None = None,
    ) -> None:
        """Queues copies of a value to these tiers. Never waits: copies that do not fit are skipped."""

        def put(value: bytearray) -> None:
            try:
                if check is not None:
                    check(value, key)
            except CorruptChunk:  # The reader of the value finds that out as well, and reports it.
                return
            for place, wrong in targets:
                place.health.count(**{counted: place.put(key, value, replace=wrong)})

        nbytes = total_bytes(parts)
        if targets and not (
            self._queue.has_room(nbytes) and self._queue.offer(Task(key, nbytes, partial(put, joined(parts))), stamp)
        ):
            for place, _ in targets:
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
    from cake_hf.chunks.stored_forms import check_any_file  # imported here since it imports torch

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
                check=check_any_file,
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
