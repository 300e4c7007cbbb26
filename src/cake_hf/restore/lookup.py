"""The prefix match: asks the store which keys it has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from cake_hf.model.plainly import no_answer
from cake_hf.report import Refusal
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Strategy
from cake_hf.stores.base import Store
from cake_hf.transfer.deadline import ask
from cake_hf.transfer.single_flight import Sharing
from cake_hf.transfer.telemetry import observe_lookup


@dataclass(frozen=True)
class PrefixMatch:
    """Which parts of a prompt a store has.

    Attributes:
        stored: for each block, whether it is stored.
        states: for each block, whether the snapshot of the model's recurrent state at its end is stored.
        refusal: why the store was not asked, or did not answer, in which case everything counts as missing; None if it did.
    """

    stored: tuple[bool, ...] = ()
    states: tuple[bool, ...] = ()
    refusal: Refusal | None = None

    @classmethod
    def none(cls, blocks: int) -> PrefixMatch:
        """Returns a match in which none of the `blocks` blocks is stored."""
        return cls((False,) * blocks, (False,) * blocks)


def match_prefix(session: Session, keys: Sequence[str], states: Sequence[str]) -> PrefixMatch:
    """Asks for blocks and snapshots in one question; all count as missing if the store fails or does not answer.

    Args:
        session: of the cache.
        keys: of blocks.
        states: keys of the snapshots at the end of each block; empty if the model has no recurrent state.
    """
    found, refusal = stored_mask(session, [*keys, *states])
    stored = tuple(found[: len(keys)])
    return PrefixMatch(stored, tuple(found[len(keys) :]) or (False,) * len(keys), refusal)


def stored_mask(session: Session, keys: list[str]) -> tuple[list[bool], Refusal | None]:
    """Returns the store's mask and None; or, if the store cannot be asked, a mask of missing keys and the refusal."""
    none = [False] * len(keys)
    bound = session.bound_store
    if keys and (absence := bound.access.reach()):
        return none, Refusal("store-unusable", absence)
    if not keys or not is_asked(session):
        return none, None
    begin, sharing = time.monotonic(), bound.sharing
    answer = ask(partial(_mask, bound.store, keys, sharing), session.limits.lookup_timeout, "lookup", sharing.lookups)
    observe_lookup(time.monotonic() - begin)
    if answer.value is not None:
        sharing.forget_faults()
        return answer.value, None
    sharing.faults.tell("lookup", "The store cannot be asked for chunks; the prompt is computed. %s", answer.trouble)
    return none, no_answer(answer.trouble)


def is_asked(session: Session) -> bool:
    """Whether the store's content matters to the session."""
    return session.strategy is not Strategy.COMPUTE or session.bound_store.saves


def _mask(store: Store, keys: list[str], sharing: Sharing) -> list[bool]:
    """Asks the store. If this hangs, it keeps alive what is known about the hang (`sharing`), and nothing of the session."""
    return [bool(has) for _, has in zip(keys, store.contains(keys), strict=True)]
