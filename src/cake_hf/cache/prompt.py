"""One prompt on its way into a cache: its chunks' names, which of them are stored, and where all is counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cake_hf.arithmetic.frontier import Strategy
from cake_hf.arithmetic.keys import chunk_keys, state_key
from cake_hf.arithmetic.report import Report, Span
from cake_hf.cache.call import ForwardCall
from cake_hf.cache.misses import NONE_YET, Inquiry
from cake_hf.cache.session import Session
from cake_hf.cache.support import tell_once
from cake_hf.movers.cost_memory import note_seconds
from cake_hf.movers.deadline import ask
from cake_hf.movers.sharing import Sharing
from cake_hf.movers.telemetry import observe_lookup
from cake_hf.stores.base import Store
from cake_hf.tensors.codec import ChunkFacts, stored_bytes
from cake_hf.tensors.layout import ChunkLayout

logger = logging.getLogger("cake_hf")


@dataclass(frozen=True)
class Prompt:
    """One prompt on its way into a cache.

    Attributes:
        call: the forward that brought it.
        first: index on the absolute grid of the call's first chunk; chunks before it are in the cache already.
        chunks: how many full chunks to restore.
        namespace: digest.
        keys: of all full chunks of the call (one more than `chunks` where the last piece is a full chunk, too); empty
            where the call is not on the canonical schedule, so that nothing of it may be loaded or saved.
        parent: key of the chunk before the first one; the namespace for chunk 0.
        stored: which of `keys` the store has.
        states: at the end of which chunks the store has a snapshot of the model's recurrent state.
        layout: of a chunk.
        state_layout: of a snapshot; without pieces where the model has no such state.
        report: where all is counted.
        started: when the call came.
        first_span: the prompt's first place on the report's timeline; rows of a batch follow each other there.
        began: when this row of it was looked up; `started` where it is alone.
        inquiry: why nothing of it is stored, being asked.
    """

    call: ForwardCall
    first: int
    chunks: int
    namespace: str
    keys: list[str]
    parent: str
    stored: list[bool]
    states: list[bool]
    layout: ChunkLayout
    state_layout: ChunkLayout
    report: Report
    started: float
    first_span: int = 0
    began: float = 0.0
    inquiry: Inquiry | None = None

    def facts(self, session: Session, index: int) -> ChunkFacts:
        """What chunk `index` of the call says about itself (its checksums are not known yet)."""
        parent = self.keys[index - 1] if index else self.parent
        return ChunkFacts(self.keys[index], parent, self.first + index, self.namespace, session.model_name)

    def state_facts(self, session: Session, index: int) -> ChunkFacts:
        """What the snapshot at the end of chunk `index` says about itself."""
        key = self.keys[index]
        return ChunkFacts(state_key(key), key, self.first + index, self.namespace, session.model_name)

    def record(self, actor: str, index: int, begin: float, end: float, outcome: str) -> None:
        """Put a chunk's work on the timeline; times are those of the clock that `started` is from."""
        _record(self.report, self.started, actor, index, begin, end, outcome)

    def recorder(self) -> Callable[[str, int, float, float, str], None]:
        """As `record`, for threads that may hang: it does not hold the call, which has the cache among its arguments."""
        return partial(_record, self.report, self.started)


