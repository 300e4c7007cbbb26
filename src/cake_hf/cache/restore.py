"""The restore of one prompt: the main thread computes from the front, loaders read from the back, until they meet.

Walk: keys -> which are stored -> frontier -> (forward on chunk 0, 1, ... | loaders: n-1, n-2, ...) -> the length is set
to all of them. The prompt's last piece is then run by whoever called the model. It may begin while the last loads still
arrive: each of its layers waits for that layer of them. So a restore is open until the last piece is through.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from cake_hf.arithmetic.costs import Costs
from cake_hf.arithmetic.errors import CakeError
from cake_hf.arithmetic.frontier import Frontier, Outcome, Strategy
from cake_hf.arithmetic.limits import ASIDE_PER_THREAD
from cake_hf.arithmetic.planner import Rule, nearness, ranges_of
from cake_hf.cache.layers import HEADROOM_TOKENS, TokenMajorLayer
from cake_hf.cache.probe import kv_like
from cake_hf.cache.prompt import Prompt
from cake_hf.cache.session import Session
from cake_hf.movers.loader import SHARED, LoadJob, fill, start_loaders
from cake_hf.movers.place import place_for
from cake_hf.movers.sharing import Flight, FlightPlan
from cake_hf.movers.writer import pack

Progress = Callable[[int, int], None]
Forward = Callable[[Callable[[], bool], dict[str, Any]], object]

GATED = "gated"
"""What a timeline calls a computed piece that waited, within its layers, for loads."""


class ForwardLeft(Exception):
    """Not an error: the chunk that a forward computes has come from the store, so the forward is left where it is."""


class Restore:
    """Brings the KV of the prompt's full chunks into the layers. Once closed, these hold exactly those tokens more.

    Use: `run`; then the prompt's last piece, with `await_layer` in each layer; then `close`. Where anything fails, `abandon`.

    Args:
        session: of the cache.
        layers: of the cache, all at the call's past length.
        prompt: from `look_up`.
        forward: runs the model on one chunk with the cache: `forward(lost, arguments)`. It raises `ForwardLeft` at the next
            layer once `lost()` says that the chunk has come from the store meanwhile.
        progress: called with (chunks that are there, all chunks) now and then.
        beyond_loads: whether what follows loads may begin before these are all there.

    Attributes:
        prompt: as given.
    """

    def __init__(
        self,
        session: Session,
        layers: list[TokenMajorLayer],
        prompt: Prompt,
        forward: Forward,
        progress: Progress,
        *,
        beyond_loads: bool,
    ) -> None:
        self.prompt = prompt
        self._session = session
        self._layers = layers
        self._forward = forward
        self._progress = progress
        self._end = prompt.call.past + prompt.call.tokens
        self._threads: list[threading.Thread] = []
        self._shared: set[int] = set()  # chunks that the main thread has from another restore
        self._waited = False
        for layer, (keys, values) in zip(layers, kv_like(session.model), strict=True):
            layer.reserve(keys, values, self._end + HEADROOM_TOKENS)
        on_host = layers[0].buffers[0].device.type == "cpu"
        costs = session.cost_memory(prompt.namespace).costs(prompt.layout.nbytes)
        ranges = _ranges(session, prompt, costs) if beyond_loads else 1
        self._beyond_loads = ranges > 1
        self._frontier = _frontier(session, prompt, costs, ranges, on_host=on_host)
        self._job = self._load_job(ranges)

    def run(self) -> None:
        """Compute, and let load, until the two sides have met, or nothing is left but loads whose layers can be awaited."""
        prompt, session = self.prompt, self._session
        if session.strategy is not Strategy.COMPUTE and any(prompt.stored[: prompt.chunks]):
            self._threads = start_loaders(self._job, session.limits.loader_threads)
        self._walk(prompt.chunks, beyond_loads=self._beyond_loads)
        self._progress(prompt.chunks, prompt.chunks)

    def await_layer(self, layer: int) -> None:
        """Return when that layer of all chunks before the piece that is in the model is in the layers' buffers."""
        self._job.adopt_landed()  # what has landed aside meanwhile makes room for others
        if not self._frontier.beyond():
            return
        self._waited = True
        if self._frontier.await_layer(layer):
            self._job.adopt_layer(layer)
        else:
            # A load has failed or is late. All chunks before the piece are made here and now; then the piece goes on.
            lengths = [held.get_seq_length() for held in self._layers]
            self._walk(self._frontier.beyond(), beyond_loads=False)
            self._waited = True
            for held, length in zip(self._layers, lengths, strict=True):
                held.show(length)
        self._job.place.catch_up()

    def close(self) -> None:
        """The prompt's last piece is through, or will not be run. Waits for the loaders, unless a load was overtaken."""
        self._settle_in()
        if not self._frontier.left_behind():
            for thread in self._threads:
                thread.join()
        self._job.let_go()
        self._count()

    def abandon(self) -> None:
        """Something went wrong: go back to what was in the layers before the call. No loader goes on writing to them."""
        self._frontier.stop()
        self._job.let_go()
        for layer in self._layers:
            # Loads under way may still land in these buffers: go on in others.
            if self.prompt.call.past:
                layer.move_out(self.prompt.call.past)
            else:
                layer.reset()

    @property
    def waited(self) -> bool:
        """Whether the piece that was in the model last has awaited loads in its layers."""
        return self._waited

    # What the main thread does.

    def _walk(self, until: int, *, beyond_loads: bool) -> None:
        """Make, or take from the loaders, all chunks before `until`; afterwards they are the layers' content."""
        while (index := self._frontier.advance(until=until, beyond_loads=beyond_loads)) is not None:
            self._settle_in()
            with self._flight(index) as plan:
                if plan.followed is not None and self._take_over(index, plan.followed):
                    continue
                if self._compute(index):
                    plan.payload = partial(self._copy_out, index)
            self._progress(index + 1, self.prompt.chunks)
        self._settle_in()
        self._waited = False
        self._show(until)

    def _compute(self, index: int) -> bool:
        """Run the model on one chunk; False if it was left, since the chunk has come from the store."""
        size, begin = self._session.chunk_size, time.monotonic()
        self._waited = False
        self._show(index)
        try:
            self._forward(partial(self._frontier.lost, index), self.prompt.call.chunk(index * size, (index + 1) * size))
        except ForwardLeft:
            wait_for_device(self._layers)
            self.prompt.record("compute", index, begin, time.monotonic(), "left")
            return False
        self._check_content(index + 1)
        wait_for_device(self._layers)
        corrupt = self._frontier.outcomes().get(index) is Outcome.CORRUPT
        self._frontier.computed(index)
        self.prompt.record("compute", index, begin, time.monotonic(), GATED if self._waited else "computed")
        save_computed(self._session, self._layers, self.prompt, index, corrupt=corrupt)
        return True

    def _take_over(self, index: int, flight: Flight) -> bool:
        """Copy a chunk that another restore computes just now; False if it does not come."""
        begin = time.monotonic()
        if not flight.wait(self._session.limits.read_timeout) or flight.payload is None:
            return False
        landing = self._job.place.landing(index, aside=True)
        fill(landing, flight.payload)
        landing.adopt(len(self.prompt.layout.pieces))
        landing.release()
        self._job.place.catch_up()
        self._frontier.computed(index)
        self._shared.add(index)
        self.prompt.record("compute", index, begin, time.monotonic(), SHARED)
        if not flight.saves:
            save_computed(self._session, self._layers, self.prompt, index)
        return True

    def _flight(self, index: int) -> AbstractContextManager[FlightPlan]:
        if not self.prompt.keys:
            return nullcontext(FlightPlan(None))
        key, saves = self.prompt.keys[index], self._session.save
        return self._session.sharing.flight(key, self._job, computes=True, saves=saves)

    def _copy_out(self, index: int) -> torch.Tensor:
        return pack(pieces_of(self._layers, self.prompt, index, self._session.chunk_size), self.prompt.layout)

    def _settle_in(self) -> None:
        """Put into place what has landed aside. Then, where late reads may still write to the buffers, leave these to them.

        After that nothing lands any more: giving up one load ends all loading.
        """
        self._job.adopt_landed()
        self._job.place.catch_up()
        if self._frontier.take_orphans():
            for layer in self._layers:
                layer.move_out(self._end)

    def _show(self, chunks: int) -> None:
        for layer in self._layers:
            layer.show(self.prompt.call.past + chunks * self._session.chunk_size)

    def _check_content(self, chunks: int) -> None:
        length = self.prompt.call.past + chunks * self._session.chunk_size
        dtypes = [buffer.dtype for layer in self._layers for buffer in layer.buffers]
        as_foreseen = dtypes == [piece.dtype for piece in self.prompt.layout.pieces]
        if not as_foreseen or any(not layer.is_own or layer.get_seq_length() != length for layer in self._layers):
            raise CakeError(
                "Something other than the model changed the cache during the prefill (a hook that edits the KV?); "
                "use a DynamicCache together with it."
            )

    def _load_job(self, ranges: int) -> LoadJob:
        limits, past = self._session.limits, self.prompt.call.past
        buffers = [buffer[:, past:] for layer in self._layers for buffer in layer.buffers]
        return LoadJob(
            store=self._session.store,
            keys=self.prompt.keys,
            layout=self.prompt.layout,
            place=place_for(buffers, self.prompt.layout, ASIDE_PER_THREAD * limits.loader_threads),
            frontier=self._frontier,
            record=self.prompt.record,
            clock=time.monotonic,
            sharing=self._session.sharing,
            most_reads=limits.loader_threads,
            patience=limits.read_timeout,
            ranges=ranges,
        )

    def _count(self) -> None:
        report, outcomes = self.prompt.report, self._frontier.outcomes()
        loaded = {index for index, outcome in outcomes.items() if outcome is Outcome.LOADED}
        ends = list(outcomes.values())
        chunks_loaded = len(loaded - self._job.shared)
        chunks_shared = len(loaded & self._job.shared) + len(self._shared)
        # Added, not set: the rows of a batch have one report.
        report.chunks_loaded += chunks_loaded
        report.chunks_shared += chunks_shared
        report.chunks_computed += self.prompt.chunks - chunks_loaded - chunks_shared
        report.chunks_missed += ends.count(Outcome.MISSED)
        report.chunks_failed += sum(outcome in (Outcome.CORRUPT, Outcome.ERROR, Outcome.LATE) for outcome in ends)
        report.bytes_loaded += chunks_loaded * self.prompt.layout.nbytes


