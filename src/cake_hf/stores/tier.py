"""A tier: one store among others, with its policy, its position and its health; and how a row of tiers is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from cake_hf.errors import CorruptChunk, StoreError, is_a_fault
from cake_hf.stores.base import Part, Store
from cake_hf.stores.health import TierHealth
from cake_hf.util.redaction import shown

T = TypeVar("T")


@dataclass(frozen=True)
class Tier:
    """A store among others, and its policy.

    Attributes:
        store: any store.
        write: whether new values are written to this tier. True: before `write` returns; "behind": soon after; False: never.
        promote: whether values found in a farther tier are copied here; by default yes, unless `write` is False. With
            `write=False` and `promote=True` the tier caches reads; with both False the store is never changed.
        owned: whether closing the tiers closes this store.

    Raises:
        StoreError: `store` is not a Store, or `write` is not one of these policies.
    """

    store: Store
    write: bool | Literal["behind"] = True
    promote: bool | None = None
    owned: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.store, Store):
            raise StoreError(f"A tier has a Store in it, not {type(self.store).__name__}; make one with open_store.")
        if self.write not in (True, False, "behind"):
            raise StoreError(f'Whether a tier is written is True, False or "behind", not {shown(repr(self.write))}.')

    @property
    def takes_copies(self) -> bool:
        """Whether values found in a farther tier are copied here."""
        return self.write is not False if self.promote is None else self.promote

    @property
    def read_only(self) -> bool:
        """Whether the store must not be changed."""
        return self.write is False and not self.takes_copies


class TierPlace:
    """A tier at its position among the others, with its health.

    Args:
        tier: the store and its policy.
        level: distance, 0 for the nearest; tiers of one level are equally near.
        clock: monotonic seconds.
    """

    def __init__(self, tier: Tier, level: int, clock: Callable[[], float]) -> None:
        self.tier = replace(tier, write=False, promote=False) if tier.store.read_only else tier
        self.store = tier.store
        self.level = level
        self.health = TierHealth(_name(tier.store), clock)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Returns the store's mask for the keys; raises whatever the store raises, also if its mask has another length."""
        with self.health.look("looked up"):
            return [has for _, has in zip(keys, self.store.contains(keys), strict=True)]

    def listing(self) -> list[str]:
        """Returns all keys; raises whatever the store raises."""
        with self.health.look("listed"):
            return list(self.store.keys())

    def write(self, key: str, parts: Sequence[Part], *, replace: bool) -> bool:
        """Writes a value; raises whatever the store raises."""
        with self.health.change("written"):
            written = self.store.write(key, parts, replace=replace)
        if written:
            self.health.lift_quarantine(key)
        return written

    def takes_copies(self) -> bool:
        """Returns whether values found in a farther tier should be copied here now."""
        return self.tier.takes_copies and not self.health.writes_badly()

    def put(self, key: str, value: bytearray, *, replace: bool) -> bool:
        """Writes a value if the store is healthy; faults are counted but not raised."""
        written = False
        if self.health.writes_badly():
            self.health.count(skipped=1)
        else:
            with collected([]):
                written = self.write(key, [value], replace=replace)
        return written

    def delete(self, key: str) -> bool:
        """Removes a key; returns False if it was not stored.

        Raises:
            StoreError: the key is stored, and the tier is read-only.
            Exception: whatever the store raises.
        """
        if self.tier.read_only:
            if not self.health.is_quarantined(key) and self.contains([key])[0]:
                raise StoreError(f"{self.health.name} is only read here: delete it there, or give the tier write=True.")
            return False
        with self.health.change("deleted"):
            deleted = self.store.delete(key)
        self.health.lift_quarantine(key)
        return deleted

    def discard(self, key: str) -> None:
        """Removes the value of this key, which is wrong if there is one; quarantines the key if it cannot be removed."""
        deleted = False
        try:
            if not self.tier.read_only and not self.health.writes_badly():
                with collected([]):
                    self.delete(key)
                    deleted = True
        finally:
            if not deleted:
                self.health.quarantine(key)


Targets = Sequence[tuple[TierPlace, bool]]
"""Tiers without a usable value of a key, each with whether a corrupt one has to be replaced there."""


def look_up(places: Sequence[TierPlace], keys: Sequence[str]) -> tuple[list[bool], list[BaseException]]:
    """Asks each tier once, about the keys that the tiers before it lack.

    Returns:
        The mask over all tiers; and the faults, if no tier answered.
    """
    found, answered = [False] * len(keys), False
    faults: list[BaseException] = []
    for place in sorted(places, key=lambda place: place.health.reads_badly()):
        missing = [n for n, key in enumerate(keys) if not found[n] and not place.health.is_quarantined(key)]
        if answered and (not missing or place.health.reads_badly()):
            continue
        with collected(faults):
            for n, has in zip(missing, place.contains([keys[n] for n in missing]), strict=True):
                found[n] = has
            answered = True
    return found, [] if answered else faults


def first(
    places: Sequence[TierPlace], key: str, ask: Callable[[Store], T | None], nbytes: int | None = None
) -> tuple[T | None, TierPlace | None, Targets]:
    """Asks one tier after the other for a value.

    Args:
        places: the tiers.
        key: the key of the value.
        ask: asks one store; returns None for a miss.
        nbytes: bytes that are read, to be counted; None if `ask` does not read.

    Returns:
        The answer, the tier that gave it, and the tiers asked before that one, which had no usable value. Of a miss, None.

    Raises:
        CorruptChunk: a tier has the value, but not of the right size, and no tier has a better one.
        StoreError: no tier has the value, and at least one failed.
    """
    lacking: list[tuple[TierPlace, bool]] = []
    faults: list[BaseException] = []
    asked = [place for place in places if not place.health.is_quarantined(key)]
    for place in sorted(asked, key=lambda place: (place.health.reads_badly(), place.level, place.health.load())):
        with collected(faults):
            try:
                with place.health.look("read"):
                    value = ask(place.store)
            except CorruptChunk:
                lacking.append((place, True))
                raise
            if value is not None:
                if nbytes is not None:
                    place.health.count(reads=1, bytes_read=nbytes)
                return value, place, lacking
            lacking.append((place, False))
    raise_any(faults, f"Chunk {key} cannot be read from any tier.")
    return None, None, lacking


@contextmanager
def collected(faults: list[BaseException]) -> Iterator[None]:
    """Catches a fault that the body raises, and appends it to a list."""
    try:
        yield
    except BaseException as error:
        if not is_a_fault(error):
            raise
        faults.append(error)


def raise_any(faults: Sequence[BaseException], what: str) -> None:
    """Raises if there are faults.

    Raises:
        CorruptChunk: a CorruptChunk is among the faults. It says more than a store's failure: such a value has to be replaced.
        StoreError: otherwise; its message is the sentence `what` and the first fault.
    """
    for fault in faults:
        if isinstance(fault, CorruptChunk):
            raise fault
    if faults:
        raise StoreError(f"{what} {faults[0]}") from faults[0]


def _name(store: Store) -> str:
    """Returns the store's own repr, or the name of its type if it has none."""
    own = type(store).__repr__ is not object.__repr__
    return shown(repr(store)) if own else type(store).__name__