def look_up(
    session: Session,
    call: ForwardCall,
    chunks: int,
    known: list[str],
    report: Report,
    started: float,
    namespace: str,
) -> Prompt:
    """Name the prompt's chunks and ask the store which of them it has.

    Args:
        session: of the cache.
        call: the forward with the prompt, or what is new of it.
        chunks: full chunks to restore.
        known: keys of the chunks that the cache holds already, all from the canonical schedule.
        report: where all is counted.
        started: when the call came.
        namespace: of the session.
    """
    began = time.monotonic()
    tokens = call.ids[0].to("cpu", torch.int64).contiguous().numpy().data
    parent = known[-1] if known else namespace
    marks, whole = call.marks(session.chunk_size), call.whole_chunks(session.chunk_size)
    keys = chunk_keys(namespace, tokens, session.chunk_size, parent, marks)[:whole]
    state_layout = session.state_layout()
    state_keys = [state_key(key) for key in keys] if state_layout.pieces else []
    asked, inquiry = _is_asked(session), None
    found = _stored(session, [*keys, *state_keys], report)
    stored, states = found[: len(keys)], found[len(keys) :] or [False] * len(keys)
    report.chunks_missed += chunks - sum(stored[:chunks])
    if chunks and not any(stored) and not report.reason:
        report.reason = _objection(session, namespace) or _why_none(session)
        if report.reason == NONE_YET and not known and asked:
            inquiry = Inquiry(session, call, namespace, note_seconds(session.limits))
    layout = session.layout()
    report.store = session.store_name
    report.bytes_stored += sum(stored) * stored_bytes(layout) + sum(states) * stored_bytes(state_layout)
    first_span = len(report.timeline)
    return Prompt(
        call,
        len(known),
        chunks,
        namespace,
        keys,
        parent,
        stored,
        states,
        layout,
        state_layout,
        report,
        started,
        first_span,
        began if first_span else started,
        inquiry,
    )


def off_schedule(session: Session, call: ForwardCall, chunks: int, report: Report, started: float) -> Prompt:
    """A call that goes on from a cache whose content is not all full chunks: cut as `generate` would, never stored."""
    report.reason = f"goes on from {call.past} tokens in the cache, not from the end of a full chunk of a prompt"
    none = [False] * chunks
    return Prompt(call, 0, chunks, "", [], "", none, none, session.layout(), session.state_layout(), report, started)


def _objection(session: Session, namespace: str) -> str:
    store, sharing = session.store, session.sharing
    if type(store).objection is Store.objection:
        return ""
    facts = session.latest_facts()  # here: the thread that asks may hang, and is not to hold the session
    answer = ask(
        partial(_objected, store, namespace, facts), session.limits.lookup_timeout, "objection", sharing.lookups
    )
    if answer.error is not None:
        return f"the store could not be asked: {answer.trouble}"
    return answer.value or ""


def _why_none(session: Session) -> str:
    if session.exact or "behaviour" not in session.latest_facts():
        return NONE_YET
    reason = (
        "this model computes something else than the one whose KV the store holds for the same weights, so it has keys of its "
        "own, and the store has none of the prompt's chunks under these yet"
    )
    tell_once(f"{type(session.model).__name__} apart", reason[0].upper() + reason[1:])
    return reason


def _objected(store: Store, namespace: str, facts: dict[str, Any]) -> str:
    objection = store.objection(namespace, lambda: facts)
    return objection if isinstance(objection, str) else ""


def _stored(session: Session, keys: list[str], report: Report) -> list[bool]:
    """The store's mask; all missing where it fails or does not answer."""
    none = [False] * len(keys)
    if keys and (absence := session.reach_store()):
        report.reason = absence
        return none
    if not keys or not _is_asked(session):
        return none
    begin, sharing = time.monotonic(), session.sharing
    look = partial(_mask, session.store, keys, sharing)
    answer = ask(look, session.limits.lookup_timeout, "lookup", sharing.lookups)
    observe_lookup(time.monotonic() - begin)
    if answer.value is not None:
        sharing.forget_faults()
        return answer.value
    sharing.faults.tell("lookup", "The store cannot be asked for chunks; the prompt is computed. %s", answer.trouble)
    report.reason = f"the store could not be asked: {answer.trouble}"
    return none


def _is_asked(session: Session) -> bool:
    """Whether it matters what the store has."""
    return session.strategy is not Strategy.COMPUTE or session.save


def _mask(store: Store, keys: list[str], sharing: Sharing) -> list[bool]:
    """Where this hangs it keeps alive what is known about that (`sharing`), and nothing of the session."""
    return [bool(has) for _, has in zip(keys, store.contains(keys), strict=True)]


def _record(report: Report, started: float, actor: str, index: int, begin: float, end: float, outcome: str) -> None:
    report.timeline.append(Span(actor, index, begin - started, end - started, outcome))
