"""A tier: one store among others, with its policy; and the row of tiers that is asked for values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Literal, TypeVar

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
        """Returns the store's mask for the keys.

        Raises:
            Exception: whatever the store raises; also if its mask is not as long as `keys`.
        """

        def ask() -> list[bool]:
            return [has for _, has in zip(keys, self.store.contains(keys), strict=True)]

        return self.health.look("looked up", ask)

    def listing(self) -> list[str]:
        """Returns all keys; raises whatever the store raises."""
        return self.health.look("listed", lambda: list(self.store.keys()))

    def write(self, key: str, parts: Sequence[Part], *, replace: bool) -> bool:
        """Writes a value; raises whatever the store raises."""
        written = self.health.change("written", lambda: self.store.write(key, parts, replace=replace))
        if written:
            self.health.welcome(key)
        return written

    def put(self, key: str, value: bytearray, *, replace: bool) -> bool:
        """Writes a value if the store is healthy; faults are counted but not raised."""
        if self.health.writes_badly():
            self.health.count(skipped=1)
            return False
        try:
            return self.write(key, [value], replace=replace)
        except BaseException as error:
            if not is_a_fault(error):
                raise
            return False

    def delete(self, key: str) -> bool:
        """Removes a key; returns False if it was not stored.

        Raises:
            StoreError: the key is stored, and the tier is read-only.
            Exception: whatever the store raises.
        """
        if not self.tier.read_only:
            deleted = self.health.change("deleted", lambda: self.store.delete(key))
            self.health.welcome(key)
            return deleted
        if not self.health.shuns(key) and self.contains([key])[0]:
            raise StoreError(f"{self.health.name} is only read here: delete it there, or give the tier write=True.")
        return False

    def disown(self, key: str) -> None:
        """Removes the value of this key, which is wrong if there is one; quarantines the key if it cannot be removed."""
        if not self.tier.read_only and not self.health.writes_badly():
            try:
                self.delete(key)
            except BaseException as error:
                self.health.quarantine(key)
                if not is_a_fault(error):
                    raise
        else:
            self.health.quarantine(key)


class Faults:
    """Collects the faults of several places while the work goes on."""

    def __init__(self) -> None:
        self.count = 0
        self._first: BaseException | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catches and counts a fault that the body raises."""
        try:
            yield
        except BaseException as error:
            if not is_a_fault(error):
                raise
            self.count += 1
            # A corrupt value says more than a store's failure: such a value has to be replaced.
            if self._first is None or (isinstance(error, CorruptChunk) and not isinstance(self._first, CorruptChunk)):
                self._first = error

    def tell(self, what: str) -> None:
        """Raises if a fault was caught.

        Raises:
            CorruptChunk: a CorruptChunk was among the faults.
            StoreError: otherwise; its message is the sentence `what` and the first fault.
        """
        if isinstance(self._first, CorruptChunk):
            raise self._first
        if self._first is not None:
            raise StoreError(f"{what} {self._first}") from self._first


@dataclass(frozen=True)
class TierAnswer(Generic[T]):
    """The result of asking one tier after the other for a value.

    Attributes:
        value: None for a miss.
        place: the tier that had the value.
        lacking: the tiers asked before that one, which had no usable value, each with whether it had a corrupt one.
    """

    value: T | None = None
    place: TierPlace | None = None
    lacking: Sequence[tuple[TierPlace, bool]] = field(default=())

    def targets(self) -> list[tuple[TierPlace, bool]]:
        """Returns the entries of `lacking` to which the value should be copied."""
        return [
            (place, wrong)
            for place, wrong in self.lacking
            if self.place is not None
            and place.level < self.place.level
            and place.tier.takes_copies
            and not place.health.writes_badly()
        ]


class TierRow:
    """All tiers, nearest first, asked as if they were one store.

    Args:
        places: the tiers in order.
    """

    def __init__(self, places: Sequence[TierPlace]) -> None:
        self._places = list(places)

    def look_up(self, keys: Sequence[str]) -> tuple[list[bool], Faults]:
        """Asks each tier once, about the keys that the tiers before it lack.

        Returns:
            The mask over all tiers; and the faults, if no tier answered.
        """
        found, answers, faults = [False] * len(keys), 0, Faults()
        for place in sorted(self._places, key=lambda place: place.health.reads_badly()):
            missing = [n for n, key in enumerate(keys) if not found[n] and not place.health.shuns(key)]
            if answers and (not missing or place.health.reads_badly()):
                continue
            with faults.caught():
                for n, has in zip(missing, place.contains([keys[n] for n in missing]), strict=True):
                    found[n] = has
                answers += 1
        return found, Faults() if answers else faults

    def first(self, key: str, ask: Callable[[Store], T | None], nbytes: int | None = None) -> TierAnswer[T]:
        """Asks one tier after the other until one has the value.

        Args:
            key: of the value.
            ask: asks one store; returns None for a miss.
            nbytes: bytes that a read returns; None if `ask` does not read, so that the store's pace is not updated.

        Raises:
            CorruptChunk: a tier has the value, but not of the right size, and no tier has a better one.
            StoreError: no tier has the value, and at least one failed.
        """
        lacking: list[tuple[TierPlace, bool]] = []
        faults = Faults()
        for place in self._route(key, nbytes or 0):
            question = partial(ask, place.store)
            with faults.caught():
                try:
                    value = (
                        place.health.look("read", question) if nbytes is None else place.health.read(nbytes, question)
                    )
                except CorruptChunk:
                    lacking.append((place, True))
                    raise
                if value is not None:
                    return TierAnswer(value, place, lacking)
                lacking.append((place, False))
        faults.tell(f"Chunk {key} cannot be read from any tier.")
        return TierAnswer()

    def _route(self, key: str, nbytes: int) -> list[TierPlace]:
        """Returns the tiers in the order in which they are asked for a value."""
        places = [place for place in self._places if not place.health.shuns(key)]
        places.sort(key=lambda p: (p.health.reads_badly(), p.level, p.health.seconds_until_read(nbytes)))
        for place in places[1:]:
            if nbytes and place.level == places[0].level:
                place.health.passed_over()
        return places


def _name(store: Store) -> str:
    """Returns the store's own repr, or the name of its type if it has none."""
    own = type(store).__repr__ is not object.__repr__
    return shown(repr(store)) if own else type(store).__name__