def save_computed(
    session: Session, layers: list[TokenMajorLayer], prompt: Prompt, index: int, *, corrupt: bool = False
) -> None:
    """Queue a chunk that was just computed on the canonical schedule, unless the store has it in good order."""
    if not session.save or not prompt.keys or (prompt.stored[index] and not corrupt):
        return
    pieces = partial(pieces_of, layers, prompt, index, session.chunk_size)
    session.save_chunk(prompt.facts(session, index), prompt.layout, pieces, prompt.report, overwrite=corrupt)


def record_tail(prompt: Prompt, layers: list[TokenMajorLayer], begin: float, *, gated: bool) -> None:
    """The prompt's last piece is through the model: note its span and the seconds of the whole prefill."""
    wait_for_device(layers)
    end = time.monotonic()
    prompt.record("compute", -1, begin, end, GATED if gated else "computed")
    prompt.report.prefill_seconds = end - prompt.started


def wait_for_device(layers: list[TokenMajorLayer]) -> None:
    """GPU work is queued, not done, when forward returns; the two ends can only meet if done means done."""
    device = layers[0].buffers[0].device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def pieces_of(layers: list[TokenMajorLayer], prompt: Prompt, index: int, size: int) -> list[torch.Tensor]:
    """A chunk's pieces `[1, chunk_size, heads, head_dim]` as they lie in the layers."""
    start = prompt.call.past + index * size
    return [buffer[:, start : start + size] for layer in layers for buffer in layer.buffers]


