"""One prompt to be brought into a cache: its chunks' keys, which of them are stored, and the report that counts them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from cake_hf.blocks import Block, HeldBlocks, blocks, full_chunks, suffix_start, tail_ends
from cake_hf.chunks.codec import ChunkMetadata, stored_bytes
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.keys import block_keys, state_key
from cake_hf.model.plainly import no_answer
from cake_hf.report import Refusal, Report, Span
from cake_hf.restore.misses import NONE_YET, Inquiry, mismatch, why_none
from cake_hf.restore.request import ForwardCall
from cake_hf.restore.session import Session
from cake_hf.restore.support import cut_image_refusal, tell_plain
from cake_hf.scheduling.frontier import Strategy
from cake_hf.stores.base import Store
from cake_hf.transfer.cost_notes import note_seconds
from cake_hf.transfer.deadline import ask
from cake_hf.transfer.single_flight import Sharing
from cake_hf.transfer.telemetry import observe_lookup
from cake_hf.util.forks import cached_property


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
        keys: the keys of blocks.
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
    """Returns whether the store's content matters to the session."""
    return session.strategy is not Strategy.COMPUTE or session.bound_store.saves


def _mask(store: Store, keys: list[str], sharing: Sharing) -> list[bool]:
    """Asks the store. If this hangs, it keeps alive what is known about the hang (`sharing`), and nothing of the session."""
    return [bool(has) for _, has in zip(keys, store.contains(keys), strict=True)]


logger = logging.getLogger("cake_hf")


@dataclass(frozen=True)
class Prompt:
    """One prompt that is being brought into a cache.

    Attributes:
        call: the forward that brought it.
        number: of the call's first block in the prompt; blocks before it are in the cache already.
        blocks: of the call, counted from its first token: those to restore, and one more than `chunks` if the suffix can be
            stored, too. Each is a chunk, unless cuts are declared.
        chunks: how many of the blocks to restore.
        namespace: digest.
        keys: of the blocks; empty if the call is not on the canonical schedule, so that nothing of it may be loaded or saved.
        parent: key of the block before the first one; for the first block of a prompt, the namespace.
        match: which of the blocks the store has.
        layout: the layout of a full chunk.
        ends_document: the last of the blocks to restore ends where the call does, at a cut, and counts as a tail.
        state_layout: the layout of a snapshot; without pieces if the model has no recurrent state.
        report: counts everything that happens to the prompt.
        started: when the call came.
        first_span: the index of the prompt's first span on the report's timeline; rows of a batch follow each other there.
        began: when this row of a batch was looked up; equals `started` for a single prompt.
        refusal: why some of the call is not restored, as far as it is known before the restore is planned; None if all is.
        inquiry: the question why nothing of it is stored, if one is under way.
    """

    call: ForwardCall
    number: int
    blocks: list[Block]
    chunks: int
    namespace: str
    keys: list[str]
    parent: str
    match: PrefixMatch
    ends_document: bool
    layout: ChunkLayout
    state_layout: ChunkLayout
    report: Report
    started: float
    first_span: int = 0
    began: float = 0.0
    refusal: Refusal | None = None
    inquiry: Inquiry | None = None

    @property
    def stored(self) -> Sequence[bool]:
        """Which of `keys` the store has."""
        return self.match.stored

    @cached_property
    def rest(self) -> int:
        """The first token of the call that is not restored, where the suffix starts."""
        return self.blocks[self.chunks - 1].end if self.chunks else 0

    @property
    def first(self) -> int:
        """About how many full chunks precede the call's first token, which computing costs depend on."""
        return self.call.past // self.layout.chunk_size

    @cached_property
    def full(self) -> frozenset[int]:
        """The blocks that are full chunks, each run in one forward."""
        return full_chunks(self.blocks, self.layout.chunk_size)

    @cached_property
    def counted(self) -> frozenset[int]:
        """The blocks that the report counts as chunks, not as tails."""
        return self.full - {self.chunks - 1} if self.ends_document else self.full

    def layout_of(self, index: int) -> ChunkLayout:
        """Returns the layout of block `index`."""
        return self.layout.of(self.blocks[index].tokens)

    def metadata(self, session: Session, index: int) -> ChunkMetadata:
        """Returns the metadata of block `index` of the call (its checksums are not known yet)."""
        parent = self.keys[index - 1] if index else self.parent
        return ChunkMetadata(self.keys[index], parent, self.number + index, self.namespace, session.bound_model.name)

    def state_metadata(self, session: Session, index: int) -> ChunkMetadata:
        """Returns the metadata of the snapshot at the end of chunk `index`."""
        key = self.keys[index]
        return ChunkMetadata(state_key(key), key, self.number + index, self.namespace, session.bound_model.name)

    def record(self, actor: str, index: int, begin: float, end: float, outcome: str) -> None:
        """Adds a chunk's work to the timeline; times are from the same clock as `started`."""
        _record(self.report, self.started, actor, index, begin, end, outcome)

    def recorder(self) -> Callable[[str, int, float, float, str], None]:
        """Returns `record` for threads that may hang: it does not hold the call, which has the cache among its arguments."""
        return partial(_record, self.report, self.started)


