"""The restore of one prompt: the main thread computes from the front, loaders read from the back, until they meet.

Walk: keys -> which are stored -> frontier -> (forward on chunk 0, 1, ... | loaders: n-1, n-2, ...) -> the length is set
to all of them. The prompt's last piece is then run by whoever called the model. It may begin while the last loads still
arrive: each of its layers waits for that layer of them. So a restore is open until the last piece is through.

Where the model carries something from chunk to chunk (windows, recurrent states; see `carried`), all that is the same, but it
can go on only where it stands: a chunk behind loaded ones is run once the windows and the state before it are put in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from cake_hf.arithmetic.errors import CakeError
from cake_hf.arithmetic.frontier import Outcome, Strategy
from cake_hf.arithmetic.limits import ASIDE_PER_THREAD
from cake_hf.cache.audit import Audit
from cake_hf.cache.carried import Carried, Windows
from cake_hf.cache.layers import HEADROOM_TOKENS, TokenMajorLayer, WindowedLayer
from cake_hf.cache.loads import WindowBuffers, plan_loads
from cake_hf.cache.pace import new_frontier, new_pace, ranges_for
from cake_hf.cache.probe import keeps_tokens, kv_like
from cake_hf.cache.prompt import Prompt
from cake_hf.cache.saving import Saver
from cake_hf.cache.session import Session
from cake_hf.cache.states import StoredStates
from cake_hf.cache.steps import steps_for
from cake_hf.movers.loader import SHARED, LoadJob, start_loaders
from cake_hf.movers.place import is_host_place, place_for
from cake_hf.movers.sharing import Flight, FlightPlan
from cake_hf.movers.streams import let_copies_out_end
from cake_hf.movers.writer import pack
from cake_hf.tensors.offload import devices_of
from cake_hf.tensors.parallel import ranks_of

Progress = Callable[[int, int], None]
Forward = Callable[[Callable[[], bool], dict[str, Any]], object]

GATED = "gated"
"""What a timeline calls a computed piece that waited, within its layers, for loads."""


class ForwardLeft(Exception):
    """Not an error: the chunk that a forward computes has come from the store, so the forward is left where it is."""


class Layers:
    """How far a forward has come.

    Args:
        count: of the model's layers.

    Attributes:
        began: when its first layer did, in monotonic seconds.
        worked: seconds of a processor that the thread had had by then.
    """

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, 0
        self.began, self.worked = time.monotonic(), time.thread_time()

    def next(self) -> None:
        """A layer begins."""
        if not self._begun:
            self.began, self.worked = time.monotonic(), time.thread_time()
        self._begun += 1

    @property
    def share(self) -> float:
        """Of all layers, those that are done."""
        return min(1.0, max(0, self._begun - 1) / self._count)


class Restore:
    """Brings the KV of the prompt's full chunks into the layers. Once closed, these hold exactly those tokens more.

    Use: `start`; `run`; then the prompt's last piece, with `await_layer` in each layer; then `close`. Where anything fails,
    `abandon`.

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
        cost_memory: of what is decided by, and what is measured.
        pace: of this restore.
        brought: chunks that were not computed, once it is closed.
    """

    def __init__(
        self,
        session: Session,
        layers: list[Any],
        prompt: Prompt,
        forward: Forward,
        progress: Progress,
        *,
        beyond_loads: bool,
    ) -> None:
        self.prompt = prompt
        self.brought = 0
        self._session = session
        self._forward = forward
        self._progress = progress
        self._end = prompt.call.past + prompt.call.tokens
        self._threads: list[threading.Thread] = []
        self._shared: set[int] = set()  # chunks that the main thread has from another restore
        self._waited = False
        self._made = 0  # all chunks before this one were made by the main thread, or what the devices compute sees them
        like = kv_like(session.model)
        self._all_layers = layers
        self._layers: list[TokenMajorLayer] = []  # those that keep each token
        self._devices = devices_of(session.model)
        self._states = StoredStates(session, prompt)
        self._carried = Carried(
            layers,
            like,
            prompt.blocks,
            prompt.call.past,
            prompt.state_layout,
            self._loaded_block,
            self._states.get,
        )
        self._audit = Audit(session, prompt)
        self._saver = Saver(session, self._layers, prompt, self._carried, self._states, self._audit)
        self._plan = plan_loads(prompt, self._carried.reach)
        if not prompt.report.reason and self._plan.usable != prompt.stored[: prompt.chunks]:
            prompt.report.reason = (
                "stored chunks are computed where no snapshot of the model's state is stored behind them"
            )
        self._windows = WindowBuffers(prompt, self._plan.windows, like)
        self.cost_memory = session.cost_memory(prompt.namespace)
        self._ranks = ranks_of(session.model)
        one_by_one = beyond_loads and not self._carried and self._ranks is None
        ranges = ranges_for(session, prompt, self.cost_memory.costs(prompt.layout.nbytes)) if one_by_one else 1
        self._beyond_loads = ranges > 1
        self._loads = session.strategy is not Strategy.COMPUTE and any(self._plan.usable)
        self._reserve(like)  # last of all that takes memory: whoever fails before has nothing to give back
        past = prompt.call.past
        # Where loads land: one per piece of the layout, each on the device of its layer.
        buffers = [buffer[:, past:] for layer in self._layers for buffer in layer.buffers] + self._windows.buffers
        if not self._loads:
            buffers = []  # they may lie by head, as no chunk does
        turn_aside = None if is_host_place(buffers) else self._turn_aside
        self.pace = new_pace(session, prompt, self._plan.usable, self.cost_memory, ranges, layers=len(layers))
        self.pace.can_run = self._can_run
        self.pace.blocks = prompt.blocks
        self.pace.can_leave = self._can_leave
        self._frontier = new_frontier(session, prompt, self._plan.usable, self.pace, turn_aside=turn_aside)
        self._steps = steps_for(self._frontier, self._ranks)
        self._job = self._load_job(buffers, ranges)

    def start(self) -> None:
        """Let the loads begin."""
        self._carried.start()
        if self._loads:
            if self._plan.state is not None:
                self._states.begin(self._plan.state)
            self._threads = start_loaders(self._job, self._session.limits.loader_threads)

    def run(self) -> None:
        """Compute until the two sides have met, or nothing is left but loads whose layers can be awaited.

        Raises:
            ComputePlainly: the model does not compute what the store holds.
        """
        prompt = self.prompt
        self._walk(prompt.chunks, beyond_loads=self._beyond_loads)
        self._audit.settle()
        self._audit.end()  # the last piece is in the model from now on
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
            lengths = [held.lengths for held in self._layers]
            self._walk(self._frontier.beyond(), beyond_loads=False)
            self._waited = True
            for held, length in zip(self._layers, lengths, strict=True):
                held.show_lengths(length)
        self._job.place.catch_up()

    def close(self, *, save_tail: bool = False) -> None:
        """The prompt's last piece is through, or will not be run. Waits for the loaders, unless it left a load behind.

        Args:
            save_tail: the last piece is a block of the canonical schedule, to be saved like the others.
        """
        self.pace.end(time.monotonic())
        try:
            self._settle_in()
            self._job.place.catch_up()
            self._session.sharing.wake()  # loaders that wait for other prompts' reads to end are not needed any more
            if not self._frontier.left_behind():
                for thread in self._threads:
                    thread.join()
            self._job.let_go()
            self._states.let_go()
            self._count()
            if save_tail:
                self._carried.begin()
                self._carried.ran()
                self._carried.passed(self.prompt.chunks)
                self._save(self.prompt.chunks)
        finally:
            let_copies_out_end()
            self._carried.end()

    def abandon(self) -> None:
        """Something went wrong: go back to what was in the layers before the call. No loader goes on writing to them."""
        self._audit.end()
        self.pace.end(time.monotonic())
        if self.prompt.inquiry is not None:
            self.prompt.inquiry.give_up()
        self._frontier.stop()
        detached = not self._loads or self._job.detach()
        self._job.place.catch_up()
        self._job.let_go()
        self._states.let_go()
        let_copies_out_end()
        try:
            self._go_back(detached=detached)
            self._carried.go_back()
        finally:
            self._carried.end()

    @property
    def waited(self) -> bool:
        """Whether the piece that was in the model last has awaited loads in its layers."""
        return self._waited

    # What the main thread does.

    def _reserve(self, like: list[Any]) -> None:
        """Make room for the prompt in the layers that keep each token, or, if the device has not as much, for nothing."""
        try:
            for layer, one in zip(self._all_layers, like, strict=True):
                if isinstance(layer, TokenMajorLayer) and keeps_tokens(one):
                    self._layers.append(layer)
                    layer.make_room(one, self._end + HEADROOM_TOKENS, by_head=not self._loads)
        except BaseException:
            for layer in self._layers:
                if not self.prompt.call.past:
                    layer.reset()
            raise

    def _go_back(self, *, detached: bool) -> None:
        past = self.prompt.call.past
        for layer in self._layers:
            if not past:
                layer.reset()
            elif detached:
                layer.show(past)
            else:
                # Loads under way may still land in these buffers: go on in others, as small as can be, for room may be short.
                layer.move_out(past, capacity=past)

    def _walk(self, until: int, *, beyond_loads: bool) -> None:
        """Make, or take from the loaders, all chunks before `until`; afterwards they are the layers' content."""
        while (index := self._steps.advance(until=until, beyond_loads=beyond_loads)) is not None:
            self._settle_in()
            self._see(index)
            with self._flight(index) as plan:
                if plan.followed is not None and self._take_over(index, plan.followed):
                    self._made = index + 1
                    continue
                if self._compute(index):
                    self._made = index + 1
                    plan.payload = partial(self._copy_out, index)
            self._progress(index + 1, self.prompt.chunks)
        self._settle_in()
        self._job.place.catch_up()
        self._waited = False
        self._stand(until)
        self._show(until)

    def _compute(self, index: int) -> bool:
        """Run the model on one chunk; False if it was left, since the chunk has come from the store."""
        self._stand(index)
        begin = time.monotonic()
        self._waited = False
        layers = Layers(len(self._all_layers))
        worked = time.thread_time()
        try:
            self._run_forward(index, partial(self._is_left, index, layers))
        except ForwardLeft:
            wait_for_devices(self._devices)
            end = time.monotonic()
            self._saw_forward(index, end - layers.began, layers.share, time.thread_time() - layers.worked)
            self._frontier.give_back(index)
            self.prompt.record("compute", index, begin, end, "left")
            return False
        end = time.monotonic()
        if not self._waited:
            self._saw_forward(index, end - begin, 1.0, time.thread_time() - worked)
        load = self._frontier.outcomes().get(index)
        self._steps.computed(index)
        self.prompt.record("compute", index, begin, end, GATED if self._waited else "computed")
        if load not in (Outcome.CORRUPT, Outcome.MISSED):
            self._audit.computed(index, partial(self._saver.pieces, index))
        self._save(index, load)
        return True

    def _is_left(self, index: int, layers: Layers) -> bool:
        """Whether a forward ends before its next layer: its chunk has arrived, or was begun on trial and is not worth it."""
        layers.next()
        if self._steps.lost(index):
            return True
        if not layers.share or not self._frontier.is_trial(index):
            return False
        wait_for_devices(self._devices)
        worked = time.thread_time() - layers.worked
        self._saw_forward(index, time.monotonic() - layers.began, layers.share, worked)
        return not self._frontier.goes_on(index)

    def _run_forward(self, index: int, lost: Callable[[], bool]) -> None:
        self._carried.begin()
        for start, end in self.prompt.blocks[index].forwards:
            self._show_new(start)
            self._forward(lost, self.prompt.call.chunk(start, end))
            self._check_content(end)
            self._carried.ran()
        self._carried.passed(index)
        wait_for_devices(self._devices)

    def _stand(self, index: int) -> None:
        """Have what the model carries be that before chunk `index`, if need be by running chunks again that are there."""
        near = self._steps.stand(self._carried.come_near, index) if self._carried else index
        for chunk in range(near, index):
            begin = time.monotonic()
            self._run_forward(chunk, never)
            self.prompt.record("compute", chunk, begin, time.monotonic(), "computed")
            self._saver.state(chunk)

    def _loaded_block(self, index: int) -> Windows | None:
        loaded = self._frontier.outcomes().get(index) is Outcome.LOADED
        return self._windows.block(index) if loaded else None

    def _save(self, index: int, load: Outcome | None = None) -> None:
        self._saver.chunk(index, load)
        self._saver.state(index)

    def _take_over(self, index: int, flight: Flight) -> bool:
        """Copy a chunk that another restore computes just now; False if it does not come."""
        begin = time.monotonic()
        if not flight.wait(self._session.limits.read_timeout) or flight.payload is None:
            return False
        self._copy_in(index, flight.payload)
        self._frontier.computed(index)
        self._shared.add(index)
        self.prompt.record("compute", index, begin, time.monotonic(), SHARED)
        if not flight.saves:
            self._saver.chunk(index)
        return True

    def _flight(self, index: int) -> AbstractContextManager[FlightPlan]:
        # A chunk of another restore does not bring the state behind it; and it is not there for other ranks.
        # Other restores must not wait for a forward that may be left, and it must not wait for theirs.
        alone = self._carried or self._ranks is not None or self._frontier.is_trial(index)
        if not self.prompt.keys or alone:
            return nullcontext(FlightPlan(None))
        key, saves = self.prompt.keys[index], self._session.save
        return self._session.sharing.flight(key, self._job, computes=True, saves=saves)

    def _copy_in(self, index: int, payload: torch.Tensor) -> None:
        """Bring a chunk's payload, `[nbytes]` uint8 on the host, to where the layers are now: they may have moved out."""
        offset = 0
        with torch.inference_mode():
            for piece in self._saver.pieces(index):
                target = piece.view(torch.uint8)
                target.copy_(payload[offset : offset + target.numel()].view(target.shape))
                offset += target.numel()

    def _copy_out(self, index: int) -> torch.Tensor:
        packed = pack(self._saver.pieces(index), self.prompt.layout_of(index))
        packed.await_copy()
        return packed.memory

    def _settle_in(self) -> None:
        """Put into place what has landed aside. Then, where late reads may still write to the buffers, leave these to them.

        After that nothing lands any more: giving up one load, or overtaking it in place, ends all loading.
        """
        self._job.adopt_landed()
        if self._frontier.take_orphans() and not self._job.detach():
            for layer in self._layers:
                layer.move_out(self._end)

    def _see(self, index: int) -> None:
        """Have the devices, before they compute that chunk, wait for the copies to where it looks and where it goes.

        As a rule there are none: what is copied meanwhile belongs to the back of the prompt.
        """
        if index != self._made or self._carried or not self._frontier.is_untouched(index):
            self._job.place.catch_up()

    def _show(self, chunks: int) -> None:
        self._show_new(self.prompt.blocks[chunks - 1].end if chunks else 0)

    def _show_new(self, tokens: int) -> None:
        for layer in self._layers:
            layer.show(self.prompt.call.past + tokens)

    def _check_content(self, tokens: int) -> None:
        length = self.prompt.call.past + tokens
        layers: list[Any] = [*self._layers, *(layer for layer in self._all_layers if isinstance(layer, WindowedLayer))]
        dtypes = [buffer.dtype for layer in self._layers for buffer in layer.buffers]
        as_foreseen = dtypes == [piece.dtype for piece in self.prompt.layout.pieces if not piece.windowed]
        if not as_foreseen or any(not layer.is_own or layer.get_seq_length() != length for layer in layers):
            raise CakeError(
                "Something other than the model changed the cache during the prefill (a hook that edits the KV?); "
                "use a DynamicCache together with it."
            )

    def _can_run(self, index: int) -> bool:
        """Chunks that are loaded already would have to be run again for what they carry."""
        return not self._carried or self._carried.standing == index

    def _can_leave(self, index: int) -> bool:
        """Not where the model carries something, which would be half done, nor where other ranks are in the forward."""
        return self.prompt.is_chunk(index) and not self._carried and self._ranks is None

    def _saw_forward(self, index: int, seconds: float, share: float, worked: float) -> None:
        """Costs are those of full chunks, by where they lie. While a GPU computes, the thread's own time tells nothing."""
        if self.prompt.is_chunk(index):
            number = self.prompt.blocks[index].start // self._session.chunk_size
            told = worked if all(device.type == "cpu" for device in self._devices) else None
            self.pace.saw_forward(number, seconds, share, worked=told)

    def _turn_aside(self, index: int) -> None:
        self._job.turn_aside(index)

    def _load_job(self, buffers: list[torch.Tensor], ranges: int) -> LoadJob:
        limits = self._session.limits
        return LoadJob(
            store=self._session.store,
            keys=self.prompt.keys,
            layout=self.prompt.layout,
            place=place_for(
                buffers,
                self.prompt.layout,
                ASIDE_PER_THREAD * limits.loader_threads,
                self._plan.windows,
                [(block.start, block.end) for block in self.prompt.blocks],
            ),
            frontier=self._frontier,
            record=self.prompt.recorder(),
            clock=time.monotonic,
            sharing=self._session.sharing,
            most_reads=limits.loader_threads,
            patience=limits.read_timeout,
            ranges=ranges,
        )

    def _count(self) -> None:
        report, outcomes = self.prompt.report, self._frontier.outcomes()
        loaded = {index for index, outcome in outcomes.items() if outcome is Outcome.LOADED} - self._steps.overruled
        ends = list(outcomes.values())
        own, shared = loaded - self._job.shared, (loaded & self._job.shared) | self._shared
        chunks = {index for index in range(self.prompt.chunks) if self.prompt.counts_as_chunk(index)}
        # Added, not set: the rows of a batch have one report.
        report.chunks_loaded += len(own & chunks)
        report.chunks_shared += len(shared & chunks)
        report.chunks_computed += len(chunks - own - shared)
        tails = set(range(self.prompt.chunks)) - chunks
        self.brought = len(own | shared)
        report.tails_loaded += len(tails & (own | shared))
        report.tail_tokens_loaded += sum(self.prompt.blocks[index].tokens for index in tails & (own | shared))
        report.tails_computed += len(tails - own - shared)
        report.chunks_missed += ends.count(Outcome.MISSED)
        report.chunks_failed += sum(outcome in (Outcome.CORRUPT, Outcome.ERROR, Outcome.LATE) for outcome in ends)
        if late := ends.count(Outcome.LATE):
            self._job.faults.tell(
                "late",
                "Chunks that the store did not bring in time are computed instead: %s.",
                f"{late} of {len(ends)}, given up after {self._session.limits.read_timeout:g} s (Limits.read_timeout)",
            )
        report.states_loaded += len(self._states.loaded)
        report.bytes_loaded += sum(self._job.place.wanted_bytes(index) for index in loaded - self._job.shared)
        report.bytes_loaded += len(self._states.loaded) * self.prompt.state_layout.nbytes


def record_tail(prompt: Prompt, devices: Sequence[torch.device], begin: float, *, gated: bool) -> None:
    """The prompt's last piece is through the model: note its span and the seconds of the whole prefill."""
    wait_for_devices(devices)
    end = time.monotonic()
    prompt.record("compute", -1, begin, end, GATED if gated else "computed")
    prompt.report.prefill_seconds = end - prompt.started


def wait_for_devices(devices: Iterable[torch.device]) -> None:
    """GPU work is queued, not done, when forward returns; the two ends can only meet if done means done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def never() -> bool:
    """Of a forward that no load overtakes."""
    return False


def no_progress(done: int, total: int) -> None:
    """Nobody is watching."""