def learn_costs(session: Session, prompt: Prompt) -> None:
    """Remember what the restore measured, for the next prompt's decisions."""
    if prompt.keys:
        memory = session.cost_memory(prompt.namespace)
        memory.learn(prompt.report.timeline[prompt.first_span :], prompt.first, prompt.layout.nbytes)


def _ranges(session: Session, prompt: Prompt, costs: Costs) -> int:
    """In how many ranges of layers the last chunks are read."""
    # Where a load fails, chunks are computed in the middle of a forward; hooks that move weights are not made for that.
    moves_weights = any(hasattr(module, "_hf_hook") for module in session.model.modules())
    if moves_weights or not session.store.reads_ranges:
        return 1
    return ranges_of(costs, prompt.layout.layers, session.store.range_seconds)


def _frontier(session: Session, prompt: Prompt, costs: Costs, ranges: int, *, on_host: bool) -> Frontier:
    threads, first = session.limits.loader_threads, prompt.first
    near = nearness(costs, first, prompt.chunks, threads)
    stored = prompt.stored[: prompt.chunks]
    rule = Rule.choose(costs, stored, first, following_seconds=_following_seconds(prompt, costs), ranges=ranges)
    return Frontier(
        stored,
        strategy=session.strategy,
        read_timeout=session.limits.read_timeout,
        near=near,
        # Beside the KV there are at most ASIDE_PER_THREAD chunks per thread; on a device one of them is being read in place.
        most_aside=(ASIDE_PER_THREAD if on_host else ASIDE_PER_THREAD - 1) * threads,
        last=threads,
        worth=rule.worth,
    )


def _following_seconds(prompt: Prompt, costs: Costs) -> float:
    """What comes after the loads: a hole behind a stored chunk, or else the prompt's last piece."""
    if costs.compute is None:
        return 0.0
    stored = prompt.stored[: prompt.chunks]
    holes = [index for index, has in enumerate(stored) if not has and any(stored[:index])]
    if holes:
        return costs.compute.seconds(prompt.first + holes[0])
    size = prompt.layout.chunk_size
    suffix_tokens = prompt.call.tokens - prompt.chunks * size
    return costs.compute.seconds(prompt.first + prompt.chunks) * suffix_tokens / size