@dataclass(frozen=True)
class CallBlocks:
    """How a call is cut into blocks.

    Attributes:
        blocks: counted from the call's first token; the suffix of the call is among them if it can be stored.
        chunks: how many of them are to be restored.
        refusal: why the call is not cut as far as it could be; None if it is.
        ends_document: see `Prompt`.
    """

    blocks: list[Block]
    chunks: int
    refusal: Refusal | None = None
    ends_document: bool = False

    @classmethod
    def of(cls, call: ForwardCall, cuts: Sequence[int], size: int, leave: int | None) -> CallBlocks:
        """Cuts a call on the canonical schedule.

        Args:
            call: the forward with the prompt, or the new part of it.
            cuts: the declared ones, counted from the prompt's first token, in ascending order.
            size: tokens of a full chunk.
            leave: tokens that the suffix must have; None to leave the last block.
        """
        inner = [cut - call.past for cut in cuts if cut > call.past]
        every = blocks(0, call.tokens, inner, size)
        last = every[-1].start if every else 0
        begin = last if leave is None else suffix_start(0, call.tokens, inner, size, leave)
        wanted = blocks(0, begin, inner, size)
        if number := call.uncut([block.end for block in wanted]):
            return cls(wanted[: number - 1], number - 1, cut_image_refusal(call.past // size + number - 1))
        ends_at_cut = call.tokens in inner or (bool(every) and every[-1].tokens == size)
        one_more = len(every) == len(wanted) + 1 and every[: len(wanted)] == wanted and ends_at_cut
        return cls(every if one_more else wanted, len(wanted), ends_document=begin == call.tokens and begin in inner)


def open_prompt(
    session: Session,
    call: ForwardCall,
    wanted: CallBlocks,
    held: HeldBlocks,
    report: Report,
    started: float,
    namespace: str,
) -> Prompt:
    """Gives keys to the prompt's blocks and asks the store which of them it has."""
    began = time.monotonic()
    tokens = call.ids[0].to("cpu", torch.int64).contiguous().numpy().data
    parent = held.keys[-1] if held.keys else namespace
    keys = block_keys(namespace, tokens, wanted.blocks, session.chunk_size, parent, call.extra_hashes(wanted.blocks))
    layout, state_layout = session.bound_model.layouts()
    state_keys = [state_key(key) for key in keys] if state_layout.pieces else []
    asked = is_asked(session)
    match = match_prefix(session, keys, state_keys)
    first_span = len(report.timeline)
    prompt = Prompt(
        call,
        len(held.keys),
        wanted.blocks,
        wanted.chunks,
        namespace,
        keys,
        parent,
        match,
        wanted.ends_document,
        layout,
        state_layout,
        report,
        started,
        first_span,
        began if first_span else started,
        match.refusal or wanted.refusal,
    )
    absent = [index for index in range(wanted.chunks) if not match.stored[index]]
    report.chunks_missed += len(prompt.counted.intersection(absent))
    report.store = session.bound_store.name
    report.bytes_stored += _bytes_stored(prompt)
    if not wanted.chunks or any(match.stored) or report.chunks_loaded or prompt.refusal or report.reason:
        return prompt
    refusal = mismatch(session, namespace) or why_none(session)
    if refusal != NONE_YET or held.keys or not asked:
        return replace(prompt, refusal=refusal)
    cuts, seconds = tail_ends(wanted.blocks, session.chunk_size), note_seconds(session.limits)
    return replace(prompt, refusal=refusal, inquiry=Inquiry(session, call, namespace, seconds, cuts))


def off_schedule(session: Session, call: ForwardCall, wanted: CallBlocks, report: Report, started: float) -> Prompt:
    """Returns the prompt of a call that continues from a cache with unknown content: cut as by `generate`, never stored."""
    none = PrefixMatch.none(len(wanted.blocks))
    refusal = Refusal(
        "off-schedule", f"goes on from {call.past} tokens in the cache, not from the end of a full chunk of a prompt"
    )
    tell_plain(refusal)
    return Prompt(
        call,
        0,
        wanted.blocks,
        wanted.chunks,
        "",
        [],
        "",
        none,
        wanted.ends_document,
        *session.bound_model.layouts(),
        report,
        started,
        refusal=refusal,
    )


def _bytes_stored(prompt: Prompt) -> int:
    """Returns how many bytes the stored part of a prompt takes, including headers."""
    sizes = Counter(
        end - start for (start, end, _), has in zip(prompt.blocks, prompt.match.stored, strict=False) if has
    )
    chunks = sum(count * stored_bytes(prompt.layout.of(tokens)) for tokens, count in sizes.items())
    return chunks + sum(prompt.match.states) * stored_bytes(prompt.state_layout)


def _record(report: Report, started: float, actor: str, index: int, begin: float, end: float, outcome: str) -> None:
    report.timeline.append(Span(actor, index, begin - started, end - started, outcome))
