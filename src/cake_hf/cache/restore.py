"""The restore of one prompt: the main thread computes from the front, loaders read from the back, until they meet.

Walk: keys -> which are stored -> frontier -> (forward on chunk 0, 1, ... | loaders: n-1, n-2, ...) -> the length is set
to all of them. The prompt's last piece is then run by whoever called the model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cake_hf.arithmetic.errors import CakeError
from cake_hf.arithmetic.frontier import Frontier, Outcome, Strategy
from cake_hf.arithmetic.keys import chunk_keys
from cake_hf.arithmetic.limits import ASIDE_PER_THREAD
from cake_hf.arithmetic.planner import nearness, worth_starting
from cake_hf.arithmetic.report import Report, Span
from cake_hf.cache.call import ForwardCall
from cake_hf.cache.layers import HEADROOM_TOKENS, TokenMajorLayer
from cake_hf.cache.probe import kv_like
from cake_hf.cache.session import Session
from cake_hf.movers.deadline import call_with_deadline
from cake_hf.movers.loader import LoadJob, start_loaders
from cake_hf.movers.place import place_for
from cake_hf.tensors.codec import ChunkFacts
from cake_hf.tensors.layout import ChunkLayout

logger = logging.getLogger("cake_hf")

Progress = Callable[[int, int], None]
Forward = Callable[[Callable[[], bool], dict[str, Any]], object]


class ForwardLeft(Exception):
    """Not an error: the chunk that a forward computes has come from the store, so the forward is left where it is."""


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
        layout: of a chunk.
        report: where all is counted.
        started: when the call came.
    """

    call: ForwardCall
    first: int
    chunks: int
    namespace: str
    keys: list[str]
    parent: str
    stored: list[bool]
    layout: ChunkLayout
    report: Report
    started: float

    def facts(self, session: Session, index: int) -> ChunkFacts:
        """What chunk `index` of the call says about itself (its checksum is not known yet)."""
        parent = self.keys[index - 1] if index else self.parent
        return ChunkFacts(self.keys[index], parent, self.first + index, self.namespace, session.model_name, "")


def look_up(session: Session, call: ForwardCall, chunks: int, known: list[str], started: float) -> Prompt:
    """Name the prompt's chunks and ask the store which of them it has.

    Args:
        session: of the cache.
        call: the forward with the prompt, or what is new of it.
        chunks: full chunks to restore.
        known: keys of the chunks that the cache holds already, all from the canonical schedule.
        started: when the call came.
    """
    namespace = session.namespace()
    parent = known[-1] if known else namespace
    keys = chunk_keys(namespace, call.ids[0].tolist(), session.chunk_size, parent)
    report = _new_report(session, call)
    stored = _stored(session, keys, report)
    report.chunks_missed = chunks - sum(stored[:chunks])
    if chunks and not any(stored) and not report.reason:
        objection = session.store.objection(namespace, session.namespace_facts)
        report.reason = objection or "the store has none of the prompt's chunks yet"
    layout = session.layout()
    return Prompt(call, len(known), chunks, namespace, keys, parent, stored, layout, report, started)


def off_schedule(session: Session, call: ForwardCall, chunks: int, started: float) -> Prompt:
    """A call that goes on from a cache whose content is not all full chunks: cut as `generate` would, never stored."""
    report = _new_report(session, call)
    report.reason = f"goes on from {call.past} tokens in the cache, not from the end of a full chunk of a prompt"
    return Prompt(call, 0, chunks, "", [], "", [False] * chunks, session.layout(), report, started)


def restore(
    session: Session, layers: list[TokenMajorLayer], prompt: Prompt, forward: Forward, progress: Progress
) -> None:
    """Bring the KV of the prompt's full chunks into the layers. On return they hold exactly those tokens more.

    Args:
        session: of the cache.
        layers: of the cache, all at the call's past length.
        prompt: from `look_up`.
        forward: runs the model on one chunk with the cache: `forward(lost, arguments)`. It raises `ForwardLeft` at the next
            layer once `lost()` says that the chunk has come from the store meanwhile.
        progress: called with (chunks that are there, all chunks) now and then.
    """
    base, size = prompt.call.past, session.chunk_size
    for layer, (keys, values) in zip(layers, kv_like(session.model), strict=True):
        layer.reserve(keys, values, base + prompt.call.tokens + HEADROOM_TOKENS)
    costs = session.cost_memory(prompt.namespace).costs(prompt.layout.nbytes)

    def worth(index: int, loads_left: int, idle_seconds: float) -> bool:
        return worth_starting(costs, prompt.first + index, loads_left, idle_seconds)

    frontier = Frontier(
        prompt.stored[: prompt.chunks],
        strategy=session.strategy,
        read_timeout=session.limits.read_timeout,
        near=nearness(costs, prompt.first, prompt.chunks, session.limits.loader_threads),
        most_aside=ASIDE_PER_THREAD * session.limits.loader_threads,
        worth=worth,
    )
    with _loading(session, layers, prompt, frontier) as job:
        while (index := frontier.advance()) is not None:
            _settle_in(layers, job, base + prompt.chunks * size)
            begin = time.monotonic()
            _show(layers, base + index * size)
            try:
                forward(partial(frontier.lost, index), prompt.call.chunk(index * size, (index + 1) * size))
            except ForwardLeft:
                _wait_for_device(layers)
                _record(prompt, "compute", index, begin, time.monotonic(), "left")
                continue
            _check_content(layers, base + (index + 1) * size, prompt.layout)
            _wait_for_device(layers)
            frontier.computed(index)
            _record(prompt, "compute", index, begin, time.monotonic(), "computed")
            save_computed(session, layers, prompt, index, corrupt=frontier.outcomes().get(index) is Outcome.CORRUPT)
            progress(index + 1, prompt.chunks)
        _settle_in(layers, job, base + prompt.chunks * size)
        _show(layers, base + prompt.chunks * size)
    progress(prompt.chunks, prompt.chunks)
    _count(prompt, frontier)


def save_computed(
    session: Session, layers: list[TokenMajorLayer], prompt: Prompt, index: int, *, corrupt: bool = False
) -> None:
    """Queue a chunk that was just computed on the canonical schedule, unless the store has it in good order."""
    if not session.save or not prompt.keys or (prompt.stored[index] and not corrupt):
        return
    start = prompt.call.past + index * session.chunk_size

    def pieces() -> list[torch.Tensor]:
        return [buffer[:, start : start + session.chunk_size] for layer in layers for buffer in layer.buffers]

    session.save_chunk(prompt.facts(session, index), prompt.layout, pieces, prompt.report, overwrite=corrupt)


def learn_costs(session: Session, prompt: Prompt) -> None:
    """Remember what the restore measured, for the next prompt's decisions."""
    if prompt.keys:
        memory = session.cost_memory(prompt.namespace)
        memory.learn(prompt.report.timeline, prompt.first, prompt.layout.nbytes)


def record_tail(prompt: Prompt, layers: list[TokenMajorLayer], begin: float) -> None:
    """The prompt's last piece is through the model: note its span and the seconds of the whole prefill."""
    _wait_for_device(layers)
    end = time.monotonic()
    _record(prompt, "compute", -1, begin, end, "computed")
    prompt.report.prefill_seconds = end - prompt.started


@contextmanager
def _loading(session: Session, layers: list[TokenMajorLayer], prompt: Prompt, frontier: Frontier) -> Iterator[LoadJob]:
    """Loader threads while the body runs. Whatever ends the body, none of them goes on writing to the layers."""
    job = LoadJob(
        store=session.store,
        keys=prompt.keys,
        layout=prompt.layout,
        place=place_for([buffer[:, prompt.call.past :] for layer in layers for buffer in layer.buffers], prompt.layout),
        frontier=frontier,
        record=lambda actor, index, begin, end, outcome: _record(prompt, actor, index, begin, end, outcome.value),
        clock=time.monotonic,
    )
    threads: list[threading.Thread] = []
    if session.strategy is not Strategy.COMPUTE and any(prompt.stored[: prompt.chunks]):
        threads = start_loaders(job, session.limits.loader_threads)
    try:
        yield job
    except BaseException:
        frontier.stop()
        for layer in layers:
            # Loads under way may still land in these buffers: go back to what was there before, in others.
            if prompt.call.past:
                layer.move_out(prompt.call.past)
            else:
                layer.reset()
        raise
    if not frontier.left_behind():
        for thread in threads:
            thread.join()


def _new_report(session: Session, call: ForwardCall) -> Report:
    return Report(tokens=call.past + call.tokens, chunk_size=session.chunk_size)


def _stored(session: Session, keys: list[str], report: Report) -> list[bool]:
    """The store's mask; all missing where it fails or does not answer."""
    if not keys or (session.strategy is Strategy.COMPUTE and not session.save):
        return [False] * len(keys)
    try:
        return call_with_deadline(lambda: session.store.contains(keys), session.limits.lookup_timeout, "lookup")
    except Exception as error:
        logger.warning("The store cannot be asked for chunks; the prompt is computed. %s", error)
        report.reason = f"the store could not be asked: {error}"
        return [False] * len(keys)


def _show(layers: list[TokenMajorLayer], length: int) -> None:
    for layer in layers:
        layer.show(length)


def _settle_in(layers: list[TokenMajorLayer], job: LoadJob, length: int) -> None:
    """Put into place what has landed aside. Then, where late reads may still write to the buffers, leave these to them.

    After that nothing lands any more: giving up one load ends all loading.
    """
    job.adopt_landed()
    if job.frontier.take_orphans():
        for layer in layers:
            layer.move_out(length)


def _check_content(layers: list[TokenMajorLayer], length: int, layout: ChunkLayout) -> None:
    dtypes = [buffer.dtype for layer in layers for buffer in layer.buffers]
    as_foreseen = dtypes == [piece.dtype for piece in layout.pieces]
    if not as_foreseen or any(not layer.is_own or layer.get_seq_length() != length for layer in layers):
        raise CakeError(
            "Something other than the model changed the cache during the prefill (a hook that edits the KV?); "
            "use a DynamicCache together with it."
        )


def _wait_for_device(layers: list[TokenMajorLayer]) -> None:
    """GPU work is queued, not done, when forward returns; the two ends can only meet if done means done."""
    device = layers[0].buffers[0].device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _record(prompt: Prompt, actor: str, index: int, begin: float, end: float, outcome: str) -> None:
    span = Span(actor, index, begin - prompt.started, end - prompt.started, outcome)
    prompt.report.timeline.append(span)


def _count(prompt: Prompt, frontier: Frontier) -> None:
    report, outcomes = prompt.report, list(frontier.outcomes().values())
    report.chunks_loaded = outcomes.count(Outcome.LOADED)
    report.chunks_computed = prompt.chunks - report.chunks_loaded
    report.chunks_missed += outcomes.count(Outcome.MISSED)
    report.chunks_failed = sum(outcome in (Outcome.CORRUPT, Outcome.ERROR, Outcome.LATE) for outcome in outcomes)
    report.bytes_loaded = report.chunks_loaded * prompt.layout.nbytes
